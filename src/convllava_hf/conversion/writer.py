"""Writes a checkpoint out of sources and accounts for every tensor of them in `conversion_report.json`.

Weights stream from the sources to the output, and the result is read back and checked before it gets its name.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig

from .. import __version__
from ..checkpoints.cards import build_model_card
from ..checkpoints.reading import CheckpointReader, name_dtype, read_json
from ..checkpoints.shapes import list_shapes
from ..checkpoints.staging import check_output, stage_output
from ..checkpoints.weight_maps import ConversionError
from ..checkpoints.writing import TensorToWrite, measure_peak_memory, parse_size, write_checkpoint
from .sources import Source
from .vocabulary import Vocabulary, extend_rows


# What a delta, or a checkpoint that was merged from one, says about itself in the place of `conversion_report.json`.
DELTA_REPORT = "delta_report.json"
DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What becomes of a tensor. The first three account for all tensors of the sources, all but "dropped" for the output's.
ACTIONS = ("renamed", "extended", "dropped", "initialised")


@dataclass
class ConversionReport:
    """What was done; also a file in the output.

    Attributes:
        output (`Path`): the new checkpoint.
        content (`dict`): sources with hashes, counts, the files written; of a conversion also every tensor and the
            checks that passed.
    """

    output: Path
    content: dict

    def summary(self) -> str:
        """A few lines for people."""
        content = self.content
        lines = [f"{content['kind']} -> {self.output}"]
        for source in content["sources"]:
            revision = f" at {source['revision'][:12]}" if source["revision"] else ""
            lines.append(f"  from     {source['role']}: {source['name']}{revision}")
        counts = ", ".join(f"{number} {action}" for action, number in content["counts"].items() if number)
        lines.append(f"  tensors  {counts}")
        for reason, number in content.get("dropped", {}).items():
            lines.append(f"  dropped  {number}: {reason}")
        if vocabulary := content.get("vocabulary"):
            added = ", ".join(f"{token} = {number}" for token, number in vocabulary["added"].items()) or "no new token"
            lines.append(f"  words    {vocabulary['rows_before']} -> {vocabulary['rows_after']} rows; {added}")
        if "not_restored" in content:
            lines.append(f"  exact    all but {content['not_restored']} values come back bit for bit")
        size = sum(file["bytes"] for file in content["files"])
        lines.append(f"  wrote    {len(content['files'])} weight file(s), {size / 1e9:.3f} GB, {content['dtype']}")
        if "checks" in content:
            lines.append(f"  checked  {'; '.join(content['checks'])}")
        peak = content["peak_memory_bytes"]
        memory = f"{peak / 1e9:.2f} GB of memory at the peak" if peak else "memory is not measured on this system"
        lines.append(f"  took     {content['seconds']:.1f} s, {memory}")
        return "\n".join(lines)


def plan_weights(
    shapes: dict[str, tuple[int, ...]],
    sources: Sequence[Source],
    *,
    dtype: torch.dtype | None = None,
    vocabulary: Vocabulary | None = None,
    fresh: Callable[[str], Callable[[], torch.Tensor] | None] = lambda name: None,
    tied: Sequence[str] = (),
) -> tuple[list[TensorToWrite], list[dict]]:
    """Says for every tensor of a new model where it comes from, and for every tensor of the sources where it goes.

    Args:
        shapes: name -> shape of everything that the new model stores.
        sources: with their tensors renamed; fresh tensors get the dtype of the first one.
        dtype: of all floating-point tensors; `None` keeps each as it is stored.
        vocabulary: which tensors grow, and how.
        fresh: gives for a name that no source has a function that makes the tensor, or `None`.
        tied: names that the new model does not store because they share another tensor's memory.

    Returns:
        What to write, in the order of `shapes`, and one record per tensor for the report.

    Raises:
        ConversionError: a missing tensor, one that has no place, or one of another shape.
    """
    origins, tensors, records = {}, [], []
    for source in sources:
        dropped = dict(source.dropped)
        for target, name in source.targets.items():
            if target in tied:
                dropped[name] = "shares the memory of the input embeddings"
            elif target not in shapes:
                raise ConversionError(
                    f"the {source.role} {source.name} holds {name!r}, for which the model of its config.json has no "
                    f"place (it would be {target!r}); expected weights and config.json of one model. Get both again."
                )
            else:
                origins[target] = (source, name)
        for name, reason in dropped.items():
            stored = source.tensors[name]
            records.append(
                {"action": "dropped", **_describe(source, name), "shape": list(stored.shape), "reason": reason}
            )

    first = next(iter(sources[0].tensors.values())).dtype
    missing = []
    for target, shape in shapes.items():
        if target not in origins:
            load, new_dtype = fresh(target), dtype or first
            action, origin = "initialised", {}
            if load is None:
                missing.append(target)
                continue
        else:
            source, name = origins[target]
            stored, origin = source.tensors[name], _describe(source, name)
            new_dtype = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
            load, action, expected = (lambda source=source, name=name: source.reader.read(name)), "renamed", shape
            if vocabulary and target in vocabulary.tensors:
                expected, action = (vocabulary.rows_before, *shape[1:]), "extended"
                load = _extending(load, vocabulary, distinct=target == vocabulary.tensors[0])
            elif stored.shape == (*shape, 1, 1):  # small timm models hold pointwise layers as 1x1 convolutions
                expected, load = stored.shape, lambda load=load, shape=shape: load().reshape(shape)
            if stored.shape != expected:
                raise ConversionError(
                    f"{name!r} of the {source.role} {source.name} ({stored.file}) has shape {stored.shape}; expected "
                    f"{expected} from its config.json. Check config.json, or get both again."
                )
        tensors.append(TensorToWrite(target, shape, new_dtype, _casting(load, target, new_dtype)))
        records.append(
            {"action": action, **origin, "target": target, "shape": list(shape), "target_dtype": name_dtype(new_dtype)}
        )
    if missing:
        raise ConversionError(
            f"{len(missing)} tensors are in no source, the first of them {missing[0]!r}; expected everything that "
            "config.json describes. The checkpoint is incomplete or not of this model: get it again."
        )
    return tensors, records


def _describe(source: Source, name: str) -> dict:
    stored = source.tensors[name]
    return {"source": source.role, "name": name, "file": stored.file, "dtype": name_dtype(stored.dtype)}


def _extending(load: Callable[[], torch.Tensor], vocabulary: Vocabulary, distinct: bool) -> Callable[[], torch.Tensor]:
    return lambda: extend_rows(load(), vocabulary.rows_after, vocabulary.new_rows, vocabulary.num_words, distinct)


def _casting(load: Callable[[], torch.Tensor], name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    def load_cast() -> torch.Tensor:
        tensor = load()
        if dtype == torch.float16 and tensor.dtype != dtype and tensor.abs().max() > torch.finfo(dtype).max:
            raise ConversionError(
                f"{name!r} has values up to {tensor.abs().max().item():.3g}; expected at most 65504, the largest of "
                "float16. Pass --dtype bfloat16."
            )
        return tensor.to(dtype)

    return load_cast


def check_stored(folder: Path, model: nn.Module, config: PreTrainedConfig):
    """Compares names and shapes of what was saved with those of a model that the saved configuration describes."""
    shapes, _ = list_shapes(model, config)
    stored = {name: tensor.shape for name, tensor in CheckpointReader(folder).tensors.items()}
    if stored != shapes:
        wrong = sorted(name for name in {*stored, *shapes} if stored.get(name) != shapes.get(name))
        raise ConversionError(f"the saved config.json does not describe the saved {wrong[0]!r}. Please report this.")


class CheckpointWriter:
    """Where and how to write. Mistakes in these arguments are found before anything is read or fetched.

    Args: as for [`convert_checkpoint`].
    """

    def __init__(self, output: str | Path, dtype: str, max_shard_size: int | str, force: bool):
        if dtype not in DTYPES:
            raise ConversionError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}.")
        self.started = time.monotonic()
        self.output = Path(os.path.expanduser(output)).resolve()
        self.dtype = DTYPES[dtype]
        self.max_shard_size = parse_size(max_shard_size)
        self.force = force
        check_output(self.output, force)

    def write(
        self,
        content: dict,
        sources: Sequence[Source],
        tensors: Sequence[TensorToWrite],
        records: list[dict],
        save: Callable[[Path], None],
        check: Callable[[Path], list[str]],
    ) -> ConversionReport:
        """Writes a checkpoint into a folder of its own, reads it back, and only then gives it its name.

        Args:
            content: first entries of the report.
            sources, tensors, records: see `plan_weights`.
            save: writes everything but the weights into a folder.
            check: reads a folder back; returns what it found right.
        """
        for source in sources:
            for part in source.parts:
                if self.output == part.folder or self.output in part.folder.parents:
                    raise ConversionError(f"{self.output} is, or holds, a source as well. Choose another --output.")
        actions = Counter(record["action"] for record in records)
        num_read = sum(len(source.tensors) for source in sources)
        if num_read != sum(actions[key] for key in ACTIONS[:3]):
            raise ConversionError(
                f"{num_read} tensors were read, but {dict(actions)} accounted for. Please report this."
            )
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        files = [path for source in sources for part in source.parts for path in part.reader.files]
        to_check = num_bytes + sum(path.stat().st_size for path in files)
        with stage_output(self.output, num_bytes, self.force) as folder:
            with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="writing", disable=None) as progress:
                files = write_checkpoint(folder, tensors, self.max_shard_size, progress)
            save(folder)
            with tqdm(total=to_check, unit="B", unit_scale=True, desc="checking", disable=None) as progress:
                hashed = [part.describe(progress) for source in sources for part in source.parts]
                for source in sources:
                    if (source.folder / DELTA_REPORT).is_file():
                        merged = read_json(source.folder / DELTA_REPORT)["sources"]
                        hashed += [{**part, "role": f"{part['role']} of {source.name}"} for part in merged]
                for file in files:
                    file.check(folder, progress)
            dtypes = {name: stored.dtype for name, stored in CheckpointReader(folder).tensors.items()}
            if dtypes != {tensor.name: tensor.dtype for tensor in tensors}:
                raise ConversionError("the tensors read back have other names or dtypes. Please report this.")
            content = {
                "convllava_hf": __version__,
                **content,
                "dtype": "dtypes as stored" if self.dtype is None else name_dtype(self.dtype),
                "sources": hashed,
                "counts": {"read": num_read, **{key: actions[key] for key in ACTIONS}, "written": len(tensors)},
                "dropped": dict(Counter(record["reason"] for record in records if record["action"] == "dropped")),
                "files": [file.describe() for file in files],
                "checks": ["files read back with the hashes of what was written", *check(folder)],
                "seconds": round(time.monotonic() - self.started, 3),
                "peak_memory_bytes": measure_peak_memory(),
                "tensors": records,
            }
            card = build_model_card(self.output.name, content)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / "conversion_report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return ConversionReport(self.output, content)
