"""What training takes in memory, from a step that is only played: no weight is read and nothing is computed.

torch runs forward and backward pass on tensors without contents and follows which of them are alive when. So recomputed
activations, frozen parts and the precision of every operation count as they would.
"""

import weakref
from dataclasses import dataclass, replace

import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from ..model.modeling_convllava import set_trainable
from ..shipped import find_file, list_files
from .plans import keep_trained_precise


CHUNK = 256  # tokens whose scores TRL's fused loss has in memory at one time
BYTES_4BIT = 0.5 + 4 / 64  # of a weight in NF4: half a byte, and a float32 scale for every 64
MOMENTS = 2 * 4  # bytes per trained parameter: AdamW's two in float32


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes at most.

    Args:
        weights: as they are stored: what is trained in float32 is its own master copy.
        gradients: of what is trained, in the dtype of its weights.
        moments: both of AdamW.
        activations: everything else, which no process shares: what the backward pass needs, temporary tensors and the
            copies of weights that are computed with.
    """

    weights: int
    gradients: int
    moments: int
    activations: int

    def divide(self, shards: int) -> "StepMemory":
        """What each of `shards` processes holds that divide weights, gradients and moments (FSDP2, ZeRO-3)."""
        return StepMemory(self.weights // shards, self.gradients // shards, self.moments // shards, self.activations)

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.activations


class PeakMode(TorchDispatchMode):
    """Follows the storages that operations make: `peak` is the most bytes of them that were alive at one time.

    Args:
        known: tensors whose storages do not count.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.alive = weakref.WeakSet()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.alive or storage in self.known:
            return
        self.alive.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


def play_step(
    config: PreTrainedConfig,
    trainable: list[str],
    *,
    rows: int,
    tokens: int,
    image_size: int,
    bf16: bool = True,
    recompute: bool = True,
    lora: LoraConfig | None = None,
    is_4bit: bool = False,
    is_sharded: bool = False,
) -> StepMemory:
    """Plays forward and backward pass of a micro-batch of rows with one image each.

    Args:
        config: of the model.
        trainable: patterns of the parameters that are trained; not looked at with `lora`.
        rows: per process and micro-batch.
        tokens: of a row, those of its image included.
        image_size: side of the square images in pixels.
        bf16: compute in bfloat16; else in float32.
        recompute: recompute activations (`gradient_checkpointing`).
        lora: adapters; what is frozen beside them is stored in bfloat16 if `bf16`, what is trained in float32.
        is_4bit: the language model's linear layers are stored in 4 bits (QLoRA). The step is played with bfloat16.
        is_sharded: weights are gathered in bfloat16 layer by layer (FSDP2). A process of its own keeps a bfloat16 copy
            of all weights that it trains. Only the activations are those of a sharded run: weights and gradients are
            counted in bfloat16.

    Returns:
        The bytes of one process that divides nothing.

    Raises:
        ValueError: rows too short for their image.
    """
    is_low = bf16 and (lora is not None or is_sharded)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16 if is_low else torch.float32)
        quantised = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if is_4bit and isinstance(module, torch.nn.Linear) and "language_model" in name
        )
        if lora is None:
            set_trainable(model, trainable)
        if recompute:
            model.gradient_checkpointing_enable()
        if recompute and lora is not None:
            model.enable_input_require_grads()
        whole = model if lora is None else get_peft_model(model, lora)
        if lora is not None:
            keep_trained_precise(whole)
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole.to_empty(device="cpu").train()
        trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)  # those of earlier micro-batches
        pixels = torch.empty(rows, 3, image_size, image_size)
        known = [*whole.parameters(), *whole.buffers(), *(parameter.grad for parameter in trained)]
        with PeakMode(known) as mode, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            run_step(model, pixels, tokens)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in whole.parameters())
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    count = sum(parameter.numel() for parameter in trained)
    activations = mode.peak + pixels.nbytes + (count_gathered(model) if is_sharded else 0)
    return StepMemory(weights - int(quantised * (2 - BYTES_4BIT)), gradients, MOMENTS * count, activations)


