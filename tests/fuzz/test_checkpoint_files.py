"""Files of strangers, mutated at random: readers raise a ConversionError of one line or give what is there, and never
anything else. Nothing in a file runs, and no file of kilobytes takes megabytes.

Seeded by the number of the round, which a failure names. A small run by default, a long one marked `slow`.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from convllava_hf.checkpoints.adapters import read_adapter
from convllava_hf.checkpoints.cards import build_folder_card
from convllava_hf.checkpoints.code_files import find_foreign_code, list_code_files
from convllava_hf.checkpoints.reading import CheckpointReader, open_pickle
from convllava_hf.checkpoints.shapes import check_counts, read_header
from convllava_hf.checkpoints.staging import list_foreign
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.hub.info import describe_checkpoint


FEW, MANY = 150, 10_000
ROUNDS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
TENSORS = {"model.a.weight": torch.ones(3, 4), "model.b.weight": torch.zeros(2, dtype=torch.float16)}
# What takes the place of a value; large numbers, wrong types, names that lead elsewhere, deep nesting.
ODD = [
    None,
    True,
    -1,
    0,
    10**6,
    2**63,
    10**30,
    1.5,
    float("inf"),
    "",
    "../x",
    "/etc/passwd",
    "a\0b",
    [],
    {},
    [[]],
    [{}],
]
ODD += [{"a": None}, ["x"] * 3, {"AutoConfig": ["../x.y"]}, "x" * 10_000]


def check(read, number: int):
    """Runs a reader on what was made of round `number`."""
    try:
        read()
    except ConversionError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, f"round {number}"
    except Exception as error:
        raise AssertionError(f"round {number}: {type(error).__name__}: {error}") from error


def mutate_bytes(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.choice([1, 1, 2, 8])):
        start = dice.randrange(len(data)) if data else 0
        kind = dice.randrange(5)
        if kind == 0 and data:
            data[start] = dice.randrange(256)
        elif kind == 1:
            del data[start : start + dice.choice([1, 4, 100])]
        elif kind == 2:
            data[start:start] = dice.randbytes(dice.choice([1, 4, 100]))
        elif kind == 3:
            data[start:start] = data[: dice.randrange(64)]
        else:
            data[start : start + 8] = struct.pack("<Q", dice.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
    return bytes(data)


def mutate_json(value, dice: random.Random):
    """Replaces, removes or adds values somewhere in a document."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.75:
        copy = value.copy()
        key = dice.choice(list(copy)) if isinstance(copy, dict) else dice.randrange(len(copy))
        chance = dice.random()
        if chance < 0.1:
            del copy[key]
        else:
            copy[key] = mutate_json(copy[key], dice)
        return copy
    return dice.choice(ODD)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_headers_of_safetensors(rounds, tmp_path):
    whole = save(TENSORS)
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    for number in range(rounds):
        dice = random.Random(number)
        if number % 2:
            text = json.dumps(mutate_json(header, dice)).encode()
            content = struct.pack("<Q", len(text)) + text + whole[8 + size :]
        else:
            content = mutate_bytes(whole, dice)
        check(lambda content=content: read_header(io.BytesIO(content), "model.safetensors"), number)
        if number % 5 == 0:
            (tmp_path / "model.safetensors").write_bytes(content)
            check(
                lambda: [CheckpointReader(tmp_path).read(name) for name in CheckpointReader(tmp_path).tensors], number
            )


class Touch:
    """Unpickled without care, this runs a command that makes a file."""

    def __init__(self, path: Path, way: int):
        self.path, self.way = path, way

    def __reduce__(self):
        calls = [
            (os.system, (f"touch {self.path}",)),
            (eval, (f"open({str(self.path)!r}, 'w')",)),
            (open, (str(self.path), "w")),
            (getattr, (Path(self.path), "touch")),
        ]
        return calls[self.way % len(calls)]


def pack(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(48))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


@pytest.mark.parametrize("rounds", ROUNDS)
def test_pickles(rounds, tmp_path):
    buffer, ran = io.BytesIO(), tmp_path / "ran"
    torch.save(TENSORS, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    for number in range(rounds):
        dice = random.Random(number)
        kind = number % 4
        if kind == 0:
            content = mutate_bytes(buffer.getvalue(), dice)
        elif kind == 1:
            content = pack(mutate_bytes(pickled, dice))
        elif kind == 2:
            payload = {"x": [Touch(ran, dice.randrange(4))]} if dice.random() < 0.5 else Touch(ran, dice.randrange(4))
            content = pack(pickle.dumps(payload, protocol=dice.randrange(2, 6)))
        else:
            content = pack(mutate_bytes(pickled, dice), zipfile.ZIP_DEFLATED)
        check(lambda content=content: read_header(io.BytesIO(content), "pytorch_model.bin"), number)
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(content)
        check(lambda path=path: open_pickle(path), number)
        assert not ran.exists(), f"round {number} ran what was in it"


DOCUMENTS = {
    "config.json": {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_convllava.ConvLlavaConfig"},
        "quantization_config": {"quant_method": "bitsandbytes"},
        "text_config": {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8},
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
    },
    "conversion_report.json": {
        "convllava_hf": "0",
        "kind": "model",
        "sources": [{"role": "a", "name": "b", "revision": None, "files": [{"name": "x", "bytes": 1, "sha256": "0"}]}],
        "counts": {"read": 1},
        "image_tokens": [[1, 1, 1]],
        "files": [{"name": "model.safetensors", "sha256": "0"}],
    },
    "tokenizer_config.json": {"chat_template": "{{ messages }}", "auto_map": {"AutoTokenizer": ["a.b", None]}},
    "model.safetensors.index.json": {"metadata": {}, "weight_map": {"model.a.weight": "model.safetensors"}},
    "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "a/b", "r": 8, "auto_mapping": {}},
    ".convllava-manifest.json": {"files": {"config.json": {"bytes": 1}}},
}


@pytest.mark.parametrize("rounds", ROUNDS)
def test_json_of_checkpoints(rounds, tmp_path):
    for number in range(rounds):
        dice = random.Random(number)
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        (tmp_path / "c").mkdir()
        changed = dice.choice(list(DOCUMENTS))
        for name, document in DOCUMENTS.items():
            text = json.dumps(mutate_json(document, dice) if name == changed else document)
            if name == changed and dice.random() < 0.2:
                text = dice.choice(["[" * 100_000, text[: len(text) // 2], '{"a":' * 50_000, "\ufeff{}", ""])
            (tmp_path / "c" / name).write_text(text)
        if dice.random() < 0.3:
            (tmp_path / "c" / "config.json").unlink()  # then it is an adapter
        name = "adapter_model.safetensors" if dice.random() < 0.3 else "model.safetensors"
        (tmp_path / "c" / name).write_bytes(save(TENSORS))
        folder = tmp_path / "c"
        readers = [
            CheckpointReader,
            find_foreign_code,
            list_code_files,
            read_adapter,
            list_foreign,
            describe_checkpoint,
        ]
        for read in [*readers, build_folder_card]:
            check(lambda read=read, folder=folder: read(folder), number)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_counts_in_configurations(rounds):
    for number in range(rounds):
        config = mutate_json(DOCUMENTS["config.json"], random.Random(number))
        if isinstance(config, dict):
            check(lambda config=config: check_counts(config, 100), number)
