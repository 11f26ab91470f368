"""Conversion: what is written, what is refused, and that nothing is left behind when it is.

The model that comes out is compared with the original's numbers in test_parity_convllava.py; here it is about files.
"""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    GenerationConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils.logging import disable_propagation, enable_propagation

import convllava_hf
from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.checkpoint_io import (
    CheckpointReader,
    StoredTensor,
    TensorToWrite,
    hash_file,
    parse_size,
    stage_output,
    write_checkpoint,
)
from convllava_hf.conversion import convert_checkpoint, init_model, plan_weights
from convllava_hf.modeling_convllava import PADDED_ID_SCORE
from convllava_hf.sources import Source
from convllava_hf.vocabulary import Vocabulary, extend_rows
from convllava_hf.weight_maps import CONVLLAVA, CONVNEXT, VISION_TOWER, ConversionError


@pytest.fixture(scope="module")
def released(reference) -> Path:
    """The reference checkpoint: `llm/` and `vision/`."""
    return reference / "convllava"


@pytest.fixture(scope="module")
def done(released, tmp_path_factory):
    """The report of a conversion of the reference checkpoint; its folder is `done.output`."""
    output = tmp_path_factory.mktemp("done") / "model"
    return convert_checkpoint(released / "llm", output, vision_tower=released / "vision")


@pytest.fixture
def broken(released, tmp_path) -> Path:
    """A copy of the reference checkpoint that a test may damage, in a folder of its own."""
    for part in ("llm", "vision"):
        shutil.copytree(released / part, tmp_path / part)
    return tmp_path


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Parts for new models: a timm tower `timm/` and language models `llama/`, `qwen2/`, `phi/`."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tower = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=3)
    save_timm(tower, folder / "timm")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["a red square and a blue circle"] * 4, trainer)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    common |= {"bos_token_id": 0, "eos_token_id": 0}
    for config in (
        LlamaConfig(**common, vocab_size=bpe.get_vocab_size()),
        Qwen2Config(**common, vocab_size=320, num_key_value_heads=1, tie_word_embeddings=True),
        PhiConfig(**common, vocab_size=bpe.get_vocab_size()),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / config.model_type)
        eos = "</s>" if config.model_type == "llama" else "<|endoftext|>"
        chat = ["<|im_start|>", "<|im_end|>"]
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, extra_special_tokens=chat)
        tokenizer.save_pretrained(folder / config.model_type)
        if config.model_type == "llama":
            model = AutoModelForCausalLM.from_pretrained(folder / "llama")
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(folder / "llama")
    return folder


def save_timm(model, folder: Path, prefix: str = "", **config):
    folder.mkdir()
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")
    images = {"input_size": [3, 256, 256], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"architecture": "convnext_atto", "pretrained_cfg": images, **config}
    (folder / "config.json").write_text(json.dumps(config))


