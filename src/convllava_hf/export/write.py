"""Writes the parts of a model as graphs of ONNX Runtime or OpenVINO, by transformers' own exporters."""

import importlib.util
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from torch.export import Dim

from ..checkpoints.weight_maps import ConversionError
from ..inference.runtime import EXTENSIONS, SUFFIXES
from .graphs import VARIES, TracedPart


# What each way needs beside its runtime; the first transformers whose exporters quantise and write OpenVINO.
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "gguf": ("gguf",),
}
OLDEST_TRANSFORMERS = "5.23"
# One protobuf holds less than 2 GB; beyond, the weights lie beside the graph.
LARGEST_FILE = int(1.5 * 2**30)
# Of the inputs, by axis.
SIZES = {
    "input_ids": {0: "batch_size", 1: "sequence_length"},
    "pixel_values": {0: "num_images", 2: "height", 3: "width"},
    "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
    "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
    "position_ids": {0: "batch_size", 1: "sequence_length"},
    "past_key_values": {0: "batch_size", 2: "past_sequence_length"},
}
# Weights that share one scale, in int4.
INT4_BLOCK = 32


def check_packages(runtime: str, quantize: str | None) -> None:
    """Checks that what an export needs is installed.

    Raises:
        ImportError: a package is missing or too old.
    """
    names = list(PACKAGES[runtime])
    if runtime == "openvino" and quantize:
        names.append("nncf")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(f"exporting needs {', '.join(missing)}: pip install 'convllava-hf[{runtime}]'")
    if runtime != "gguf" and Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"exporting needs transformers {OLDEST_TRANSFORMERS} or newer, for its exporters; installed is "
            f"{transformers.__version__}. The machine that answers may have an older one."
        )


def write_graphs(
    parts: dict[str, TracedPart], folder: Path, runtime: str, quantize: str | None, context: int = 0
) -> dict[str, int]:
    """Traces, translates, quantises and saves the parts of a model, one after the other.

    Args:
        parts: from `graphs.split_model`.
        folder: where the graphs go.
        runtime: `"onnx"`, `"openvino"` or `"executorch"`.
        quantize: `None`, `"int8"` or `"int4"`: the weights of linear layers, of the tower and the decoder.
        context: the longest text in tokens, for ExecuTorch.

    Returns:
        Bytes of each graph's files.

    Raises:
        ConversionError: an operator that the runtime lacks; the message names the part.
    """
    folder.mkdir()
    write = {"onnx": _write_onnx, "openvino": _write_openvino, "executorch": _write_executorch}[runtime]
    if runtime == "executorch":
        parts = {name: _bound(part, context) for name, part in parts.items()}
    sizes = {}
    for name, part in parts.items():
        before = {path: path.stat().st_size for path in folder.iterdir()}
        try:
            write(part, folder / f"{name}{SUFFIXES[quantize]}{EXTENSIONS[runtime]}", quantize)
        except OSError:  # of the disk, and not of the graph
            raise
        except Exception as error:  # the exporters have kinds of their own, and the last cause names the operator
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = " ".join(str(cause).split())
            raise ConversionError(f"{name} cannot be exported to {runtime}: {reason[:600]}") from error
        sizes[name] = sum(path.stat().st_size for path in folder.iterdir() if path not in before)
    return sizes


def _write_onnx(part: TracedPart, path: Path, quantize: str | None) -> None:
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    quantizer = None
    if quantize == "int8":
        # Embeddings are looked up, not multiplied; convolutions have no fast int8 kernel for the CPU.
        settings = OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul"], per_channel=True)
        quantizer = OnnxRuntimeQuantizer(settings)
    config = OnnxConfig(dynamic_shapes=part.dynamic_shapes, quantizer=quantizer)
    program, _ = OnnxExporter().export_program(part.module.eval(), dict(part.inputs), config)
    if quantize == "int4":
        program = _pack_int4(program)
    _name_sizes(program.graph)
    weights = sum(value.const_value.nbytes for value in program.graph.initializers.values())
    beside = {"external_data": f"{path.name}_data"} if weights > LARGEST_FILE else {}
    onnx_ir.save(program, path, **beside)


def _name_sizes(graph) -> None:
    """Names the sizes that vary: transformers.js begins its cache by the name of its first, the batch."""
    import onnx_ir

    for value in graph.inputs:
        names = SIZES["past_key_values" if value.name.startswith("past_key_values") else value.name]
        sizes = [size if isinstance(size, int) else names[axis] for axis, size in enumerate(value.shape)]
        value.shape = onnx_ir.Shape(sizes)


def _pack_int4(program):
    """Packs the weights of linear layers four bits each, with ONNX Runtime's own tool."""
    import onnx_ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    packer = MatMulNBitsQuantizer(onnx_ir.to_proto(program), block_size=INT4_BLOCK, is_symmetric=True)
    packer.process()
    return onnx_ir.from_proto(packer.model.model)


def _write_openvino(part: TracedPart, path: Path, quantize: str | None) -> None:
    from transformers.exporters import (
        NNCFOpenVINOQuantizer,
        NNCFWeightCompressionConfig,
        OpenVINOConfig,
        OpenVINOExporter,
    )

    quantizer = None
    if quantize:
        import nncf

        mode = {"int8": "INT8_ASYM", "int4": "INT4_SYM"}[quantize]
        # int4 shares a scale among 128 weights, which not every width is a multiple of: fewer share one there.
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        quantizer = NNCFOpenVINOQuantizer(
            NNCFWeightCompressionConfig(
                mode=nncf.CompressWeightsMode[mode], advanced_parameters=fallback if quantize == "int4" else None
            )
        )
    config = OpenVINOConfig(dynamic_shapes=part.dynamic_shapes, quantizer=quantizer, stateful=False)
    exporter = OpenVINOExporter()
    program, _ = exporter.export_program(part.module.eval(), dict(part.inputs), config)
    exporter.save_program(program, path)


def _bound(part: TracedPart, context: int) -> TracedPart:
    """A part for one row, whose sizes have an end: ExecuTorch reserves memory for the largest when it writes."""

    def bound(shapes):
        if all(isinstance(axis, int) for axis in shapes):
            return {axis: Dim.AUTO(max=context) if size is VARIES else size for axis, size in shapes.items() if axis}
        return {name: bound(inner) for name, inner in shapes.items()}

    def take_row(tensor):  # a copy with strides of its own, which `contiguous` leaves alone where a size is 1
        return tensor[:1].clone(memory_format=torch.contiguous_format)

    inputs = torch.utils._pytree.tree_map(take_row, part.inputs)
    return TracedPart(part.module, inputs, bound(part.dynamic_shapes))


def _write_executorch(part: TracedPart, path: Path, quantize: str | None) -> None:
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    config = ExecutorchConfig(dynamic_shapes=part.dynamic_shapes)
    program, _ = ExecutorchExporter().export_program(part.module.eval(), dict(part.inputs), config)
    ExecutorchExporter.save_program(program, path)
