"""Batches without padding: rows follow each other in one, see themselves alone, and teach what padded rows teach."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_data import make_rows, save_tiny_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from convllava_hf.training.arguments import ConvLlavaTrainingArguments
from convllava_hf.training.blank_images import add_passes
from convllava_hf.training.collator import join_rows
from convllava_hf.training.trainer import ConvLlavaTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"convllava": save_tiny_checkpoint(folder / "convllava"), "llava": save_tiny_llava(folder / "llava")}


@pytest.fixture
def make_trainer(models, tmp_path):
    """A trainer of a family on the CPU with eager attention, whose masks are block-diagonal where rows are joined."""

    def make(family="convllava", joined=False, rows=None, **settings):
        trainer = ConvLlavaTrainer(
            model=AutoModelForImageTextToText.from_pretrained(models[family], attn_implementation="eager"),
            processing_class=AutoProcessor.from_pretrained(models[family]),
            train_dataset=make_rows(16) if rows is None else rows,
            args=ConvLlavaTrainingArguments(
                **{
                    "output_dir": str(tmp_path / "output"),
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "max_steps": 2,
                    "learning_rate": 1e-3,
                    "adam_epsilon": 1e-4,
                    "max_length": None,
                    "assistant_only_loss": True,
                    "use_cpu": True,
                    "bf16": False,
                    "group_by_modality_length": False,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": "none",
                    **settings,
                }
            ),
        )
        trainer.data_collator.padding_free = joined or trainer.data_collator.padding_free
        return trainer

    return make


def get_gradients(trainer, batch: dict) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(dict(batch)), num_items_in_batch=10).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_rows_follow_each_other():
    """Padding on either side goes; what belongs to images stays; no token predicts the next row's first."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7, -100], [-100, -100, 8, 9]]),
        "pixel_values": torch.zeros(2, 3, 8, 8),
    }
    joined = join_rows(batch)
    assert "attention_mask" not in joined and joined["pixel_values"].shape == (2, 3, 8, 8)
    assert joined["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert joined["labels"].tolist() == [[-100, -100, 7, -100, 9]]
    assert joined["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert joined["cu_seq_lens_q"].tolist() == joined["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert joined["cu_seq_lens_q"].dtype == torch.int32 and joined["max_length_q"] == joined["max_length_k"] == 3


@pytest.mark.parametrize("family", ["convllava", "llava"])
def test_gradients_equal_those_of_padded_rows(family, make_trainer):
    """Rows with images and without, of different lengths; rows that see each other would differ."""
    trainer = make_trainer(family)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(2, 7)])
    assert (batch["attention_mask"] == 0).any()
    expected = get_gradients(trainer, batch)
    joined = join_rows(batch)
    found = get_gradients(trainer, joined)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    joined["position_ids"] = torch.arange(joined["input_ids"].shape[1])[None]
    one_row = get_gradients(trainer, joined)
    assert any((one_row[name] - gradient).abs().max() > 1e-3 for name, gradient in expected.items())


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_without_padding_ends_in_the_same_weights(cached, make_trainer, models, tmp_path):
    settings = {"trainable": ["multi_modal_projector", "language_model"]}
    settings |= {"vision_cache": str(tmp_path / "features")} if cached else {}
    logs, weights, evaluated = [], [], []
    for joined in (False, True):
        trainer = make_trainer(joined=joined, **settings)
        trainer.train()
        trainer.save_model(str(tmp_path / str(joined)))
        weights.append(load_file(tmp_path / str(joined) / "model.safetensors"))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        evaluated.append(None if cached else trainer.evaluate(make_rows(7))["eval_loss"])
    before = load_file(models["convllava"] / "model.safetensors")
    assert any((weights[0][name] - before[name]).abs().max() > 1e-4 for name in before)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-5, rtol=0, msg=name)
    assert cached or evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)
    for padded, joined in zip(*logs, strict=True):
        assert joined["padding"] == 0 < padded["padding"]
        assert joined["loss"] == pytest.approx(padded["loss"], rel=1e-4)
        assert joined["num_tokens"] == padded["num_tokens"]


def test_blank_image_is_a_row_of_its_own(make_trainer):
    """A rank without images beside one with some: LLaVA runs its tower, and no gradient changes."""
    trainer = make_trainer("llava", rows=make_rows(16))
    batch = join_rows(trainer.data_collator([trainer.train_dataset[number] for number in (4, 9, 14)]))
    expected = get_gradients(trainer, batch)
    filled = add_passes(batch, 1, trainer.processing_class, trainer.model.config)
    assert filled["pixel_values"].shape[0] == 1 and filled["cu_seq_lens_q"].diff()[-1] == 4
    found = get_gradients(trainer, filled)
    for name, gradient in expected.items():
        torch.testing.assert_close(found.pop(name), gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert any("multi_modal_projector" in name for name in found)
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_batches_are_padded_where_no_flash_attention_is(make_trainer, caplog, monkeypatch):
    transformers.utils.logging.enable_propagation()
    trainer = make_trainer(padding_free=True)
    transformers.utils.logging.disable_propagation()
    assert "padding_free needs --attn_implementation flash_attention_2" in caplog.text
    assert "attention_mask" in next(iter(trainer.get_train_dataloader()))
    monkeypatch.setattr("convllava_hf.training.trainer.is_flash_attention_requested", lambda config: True)
    batch = next(iter(make_trainer(padding_free=True).get_train_dataloader()))
    assert "attention_mask" not in batch and len(batch["cu_seq_lens_q"]) == 5
