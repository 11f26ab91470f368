"""Answers from an export: a runtime runs the graphs, transformers' `generate` does the rest.

Notation: `B` rows of text, `S` tokens per row, `P` tokens in the cache, `I` images, `H, W` pixels, `N` tokens of an
image, `D` width of the language model, `V` vocabulary, `L` layers.

An export is a folder with the files of a checkpoint but for its weights, `export.json`, and a folder named as the
runtime with three graphs, whose names are those of transformers.js:

| graph | inputs | outputs |
|---|---|---|
| `embed_tokens` | `input_ids` (B, S) | `inputs_embeds` (B, S, D) |
| `vision_encoder` | `pixel_values` (I, 3, H, W) | `image_features` (I, N, D) |
| `decoder_model_merged` | `inputs_embeds` (B, S, D), `attention_mask` (B, P + S), `position_ids` (B, S), for each layer `past_key_values.{i}.key`, `.value` (B, heads, P, width) | `logits` (B, 1, V) of the last position, `present.{i}.key`, `.value` (B, heads, P + S, width) |
"""  # noqa: E501

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from ..checkpoints.staging import EXPORT_MANIFEST
from ..model.modeling_convllava import ConvLlavaGenerationMixin


GRAPHS = ("embed_tokens", "vision_encoder", "decoder_model_merged")
# How a graph's file is called after its name, as transformers.js expects it.
SUFFIXES = {None: "", "int8": "_quantized", "int4": "_q4"}
EXTENSIONS = {"onnx": ".onnx", "openvino": ".xml", "executorch": ".pte"}
PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
# OpenVINO computes in bfloat16 where the CPU has it, and quantises activations behind compressed weights, unless told
# not to.
EXACT = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}

Graph = Callable[..., dict[str, torch.Tensor]]


class OnnxGraph:
    """One graph in ONNX Runtime on the CPU, with as many threads as torch. Tensors go in and out without copies.

    Args:
        path: the `.onnx` file.
    """

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait take the cores from torch, which works between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        arrays = self.session.run(self.outputs, {name: tensors[name].contiguous().numpy() for name in self.inputs})
        return {name: torch.from_numpy(array) for name, array in zip(self.outputs, arrays, strict=True)}


