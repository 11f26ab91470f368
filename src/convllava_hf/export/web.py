"""The layout that transformers.js reads: a ConvLLaVA becomes a model of its class `llava`.

transformers.js takes the graphs of an ONNX export as they are, from the folder `onnx`. It has no ConvLLaVA, and needs
none: with a patch as large as a cell of the tower, a LLaVA has as many image tokens.
"""

import json
import re
from pathlib import Path

from transformers import PreTrainedConfig

from ..checkpoints.weight_maps import ConversionError


# The address space of WebAssembly.
LARGEST_PAGE = 4 * 10**9
# How transformers.js calls the weights of a graph's file name.
DTYPES = {None: "fp32", "int8": "q8", "int4": "q4"}
GENERATION_MARKS = re.compile(r"\s*\{%-\s*(end)?generation\s*-%\}\s*")
# The text models whose cache transformers.js knows how to begin (`src/configs.js`, getNormalizedConfig).
TEXT_MODELS = (
    "apertus cohere cohere2 falcon gemma gemma2 gemma3_text glm gpt2 gpt_bigcode gpt_neox gptj granite helium llama "
    "mistral mobilellm olmo olmo2 olmo3 opt phi phi3 qwen2 qwen3 smollm3 stablelm starcoder2"
).split()


def check_web(config: PreTrainedConfig, num_bytes: int) -> None:
    """Refuses what transformers.js does not know and what no page can hold, before anything is traced.

    Args:
        config: the checkpoint's.
        num_bytes: of the graphs.

    Raises:
        ConversionError: the language model is unknown there, or the graphs are too large.
    """
    kind = config.get_text_config().model_type
    if kind not in TEXT_MODELS:
        raise ConversionError(
            f"text_config.model_type={kind!r} is unknown to transformers.js; expected one of {', '.join(TEXT_MODELS)}."
        )
    if num_bytes > LARGEST_PAGE:
        raise ConversionError(
            f"the export would have {num_bytes / 1e9:.1f} GB, more than a page can hold ({LARGEST_PAGE / 1e9:.0f} GB); "
            "pass --quantize int8 or int4, or take a smaller checkpoint."
        )


def adapt_to_web(folder: Path, config: PreTrainedConfig, quantize: str | None) -> None:
    """Rewrites the small files of an ONNX export for transformers.js.

    Args:
        folder: with the export.
        config: the checkpoint's.
        quantize: of the graphs.
    """
    sidecars = {path.name.removesuffix("_data"): 1 for path in (folder / "onnx").glob("*_data")}
    stored = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        "text_config": config.get_text_config().to_dict(),
        "vision_config": config.vision_config.to_dict(),
        "transformers.js_config": {"dtype": DTYPES[quantize], "use_external_data_format": sidecars or False},
    }
    _write(folder / "config.json", stored)
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    images = processor["image_processor"]
    extra = {}
    if config.model_type == "convllava":
        extra = {"patch_size": config.downsampling_factor, "num_additional_image_tokens": 0}
    # `chunk_prefix_space` and `image_aspect_ratio` are read by the page, not by transformers.js.
    kept = ("image_token", "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    kept = {key: processor[key] for key in (*kept, "chunk_prefix_space") if key in processor}
    _write(folder / "processor_config.json", {"processor_class": "LlavaProcessor"} | kept | extra)
    _write(
        folder / "preprocessor_config.json",
        {key: value for key, value in images.items() if key != "auto_map"}
        | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = folder / "chat_template.jinja"
    if template.is_file():  # transformers.js reads it from the tokenizer; its Jinja has no marks for training
        text = GENERATION_MARKS.sub("", template.read_text(encoding="utf-8"))
        _write(folder / "tokenizer_config.json", tokenizer | {"chat_template": text})
    for path in folder.glob("*.py"):  # code of Python classes
        path.unlink()


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