def count_gathered(model: torch.nn.Module) -> int:
    """Bytes of bfloat16 weights and gradients that FSDP2 has whole at one time.

    That is what belongs to no layer, a layer and the next one, which is fetched early, and one layer's gradients.
    """
    kinds = set(model._no_split_modules or ())
    layers = [
        [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
        for module in model.modules()
        if type(module).__name__ in kinds
    ]
    sizes = [sum(size for size, _ in layer) for layer in layers]
    trained = [sum(size for size, is_trained in layer if is_trained) for layer in layers]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    outside_trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - sum(trained)
    return 2 * (outside + outside_trained + 2 * max(sizes, default=0) + max(trained, default=0))


def plan_memory(
    config: PreTrainedConfig, stage: int, trainable: list[str], *, gpus: int, image_size: int, tokens: int | None = None
) -> list[dict]:
    """What each GPU holds by the recipes of a stage, on one GPU and on several.

    On several, FSDP2 or ZeRO-3 divide what recipes without adapters store; with adapters every GPU stores everything
    (DDP), and a second copy of the gradients that are exchanged.

    Args:
        config: of the model.
        stage: 1 to 3; every recipe of it is played with its rows per GPU.
        trainable: patterns of what recipes without adapters train.
        gpus: the most GPUs; there is a row for each power of two below it.
        image_size: side of the square images in pixels.
        tokens: of each row. Default: the most that the recipe lets through.

    Returns:
        A dictionary per recipe and number of GPUs: `recipe`, `gpus`, `rows` and `tokens` per GPU and micro-batch, and
        bytes of `weights`, `gradients`, `moments`, `activations` and their `total`.
    """
    counts = sorted({gpus, *(2**power for power in range(gpus.bit_length()) if 2**power <= gpus)})
    table = []
    for name in (f"convllava_stage{stage}{kind}" for kind in ("", "_lora", "_qlora")):
        if name not in list_files("recipe"):
            continue
        recipe = yaml.safe_load(find_file("recipe", name).read_text(encoding="utf-8"))
        batch = {"rows": recipe["per_device_train_batch_size"], "tokens": tokens or recipe["max_length"]}
        lora = build_lora(recipe) if recipe.get("use_peft") else None
        is_4bit = "quantization_config" in recipe.get("model_init_kwargs", {})
        settings = {**batch, "image_size": image_size, "bf16": recipe["bf16"], "lora": lora, "is_4bit": is_4bit}
        alone = play_step(config, trainable, **settings)
        shared = alone
        if lora is not None:
            shared = replace(alone, activations=alone.activations + alone.gradients)
        elif gpus > 1:
            shared = replace(alone, activations=play_step(config, trainable, **settings, is_sharded=True).activations)
        for count in counts:
            step = alone if count == 1 else shared if lora is not None else shared.divide(count)
            sizes = {**vars(step), "total": step.total}
            table.append({"recipe": name, "gpus": count, **batch, **sizes})
    return table


def build_lora(recipe: dict) -> LoraConfig:
    """The adapters of a recipe, as TRL makes them."""
    return LoraConfig(
        r=recipe["lora_r"],
        lora_alpha=recipe["lora_alpha"],
        lora_dropout=recipe["lora_dropout"],
        target_modules=recipe["lora_target_modules"][0],
        modules_to_save=recipe["lora_modules_to_save"],
    )


def run_step(model: torch.nn.Module, pixels: torch.Tensor, tokens: int) -> None:
    """Forward and backward pass of rows with one image each, as the trainer runs them.

    Args:
        model: a model of images and text, in training mode.
        pixels: `(B, 3, H, W)`.
        tokens: of each row, those of its image included.
    """
    rows = len(pixels)
    features = torch.stack(tuple(model.model.get_image_features(pixels, return_dict=True).pooler_output))
    if features.shape[1] >= tokens:
        raise ValueError(f"an image takes {features.shape[1]} tokens, rows have {tokens}: give them more (--tokens).")
    text = torch.zeros(rows, tokens - features.shape[1], dtype=torch.long, device=pixels.device)
    embeddings = model.get_input_embeddings()(text)
    embeddings = torch.cat([features.to(embeddings.dtype), embeddings], 1)
    del features
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=pixels.device)
    mask[:, -1] = 0  # batches are padded, as a rule; rows of one length take no mask in memory
    inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": False}
    hidden = model.model.language_model(**inputs).last_hidden_state
    del embeddings, inputs
    # The fused loss has the scores of one part of the tokens in memory, and recomputes them in the backward pass.
    part = hidden.flatten(0, 1)[:CHUNK]
    loss = torch.nn.functional.cross_entropy(model.lm_head(part).float(), part.new_zeros(len(part), dtype=torch.long))
    (loss + hidden.float().mean()).backward()