class OpenVinoGraph:
    """One graph in OpenVINO on the CPU, in float32, with as many threads as torch.

    Args:
        path: the `.xml` file, beside its `.bin`.
    """

    def __init__(self, path: Path):
        import openvino

        settings = EXACT | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.model = openvino.Core().compile_model(str(path), "CPU", settings)
        self.inputs = {
            port.get_any_name(): [None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
            for port in self.model.inputs
        }
        self.outputs = [port.get_any_name() for port in self.model.outputs]

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        results = self.model({name: tensors[name].contiguous().numpy() for name in self.inputs}, share_inputs=True)
        return {name: torch.from_numpy(results[name]) for name in self.outputs}


class ExecutorchGraph:
    """One program in ExecuTorch on the CPU, which takes one row or one picture at a time, up to a size.

    Args:
        path: the `.pte` file, whose name says what goes in and out: programs themselves have places and no names.
    """

    def __init__(self, path: Path):
        from executorch.runtime import Runtime

        self.program = Runtime.get().load_program(path)
        self.method = self.program.load_method("forward")
        meta = self.method.metadata
        shapes = [list(meta.input_tensor_meta(place).sizes()) for place in range(meta.num_inputs())]
        layers = [f"{index}.{kind}" for index in range(len(shapes) // 2 - 1) for kind in ("key", "value")]
        names, self.outputs = {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "vision_encoder": (["pixel_values"], ["image_features"]),
            "decoder_model_merged": (
                ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in layers)],
                ["logits", *(f"present.{name}" for name in layers)],
            ),
        }[path.stem]
        self.inputs = dict(zip(names, shapes, strict=True))

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        for name, (_, *largest) in self.inputs.items():
            if any(size > most for size, most in zip(tensors[name].shape[1:], largest, strict=True)):
                raise ValueError(
                    f"{name} has the shape {tuple(tensors[name].shape)}; this export has memory for (1, "
                    f"{', '.join(map(str, largest))}). Send smaller pictures or a shorter text."
                )
        rows = zip(*(tensors[name].split(1) for name in self.inputs), strict=True)
        results = [self.method.execute([value.contiguous() for value in row]) for row in rows]
        return {name: torch.cat(parts) for name, *parts in zip(self.outputs, *results, strict=True)}


GRAPH_CLASSES = {"onnx": OnnxGraph, "openvino": OpenVinoGraph, "executorch": ExecutorchGraph}


class ExportedForConditionalGeneration(PreTrainedModel, ConvLlavaGenerationMixin):
    """A model whose parts are graphs of a runtime. Generates as the checkpoint does; has no weights of its own.

    Args:
        config: the checkpoint's configuration.
        graphs: what `GRAPHS` lists, by name.
        generation_config: the checkpoint's.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _supports_sdpa = True

    def __init__(self, config, graphs: dict[str, Graph], generation_config: GenerationConfig | None = None):
        super().__init__(config)
        self.graphs = graphs
        if generation_config is not None:
            self.generation_config = generation_config
        past = {name: shape for name, shape in graphs["decoder_model_merged"].inputs.items() if name.startswith("past")}
        self.num_layers = len(past) // 2
        self.cache_shapes = {name: (shape[1], shape[3]) for name, shape in past.items()}

    @property
    def device(self) -> torch.device:
        """Where inputs are expected; the runtimes take them from the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what goes in and comes out; quantised graphs compute in others inside."""
        return torch.float32

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encodes and projects images; images of equal size run as one batch.

        Args:
            pixel_values: `(I, 3, H, W)`, float32, padded at the right and the bottom where sizes differ.
            image_sizes: `(I, 2)` heights and widths in pixels without padding. Default: no padding.
            kwargs: settings of checkpoints that mean nothing here.

        Returns:
            `pooler_output`: one tensor `(N_i, D)` per image.
        """
        full = tuple(pixel_values.shape[-2:])
        sizes = [full] * len(pixel_values) if image_sizes is None else [tuple(size) for size in image_sizes.tolist()]
        features: list = [None] * len(sizes)
        for height, width in dict.fromkeys(sizes):
            members = [index for index, size in enumerate(sizes) if size == (height, width)]
            group = self.graphs["vision_encoder"](pixel_values=pixel_values[members, :, :height, :width].float())
            for index, feature in zip(members, group["image_features"], strict=True):  # (members, N, D)
                features[index] = feature
        return BaseModelOutputWithPooling(pooler_output=tuple(features))

    def get_input_embeddings(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from ids `(..., S)` to embeddings `(..., S, D)`."""
        return self._embed

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds = self.graphs["embed_tokens"](input_ids=torch.atleast_2d(input_ids))["inputs_embeds"]
        return embeds.reshape(*input_ids.shape, -1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Scores of the token after the last position.

        Args:
            input_ids: `(B, S)`, image placeholders expanded to one per image token.
            pixel_values, image_sizes: see `get_image_features`.
            attention_mask: `(B, P + S)`, 1 at tokens and 0 at padding. Default: no padding.
            position_ids: `(B, S)`. Default: counted from the mask.
            past_key_values: keys and values of what was read; they are replaced by longer ones.
            inputs_embeds: `(B, S, D)` in place of `input_ids`; without images.
            kwargs: settings of `generate` that mean nothing here.

        Returns:
            `logits` `(B, 1, V)` and the cache.

        Raises:
            ValueError: placeholders that do not match the images.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)  # (B, S, D)
        if pixel_values is not None:
            features = torch.cat(self.get_image_features(pixel_values, image_sizes).pooler_output)  # (sum of N, D)
            mask = input_ids == self.config.image_token_id  # (B, S)
            if mask.sum() != len(features):
                raise ValueError(
                    f"Image features and image tokens do not match: {int(mask.sum())} placeholders with id "
                    f"{self.config.image_token_id} in the text, {len(features)} features from the images. Prepare text "
                    "and images with one call of the processor, and do not cut its input_ids."
                )
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)
        rows, length = inputs_embeds.shape[:2]
        cache = DynamicCache() if past_key_values is None else past_key_values
        past = self._read_cache(cache, rows)
        total = past["past_key_values.0.key"].shape[2] + length
        if attention_mask is None:
            attention_mask = torch.ones(rows, total, dtype=torch.long)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        outputs = self.graphs["decoder_model_merged"](
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask.long(),
            position_ids=position_ids.expand(rows, -1),
            **past,
        )
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = outputs[f"present.{index}.key"], outputs[f"present.{index}.value"]
        return CausalLMOutputWithPast(logits=outputs["logits"], past_key_values=cache)

    def _read_cache(self, cache: Cache, rows: int) -> dict[str, torch.Tensor]:
        """The decoder's inputs from a cache, which is emptied into layers of ours if nothing was read yet."""
        if cache.get_seq_length() == 0:
            # Text models with sliding windows would get layers that forget; the graphs mask instead.
            cache.layers = [DynamicLayer() for _ in range(self.num_layers)]
            for index, layer in enumerate(cache.layers):
                layer.lazy_initialization(torch.empty(0), torch.empty(0))
                for kind in ("key", "value"):
                    heads, width = self.cache_shapes[f"past_key_values.{index}.{kind}"]
                    setattr(layer, f"{kind}s", torch.empty(rows, heads, 0, width))
        return {
            f"past_key_values.{index}.{kind}": getattr(layer, f"{kind}s")
            for index, layer in enumerate(cache.layers)
            for kind in ("key", "value")
        }

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats rows for beams and samples; transformers repeats image by image, which fits one image per row."""
        pixel_values = model_kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and len(pixel_values) != len(input_ids):
            raise ValueError(
                f"{len(pixel_values)} images in {len(input_ids)} rows cannot be repeated {expand_size} times here: "
                "beams and several samples need one image per row. Use the checkpoint itself."
            )
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


def load_export(
    folder: Path, runtime: str, trust_remote_code: bool = False
) -> tuple[ExportedForConditionalGeneration, ProcessorMixin]:
    """Opens an export in its runtime.

    Args:
        folder: what `convllava export --to onnx|openvino|executorch|web` made.
        runtime: `"onnx"`, `"openvino"` or `"executorch"`.
        trust_remote_code: run the code of configuration and processor that comes with the export.

    Returns:
        The model and the processor.

    Raises:
        ValueError: an unknown runtime, a folder that is no export, or one for another runtime.
        ImportError: the runtime is not installed.
    """
    if runtime not in EXTENSIONS:
        raise ValueError(f"runtime={runtime!r}; expected {', '.join(map(repr, EXTENSIONS))}.")
    if importlib.util.find_spec(PACKAGES[runtime]) is None:
        raise ImportError(f"runtime={runtime!r} needs {PACKAGES[runtime]}: pip install 'convllava-hf[{runtime}]'")
    folder = Path(folder).expanduser()
    manifest = folder / EXPORT_MANIFEST
    fix = f"make one: convllava export CHECKPOINT --to {runtime} --output DIR"
    if not manifest.is_file():
        raise ValueError(f"{folder} is not the folder of an export (it has no {EXPORT_MANIFEST}); {fix}")
    suffix = SUFFIXES[json.loads(manifest.read_text(encoding="utf-8"))["quantize"]] + EXTENSIONS[runtime]
    paths = {name: folder / runtime / f"{name}{suffix}" for name in GRAPHS}
    if missing := [str(path.relative_to(folder)) for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{folder} is not an export for runtime={runtime!r} (it lacks {', '.join(missing)}); {fix}")
    graphs = {name: GRAPH_CLASSES[runtime](path) for name, path in paths.items()}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model = ExportedForConditionalGeneration(config, graphs, GenerationConfig.from_pretrained(folder))
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
