"""`convllava export`: checks, traces, writes, runs what was written, and only then gives it its name."""

import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from ..checkpoints.architecture import check_source
from ..checkpoints.staging import EXPORT_MANIFEST, check_output, stage_output
from ..checkpoints.weight_maps import ConversionError
from ..inference.load import load
from ..inference.runtime import SUFFIXES, load_export
from .agreement import Agreement, compare, make_probes
from .gguf import check_gguf, write_gguf
from .graphs import check_exportable, split_model
from .web import adapt_to_web, check_web
from .write import PACKAGES, check_packages, write_graphs


TARGETS = ("onnx", "openvino", "executorch", "web", "gguf")
FLOAT32_ONLY = {"gguf": "none for gguf (llama.cpp's own llama-quantize does it)", "executorch": "none for executorch"}
# What the graphs of ExecuTorch reserve memory for, in tokens of prompt and answer.
LONGEST_TEXT = 2048
# Ours, and transformers' own for LLaVA v1.5, LLaVAR, v0 and TinyLLaVA.
FAMILIES = ("convllava", "llava")
BYTES_PER_WEIGHT = {None: 4, "int8": 1, "int4": 0.6}


@dataclass
class ExportReport:
    """What an export is.

    Attributes:
        output: its folder.
        target: what it is for.
        quantize: `None`, `"int8"` or `"int4"`.
        sizes: bytes of each graph.
        agreement: with the checkpoint; `None` where there is no runtime to run it.
        missing: what the target cannot hold, in a sentence; empty if nothing.
    """

    output: Path
    target: str
    quantize: str | None
    sizes: dict[str, int]
    agreement: Agreement | None
    missing: str = ""

    def summary(self) -> str:
        """The report in lines."""
        lines = [f"{self.output}: {self.target}, {self.quantize or 'float32'}"]
        lines += [f"  {name}: {size / 1e6:.1f} MB" for name, size in self.sizes.items()]
        if found := self.agreement:
            lines += [
                f"  greedy tokens equal to the checkpoint's: {found.equal_tokens} of {found.tokens}",
                f"  largest difference of a score: {found.logit_difference:.1e} of the largest score",
                f"  speed: {found.speedup:.2f}x the checkpoint's in float32, on this machine",
            ]
        else:
            lines.append("  not compared with the checkpoint: pip install 'convllava-hf[gguf]' brings llama.cpp")
        return "\n".join([*lines, *([f"  missing: {self.missing}"] if self.missing else [])])


def export_checkpoint(
    checkpoint: str | Path,
    target: str,
    output: str | Path,
    quantize: str | None = None,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Takes a checkpoint to another runtime.

    The checkpoint is computed with in float32, whatever its dtype: what it says then is what the export must say.

    Args:
        checkpoint: Hub id or path of a ConvLLaVA, or of a model of the LLaVA family.
        target: one of `TARGETS`.
        output: folder to make. Nothing is left there if the export fails or is interrupted.
        quantize: `None` for float32, `"int8"` or `"int4"` for the weights of linear layers.
        force: replace an export that is there.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run the code in the checkpoint.

    Returns:
        Sizes, and how the export compares with the checkpoint.

    Raises:
        ConversionError: an unknown target, quantisation or family, or an export that does not say what the checkpoint
            says.
        ImportError: what the target needs is not installed.
    """
    if target not in TARGETS:
        raise ConversionError(f"target {target!r} is unknown; expected one of {', '.join(TARGETS)}.")
    if quantize not in SUFFIXES or (quantize and target in FLOAT32_ONLY):
        expected = FLOAT32_ONLY.get(target, "int8 or int4")
        raise ConversionError(f"quantize={quantize!r} is not supported; expected {expected}.")
    output = Path(os.path.expanduser(output)).resolve()
    runtime = {"web": "onnx"}.get(target, target)
    check_packages(runtime, quantize)
    check_output(output, force)
    stored, _ = PreTrainedConfig.get_config_dict(checkpoint, revision=revision)
    if stored.get("model_type") not in FAMILIES:
        raise ConversionError(
            f"model_type={stored.get('model_type')!r} cannot be exported; expected {' or '.join(FAMILIES)}."
        )
    if target == "gguf":
        check_gguf(stored)
    check_source(checkpoint, revision)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):  # no weight is read before the shape is known to be one that can go
        shape = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(checkpoint, **source), trust_remote_code=trust_remote_code
        )
    check_exportable(shape)
    num_bytes = int(shape.num_parameters() * BYTES_PER_WEIGHT[quantize])
    if target == "web":
        check_web(shape.config, num_bytes)
    model, processor = load(checkpoint, device="cpu", dtype="float32", **source)
    if target == "executorch" and getattr(processor.image_processor, "image_aspect_ratio", None) == "native":
        raise ConversionError(
            "image_aspect_ratio='native' makes pictures of many shapes, and ExecuTorch has memory for one; set "
            "'pad' in preprocessor_config.json, or export to another target."
        )
    packages = ("transformers", "torch", *PACKAGES[runtime])
    manifest = {"target": target, "quantize": quantize, "versions": {name: version(name) for name in packages}}
    with stage_output(output, num_bytes, force) as folder:
        found, missing = None, ""
        if target == "gguf":
            sizes, missing = write_gguf(model, processor, folder)
            if importlib.util.find_spec("xllamacpp"):
                from .llama_cpp import compare_with_llama_cpp

                found = compare_with_llama_cpp(model, processor, folder)
        else:
            convolutional = model.config.model_type == "convllava"
            side = model.config.downsampling_factor if convolutional else model.config.vision_config.image_size
            largest, context = None, 0
            if target == "executorch":
                size = processor.image_processor.size
                largest = max(size["height"], size["width"]) if convolutional else None
                context = min(model.config.get_text_config().max_position_embeddings, LONGEST_TEXT)
            parts = split_model(model, side, convolutional, largest)
            sizes = write_graphs(parts, folder / runtime, runtime, quantize, context)
            if context:  # what the export has memory for is what it takes
                model.config.get_text_config().max_position_embeddings = context
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            processor.save_pretrained(folder)
            _write_manifest(folder, manifest)
            exported, reloaded = load_export(folder, runtime, trust_remote_code=True)
            found = compare(model, exported, make_probes(model, reloaded))
        if found and quantize is None and found.equal_tokens < found.tokens:
            raise ConversionError(
                f"the export gives {found.equal_tokens} of {found.tokens} of the checkpoint's greedy tokens (scores "
                f"differ by {found.logit_difference:.1e}); nothing was written. Report this with the checkpoint's "
                "config.json."
            )
        if target == "web":
            adapt_to_web(folder, model.config, quantize)
        _write_manifest(folder, manifest | ({"agreement": asdict(found)} if found else {}))
    return ExportReport(output, target, quantize, sizes, found, missing)


def _write_manifest(folder: Path, manifest: dict) -> None:
    (folder / EXPORT_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