def edit_json(path: Path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def edit_weights(path: Path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def list_hidden(folder: Path) -> list[str]:
    """What a conversion works in, if it is left behind."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------------------------- what is written


def test_weights_are_those_of_the_sources_bit_by_bit(done, released):
    written = load_file(done.output / "model.safetensors")
    language = {}
    for path in sorted((released / "llm").glob("*.bin")):
        language |= torch.load(path, weights_only=True)
    tower = torch.load(released / "vision" / "pytorch_model.bin", weights_only=True)
    for name, tensor in language.items():
        target = written.pop(CONVLLAVA.rename(name))
        assert target.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(target[: len(tensor)], tensor)
        assert len(target) == (1024 if len(tensor) == 1000 else len(tensor))
    for name, tensor in tower.items():
        assert torch.equal(written.pop(f"model.vision_tower.{name}"), tensor)
    assert not written


def test_report_accounts_for_everything(done, released):
    content = json.loads((done.output / "conversion_report.json").read_text())
    assert content == json.loads(json.dumps(done.content))
    assert content["counts"] == {
        "read": 108,
        "renamed": 106,
        "extended": 2,
        "dropped": 0,
        "initialised": 0,
        "written": 108,
    }
    assert content["vocabulary"] == {
        "rows_before": 1000,
        "rows_after": 1024,
        "added": {"<image>": 1000, "<pad>": 1001},
    }
    for source, folder in zip(content["sources"], ("llm", "vision"), strict=True):
        assert {file["name"] for file in source["files"]} == {path.name for path in released.glob(f"{folder}/*.bin")}
        for file in source["files"]:
            data = (released / folder / file["name"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    (file,) = content["files"]
    assert file["sha256"] == hashlib.sha256((done.output / file["name"]).read_bytes()).hexdigest()
    records = {record["name"]: record for record in content["tensors"]}
    assert len(records) == 108
    assert records["lm_head.weight"] == {
        "action": "extended",
        "source": "language model",
        "name": "lm_head.weight",
        "file": "pytorch_model-00002-of-00002.bin",
        "dtype": "bfloat16",
        "target": "lm_head.weight",
        "shape": [1024, 64],
        "target_dtype": "bfloat16",
    }
    assert 50e6 < content["peak_memory_bytes"] < 50e9


def test_summary_names_what_matters(done):
    summary = done.summary()
    for text in ("llm", "vision", "106 renamed", "1000 -> 1024 rows", "<image> = 1000", "GB of memory at the peak"):
        assert text in summary
    assert str(done.output) in summary


def test_output_holds_what_loading_needs_and_no_local_path(done, released):
    names = {path.name for path in done.output.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    package = Path(convllava_hf.__file__).parent
    for name in ("configuration", "image_processing", "modeling", "processing"):
        code = f"{name}_convllava.py"
        assert (done.output / code).read_text() == (package / code).read_text()
    for path in done.output.iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text()
            assert str(released) not in text and str(done.output.parent) not in text, path.name
    assert list_hidden(done.output.parent) == []


def test_configuration(done):
    config = ConvLlavaConfig.from_pretrained(done.output)
    assert config.vision_config.hidden_sizes == [8, 16, 24, 32, 40]
    assert config.vision_config.depths == [1, 1, 2, 1, 2]
    assert config.projector_type == "mlp2x_gelu"
    assert (config.text_config.rms_norm_eps, config.text_config.vocab_size, config.vocab_padding) == (1e-5, 1024, 22)
    assert (config.image_token_id, config.text_config.pad_token_id, config.text_config.eos_token_id) == (1000, 1001, 2)
    assert config.dtype == torch.bfloat16
    assert config.num_image_tokens(128, 128) == 4
    assert config.text_config.use_cache is True


def test_generation_config_bounds_answers_without_warnings(done):
    generation = GenerationConfig.from_pretrained(done.output)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 1001, 1)
    assert generation.max_new_tokens == 1024
    assert generation.suppress_tokens == [1000]  # <image>
    assert "max_length" not in json.loads((done.output / "generation_config.json").read_text())
    assert not generation.do_sample


@pytest.mark.parametrize(
    "load", [AutoTokenizer.from_pretrained, lambda path: AutoProcessor.from_pretrained(path).tokenizer]
)
def test_tokenizer_reloads_with_the_original_ids(done, released, load):
    tokenizer = load(done.output)
    expected = json.loads((released / "expected.json").read_text())["tokenizer"]["strings"]
    checked = 0
    for entry in expected:
        # A leading space is the processor's work (see get_text_with_replacements); "<image>" is a token now.
        if "<image>" not in entry["text"] and not entry["text"].startswith((" ", "\u2581")):
            assert tokenizer(entry["text"])["input_ids"] == entry["tokenizer_input_ids"], entry["text"]
            checked += 1
    assert checked == 15
    assert (tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id, len(tokenizer)) == (1000, 1001, 1002)
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length) == ("<pad>", "left", 2048)
    assert {"<image>", "<pad>"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.decode(tokenizer("a<image>b")["input_ids"], skip_special_tokens=True) == "ab"


def test_image_processor_is_the_towers(done):
    processor = AutoImageProcessor.from_pretrained(done.output)
    assert dict(processor.size) == {"height": 128, "width": 128}
    assert (processor.image_aspect_ratio, processor.downsampling_factor, int(processor.resample)) == ("pad", 64, 3)
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]


def test_converting_twice_gives_the_same_files(done, released, tmp_path):
    again = convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision")
    names = sorted(path.name for path in done.output.iterdir())
    assert names == sorted(path.name for path in again.output.iterdir())
    for name in names:
        if name != "conversion_report.json":  # holds the time and the memory that it took
            assert (done.output / name).read_bytes() == (again.output / name).read_bytes(), name


def test_shards_are_bounded_and_load_like_one_file(done, released, tmp_path):
    report = convert_checkpoint(
        released / "llm", tmp_path / "model", vision_tower=released / "vision", max_shard_size="150KB"
    )
    names = [file["name"] for file in report.content["files"]]
    assert names == [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    assert len(names) >= 5
    index = json.loads((report.output / "model.safetensors.index.json").read_text())
    whole = load_file(done.output / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name in names:
        shard = load_file(report.output / name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 150_000
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(shard)
    model = AutoModelForImageTextToText.from_pretrained(report.output)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(done, released, tmp_path, dtype):
    report = convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision", dtype=dtype)
    wanted = getattr(torch, dtype)
    stored = load_file(done.output / "model.safetensors")
    for name, tensor in load_file(report.output / "model.safetensors").items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor[:1000], stored[name][:1000].to(wanted))
    assert AutoModelForImageTextToText.from_pretrained(report.output, dtype="auto").dtype == wanted


def test_new_rows_are_means(done):
    written = load_file(done.output / "model.safetensors")
    head, table = written["lm_head.weight"], written["model.language_model.embed_tokens.weight"]
    mean = head[:1000].double().mean(0).bfloat16()
    assert all(torch.equal(row, mean) for row in head[1000:])
    # 24 new rows, each the mean of every 24th word.
    for number in (0, 1, 23):
        torch.testing.assert_close(table[1000 + number], table[number:1000:24].double().mean(0).bfloat16())
    assert len(torch.unique(table[1000:], dim=0)) == 24


@pytest.mark.parametrize("num_words", [1, 3, 5000])
@pytest.mark.parametrize("distinct", [True, False])
def test_extend_rows(num_words, distinct):
    rows = torch.randn(num_words + 2, 3)
    new_rows = [num_words, *range(num_words + 2, num_words + 8)]
    table = extend_rows(rows, num_words + 8, new_rows, num_words, distinct)
    assert torch.equal(table[:num_words], rows[:num_words])
    assert torch.equal(table[num_words + 1], rows[num_words + 1])  # neither a word nor new
    step = min(7, num_words) if distinct else 1
    for number, row in enumerate(new_rows):
        expected = rows[number % step : num_words : step].double().mean(0).float()
        torch.testing.assert_close(table[row], expected)
    assert extend_rows(rows[:, 0], num_words + 8, new_rows, num_words, distinct).shape == (num_words + 8,)
    assert torch.equal(extend_rows(rows, len(rows), [], num_words, distinct), rows)


def test_full_size_plan_covers_the_model():
    """The whole plan for a released 7B checkpoint, on shapes alone."""
    text = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    vision = ConvNextConfig(num_stages=5, depths=[3, 3, 27, 3, 6], hidden_sizes=[192, 384, 768, 1536, 3072])
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(text).state_dict()
        tower = ConvNextModel(vision).state_dict()
        text.vocab_size = 32064
        config = ConvLlavaConfig(vision_config=vision, text_config=text, image_token_id=32000, vocab_padding=62)
        whole = ConvLlavaForConditionalGeneration(config).state_dict()
    projector = {"0.weight": (4096, 3072), "0.bias": (4096,), "2.weight": (4096, 4096), "2.bias": (4096,)}
    language |= {f"model.mm_projector.{name}": torch.empty(shape, device="meta") for name, shape in projector.items()}
    tower = {name: tensor for name, tensor in tower.items() if not name.startswith("layernorm.")}

    sources = []
    for state, tables in ((language, [CONVLLAVA]), (tower, [CONVNEXT, VISION_TOWER])):
        stored = {name: StoredTensor(tuple(tensor.shape), torch.bfloat16, "file") for name, tensor in state.items()}
        sources.append(Source("part", "name", Path(), None, stored, {name: name for name in stored}))
        for table in tables:
            sources[-1].rename(table)
    tables = ("model.language_model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    vocabulary = Vocabulary(tables, 32000, {"<image>": 32000, "<pad>": 32001}, 32000, 32064, 32000)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    tensors, records = plan_weights(shapes, sources, vocabulary=vocabulary)
    assert {tensor.name: tensor.shape for tensor in tensors} == shapes
    assert len(records) == 295 + 398
    assert sum(tensor.num_bytes for tensor in tensors) == 2 * (7_436_945_600 - 2 * 3072 + 2 * 64 * 4096 + 2 * 3072)


# ------------------------------------------------------------------------------------------------- vision towers


def test_tower_alone(released, tmp_path):
    report = convert_checkpoint(released / "vision", tmp_path / "tower")
    assert report.content["kind"] == "vision tower"
    assert report.content["counts"]["renamed"] == 83
    original = torch.load(released / "vision" / "pytorch_model.bin", weights_only=True)
    model, info = ConvNextModel.from_pretrained(report.output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.items())
    assert torch.equal(model.layernorm.weight, torch.ones(40, dtype=torch.bfloat16))
    assert model.config.image_size == 128
    settings = json.loads((report.output / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 128}
    assert settings["crop_size"] == {"height": 128, "width": 128}

    # As a tower it is what the original was.
    first = convert_checkpoint(released / "llm", tmp_path / "first", vision_tower=released / "vision")
    second = convert_checkpoint(released / "llm", tmp_path / "second", vision_tower=report.output)
    assert first.content["files"][0]["sha256"] == second.content["files"][0]["sha256"]
    assert second.content["counts"]["dropped"] == 2


def test_tower_inside_a_classifier(released, tmp_path):
    config = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_labels=3)
    model = ConvNextForImageClassification(config)
    model.save_pretrained(tmp_path / "classifier")
    shutil.copy(released / "vision" / "preprocessor_config.json", tmp_path / "classifier")
    report = convert_checkpoint(tmp_path / "classifier", tmp_path / "tower")
    tower = ConvNextModel.from_pretrained(report.output)
    assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in model.convnext.state_dict().items())
    assert report.content["counts"]["dropped"] == 2


def test_timm_tower(parts, tmp_path):
    report = convert_checkpoint(parts / "timm", tmp_path / "tower")
    original = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=3).eval()
    original.load_state_dict(torch.load(parts / "timm" / "pytorch_model.bin", weights_only=True))
    tower = ConvNextModel.from_pretrained(report.output).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            tower(pixels).last_hidden_state, original.forward_features(pixels), rtol=0, atol=1e-5
        )
    settings = json.loads((report.output / "preprocessor_config.json").read_text())
    assert (settings["image_mean"], settings["crop_size"]) == ([0.5, 0.5, 0.5], {"height": 256, "width": 256})


def test_open_clip_tower(parts, tmp_path):
    state = torch.load(parts / "timm" / "pytorch_model.bin", weights_only=True)
    state = {f"visual.trunk.{name}": tensor for name, tensor in state.items() if not name.startswith("head.fc")}
    (tmp_path / "clip").mkdir()
    extra = {
        "logit_scale": torch.ones(()),
        "text_projection": torch.ones(2, 2),
        "visual.head.proj.weight": torch.ones(2),
    }
    save_file({**state, **extra}, tmp_path / "clip" / "open_clip_model.safetensors")
    vision = {"timm_model_name": "convnext_atto", "image_size": 320}
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
    report = convert_checkpoint(tmp_path / "clip", tmp_path / "tower")
    plain = convert_checkpoint(parts / "timm", tmp_path / "plain")
    assert report.content["files"][0]["sha256"] == plain.content["files"][0]["sha256"]
    assert report.content["dropped"] == {
        "text tower of CLIP": 1,
        "projection of CLIP's image embedding": 1,
        "scale of CLIP's contrastive loss": 1,
    }
    assert "1: text tower of CLIP" in report.summary()
    settings = json.loads((report.output / "preprocessor_config.json").read_text())
    assert settings["crop_size"] == {"height": 320, "width": 320}
    assert settings["image_mean"] == [0.48145466, 0.4578275, 0.40821073]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "convnext_xxlarge"}, "epsilon of 1e-5"),
        ({"model_args": {"norm_eps": 1e-5}}, "norm_eps"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "act_layer"),
    ],
)
def test_timm_models_with_other_arithmetic_are_refused(parts, tmp_path, config, message):
    shutil.copytree(parts / "timm", tmp_path / "timm")
    edit_json(tmp_path / "timm" / "config.json", **config)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(tmp_path / "timm", tmp_path / "tower")


# ---------------------------------------------------------------------------------------------------- new models


def test_init_joins_two_parts(parts, tmp_path):
    report = init_model(parts / "timm", parts / "llama", tmp_path / "model", resolution=192, add_stage="2x40")
    config = AutoConfig.from_pretrained(report.output)
    assert config.vision_config.hidden_sizes == [8, 16, 24, 32, 40]
    assert config.vision_config.depths == [1, 1, 2, 1, 2]
    assert config.downsampling_factor == 64
    written = load_file(report.output / "model.safetensors")
    text = load_file(parts / "llama" / "model.safetensors")
    rows = len(text["lm_head.weight"])
    assert torch.equal(written["lm_head.weight"][:rows], text["lm_head.weight"])
    tower = torch.load(parts / "timm" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(written["model.vision_tower.embeddings.layernorm.bias"], tower["stem.1.bias"])
    fresh = [record["target"] for record in report.content["tensors"] if record["action"] == "initialised"]
    assert len(fresh) == 4 + 4 + 2 * 9
    assert all(
        name.startswith(("model.multi_modal_projector.", "model.vision_tower.encoder.stages.4.")) for name in fresh
    )

    # torch's defaults, as the original's new modules: uniform up to 1 / sqrt(inputs).
    stage = "model.vision_tower.encoder.stages.4."
    weight, bias = (written[f"{stage}layers.1.pwconv1.{leaf}"] for leaf in ("weight", "bias"))
    assert 0.9 / 40**0.5 < weight.abs().max() <= 1 / 40**0.5
    assert 0.9 / 40**0.5 < bias.abs().max() <= 1 / 40**0.5
    assert torch.equal(written[f"{stage}layers.1.layernorm.weight"], torch.ones(40))
    assert torch.equal(written[f"{stage}layers.1.layer_scale_parameter"], torch.full((40,), 1e-6))
    assert not torch.equal(written[f"{stage}layers.0.pwconv1.weight"], weight)

    model, processor = (
        AutoModelForImageTextToText.from_pretrained(report.output),
        AutoProcessor.from_pretrained(report.output),
    )
    pixels = torch.randint(0, 255, (3, 100, 80), dtype=torch.uint8)
    inputs = processor(images=pixels, text="<image>\na red square", return_tensors="pt")
    assert (inputs["input_ids"] == config.image_token_id).sum() == 9
    assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_init_is_reproducible(parts, tmp_path):
    hashes = []
    for number, seed in enumerate((0, 0, 1)):
        report = init_model(parts / "timm", parts / "llama", tmp_path / str(number), resolution=128, seed=seed)
        hashes.append(report.content["files"][0]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_init_without_a_new_stage(parts, tmp_path):
    report = init_model(
        parts / "timm",
        parts / "llama",
        tmp_path / "model",
        resolution=128,
        projector_type="mlp3x_gelu",
        dtype="bfloat16",
    )
    config = AutoConfig.from_pretrained(report.output)
    assert (config.downsampling_factor, config.projector_type) == (32, "mlp3x_gelu")
    assert config.num_image_tokens(128, 128) == 16
    model = AutoModelForImageTextToText.from_pretrained(report.output, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.content["counts"]["initialised"] == 6


def test_init_with_tied_embeddings_and_spare_rows(parts, tmp_path):
    report = init_model(parts / "timm", parts / "qwen2", tmp_path / "model", resolution=128)
    vocabulary = report.content["vocabulary"]
    assert (vocabulary["rows_before"], vocabulary["rows_after"]) == (320, 320)
    written = load_file(report.output / "model.safetensors")
    assert "lm_head.weight" not in written
    original = load_file(parts / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    table = written["model.language_model.embed_tokens.weight"]
    changed = [row for row in range(320) if not torch.equal(original[row], table[row])]
    assert changed == sorted(vocabulary["added"].values())
    assert ConvLlavaConfig.from_pretrained(report.output).tie_word_embeddings
    processor = AutoProcessor.from_pretrained(report.output)
    assert not processor.chunk_prefix_space
    assert "<|im_start|>" in processor.chat_template
    assert processor.tokenizer.chat_template == processor.chat_template
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(report.output).eos_token_id == [0, end]


def test_init_with_ids_that_the_tokenizer_leaves_out(parts, tmp_path):
    shutil.copytree(parts / "qwen2", tmp_path / "gap")
    file = tmp_path / "gap" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    highest = max(vocabulary.values()) + 12
    (end,) = [token for token in content["added_tokens"] if token["content"] == "<|im_end|>"]
    tokens = {"<image>": highest - 2, "<pad>": highest - 1, "<|im_end|>": highest}
    vocabulary.update(tokens)
    others = [token for token in content["added_tokens"] if token["content"] not in tokens]
    content["added_tokens"] = others + [{**end, "content": token, "id": number} for token, number in tokens.items()]
    file.write_text(json.dumps(content))
    edit_json(tmp_path / "gap" / "tokenizer_config.json", added_tokens_decoder={}, pad_token="<pad>")

    report = init_model(parts / "timm", tmp_path / "gap", tmp_path / "model", resolution=128)
    ids = AutoProcessor.from_pretrained(report.output).tokenizer.get_vocab()
    config = ConvLlavaConfig.from_pretrained(report.output)
    assert ids["<|im_end|>"] == highest and len(ids) <= highest
    assert config.vocab_padding == config.text_config.vocab_size - highest - 1
    model = AutoModelForImageTextToText.from_pretrained(report.output)
    assert model(input_ids=torch.tensor([[5]])).logits[..., highest] > PADDED_ID_SCORE


def test_init_with_a_biased_head(parts, tmp_path):
    report = init_model(parts / "timm", parts / "phi", tmp_path / "model", resolution=128)
    bias = load_file(report.output / "model.safetensors")["lm_head.bias"]
    original = load_file(parts / "phi" / "model.safetensors")["lm_head.bias"]
    assert torch.equal(bias[: len(original)], original)
    assert len(bias) == 320
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (1, 7))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(parts / "phi").eval()(ids).logits
        found = AutoModelForImageTextToText.from_pretrained(report.output).eval()(input_ids=ids).logits
    assert torch.equal(found[..., : len(original)], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 100}, "100x100 pixels cannot be split"),
        ({"add_stage": "6*40"}, r"add_stage='6\*40'; expected BLOCKSxWIDTH"),
        ({"add_stage": "0x40"}, "expected BLOCKSxWIDTH"),
        ({"projector_type": "resampler"}, "projector_type='resampler'"),
        ({"chat_template": "alpaca"}, "chat_template='alpaca'; expected one of .*vicuna_v1"),
        ({"text": "timm"}, "timm is no causal language model"),
        ({"vision": "llama"}, "no ConvNeXt"),
        ({"vision": "nowhere/at all"}, "no folder"),
        ({"text_revision": "main"}, "revision 'main' needs a Hub id"),
    ],
)
def test_init_refuses_what_does_not_fit(parts, tmp_path, options, message):
    options = {"vision": "timm", "text": "llama", "resolution": 128, **options}
    paths = [parts / options.pop(name) for name in ("vision", "text")]
    with pytest.raises(ConversionError, match=message):
        init_model(*paths, tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []


def test_init_wants_a_template_that_fits(parts, tmp_path):
    shutil.copytree(parts / "qwen2", tmp_path / "text")
    content = (tmp_path / "text" / "tokenizer.json").read_text().replace("<|im_end|>", "<|im_stop|>")
    (tmp_path / "text" / "tokenizer.json").write_text(content)
    edit_json(tmp_path / "text" / "tokenizer_config.json", extra_special_tokens=[])
    with pytest.raises(ConversionError, match=r"texts end in '<\|endoftext\|>'.*--chat-template"):
        init_model(parts / "timm", tmp_path / "text", tmp_path / "model", resolution=128)
    init_model(parts / "timm", tmp_path / "text", tmp_path / "model", resolution=128, chat_template="plain")


# ------------------------------------------------------------------------------------------------------ bad input


class Payload:
    """Unpickled without care, this runs a command that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def add_adapter(broken):
    edit_weights(broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.update({"model.lora_A": torch.ones(2)}))


def remove_tensor(broken):
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w.pop("encoder.stages.2.layers.1.dwconv.bias"))


def remove_indexed(broken):
    edit_weights(broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.pop("model.norm.weight"))


def repeat_tensor(broken):
    edit_weights(
        broken / "llm/pytorch_model-00002-of-00002.bin",
        lambda w: w.update({"model.embed_tokens.weight": torch.ones(2)}),
    )


def repeat_target(broken):
    edit_weights(
        broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.update({"model.mm_projector.bias": torch.ones(64)})
    )


def reshape_tensor(broken):
    edit_weights(
        broken / "llm/pytorch_model-00002-of-00002.bin", lambda w: w.update({"model.norm.weight": torch.ones(63)})
    )


def shorten_vocabulary(broken):
    def cut(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:900].clone()

    for path in (broken / "llm").glob("*.bin"):
        edit_weights(path, cut)


def add_layer(broken):
    edit_json(broken / "llm/config.json", num_hidden_layers=1)


def truncate_shard(broken):
    path = broken / "llm/pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:200_000])


def empty_shard(broken):
    (broken / "vision/pytorch_model.bin").write_bytes(b"")


def truncate_safetensors(broken):
    path = broken / "vision/pytorch_model.bin"
    save_file(torch.load(path, weights_only=True), path.with_name("model.safetensors"))
    data = path.with_name("model.safetensors").read_bytes()
    path.with_name("model.safetensors").write_bytes(data[:-100])


def quantise(broken):
    weights = {"embeddings.patch_embeddings.weight": torch.ones(8).to(torch.float8_e4m3fn)}
    save_file(weights, broken / "vision/model.safetensors")


def remove_shard(broken):
    (broken / "llm/pytorch_model-00001-of-00002.bin").unlink()


def remove_weights(broken):
    (broken / "vision/pytorch_model.bin").unlink()


def hide_code(broken):
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w.update({"x": Payload(broken / "ran")}))


