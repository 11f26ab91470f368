"""The trainer: what it adds to TRL's, what goes wrong and how it says so, training that is interrupted or shared."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import make_rows, save_rows, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTTrainer

from convllava_hf.images import undecode_images
from convllava_hf.training.arguments import ConvLlavaTrainingArguments
from convllava_hf.training.callbacks import draw_curves
from convllava_hf.training.collator import ConvLlavaCollator
from convllava_hf.training.plans import estimate_states
from convllava_hf.training.run import locate_data, run_recipe
from convllava_hf.training.runs import find_last_checkpoint
from convllava_hf.training.trainer import ConvLlavaTrainer, set_aspect_ratio
from convllava_hf.training.vision_cache import VisionCache, hash_image


PLAN = {"trainable": ["multi_modal_projector", r"vision_tower.*stages\.4\.", "language_model", "lm_head"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture
def warnings(caplog):
    """What this package's loggers write, which transformers keeps from other loggers."""
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.fixture
def make_trainer(checkpoint, tmp_path):
    """Builds a trainer on the tiny checkpoint; keyword arguments are those of the arguments."""

    def make(rows=None, trainer_class=ConvLlavaTrainer, eval_dataset=None, **kwargs):
        settings = {
            "output_dir": str(tmp_path / "output"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "max_length": None,
            "assistant_only_loss": True,
            "use_cpu": True,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, trainable=kwargs.pop("trainable", None))
        return trainer_class(
            model=model,
            processing_class=AutoProcessor.from_pretrained(checkpoint),
            train_dataset=make_rows(24) if rows is None else rows,
            eval_dataset=eval_dataset,
            args=ConvLlavaTrainingArguments(**{**settings, **kwargs}),
        )

    return make


def get_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_learns_as_the_stock_trainer(make_trainer, monkeypatch):
    """Bytes that the device normalises, and our collator, change nothing: the same losses as TRL's own trainer."""
    monkeypatch.setattr(ConvLlavaTrainer, "_silence_padded_ids", lambda self: None)
    losses = []
    for trainer_class in (ConvLlavaTrainer, SFTTrainer):
        trainer = make_trainer(trainer_class=trainer_class, group_by_modality_length=False)
        trainer.train()
        losses.append(get_losses(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_fused_output_layer_gives_padded_ids_no_probability(make_trainer):
    """TRL's loss equals the model's own, which the parity tests hold against the original."""
    trainer = make_trainer()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        expected = trainer.model(**batch).loss
        ours = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert "bias" not in "".join(name for name in trainer.model.state_dict() if "lm_head" in name)


def test_images_travel_as_bytes(make_trainer):
    trainer = make_trainer()
    raw = next(iter(trainer.get_train_dataloader()))
    assert raw["pixel_values"].dtype == torch.uint8
    plain = make_trainer(normalize_on_device=False)
    torch.testing.assert_close(
        trainer._prepare_inputs(raw)["pixel_values"], next(iter(plain.get_train_dataloader()))["pixel_values"]
    )
    assert trainer.processing_class.image_processor.do_normalize  # what is saved is not what the workers use


def test_batches_tell_the_model_how_many_sizes_their_images_have(make_trainer, monkeypatch):
    """So that nothing is read from the device for it, where all have one."""
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["vision_passes"] == 1
    batch = trainer._prepare_inputs(batch)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda *_: pytest.fail("the sizes were read"))
    trainer.model(**batch)
    monkeypatch.undo()
    trainer.data_collator.processor.image_processor.image_aspect_ratio = "native"
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["vision_passes"] == len(set(map(tuple, batch["image_sizes"].tolist()))) > 1
    texts = make_rows(24).filter(lambda row: not row["images"], keep_in_memory=True)
    assert trainer.data_collator([texts[0], texts[1]])["vision_passes"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_has_its_learning_rate(make_trainer, checkpointing):
    trainer = make_trainer(
        **PLAN,
        vision_learning_rate=1e-5,
        projector_learning_rate=1e-4,
        gradient_checkpointing=checkpointing,
        weight_decay=0.1,
        warmup_steps=0,
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    groups = {(group["part"], group["weight_decay"]): group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert groups == {
        ("rest", 0.1): 1e-3,
        ("rest", 0.0): 1e-3,
        ("projector", 0.1): 1e-4,
        ("projector", 0.0): 1e-4,
        ("vision tower", 0.1): 1e-5,
        ("vision tower", 0.0): 1e-5,
    }
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    first = trainer.state.log_history[0]
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert first["learning_rate_vision_tower"] == pytest.approx(1e-5)
    assert first["learning_rate_projector"] == pytest.approx(1e-4)


class HalvedSGD(torch.optim.SGD):
    """An optimizer that only construction through transformers can reach."""


def test_learning_rates_per_part_keep_the_optimizer_that_was_asked_for(make_trainer):
    """The groups of transformers' own construction are split; class and settings stay those that were passed."""
    trainer = make_trainer(**PLAN, projector_learning_rate=1e-4, weight_decay=0.1)
    trainer.optimizer_cls_and_kwargs = (HalvedSGD, {"lr": 5e-3, "momentum": 0.5})
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is HalvedSGD
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    rates = {(group["part"], group["weight_decay"]): group["lr"] for group in optimizer.param_groups}
    assert rates == {("rest", 0.1): 5e-3, ("rest", 0.0): 5e-3, ("projector", 0.1): 1e-4, ("projector", 0.0): 1e-4}
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters() if p.requires_grad)


def test_learning_rates_per_part_keep_8_bit_overrides(make_trainer):
    """bitsandbytes finds embeddings by their place in the groups, which it looks up at its first step."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    trainer = make_trainer(**PLAN, projector_learning_rate=1e-4, optim="adamw_bnb_8bit")
    optimizer = trainer.create_optimizer()
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    embeddings = trainer.model.get_input_embeddings()
    assert (embeddings, "weight", {"optim_bits": 32}) in manager.module_weight_config_triple
    optimizer.check_overrides()
    places = [
        (i, j)
        for i, group in enumerate(optimizer.param_groups)
        for j, parameter in enumerate(group["params"])
        if parameter is embeddings.weight
    ]
    assert len(places) == 1 and manager.index2config[places[0]] == {"optim_bits": 32}


def test_learning_rates_per_part_where_the_optimizer_holds_something_else(make_trainer):
    trainer = make_trainer(**PLAN, projector_learning_rate=1e-4)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 1e-3, "params": [torch.zeros(2, requires_grad=True)]})
    with pytest.raises(ValueError, match="optim='adamw_torch.*vision_learning_rate.*projector_learning_rate"):
        trainer.create_optimizer()


def test_rows_in_their_own_order(make_trainer):
    """`train_sampling_strategy="sequential"` is what it says; the default groups rows."""
    orders = {}
    for strategy in ("sequential", "random"):
        trainer = make_trainer(train_sampling_strategy=strategy)
        orders[strategy] = list(trainer._get_train_sampler())
    assert orders["sequential"] == list(range(24)) != orders["random"]
    assert sorted(orders["random"]) == orders["sequential"]


def test_gradient_norm_is_computed_once(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=2)
    calls = []
    clip = trainer.accelerator.clip_grad_norm_
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *a, **k: calls.append(None) or clip(*a, **k))
    total = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *a, **k: calls.append("again") or total(*a, **k))
    trainer.train()
    assert calls == [None, None]


def test_learning_rate_of_a_frozen_part(make_trainer):
    trainer = make_trainer(trainable=["language_model"], projector_learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"0\.0001 .*projector"):
        trainer.train()


def test_parameters_by_pattern_for_any_model(make_trainer):
    trainer = make_trainer(trainable=["multi_modal_projector"])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("multi_modal_projector" in name for name in trained)


def test_image_size_is_overridable(make_trainer):
    trainer = make_trainer(image_size=192)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[-2:] == (192, 192)
    trainer.save_model()
    assert AutoProcessor.from_pretrained(trainer.args.output_dir).image_processor.size["height"] == 192


def test_cached_features_are_those_of_upright_images(make_trainer, tmp_path):
    """A photo that its EXIF data turns, as `datasets` decodes it for training without a cache."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.linear_gradient("L").convert("RGB").resize((60, 30)).save(file, "JPEG", exif=exif)
    turned = {"bytes": file.getvalue(), "path": None}
    trainer = make_trainer(trainable=["multi_modal_projector"])
    cache = VisionCache(tmp_path, trainer.model, trainer.processing_class.image_processor, torch.float32)
    rows = Dataset.from_dict({"images": [[turned]]}).cast_column("images", List(ImageFeature(decode=False)))
    cache.fill(rows)
    features, _ = cache.load(hash_image(turned))
    upright = trainer.processing_class.image_processor(ImageFeature().decode_example(turned), return_tensors="pt")
    assert ImageFeature().decode_example(turned).size == (30, 60)
    expected, _ = trainer.model.base_model._encode(upright["pixel_values"])
    torch.testing.assert_close(features, expected[0].detach())


def test_cached_features_train_as_images_do(make_trainer, tmp_path, monkeypatch):
    """Stage 3 with features from the disk: the same losses, and in a second run the tower is not even asked."""
    plan = {"trainable": ["multi_modal_projector", "language_model", "lm_head"], "max_steps": 4}
    plain = make_trainer(**plan)
    plain.train()
    cached = make_trainer(**plan, vision_cache=str(tmp_path / "features"))
    batch = next(iter(cached.get_train_dataloader()))
    assert "pixel_values" not in batch and batch["vision_features"].shape == (4 * len(batch["image_sizes"]), 24)
    cached.train()
    assert get_losses(cached) == pytest.approx(get_losses(plain), abs=1e-5)
    for name, parameter in cached.model.named_parameters():
        torch.testing.assert_close(parameter, plain.model.get_parameter(name), atol=1e-5, rtol=0)

    monkeypatch.setattr("convllava_hf.training.vision_cache.VisionCache.store", None)
    again = make_trainer(**plan, vision_cache=str(tmp_path / "features"))
    again.model.model.vision_tower.forward = None
    again.train()
    assert get_losses(again) == get_losses(cached)


def test_features_of_another_tower_or_size_are_not_taken(make_trainer, tmp_path):
    plan = {"trainable": ["multi_modal_projector"], "vision_cache": str(tmp_path / "features")}
    make_trainer(**plan)
    make_trainer(**plan, image_size=192)
    assert len(list((tmp_path / "features").iterdir())) == 2
    with pytest.raises(ValueError, match=r"\(embeddings\S+ and \d+ more\)"):
        make_trainer(vision_cache=str(tmp_path / "features"))


def test_cache_that_does_not_fit_is_refused_first(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("convllava_hf.training.vision_cache.VisionCache.estimate_bytes", lambda self, sizes: 10**18)
    with pytest.raises(OSError, match=r"\b20 .*1000000000\.000 GB.* \d+\.\d+ GB"):
        make_trainer(trainable=["multi_modal_projector"], vision_cache=str(tmp_path / "features"))


class TestCollator:
    def collate(self, checkpoint, rows, **kwargs):
        processor = AutoProcessor.from_pretrained(checkpoint)
        collator = ConvLlavaCollator(
            processor, assistant_only_loss=True, image_token_id=processor.image_token_id, **kwargs
        )
        return collator(list(rows))

    def test_cuts_text_but_no_image(self, checkpoint):
        rows = make_rows(4)
        whole = self.collate(checkpoint, rows)
        cut = self.collate(checkpoint, rows, max_tokens=40)
        assert whole["input_ids"].shape[1] > 40
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(cut[key], whole[key][:, :40])
        assert torch.equal(cut["pixel_values"], whole["pixel_values"])

    def test_names_the_row_whose_image_does_not_fit(self, checkpoint):
        with pytest.raises(ValueError, match=r"max_length=8 .*'Question 0\?' \(1 images\)"):
            self.collate(checkpoint, make_rows(2), max_tokens=8)

    def test_names_the_row_that_cannot_be_prepared(self, checkpoint):
        rows = list(make_rows(3))
        rows[1]["images"] = []
        rows[1]["messages"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "Where is it?"}]
        with pytest.raises(ValueError, match=r"Where is it\?' \(0 images\)"):
            self.collate(checkpoint, rows)

    def test_says_that_a_row_has_nothing_to_learn(self, checkpoint, caplog):
        rows = list(make_rows(2))
        rows[1]["messages"] = rows[1]["messages"][:1]
        transformers.utils.logging.enable_propagation()
        batch = self.collate(checkpoint, rows)
        transformers.utils.logging.disable_propagation()
        assert "'Question 1?" in caplog.text
        assert (batch["labels"][1] == -100).all() and (batch["labels"][0] != -100).any()


def test_batch_without_labels_trains_on(make_trainer):
    """One such batch costs a step and changes nothing; it does not end hours of training."""
    rows = make_rows(8).map(lambda row: {"messages": row["messages"][:1]})
    trainer = make_trainer(rows, max_steps=1)
    trainer.train()
    assert get_losses(trainer) == [0.0]


def test_missing_image_is_named(make_trainer, tmp_path):
    rows = make_rows(4).to_list()
    rows[2]["images"] = [{"bytes": None, "path": str(tmp_path / "gone.png")}]
    dataset = make_rows(4)
    dataset = dataset.from_list(rows, features=dataset.features)
    with pytest.raises(ValueError, match=r"Question 2\?.*gone.png"):
        make_trainer(dataset).train()


def use_single_images(dataset):
    """The rows that have one image, with a column `image` in the place of `images`."""
    rows = [row for row in undecode_images(dataset).to_list() if row["images"]]
    rows = [{"messages": row["messages"], "image": row["images"][0]} for row in rows]
    features = {"messages": dataset.features["messages"], "image": ImageFeature()}
    return Dataset.from_list(rows, features=Features(features))


@pytest.mark.parametrize("cached", [False, True])
def test_column_of_single_images_trains_as_lists_do(make_trainer, tmp_path, cached):
    settings = {"trainable": ["multi_modal_projector"], "max_steps": 2}
    if cached:
        settings["vision_cache"] = str(tmp_path / "cache")
    rows = make_rows(20)
    rows = rows.filter(lambda row: len(row["images"]) == 1)
    lists, singles = make_trainer(rows, **settings), make_trainer(use_single_images(rows), **settings)
    for trainer in (lists, singles):
        trainer.train()
    assert get_losses(singles) == get_losses(lists)


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("broken", ["cut", "garbage", "empty", "gone"])
def test_broken_image_is_named(make_trainer, tmp_path, cached, column, broken):
    rows = make_rows(4).to_list()
    content = {"cut": rows[2]["images"][0]["bytes"][:60], "garbage": b"garbage", "empty": b"", "gone": None}[broken]
    rows[2]["images"] = [{"bytes": content, "path": str(tmp_path / "gone.png") if broken == "gone" else None}]
    dataset = make_rows(4)
    dataset = dataset.from_list(rows, features=dataset.features)
    dataset = use_single_images(dataset) if column == "image" else dataset
    settings = {"trainable": ["multi_modal_projector"], "vision_cache": str(tmp_path / "cache")} if cached else {}
    message = "image 0 of row 2: " if cached else r"'Question 2\?.*: "
    with pytest.raises(ValueError, match=message + ".*gone.png" * (broken == "gone")):
        make_trainer(dataset, **settings).train()


def test_broken_image_of_the_evaluation_is_named(make_trainer):
    dataset = use_single_images(make_rows(4))
    rows = undecode_images(dataset).to_list()
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:60]
    broken = Dataset.from_list(rows, features=dataset.features)
    trainer = make_trainer(dataset, eval_dataset=broken)
    with pytest.raises(ValueError, match=r"'Question 1\?"):
        trainer.evaluate()


def test_gradient_that_is_no_number_stops_before_it_spoils_the_weights(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    parameter = trainer.model.get_parameter("model.multi_modal_projector.linear_1.weight")
    steps = []

    def spoil(gradient):
        steps.append(None)
        return gradient * float("nan") if len(steps) == 2 else gradient

    parameter.register_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"gradient .* step 2.*checkpoint-1\."):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert not (Path(trainer.args.output_dir) / "checkpoint-2").exists()


def test_gradient_that_is_no_number_under_deepspeed(make_trainer, monkeypatch):
    """DeepSpeed has stepped before its norm is known: what was trained is lost, and no checkpoint takes it."""
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    norms = iter([1.0, float("inf")])
    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(trainer, "_clip_grad_norm", lambda model: next(norms))
    with pytest.raises(FloatingPointError, match="step 2.* spoilt"):
        trainer._get_grad_norm(trainer.model, trainer._clip_grad_norm(trainer.model))
        trainer.state.global_step = 1
        trainer._get_grad_norm(trainer.model, trainer._clip_grad_norm(trainer.model))


def test_loss_that_is_no_number_stops_before_it_spoils_the_weights(make_trainer):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    calls = []
    compute = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        calls.append(None)
        return compute(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    trainer.compute_loss = compute_loss
    with pytest.raises(FloatingPointError, match=r"nan at step 3.*checkpoint-2\."):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_full_disk_leaves_the_last_checkpoint(make_trainer, monkeypatch):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    save = torch.save

    def save_until_full(content, file, *args, **kwargs):
        if "checkpoint-2" in str(file) and "optimizer" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
        return save(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(OSError, match=r"output: .*checkpoint-1\."):
        trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]


def get_settings(checkpoint: Path, data: Path, output: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--output_dir", str(output)),
        *("--max_steps", "-1", "--num_train_epochs", "2", "--save_steps", "1", "--save_total_limit", "4"),
        *("--learning_rate", "0.003"),
    ]


@pytest.mark.timeout(240)
def test_killed_training_resumes_to_the_same_weights(checkpoint, data, tmp_path):
    """`kill -9` at a random place, in the second of two epochs: as if nothing had happened."""
    whole = tmp_path / "whole"
    run_recipe("tiny_cpu_stage2", get_settings(checkpoint, data, whole))
    steps = json.loads((find_last_checkpoint(whole) / "trainer_state.json").read_text())["global_step"]

    killed = tmp_path / "killed"
    command = [str(Path(sys.executable).parent / "convllava"), "train", "tiny_cpu_stage2"]
    process = subprocess.Popen(
        [*command, *get_settings(checkpoint, data, killed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    target = killed / f"checkpoint-{steps // 2 + 2}"
    while not target.exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()[-2000:]
    assert not (killed / "model.safetensors").exists()

    trainer = run_recipe(
        "tiny_cpu_stage2", [*get_settings(checkpoint, data, killed), "--resume_from_checkpoint", "last"]
    )
    assert trainer.state.global_step == steps
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_learn_as_one(checkpoint, data, tmp_path):
    """DDP through the trainer, with frozen parts, and batches of one rank without images."""
    one, two = tmp_path / "one", tmp_path / "two"
    shared = ["--group_by_modality_length", "false", "--save_strategy", "no", "--num_train_epochs", "1"]
    run_recipe("tiny_cpu_stage2", [*get_settings(checkpoint, data, one), *shared])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(sys.executable).parent / "convllava"), "train", "tiny_cpu_stage2"]
    command += [*get_settings(checkpoint, data, two), *shared, "--per_device_train_batch_size", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, shared_weights = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, tensor in expected.items():
        torch.testing.assert_close(shared_weights[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_leaves_curves_and_a_card(checkpoint, data, tmp_path):
    settings = [
        "--model_name_or_path",
        str(checkpoint),
        "--dataset_name",
        str(data),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    run_recipe("tiny_cpu_stage1", [*settings, "--max_steps", "2"])
    assert (tmp_path / "o" / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "o" / "README.md").read_text()
    assert "| recipe | tiny_cpu_stage1 |" in card and f"| data | {data} |" in card
    assert "| rows per step | 2 (2 x 1 x 1) |" in card
    assert card.count("## How it was trained") == 1
    assert r"multi_modal_projector\|vision_tower.*stages\.4\." in card


def test_curves_without_a_loss(tmp_path):
    draw_curves([{"step": 1, "eval_loss": 1.0}], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model_name_or_path"),
        (["--model_name_or_path", "x"], "--dataset_name"),
    ],
)
def test_what_is_missing_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_recipe("tiny_cpu_stage1", arguments)


def test_unknown_recipe():
    with pytest.raises(FileNotFoundError, match="'stage9'.*convllava_dpo"):
        run_recipe("stage9")


def test_bfloat16_where_the_processor_lacks_it(make_trainer, monkeypatch, warnings):
    monkeypatch.setattr("convllava_hf.training.arguments.is_fast_on_cpu", lambda dtype: False)
    assert not make_trainer(bf16=True).args.bf16
    assert "computing in float32" in warnings.text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_recipes_for_gpus_run_on_a_cpu(checkpoint, data, tmp_path, monkeypatch, warnings):
    """`bf16: true` and bfloat16 weights become float32 without a flag, and it is said."""
    monkeypatch.setattr("convllava_hf.training.arguments.is_fast_on_cpu", lambda dtype: False)
    monkeypatch.setattr("convllava_hf.training.run.is_fast_on_cpu", lambda dtype: False)
    settings = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--max_steps", "1"]
    settings += ["--output_dir", str(tmp_path / "out"), "--dataloader_num_workers", "0", "--report_to", "none"]
    trainer = run_recipe("custom_finetune_lora", settings)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert "no GPU was found" in warnings.text and "computing in float32" in warnings.text


def test_data_that_can_only_be_here_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.json").write_text(json.dumps([{"id": "1", "conversations": []}]))
    with pytest.raises(ValueError, match="convllava data build --llava-json my.json --image-root"):
        locate_data("my.json")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": []}))
    assert locate_data("chat.jsonl") == ("json", {"data_files": "chat.jsonl"})
    (tmp_path / "built").mkdir()
    assert locate_data("built") == ("built", {})
    for name in ("data", "./data", "/nowhere/data", "built/data", "a/b/c", "gone.json", "owner/gone.json", "~/gone"):
        with pytest.raises(FileNotFoundError, match=f"--dataset_name {re.escape(name)}: "):
            locate_data(name)
    assert locate_data("owner/name") == ("owner/name", {})


def test_says_what_will_happen_and_what_has_happened(checkpoint, data, tmp_path, warnings, capsys):
    settings = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--output_dir", str(tmp_path)]
    trainer = run_recipe("tiny_cpu_stage1", settings)
    assert trainer.state.global_step == 12  # every row once
    text = warnings.text
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    for expected in (
        f"{data}: 24 rows",
        "12 of 2 rows (2 x 1 accumulated x 1 processes): each row is seen 1 times",
        f"{trained:,} of {trainer.model.num_parameters():,} parameters",
        "128 pixels a side",
        f"about {trainer.longest_row} tokens",
        f"{estimate_states(trainer.model) / 1e9:.3g} GB per process",
        "done: 12 steps; loss ",
        f"convllava ask IMAGE QUESTION --model {tmp_path}",
    ):
        assert expected in text, expected
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/12  loss ") and lines[-1].startswith("step 12/12  loss ")


def test_interrupted_training_can_be_resumed(checkpoint, data, tmp_path, warnings):
    """Ctrl-C after the third step: a checkpoint, the way to go on, and the weights of a run that was not stopped."""
    settings = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--learning_rate", "0.003"]
    run_recipe("tiny_cpu_stage1", [*settings, "--output_dir", str(tmp_path / "whole")])

    class PressKeys(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    build = ConvLlavaTrainer.__init__

    def build_with_keys(self, **kwargs):
        build(self, **kwargs, callbacks=[PressKeys()])

    stopped = [*settings, "--output_dir", str(tmp_path / "stopped")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvLlavaTrainer, "__init__", build_with_keys)
        with pytest.raises(KeyboardInterrupt):
            run_recipe("tiny_cpu_stage1", stopped)
    assert "stopped after step 3 of 12" in warnings.text and "--resume_from_checkpoint last" in warnings.text
    assert find_last_checkpoint(tmp_path / "stopped").name == "checkpoint-3"
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    run_recipe("tiny_cpu_stage1", [*stopped, "--resume_from_checkpoint", "last"])
    expected, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_what_is_trained_beside_adapters_is_float32(checkpoint, data, tmp_path, monkeypatch):
    """Frozen weights in bfloat16; every weight of the projector moves by steps that bfloat16 would swallow."""
    monkeypatch.setattr("convllava_hf.training.arguments.is_fast_on_cpu", lambda dtype: True)
    monkeypatch.setattr("convllava_hf.training.run.is_fast_on_cpu", lambda dtype: True)
    settings = ["--model_name_or_path", str(checkpoint), "--dataset_name", str(data), "--max_steps", "2"]
    settings += ["--output_dir", str(tmp_path / "out"), "--dtype", "bfloat16", "--bf16", "true", "--warmup_steps", "0"]
    trainer = run_recipe("tiny_cpu_lora", [*settings, "--projector_learning_rate", "1e-5", "--save_strategy", "no"])
    dtypes = {}
    for parameter in trainer.model.parameters():
        dtypes.setdefault(parameter.requires_grad, set()).add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    before = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="bfloat16").state_dict()
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    weights = {
        name.split("multi_modal_projector.")[1]: w for name, w in after.items() if "multi_modal_projector" in name
    }
    assert len(weights) == 4
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        moved = (weight != before[f"model.multi_modal_projector.{name}"].float()).float().mean()
        assert moved > 0.9, (name, moved)


def test_images_become_the_shape_that_is_asked_for(make_trainer, tmp_path):
    trainer = make_trainer(image_aspect_ratio="native")
    assert trainer.processing_class.image_processor.image_aspect_ratio == "native"
    assert len(next(iter(trainer.get_train_dataloader()))["image_sizes"].unique(dim=0)) > 1
    with pytest.raises(ValueError, match="aspect_ratio='crop': ConvLlavaImageProcessor.*pad, native, squash"):
        make_trainer(image_aspect_ratio="crop")
    processor = AutoProcessor.from_pretrained(save_tiny_llava(tmp_path / "llava"))
    wide = Image.new("RGB", (56, 28), "red")
    cropped = processor(images=[wide], text=["<image>"], return_tensors="pt")["pixel_values"]
    set_aspect_ratio(processor, "pad")
    padded = processor(images=[wide], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert padded.shape == cropped.shape == (1, 3, 28, 28)
    assert cropped[0, 0].unique().numel() == 1 < padded[0, 0].unique().numel()


def test_log_says_how_fast_it_is(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    log = trainer.state.log_history[1]
    assert log["rows_per_second"] > 0 and log["tokens_per_second"] > log["rows_per_second"]
    assert log["megapixels_per_second"] > 0 and 0 <= log["data_wait"] < 1
    batch = next(iter(trainer.get_train_dataloader()))
    shares = [entry["padding"] for entry in trainer.state.log_history if "padding" in entry]
    first = 1 - batch["attention_mask"].float().mean().item()
    assert shares[0] == pytest.approx(first, abs=1e-3)


def test_fixed_questions_are_answered_at_each_evaluation(make_trainer, tmp_path):
    """`eval_generate`: exact answers in the log beside the loss, in the curves, and on a page with the pictures."""
    rows = make_rows(1).select([0] * 12)  # one question, which a tiny model learns by heart
    settings = {"eval_strategy": "steps", "eval_on_start": True, "eval_generate": 2, "eval_steps": 20, "max_steps": 20}
    settings["learning_rate"] = 1e-2
    trainer = make_trainer(rows, eval_dataset=rows, **settings)
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    exact = [entry["eval_exact_match"] for entry in evaluated]
    assert [entry["step"] for entry in evaluated] == [0, 20]
    assert exact[0] < exact[-1] == 1.0
    record = json.loads((tmp_path / "output" / "evaluation_answers.json").read_text())
    assert record["expected"] == ["Answer 0."] * 2 and record["answers"]["20"] == ["Answer 0."] * 2
    assert record["answers"]["0"] != record["answers"]["20"]
    page = (tmp_path / "output" / "evaluation_answers.html").read_text()
    assert page.count("<img ") == 2 and page.count("class='right'>Answer 0.") >= 2 and page.count(">step 0<") == 2
    assert Image.open(tmp_path / "output" / "training_curves.png").width > 1200  # three plots

    resumed = make_trainer(rows, eval_dataset=rows, **settings)
    resumed.sample.load_record(step=20)
    assert list(resumed.sample.answers) == [0]


@pytest.mark.parametrize("kind", ["lora", "llava", pytest.param("bf16", marks=pytest.mark.slow)])
def test_fixed_questions_are_answered_with_adapters_in_bfloat16_and_by_llava(
    kind, checkpoint, data, tmp_path, monkeypatch
):
    """The model that answers is the one that is trained: it learns a question by heart."""
    monkeypatch.setattr("convllava_hf.training.arguments.is_fast_on_cpu", lambda dtype: True)
    monkeypatch.setattr("convllava_hf.training.run.is_fast_on_cpu", lambda dtype: True)
    rows = make_rows(1).select([0] * 12)
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "rows" / f"{split}-00000-of-00001.parquet")
    model = save_tiny_llava(tmp_path / "llava") if kind == "llava" else checkpoint
    settings = ["--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "rows"), "--eval_generate", "1"]
    settings += ["--output_dir", str(tmp_path / "output"), "--eval_strategy", "steps", "--eval_on_start", "true"]
    settings += ["--max_steps", "25", "--eval_steps", "25", "--learning_rate", "0.02", "--report_to", "none"]
    settings += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--save_strategy", "no"]
    settings += ["--per_device_eval_batch_size", "12"]
    settings += {"bf16": ["--bf16", "true", "--dtype", "bfloat16"], "llava": ["--trainable", "."]}.get(kind, [])
    trainer = run_recipe("tiny_cpu_lora" if kind == "lora" else str(write_plain_recipe(tmp_path)), settings)
    exact = [entry["eval_exact_match"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert exact == [0.0, 1.0]


def write_plain_recipe(folder: Path) -> Path:
    file = folder / "plain.yaml"
    file.write_text("assistant_only_loss: true\nmax_length: 512\nuse_cpu: true\nbf16: false\n")
    return file


def test_stops_early_and_keeps_the_best(make_trainer, tmp_path):
    """A rate that spoils the model: the first evaluation stays the best, and its weights are what is left."""
    rows = make_rows(8)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 9}
    settings |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "learning_rate": 3.0}
    trainer = make_trainer(rows, eval_dataset=rows, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step == 3 == len(losses) and min(losses) == losses[0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "output" / "checkpoint-1")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-4)
    with pytest.raises(ValueError, match="early_stopping_patience=2 .*--load_best_model_at_end"):
        make_trainer(early_stopping_patience=2)


def test_questions_to_answer_need_evaluation_data(make_trainer):
    with pytest.raises(ValueError, match="eval_generate=2 .*--eval_strategy steps.*--holdout"):
        make_trainer(eval_generate=2)
