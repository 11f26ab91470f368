"""Deltas: released weights minus those of the LLaMA that they were trained from, and the way back.

Both directions stream: a tensor is read, added and written a block of rows at a time, so memory stays near that of the
imports whatever the size of the model. An interrupted run is continued by the same command.

Notation: `R` rows of the base's vocabulary, `V` rows of the delta's, `V >= R`.

Source: haotian-liu/LLaVA and SALT-NLP/LLaVAR, `llava/model/apply_delta.py` and `make_delta.py`. They hold both models
in memory as float16 and add in place. Here as there both operands are rounded to float16 first; the sum of two float16
numbers, taken in float32 and rounded, is their float16 sum.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from .. import __version__
from ..checkpoints.reading import read_json
from ..checkpoints.staging import check_output, stage_output
from ..checkpoints.weight_maps import ConversionError
from ..checkpoints.writing import TensorToWrite, measure_peak_memory, parse_size, remove_notes, write_checkpoint
from .llava_family import FINAL_NORM, looks_like_delta
from .sources import Source, find_source
from .writer import DELTA_REPORT, ConversionReport


# Tables with a row per word, which may have more rows in the delta.
VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
PROJECTOR = "model.mm_projector."
ROTARY_BUFFER = ".rotary_emb.inv_freq"
# Both operands of a block are mapped at a time, and let go of before the next.
BLOCK_BYTES = 32 * 2**20
# Written beside a delta of ours: SHA-256 of every tensor of the base that it belongs to, as float16.
ORIGIN = "delta_origin.json"


def apply_delta(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> ConversionReport:
    """Merges a released delta with its LLaMA; bit-identical to what the original's `apply_delta` writes.

    Args:
        base: Hub id or folder of the LLaMA.
        delta: Hub id or folder of the delta.
        output: folder to make, in the delta's layout as safetensors. [`convert_checkpoint`] takes it on.
        base_revision, delta_revision: branch, tag or commit on the Hub.
        max_shard_size: bytes per weight file, or such as `"5GB"`.
        force: replace `output` if it is the folder of a model.

    Returns:
        The report; it also lies in the output.

    Raises:
        ConversionError: a base that is not the delta's, anything missing or damaged, or no room for the result.
    """
    fix = "Pass --base and --delta with a Hub id or a folder each."
    sources = [find_source(base, base_revision, "base", fix), find_source(delta, delta_revision, "delta", fix)]
    return _combine("merged checkpoint", *sources, output, 1, max_shard_size, force)


def make_delta(
    base: str | Path,
    target: str | Path,
    output: str | Path,
    *,
    base_revision: str | None = None,
    target_revision: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> ConversionReport:
    """Takes the base off a checkpoint, as the original's `make_delta` does: the inverse of [`apply_delta`].

    float16 cannot hold every difference: the report counts the values that do not come back bit for bit. The hashes of
    the base are written beside the delta, and [`apply_delta`] refuses any other base.

    Args:
        base: Hub id or folder of the LLaMA.
        target: Hub id or folder of the checkpoint in the original layout.
        output, base_revision, target_revision, max_shard_size, force: as for [`apply_delta`].

    Returns:
        The report; it also lies in the output.

    Raises:
        ConversionError: as for [`apply_delta`].
    """
    fix = "Pass --base and --target with a Hub id or a folder each."
    sources = [find_source(base, base_revision, "base", fix), find_source(target, target_revision, "target", fix)]
    return _combine("delta", *sources, output, -1, max_shard_size, force)


def _combine(
    kind: str, base: Source, other: Source, output: str | Path, sign: int, max_shard_size: int | str, force: bool
) -> ConversionReport:
    """Writes `other + sign * base`, and the small files of `other`."""
    started = time.monotonic()
    output, max_shard_size = Path(os.path.expanduser(output)).resolve(), parse_size(max_shard_size)
    for source in (base, other):
        if output == source.folder or output in source.folder.parents or source.folder in output.parents:
            raise ConversionError(f"{output} and the {source.role} {source.folder} overlap. Choose another --output.")
    check_output(output, force)
    base.open()
    other.open()
    shared = check_pair(base, other, sign)
    names = [name for name in other.tensors if not name.endswith(ROTARY_BUFFER)]
    not_restored = dict.fromkeys(names, 0)
    tensors = []
    for name in names:
        load = partial(_iterate_sum, base if name in shared else None, other, name, sign, not_restored)
        tensors.append(TensorToWrite(name, other.tensors[name].shape, torch.float16, load))
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    files = [path for source in (base, other) for path in source.reader.files]
    to_hash = num_bytes + sum(path.stat().st_size for path in files)
    # The same inputs find what an interrupted run has finished.
    identity = [kind, max_shard_size, [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    resume = key if sign > 0 else None  # the values that do not come back have to be counted in one go
    with stage_output(output, num_bytes, force, resume) as folder:
        with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing", disable=None) as progress:
            written = write_checkpoint(folder, tensors, max_shard_size, progress, resume is not None)
        _copy_small_files(other.folder, folder)
        if sign < 0:
            origin = {name: _hash_tensor(base, name) for name in sorted(shared)}
            (folder / ORIGIN).write_text(json.dumps({"base": base.name, "sha256": origin}, indent=1) + "\n")
        with tqdm(total=to_hash, unit="B", unit_scale=True, desc="checking", disable=None) as progress:
            hashed = [source.describe(progress) for source in (base, other)]
            for file in written:
                file.check(folder, progress)
        remove_notes(folder)
        content = {
            "convllava_hf": __version__,
            "kind": kind,
            "sources": hashed,
            "counts": {
                "summed" if sign > 0 else "subtracted": len(shared),
                "copied": len(names) - len(shared),
                "left out": len(other.tensors) - len(names),
            },
            **({"not_restored": sum(not_restored.values())} if sign < 0 else {}),
            "dtype": "float16",
            "files": [file.describe() for file in written],
            "seconds": round(time.monotonic() - started, 3),
            "peak_memory_bytes": measure_peak_memory(),
        }
        (folder / DELTA_REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return ConversionReport(output, content)


def check_pair(base: Source, other: Source, sign: int) -> set[str]:
    """Checks that two checkpoints belong together, before anything is written.

    Args:
        base: the LLaMA.
        other: the delta (`sign` 1), or the checkpoint to make one of (`sign` -1).
        sign: see above.

    Returns:
        Names of the tensors that both have, without rotary buffers.

    Raises:
        ConversionError: the base has other layers, shapes, words or values than the one that `other` was made from; or
            the two are not what they are said to be.
    """
    what = f"the base {base.name} is not the one that the {other.role} {other.name} was made from"
    fix = "Pass the right --base."
    for source, is_delta in ((base, False), (other, sign > 0)):
        buffers = [name for name in source.tensors if name.endswith(ROTARY_BUFFER)]
        if buffers and (not source.reader.read(buffers[0]).any()) != is_delta:
            found, expected = ("other values than 0", "a delta") if is_delta else ("only zeros", "whole weights")
            raise ConversionError(
                f"the {source.role} {source.name} has {found} in {buffers[0]!r}; expected {expected}. Check which "
                "folder is which."
            )
        if looks_like_delta(source) != is_delta:
            found, expected = ("whole weights", "a delta") if is_delta else ("a delta", "whole weights")
            raise ConversionError(
                f"the {source.role} {source.name} holds {found}, by its {FINAL_NORM!r}; expected {expected}. Check "
                "which folder is which."
            )
    shared = {name for name in base.tensors if not name.endswith(ROTARY_BUFFER)}
    projectors = sorted(name for name in shared if name.startswith(PROJECTOR))
    if projectors:
        raise ConversionError(
            f"the base {base.name} holds {projectors[0]!r}; expected a LLaMA without projector. {fix}"
        )
    for name in sorted(shared - other.tensors.keys()):
        raise ConversionError(f"{what}: it has {name!r}, which the {other.role} lacks. {fix}")
    for name, stored in other.tensors.items():
        if name.startswith(PROJECTOR) or name.endswith(ROTARY_BUFFER):
            continue
        if name not in shared:
            raise ConversionError(f"{what}: it lacks {name!r}. {fix}")
        expected, found = stored.shape, base.tensors[name].shape
        extra = expected[0] - found[0] if name in VOCABULARY_TABLES else 0
        if found != (expected[0] - max(extra, 0), *expected[1:]):
            raise ConversionError(f"{what}: {name!r} has shape {found} in it; expected {expected}. {fix}")
        added = _read_added_tokens(other) - _read_added_tokens(base)
        if name in VOCABULARY_TABLES and added and extra != len(added):
            raise ConversionError(
                f"{what}: {name!r} has {found[0]} rows in it; expected {expected[0] - len(added)}, as {len(added)} of "
                f"the {expected[0]} rows of the {other.role} are of added tokens. {fix}"
            )
    tokenizers = [source.folder / "tokenizer.model" for source in (base, other)]
    if all(path.is_file() for path in tokenizers) and len({path.read_bytes() for path in tokenizers}) > 1:
        raise ConversionError(f"{what}: their tokenizer.model differ, so they have other vocabularies. {fix}")
    if sign > 0 and (other.folder / ORIGIN).is_file():
        for name, known in read_json(other.folder / ORIGIN).get("sha256", {}).items():
            found = _hash_tensor(base, name) if name in shared else None
            if found != known:
                raise ConversionError(
                    f"{what}: SHA-256 of its {name!r} as float16 is {found}; expected {known}, from {ORIGIN}. {fix}"
                )
    return shared


def _read_added_tokens(source: Source) -> set[str]:
    path = source.folder / "added_tokens.json"
    return set(read_json(path)) if path.is_file() else set()


def _iterate_blocks(source: Source, name: str) -> Iterator[torch.Tensor]:
    """The rows of a tensor as float16, a block at a time, in memory of their own."""
    shape = source.tensors[name].shape
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_BYTES // (2 * max(1, torch.Size(shape[1:]).numel())))
    for start in range(0, rows, step):
        block = source.reader.read(name)
        block = (block[start : start + step] if shape else block).to(torch.float16, copy=True)
        source.reader.close()
        yield block


def _iterate_sum(
    base: Source | None, other: Source, name: str, sign: int, not_restored: dict[str, int]
) -> Iterator[torch.Tensor]:
    """Blocks of `other + sign * base`; rows that the base does not have are those of `other`."""
    blocks = _iterate_blocks(base, name) if base is not None else iter(())
    not_restored[name] = 0
    for block in _iterate_blocks(other, name):
        addend = next(blocks, None)
        if addend is not None:
            before = block.clone() if sign < 0 else None
            summed = block[: len(addend)]  # a view
            summed.add_(addend, alpha=sign)
            if sign < 0:
                not_restored[name] += int((summed + addend != before[: len(addend)]).sum())
        yield block


def _hash_tensor(source: Source, name: str) -> str:
    digest = hashlib.sha256()
    for block in _iterate_blocks(source, name):
        digest.update(memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _copy_small_files(source: Path, folder: Path):
    """Copies configuration and tokenizer."""
    for path in sorted(source.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.suffix in (".json", ".model", ".txt") and not is_index and path.name not in (DELTA_REPORT, ORIGIN):
            shutil.copyfile(path, folder / path.name)