def hide_code_in_old_format(broken):
    (broken / "vision/pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(broken / "ran")}))


def save_whole_module(broken):
    torch.save(torch.nn.Linear(2, 2), broken / "vision/pytorch_model.bin")


def save_training_state(broken):
    torch.save({"state_dict": {"x": torch.ones(2)}, "epoch": 3}, broken / "vision/pytorch_model.bin")


def save_list(broken):
    torch.save([torch.ones(2)], broken / "vision/pytorch_model.bin")


def lead_elsewhere(broken):
    (broken / "llm/pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../vision/pytorch_model.bin"}}')


def empty_index(broken):
    (broken / "llm/pytorch_model.bin.index.json").write_text("{}")


def damage_config(broken):
    (broken / "llm/config.json").write_text('{"architectures": [')


def list_in_config(broken):
    (broken / "vision/config.json").write_text("[]")


def remove_tower_config(broken):
    (broken / "vision/config.json").unlink()


def remove_preprocessor(broken):
    (broken / "vision/preprocessor_config.json").unlink()


def crop_images(broken):
    edit_json(broken / "vision/preprocessor_config.json", size={"shortest_edge": 150})


def remove_statistics(broken):
    edit_json(broken / "vision/preprocessor_config.json", image_mean=None)


def other_architecture(broken):
    edit_json(broken / "llm/config.json", architectures=["LlavaMptForCausalLM"])


