"""Runs GGUF files in llama.cpp and compares what it says with the checkpoint.

`xllamacpp` brings llama.cpp: its server, in this process, on loopback.
"""

import base64
import secrets
import time
from io import BytesIO
from pathlib import Path

import torch
import xllamacpp
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

# The HTTP client that transformers itself fetches images with: its distribution differs between versions.
from transformers.image_utils import httpx

from ..checkpoints.weight_maps import ConversionError
from .agreement import NEW_TOKENS, QUESTION, Agreement, count_equal, generate_greedily, make_picture


PROMPT = f"USER: {QUESTION} ASSISTANT:"
PICTURE_PROMPT = f"USER: <image>\n{QUESTION} ASSISTANT:"
# llama.cpp computes GELU by a table in 16 bits: tokens whose logarithms of probability are closer may change places.
TIE = 0.05


class LlamaCpp:
    """llama.cpp on the CPU in float32, one request at a time.

    Args:
        folder: of `model.gguf`, and of `mmproj.gguf` where there is one.
    """

    def __init__(self, folder: Path):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(folder / "model.gguf")
        if (folder / "mmproj.gguf").exists():
            settings.mmproj.path = str(folder / "mmproj.gguf")
        settings.n_ctx, settings.n_parallel, settings.warmup = 1024, 1, False
        settings.n_gpu_layers, settings.mmproj_use_gpu = 0, False
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        key = secrets.token_hex(32)  # the server listens for other programs of this machine, too
        settings.api_keys, settings.verbosity = [key], 1
        self.server = xllamacpp.Server(settings)
        address = self.server.listening_address
        url = address if address.startswith("http") else f"http://{address}"
        headers = {"Authorization": f"Bearer {key}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=None, trust_env=False)

    def call(self, path: str, **body) -> dict:
        """Asks the server: posts where there is a body."""
        reply = self.client.post(path, json=body) if body else self.client.get(path)
        return reply.raise_for_status().json()

    def tokenize(self, text: str) -> list[int]:
        """The ids of a prompt."""
        return self.call("/tokenize", content=text, add_special=True)["tokens"]

    def generate(self, prompt: str, image: Image.Image | None = None) -> list[tuple[int, dict[int, float]]]:
        """Greedy tokens but for those that end an answer, each with the logarithms of the largest probabilities in its
        place, by id. The server leaves those out where a token ends within a letter."""
        if image:
            file = BytesIO()
            image.save(file, "png")
            prompt = {
                "prompt_string": prompt.replace("<image>", self.call("/props")["media_marker"]),
                "multimodal_data": [base64.b64encode(file.getvalue()).decode()],
            }
        settings = {"n_predict": NEW_TOKENS, "n_probs": 5, "temperature": 0, "top_k": 1, "cache_prompt": False}
        reply = self.call("/completion", prompt=prompt, ignore_eos=True, return_tokens=True, **settings)
        steps, found = reply["completion_probabilities"], []
        for token in reply["tokens"]:
            known = steps.pop(0)["top_logprobs"] if steps and steps[0]["id"] == token else []
            found.append((token, {top["id"]: top["logprob"] for top in known}))
        return found


def compare_with_llama_cpp(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> Agreement:
    """Runs the files in llama.cpp on words, and on a picture where llama.cpp reads the tower as the checkpoint does.

    Args:
        model: the checkpoint in float32.
        processor: the checkpoint's.
        folder: with the files.

    Raises:
        ConversionError: llama.cpp splits a text into other tokens.
    """
    llama, ids = LlamaCpp(folder), processor.tokenizer(PROMPT)["input_ids"]
    if llama.tokenize(PROMPT) != ids:
        raise ConversionError(
            f"llama.cpp reads {PROMPT!r} as {llama.tokenize(PROMPT)}, expected {ids}; nothing was written. Report this "
            "with the checkpoint's tokenizer."
        )
    found = [compare_prompt(model, processor, llama, PROMPT)]
    if model.config.model_type == "llava" and model.config.vision_config.model_type != "clip_vision_model":
        side = model.config.vision_config.image_size  # nobody resizes a picture of the tower's size
        found.append(compare_prompt(model, processor, llama, PICTURE_PROMPT, make_picture(side, side)))
    return Agreement.over(found)


def compare_prompt(
    model: PreTrainedModel, processor: ProcessorMixin, llama: LlamaCpp, prompt: str, image: Image.Image | None = None
) -> Agreement:
    """What llama.cpp makes of a prompt against what the checkpoint does."""
    text = prompt.replace("<image>", processor.image_token)
    inputs = processor(text=text, images=image, return_tensors="pt")
    for _ in range(2):  # the first call also prepares
        started = time.perf_counter()
        theirs = llama.generate(prompt, image)
        seconds = time.perf_counter() - started
        tokens, scores, took = generate_greedily(model, inputs)
    ends = model.generation_config.eos_token_id
    logarithms = scores.log_softmax(-1)  # (T, V), as llama.cpp tells them: with the ends, which it does not choose
    allowed = logarithms.index_fill(1, torch.tensor(ends).flatten(), -torch.inf)
    equal, count = count_equal(tokens, [token for token, _ in theirs]), len(tokens)
    kept = range(min(equal + 1, count))  # what follows another token is another text
    gaps = [abs(logarithms[place, index].item() - value) for place in kept for index, value in theirs[place][1].items()]
    if 0 < equal < count and allowed[equal].max() - allowed[equal, theirs[equal][0]] < TIE:
        count = equal
    return Agreement(count, equal, max(gaps, default=0.0) / scores[: len(kept)].abs().max().item(), took, seconds)
