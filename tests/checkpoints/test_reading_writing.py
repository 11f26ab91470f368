"""Checkpoints are read and written tensor by tensor."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from convllava_hf.checkpoints.reading import CheckpointReader, hash_file
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.checkpoints.writing import TensorToWrite, parse_size, write_checkpoint
from convllava_hf.conversion.convert import convert_checkpoint


def test_a_file_that_the_system_does_not_map(reference, tmp_path, monkeypatch):
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision/model.safetensors").touch()

    def refuse(*arguments, **kwargs):
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)")

    monkeypatch.setattr("convllava_hf.checkpoints.reading.safe_open", refuse)
    with pytest.raises(ConversionError, match=r"\(12\)"):
        convert_checkpoint(tmp_path / "vision", tmp_path / "output")


def test_sizes():
    assert [parse_size(size) for size in (7, "7", "7B", "2KB", "3 MB", "5gb")] == [
        7,
        7,
        7,
        2000,
        3_000_000,
        5_000_000_000,
    ]


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
    with pytest.raises(ConversionError, match="'scalar'"):
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
from convllava_hf.checkpoints import reading
from convllava_hf.checkpoints.writing import TensorToWrite, write_checkpoint

reading.MAPPED_BYTES = 16 * 2**20
reader = reading.CheckpointReader(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = [
    TensorToWrite(name, stored.shape, stored.dtype, lambda name=name: reader.read(name))
    for name, stored in reader.tensors.items()
]
write_checkpoint(Path(sys.argv[2]), tensors, 10**12)
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