def other_feature_layer(broken):
    edit_json(broken / "llm/config.json", mm_vision_select_layer=-2)


def other_aspect_ratio(broken):
    edit_json(broken / "llm/config.json", image_aspect_ratio="anyres")


def start_and_end_tokens(broken):
    edit_json(broken / "llm/config.json", mm_use_im_start_end=True)


def other_projector(broken):
    edit_json(broken / "llm/config.json", mm_projector_type="identity")


def other_projector_depth(broken):
    edit_json(broken / "llm/config.json", mm_projector_type="mlp3x_gelu")


def other_tower_width(broken):
    edit_json(broken / "llm/config.json", mm_hidden_size=3072)


def remove_tokenizer(broken):
    for path in (broken / "llm").glob("*token*"):
        path.unlink()


def damage_tokenizer(broken):
    (broken / "llm/tokenizer.model").write_bytes(b"\x00\x01\x02")


def clip_tower(broken):
    weights = {"vision_model.embeddings.class_embedding": torch.ones(4)}
    torch.save(weights, broken / "vision/pytorch_model.bin")


BAD_INPUT = [
    (add_adapter, r"unknown weight 'model\.lora_A'"),
    (
        remove_tensor,
        r"1 tensors are in no source, the first of them 'model\.vision_tower\.encoder\.stages\.2\.layers\.1",
    ),
    (remove_indexed, r"does not hold 'model\.norm\.weight', which the index lists"),
    (repeat_tensor, r"'model\.embed_tokens\.weight' is in both"),
    (repeat_target, r"both become 'model\.multi_modal_projector\.linear_1\.bias'"),
    (reshape_tensor, r"'model\.norm\.weight'.*has shape \(63,\); expected \(64,\)"),
    (shorten_vocabulary, "tokenizer of llm has 1000 ids and its embeddings .* have 900 rows"),
    (add_layer, r"'model\.layers\.1\.\S+', for which the model of its config.json has no place"),
    (truncate_shard, r"pytorch_model-00001-of-00002\.bin \(200000 bytes\) cannot be read.*truncated or damaged"),
    (empty_shard, r"\(0 bytes\) is not in the zip format"),
    (truncate_safetensors, "cannot be read as safetensors.*truncated or damaged"),
    (quantise, "as F8_E4M3; expected one of F64, F32.*not quantised"),
    (remove_shard, r"pytorch_model-00001-of-00002\.bin is missing; pytorch_model\.bin\.index\.json lists it"),
    (remove_weights, "has no weights; expected one of model.safetensors"),
    (hide_code, r"asks for '(posix|nt)\.system' when it is unpickled.*nothing in it ran"),
    (hide_code_in_old_format, "not in the zip format.*nothing in it ran"),
    (save_whole_module, r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    (save_training_state, "holds 'state_dict': dict; expected tensors by name"),
    (save_list, "holds a list; expected a dictionary"),
    (lead_elsewhere, r"lists the file '\.\./vision/pytorch_model\.bin'; expected one beside it"),
    (empty_index, "has no 'weight_map'"),
    (damage_config, "config.json is not valid JSON"),
    (list_in_config, "holds a list; expected a JSON object"),
    (remove_tower_config, "config.json is missing"),
    (remove_preprocessor, "preprocessor_config.json is missing"),
    (crop_images, "expected the same side in both"),
    (remove_statistics, "no image_mean and image_std"),
    (other_architecture, r"architectures = \['LlavaMptForCausalLM'\]; expected \['LlavaLlamaForCausalLM'\]"),
    (other_feature_layer, "mm_vision_select_layer = -2; expected -1"),
    (other_aspect_ratio, "image_aspect_ratio = 'anyres'; expected 'pad'"),
    (start_and_end_tokens, "mm_use_im_start_end = True; expected False"),
    (other_projector, "projector_type='identity'"),
    (other_projector_depth, r"2 tensors are in no source, the first of them 'model\.multi_modal_projector\.linear_3"),
    (other_tower_width, "features of width 40.*mm_hidden_size = 3072"),
    (remove_tokenizer, "tokenizer of llm cannot be loaded"),
    (damage_tokenizer, "tokenizer of llm cannot be loaded"),
    (clip_tower, "vision is no ConvNeXt"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_INPUT, ids=[damage.__name__ for damage, _ in BAD_INPUT])
def test_bad_input_is_one_clear_error_and_leaves_nothing(broken, damage, message):
    damage(broken)
    before = sorted(path.name for path in broken.iterdir())
    with pytest.raises(ConversionError, match=message) as raised:
        convert_checkpoint(broken / "llm", broken / "output", vision_tower=broken / "vision")
    assert sorted(path.name for path in broken.iterdir()) == before
    text = str(raised.value)
    assert "\n" not in text and text.endswith("."), "one line, in sentences: what is wrong, what was expected, the fix"
    assert "weights_only" not in text, "never suggest to load it without care"


def test_values_too_large_for_float16(broken):
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w["embeddings.layernorm.bias"].fill_(2.0**20))
    with pytest.raises(ConversionError, match=r"values up to 1\.05e\+06; expected at most 65504.*bfloat16"):
        convert_checkpoint(broken / "llm", broken / "output", vision_tower=broken / "vision", dtype="float16")
    assert list_hidden(broken) == [] and not (broken / "output").exists()


def test_missing_tower(broken):
    with pytest.raises(ConversionError, match=r"'ConvLLaVA/ConvLLaVA-ConvNeXt-tiny'.*Pass --vision-tower"):
        convert_checkpoint(broken / "llm", broken / "output")
    with pytest.raises(ConversionError, match=r"no folder '/does/not/exist'.*Pass --vision-tower"):
        convert_checkpoint(broken / "llm", broken / "output", vision_tower="/does/not/exist")
    edit_json(broken / "llm/config.json", mm_vision_tower=str(broken / "vision"))
    assert convert_checkpoint(broken / "llm", broken / "output").content["counts"]["written"] == 108


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'; expected one of auto, float32"),
        ({"max_shard_size": "five"}, "size 'five'"),
        ({"max_shard_size": 0}, "size 0"),
        ({"revision": "main"}, "revision 'main' needs a Hub id"),
        ({"source": "vision"}, "no ConvLLaVA or LLaVA language model and takes no --vision-tower"),
    ],
)
def test_bad_arguments(released, tmp_path, options, message):
    source = released / options.pop("source", "llm")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "output", vision_tower=released / "vision", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_system_does_not_map(released, tmp_path, monkeypatch):
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/model.safetensors").touch()

    def refuse(*arguments, **kwargs):
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    monkeypatch.setattr("convllava_hf.checkpoint_io.safe_open", refuse)
    with pytest.raises(ConversionError, match=r"cannot be mapped into memory: .*\(12\)\. Split it into shards"):
        convert_checkpoint(tmp_path / "vision", tmp_path / "output")


