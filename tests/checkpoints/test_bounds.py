"""Small files that would take a machine: each is refused by name before it does."""

import os
import struct
import zipfile

import pytest
import torch
from tiny_checkpoint import build_tokenizer

from convllava_hf.checkpoints.reading import CheckpointReader, open_pickle, read_json, read_tensors
from convllava_hf.checkpoints.shapes import check_counts, find_relabelled, read_header
from convllava_hf.checkpoints.templates import render_chat_template
from convllava_hf.checkpoints.weight_maps import ConversionError


def test_tensors_that_repeat_themselves_are_refused(tmp_path):
    """A pickle of a kilobyte with a tensor of 4 TB, and one with a small tensor under a thousand names."""
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.bin")
    with pytest.raises(ConversionError, match="'x' of 4000000000000 bytes in 4"):
        open_pickle(tmp_path / "a.bin")
    shared = torch.zeros(10_000)
    torch.save({str(number): shared for number in range(1000)}, tmp_path / "b.bin")
    with pytest.raises(ConversionError, match=r"b\.bin"):
        open_pickle(tmp_path / "b.bin")
    torch.save({"embeddings": shared, "tied": shared}, tmp_path / "c.bin")
    assert len(open_pickle(tmp_path / "c.bin")) == 2


def test_compressed_pickles_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + bytes(50_000_000))
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 100_000
    for read in (CheckpointReader, lambda folder: read_header(open(folder / "pytorch_model.bin", "rb"), "a.bin")):
        with pytest.raises(ConversionError, match=r"data\.pkl"):
            read(tmp_path)


def test_a_pickle_that_numbers_its_objects_far_up_takes_no_memory(tmp_path):
    """Python's unpickler would make a table of 34 GB for this one of a few bytes."""
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    with open(tmp_path / "a.bin", "rb") as file, pytest.raises(ConversionError, match=str(2**31 - 1)):
        read_header(file, "a.bin")


def test_a_header_that_claims_terabytes_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with open(tmp_path / "x.safetensors", "rb") as file, pytest.raises(ConversionError, match=str(2**40)):
        read_header(file, "x.safetensors")


def test_pipes_are_no_files(tmp_path):
    """Reading one would wait for ever."""
    for name in ("model.safetensors", "config.json", "mm_projector.bin"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(ConversionError, match="model.safetensors"):
        CheckpointReader(tmp_path)
    with pytest.raises(ConversionError, match="config.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ConversionError, match="mm_projector.bin"):
        read_tensors(tmp_path / "mm_projector.bin")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_nested_json_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConversionError, match="x.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("index", [{"a": 1}, {"a": ["x"]}, {"a": None}, {"a": "../x"}, {"a": "b\\c"}])
def test_an_index_names_files_beside_it(tmp_path, index):
    import json

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ConversionError, match="model.safetensors.index.json"):
        CheckpointReader(tmp_path)


def test_a_configuration_of_more_layers_than_tensors_is_refused():
    for config in (
        {"num_hidden_layers": 10**6},
        {"vision_config": {"depths": [3, 10**6]}},
        {"text_config": {"n_layers": 10**6}},
    ):
        with pytest.raises(ConversionError, match="1000000.*400"):
            check_counts(config, 400)
    check_counts({"num_hidden_layers": 80, "depths": [3, 3, 27]}, 400)


class Templated:
    """A processor that renders as transformers' do."""

    def __init__(self, template: str):
        self.tokenizer = build_tokenizer()
        self.tokenizer.chat_template = template

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 'a' * 9999999999 }}", "MB of memory"),
        ("{{ 'a' * 2000000 }}", "2000000 characters"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "more than 2 s|does not end",
        ),
        ("{{ raise_exception('no') }}", "cannot be rendered: no"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
        ("{% for", "cannot be rendered"),
    ],
)
def test_templates_are_rendered_with_limits(template, problem, monkeypatch):
    monkeypatch.setattr("convllava_hf.checkpoints.templates.MAX_SECONDS", 2)
    with pytest.raises(ConversionError, match=problem):
        render_chat_template(Templated(template), [{"role": "user", "content": "hello"}])


def test_templates_render_as_they_do_without_limits():
    template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    assert render_chat_template(Templated(template), [{"role": "user", "content": "hello"}]) == "hello!"


def test_numbers_that_are_read_as_another_dtype_are_seen():
    torch.manual_seed(0)
    for weights in (torch.randn(64, 64) * 0.02, torch.rand(64, 64) - 0.5, torch.randn(64, 64)):
        half, brain = weights.half(), weights.bfloat16()
        assert find_relabelled(half) is None and find_relabelled(brain) is None
        assert find_relabelled(brain.view(torch.float16)) == "bfloat16"
        assert find_relabelled(half.view(torch.bfloat16)) == "float16" or weights.std() > 0.4
    for plain in (torch.zeros(64, 64), torch.ones(64, 64), torch.eye(64)):
        assert find_relabelled(plain.half()) is None and find_relabelled(plain.bfloat16()) is None