def test_converted_checkpoints_are_not_converted_again(done, tmp_path):
    with pytest.raises(ConversionError, match="converted already"):
        convert_checkpoint(done.output, tmp_path / "output")


def test_sizes():
    assert [parse_size(size) for size in (7, "7", "7B", "2KB", "3 MB", "5gb")] == [
        7,
        7,
        7,
        2000,
        3_000_000,
        5_000_000_000,
    ]


# --------------------------------------------------------------------------------------------- the output's place


def test_existing_output_is_kept_without_force(released, tmp_path):
    output = tmp_path / "model"
    first = convert_checkpoint(released / "llm", output, vision_tower=released / "vision")
    (output / "mark").write_text("mine")
    with pytest.raises(ConversionError, match="model exists.*--force"):
        convert_checkpoint(released / "llm", output, vision_tower=released / "vision")
    assert (output / "mark").exists()

    again = convert_checkpoint(released / "llm", output, vision_tower=released / "vision", force=True)
    assert not (output / "mark").exists()
    assert first.content["files"] == again.content["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failure_with_force_keeps_the_old_output(broken):
    output = broken / "model"
    convert_checkpoint(broken / "llm", output, vision_tower=broken / "vision")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    edit_weights(broken / "vision/pytorch_model.bin", lambda w: w["embeddings.layernorm.bias"].fill_(1e6))
    with pytest.raises(ConversionError, match="65504"):
        convert_checkpoint(broken / "llm", output, vision_tower=broken / "vision", dtype="float16", force=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert list_hidden(broken) == []


def test_force_never_deletes_what_is_no_model(released, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(ConversionError, match="not the folder of a model"):
            convert_checkpoint(released / "llm", tmp_path / name, vision_tower=released / "vision", force=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_source_is_never_replaced(broken):
    (broken / "config.json").write_text("{}")
    for output in (broken / "llm", broken / "vision", broken):
        with pytest.raises(ConversionError, match="source as well|holds folders beside a model"):
            convert_checkpoint(broken / "llm", output, vision_tower=broken / "vision", force=True)
    assert (broken / "llm" / "tokenizer.model").exists()


def test_checkpoints_of_a_training_run_are_never_replaced(released, tmp_path):
    convert_checkpoint(released / "vision", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-100").mkdir()
    (tmp_path / "run" / "checkpoint-100" / "weights").write_text("a day of work")
    with pytest.raises(ConversionError, match="checkpoint-100"):
        convert_checkpoint(released / "vision", tmp_path / "run", force=True)
    assert (tmp_path / "run" / "checkpoint-100" / "weights").read_text() == "a day of work"


def test_empty_folder_and_missing_parents_are_fine(released, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a" / "b" / "model"):
        convert_checkpoint(released / "vision", output)
        assert (output / "config.json").exists()
        assert oct(output.stat().st_mode)[-3:] == oct(output.parent.stat().st_mode)[-3:] or os.umask(0o022) >= 0


def test_interruption_leaves_nothing(released, tmp_path, monkeypatch):
    read, calls = CheckpointReader.read, []

    def interrupt(self, name):
        calls.append(name)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(CheckpointReader, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision")
    assert len(calls) == 60
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_in_the_middle_of_writing(released, tmp_path):
    """A real limit of the system (`ulimit -f`) stops the writing of the one weight file of 0.6 MB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(ConversionError, match=os.strerror(errno.EFBIG)) as raised:
            convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Free some space or choose another --output" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# Subprocesses that only read and write call themselves as the command line does: registration is then left out, which
# would load all of transformers.
FULL_DISK = """
import os, subprocess, sys
sys.argv[0] = "convllava"
from pathlib import Path
import torch
from tokenizers import Tokenizer, models
from convllava_hf.checkpoint_io import ConversionError, TensorToWrite, stage_output, write_checkpoint

mount = Path(sys.argv[1])
tensors = [TensorToWrite(str(n), (1000,), torch.float32, lambda: torch.ones(1000)) for n in range(8)]
# Too small to begin with; then bytes enough, but no room for as many files: for the second shard, for the last one, and
# for the tokenizer, whose library is written in Rust and has errors of its own.
for options in ("size=8m", "size=64m,nr_inodes=4", "size=64m,nr_inodes=10", "size=64m,nr_inodes=11"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=True)
    try:
        with stage_output(mount / "model", 32_000, force=False) as folder:
            write_checkpoint(folder, tensors, max_shard_size=4000)
            Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    except ConversionError as error:
        print("REFUSED", options, len(error.__cause__.args) if error.__cause__ else None, error)
    print("LEFT", os.listdir(mount))
    subprocess.run(["umount", mount], check=True)
"""


def test_full_disk(tmp_path):
    """Real file systems without room, mounted in a namespace of this test's own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a file system of its own")
    done = subprocess.run(
        [*unshare, sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["REFUSED", "LEFT"] * 4, done.stdout
    assert set(lines[1::2]) == {"LEFT []"}
    assert "0.01 GB free; expected 0.03 GB" in lines[0]
    assert all(os.strerror(errno.ENOSPC) in line and "Free some space" in line for line in lines[2::2])


def test_disk_that_forgets_is_noticed(released, tmp_path, monkeypatch):
    """What is on the disk is read back: one bit that flips after writing is an error."""

    def write_and_flip(folder, *args):
        files = write_checkpoint(folder, *args)
        path = folder / files[0].name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return files

    monkeypatch.setattr("convllava_hf.conversion.write_checkpoint", write_and_flip)
    with pytest.raises(ConversionError, match="reads back differently"):
        convert_checkpoint(released / "vision", tmp_path / "tower")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_named(tmp_path, caplog):
    stale = tmp_path / ".model.incomplete-0123"
    for folder in (stale, tmp_path / ".other.incomplete-0123"):
        folder.mkdir()
    enable_propagation()
    with stage_output(tmp_path / "model", 0, False) as folder:
        (folder / "config.json").write_text("{}")
    disable_propagation()
    assert [record.getMessage().split()[0] for record in caplog.records] == [str(stale)] and stale.exists()


def test_library_errors_other_than_the_disk_are_not_disguised(tmp_path):
    with pytest.raises(ZeroDivisionError), stage_output(tmp_path / "model", 0, False):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ reading, writing


def test_written_files_are_plain_safetensors(tmp_path):
    """Mixed dtypes stay aligned, empty and scalar tensors pass, and safetensors' own reader agrees."""
    content = {
        "odd": torch.randn(3, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).T,
    }
    tensors = [TensorToWrite(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in content.items()]
    (file,) = write_checkpoint(tmp_path, tensors, 10**9)
    path = tmp_path / file.name
    assert (file.num_bytes, file.sha256) == (path.stat().st_size, hash_file(path))
    loaded = load_file(path)
    assert set(loaded) == set(content)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in content.items())
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % content[name].itemsize == 0
    with pytest.raises(ConversionError, match="'scalar' came as"):
        write_checkpoint(tmp_path, [TensorToWrite("scalar", (2,), torch.float32, lambda: content["scalar"])], 10**9)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_reader(tmp_path, kind):
    content = {"a": torch.randn(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    if kind == "bin":
        torch.save(content, tmp_path / "pytorch_model.bin")
    else:
        save_file(content, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert {name: (stored.shape, stored.dtype) for name, stored in reader.tensors.items()} == {
        "a": ((4, 3), torch.float32),
        "b": ((2,), torch.bfloat16),
    }
    for _ in range(2):
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in content.items())
        reader.close()


MEMORY = """
import resource, sys
sys.argv[0] = "convllava"
from pathlib import Path
import torch
from convllava_hf import checkpoint_io

checkpoint_io.MAPPED_BYTES = 16 * 2**20
reader = checkpoint_io.CheckpointReader(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = [
    checkpoint_io.TensorToWrite(name, stored.shape, stored.dtype, lambda name=name: reader.read(name))
    for name, stored in reader.tensors.items()
]
checkpoint_io.write_checkpoint(Path(sys.argv[2]), tensors, 10**12)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other ways elsewhere")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """160 MB pass into one output file through a process that grows by less than a third of that."""
    (tmp_path / "output").mkdir()
    torch.save({str(number): torch.zeros(2**20) for number in range(40)}, tmp_path / "pytorch_model.bin")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, tmp_path / "output"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "model.safetensors").stat().st_size > 160e6
    assert int(done.stdout) < 50e6


# ------------------------------------------------------------------------------------------------------------- Hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as listing and downloading two repositories takes."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, Path]
    fetched: set[str]

    def answer(self, code: int, body: bytes = b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        name = "/".join(path[2:4] if is_api else path[:2])
        if name not in self.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        commit = hashlib.sha1(name.encode()).hexdigest()
        files = {path.name: path for path in sorted(self.repositories[name].iterdir())}
        if is_api and path[4:5] == ["tree"]:
            answer = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": "0" * 40} for f, p in files.items()]
            return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        if is_api:
            answer = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        data = files[path[-1]].read_bytes()
        self.fetched.add(path[-1])
        self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    """A Hub on this machine with the reference checkpoint; yields the names of the files that were fetched."""
    shutil.copytree(released / "llm", tmp_path / "hub")
    (tmp_path / "hub" / "training_args.bin").write_text("not needed")
    Hub.repositories = {"ConvLLaVA/tiny": tmp_path / "hub", "ConvLLaVA/ConvLLaVA-ConvNeXt-tiny": released / "vision"}
    Hub.fetched = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield Hub.fetched
    server.shutdown()


def test_hub_ids(hub, tmp_path, monkeypatch):
    """Both repositories come from the Hub: what is needed is fetched, and the commits are recorded."""
    report = convert_checkpoint("ConvLLaVA/tiny", tmp_path / "model", revision="v1")
    names = ["ConvLLaVA/tiny", "ConvLLaVA/ConvLLaVA-ConvNeXt-tiny"]
    commits = [hashlib.sha1(name.encode()).hexdigest() for name in names]
    assert [(source["name"], source["revision"]) for source in report.content["sources"]] == list(
        zip(names, commits, strict=True)
    )
    card = (report.output / "README.md").read_text()
    assert "base_model:\n- ConvLLaVA/tiny\n- ConvLLaVA/ConvLLaVA-ConvNeXt-tiny" in card
    assert all(commit in card for commit in commits)
    assert hub >= {"pytorch_model-00001-of-00002.bin", "tokenizer.model", "preprocessor_config.json"}
    assert "training_args.bin" not in hub

    with pytest.raises(ConversionError, match=r"'ConvLLaVA/absent' is no folder .* Pass a Hub id or a folder\.$"):
        convert_checkpoint("ConvLLaVA/absent", tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = convert_checkpoint("ConvLLaVA/tiny", tmp_path / "again", revision=commits[0])
    assert again.content["sources"][0]["revision"] == commits[0]
