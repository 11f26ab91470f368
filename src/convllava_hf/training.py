"""Training with TRL: its `SFTTrainer` with per-part learning rates, grouped batches, whole images and safe checkpoints.

Everything else (arguments, PEFT, distribution, logging, the loss) is TRL's and transformers' own, and a recipe is a
config file of `trl sft`.

Notation: `B` rows of a batch, `S` tokens per row, `I` images of a batch, `H, W` pixels.
"""

import copy
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor, ProgressCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .image_budgets import set_image_size
from .image_columns import COLUMNS, decode_image, list_images, undecode_images
from .modeling_convllava import PADDED_ID_SCORE, find_names, set_trainable
from .plans import PARTS
from .sampling import ModalityLengthSampler, measure_lengths
from .shipped_files import find_file
from .template_files import build_chat_template, list_chat_templates
from .training_progress import CurvesCallback, LossBarCallback
from .vision_cache import CachedImageProcessor, VisionCache, make_stand_in


logger = logging.get_logger(__name__)
# Modules of PEFT that train something in the place of the module inside them, and what they add to names.
PEFT_WRAPPERS = (BaseTunerLayer, ModulesToSaveWrapper)
PEFT_NAME_PARTS = r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)"

# The chat template for captions alone: nothing to chat with, so what is trained with it keeps its own.
CAPTIONS_ALONE = "plain"


@dataclass
class ConvLlavaTrainingArguments(SFTConfig):
    r"""TRL's [`SFTConfig`](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig), and what it lacks.

    Args:
        optim_target_modules: regular expressions of the parameters to train; all others are frozen. For models of this
            package `model_init_kwargs: {trainable: [...]}` does the same, and works with `trl sft` as well.
        vision_learning_rate: peak learning rate of the vision tower. Default: `learning_rate`.
        projector_learning_rate: peak learning rate of the projector. Default: `learning_rate`.
        group_by_modality_length: batches of rows with images or without, and of similar length. Not for streams.
        normalize_on_device: workers hand over images as bytes, a quarter of the size; the device normalises them.
        vision_cache: folder for the features of the frozen tower, which are then computed once instead of in every
            epoch and run; see `vision_cache.py`. What it will take is said first.
        image_size: side of the square that images are padded or squashed to, or the budget of `native`, in pixels.
            Default: the checkpoint's.
        max_length: rows are cut to so many tokens on the right, but never inside or before an image.
    """

    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower. Default: learning_rate."}
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Default: learning_rate."}
    )
    group_by_modality_length: bool = field(
        default=True, metadata={"help": "Batch rows with images or without, and of similar length, together."}
    )
    normalize_on_device: bool = field(
        default=True, metadata={"help": "Move images as bytes and normalise them on the device."}
    )
    vision_cache: str | None = field(
        default=None, metadata={"help": "Folder to keep the features of the frozen vision tower in."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the processed square in pixels. Default: the checkpoint's."}
    )


@dataclass
class ConvLlavaCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, which cuts long rows without cutting images and names the row where something is wrong.

    Args:
        max_tokens: longest row; `None` cuts nothing. (TRL's `max_length` also cuts through images.)
        image_token_id: id of the placeholder.
        raw_pixels: leave `pixel_values` as bytes, 0 to 255.
        vision_cache: give features of the tower instead of pixels; images must come undecoded.

    Raises:
        ValueError: a row whose images do not fit into `max_tokens`, or that cannot be prepared.
    """

    max_tokens: int | None = None
    image_token_id: int | None = None
    raw_pixels: bool = False
    vision_cache: VisionCache | None = None
    is_cached: bool = field(default=False, init=False)

    def __post_init__(self):
        if self.vision_cache is not None:
            self.processor = copy.copy(self.processor)
            self.processor.image_processor = CachedImageProcessor(self.processor.image_processor, self.vision_cache)
            self.vision_cache = None
            self.is_cached = True
        elif self.raw_pixels:
            self.processor = copy.deepcopy(self.processor)
            self.processor.image_processor.do_rescale = self.processor.image_processor.do_normalize = False

    def torch_call(self, examples: list[dict]) -> dict:
        """Prepares a batch: `input_ids`, `attention_mask`, `labels` `(B, S)`, `pixel_values` `(I, 3, H, W)`, ..."""
        examples = [self._prepare_images(example) for example in examples]
        try:
            batch = super().torch_call(examples)
        except (ValueError, OSError) as error:
            for example in examples:
                try:
                    super().torch_call([example])
                except (ValueError, OSError) as cause:
                    raise ValueError(f"cannot prepare {describe_row(example)}: {cause}") from cause
            raise error
        self._cut(batch, examples)
        for example, labels in zip(examples, batch["labels"], strict=True):
            if not (labels != -100).any():
                logger.warning(f"no token to train on in {describe_row(example)}; it only takes time.")
        return batch

    def _prepare_images(self, example: dict) -> dict:
        """Decodes the images of a row, which come as bytes or path, or lets pictures of one pixel stand for them."""
        if not set(COLUMNS) & example.keys():
            return example
        decode = make_stand_in if self.is_cached else decode_image
        try:
            images = [decode(image) for image in list_images(example)]
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read an image of {describe_row(example)}: {error}") from error
        return {**{key: value for key, value in example.items() if key not in COLUMNS}, "images": images}

    def _cut(self, batch: dict, examples: list[dict]) -> None:
        """Cuts the batch to `max_tokens` columns; padding is on the right."""
        length = batch["input_ids"].shape[1]
        if self.max_tokens is None or length <= self.max_tokens:
            return
        cut_images = (batch["input_ids"][:, self.max_tokens :] == self.image_token_id).any(1)
        for example, is_cut in zip(examples, cut_images.tolist(), strict=True):
            if is_cut:
                raise ValueError(
                    f"max_length={self.max_tokens} would cut an image of {describe_row(example)}: raise max_length, "
                    "give images fewer tokens (image_size), or leave the row out."
                )
        for key, value in batch.items():
            if isinstance(value, torch.Tensor) and value.shape[:2] == (len(examples), length):
                batch[key] = value[:, : self.max_tokens]


def describe_row(example: dict) -> str:
    """A row by the beginning of its first message, and its number of images."""
    content = (example.get("messages") or example.get("prompt") or [{}])[0]
    content = content.get("content", "") if isinstance(content, dict) else content
    if not isinstance(content, str):
        content = " ".join(part.get("text") or "" for part in content)
    return f"the row that begins {content[:60]!r} ({len(list_images(example))} images)"


class FiniteGradientsCallback(TrainerCallback):
    """Keeps a gradient that is no number out of the weights, and so out of the checkpoints."""

    def __init__(self, trainer: "ConvLlavaTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.stop_at_infinite_gradients()


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run: one that was interrupted while it was written has no readable state."""
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        found.append((state["global_step"], folder))
    return max(found)[1] if found else None


class ConvLlavaTrainer(SFTTrainer):
    """TRL's `SFTTrainer` for models of images and text: this package's, and transformers' LLaVA.

    Args:
        recipe, data: names of the recipe and of the data, for the model card.
        args, kwargs: see `SFTTrainer`; `args` are [`ConvLlavaTrainingArguments`].
    """

    def __init__(
        self, *, args: ConvLlavaTrainingArguments, recipe: str | None = None, data: str | None = None, **kwargs
    ):
        self.recipe, self.data = recipe, data
        model_kwargs = args.model_init_kwargs or {}
        if args.bf16 and not has_fast_bf16(args.device):
            logger.warning("this processor has no bfloat16 arithmetic: computing in float32.")
            args.bf16, args.mixed_precision = False, "no"
        if args.ddp_find_unused_parameters is None and "trainable" in model_kwargs:
            args.ddp_find_unused_parameters = False  # text-only batches run an idle vision pass
        super().__init__(args=args, **kwargs)
        targets = [] if self.args.optim.startswith(("galore", "apollo")) else args.optim_target_modules or []
        targets = [targets] if isinstance(targets, str) else targets
        if isinstance(self.model, PeftModel):
            self._report_what_peft_freezes([*(model_kwargs.get("trainable") or []), *targets])
        elif targets:
            set_trainable(self.model, targets)
        if args.image_size is not None:
            set_image_size(self.processing_class.image_processor, args.image_size)
        if isinstance(self.data_collator, DataCollatorForVisionLanguageModeling):
            # The collator decodes images: an image that cannot be read is named with its row.
            if self.train_dataset is not None:
                self.train_dataset = undecode_images(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: undecode_images(dataset) for name, dataset in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = undecode_images(self.eval_dataset)
            self.data_collator = self._build_collator(self._fill_cache() if args.vision_cache else None)
        self._silence_padded_ids()
        self.add_callback(CurvesCallback())
        self.add_callback(FiniteGradientsCallback(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(LossBarCallback())

    def _report_what_peft_freezes(self, patterns: list[str]) -> None:
        """PEFT trains its adapters and the modules it saves, whatever a recipe trains without it.

        Raises:
            ValueError: a pattern that matches no parameter.
        """
        model = self.model.get_base_model()
        wrapped = [name for name, module in model.named_modules() if isinstance(module, PEFT_WRAPPERS)]
        names = {re.sub(PEFT_NAME_PARTS, "", name): name for name, _ in model.named_parameters()}
        frozen = Counter()
        for name in sorted(find_names(list(names), patterns)):
            if not names[name].startswith(tuple(f"{module}." for module in wrapped)):
                part = re.match(r".*?\.stages\.\d+|(model\.)?[^.]+", name)[0]
                frozen[part.removeprefix("model.")] += 1
        if frozen:
            logger.warning(
                "use_peft trains nothing but its adapters and lora_modules_to_save. Of what the recipe trains without "
                f"it, these tensors stay frozen: {', '.join(f'{count} of {part}' for part, count in frozen.items())}."
            )

    def _fill_cache(self) -> VisionCache:
        """Computes the tower's features of all training images, as this run would."""
        if not isinstance(self.train_dataset, Dataset) or self.eval_dataset is not None:
            raise ValueError("vision_cache needs data that is no stream, and eval_strategy='no'.")
        columns = self.train_dataset.column_names
        if not set(COLUMNS) & set(columns):
            raise ValueError(f"vision_cache needs a column 'images' or 'image'; got {', '.join(columns)}.")
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        model.to(self.args.device)
        cache = VisionCache(self.args.vision_cache, model, self.processing_class.image_processor, dtype)
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            done = cache.fill(
                self.train_dataset, self.args.process_index, self.args.world_size, self.is_world_process_zero()
            )
        model.train(was_training)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            logger.warning(done)
        return cache

    def _build_collator(self, cache: VisionCache | None) -> ConvLlavaCollator:
        """Our collator with the settings of the one that TRL built."""
        theirs = {f.name: getattr(self.data_collator, f.name) for f in fields(self.data_collator)}
        return ConvLlavaCollator(
            **{**theirs, "max_length": None},
            max_tokens=self.args.max_length,
            image_token_id=self.model.config.image_token_id,
            raw_pixels=self.args.normalize_on_device and self._normalization() is not None,
            vision_cache=cache,
        )

    def _normalization(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and standard deviation of the pixels in bytes, `(1, 3, 1, 1)` each; `None` if they stay as they are."""
        settings = self.processing_class.image_processor
        if not (settings.do_rescale and settings.do_normalize):
            return None
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1) / settings.rescale_factor
            for values in (settings.image_mean, settings.image_std)
        )
        return mean, std

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            mean, std = (value.to(pixels.device) for value in self._normalization())
            inputs["pixel_values"] = (pixels.float() - mean) / std
        return inputs

    def _silence_padded_ids(self) -> None:
        """Gives ids that only round the vocabulary up no probability in TRL's fused output layer.

        That layer reads weight and bias and does not call the model's own forward, which does this.
        """
        head, padding = self.model.get_output_embeddings(), getattr(self.model.config, "vocab_padding", 0)
        if isinstance(head, ModulesToSaveWrapper):
            head = head.modules_to_save[head.active_adapters[0]]
        # ZeRO-3 gathers weight and bias by what DeepSpeed knows of them, which a buffer lacks.
        if padding and head.bias is None and not is_deepspeed_zero3_enabled():
            device = "cpu" if head.weight.is_meta else head.weight.device
            bias = torch.zeros(head.out_features, device=device, dtype=head.weight.dtype)
            bias[-padding:] = PADDED_ID_SCORE
            del head._parameters["bias"]  # a buffer of that name, which is neither trained nor saved
            head.register_buffer("bias", bias, persistent=False)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        if "messages" not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        with self.args.main_process_first(desc="measuring rows"):
            lengths, has_images = measure_lengths(dataset, getattr(self.processing_class, "image_processor", None))
        rows = self.args.train_batch_size * self.args.world_size
        return ModalityLengthSampler(lengths, has_images, rows, self.args.data_seed or self.args.seed)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Makes the optimizer; with learning rates per part, one group per part and weight decay."""
        rates = {"vision tower": self.args.vision_learning_rate, "projector": self.args.projector_learning_rate}
        if self.optimizer is not None or not any(rate is not None for rate in rates.values()):
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")
                part = part if rates.get(part) is not None else "rest"
                groups.setdefault((part, name in decayed), []).append(parameter)
        for part, rate in rates.items():
            if rate is not None and part not in {part for part, _ in groups}:
                raise ValueError(
                    f"a learning rate of {rate} is set for the {part}, but none of its parameters are trained: see "
                    "`convllava plan`, or leave the learning rate out."
                )
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = cls(
            [
                {
                    "params": parameters,
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                    "lr": self.args.learning_rate if part == "rest" else rates[part],
                    "part": part,
                }
                for (part, decay), parameters in sorted(groups.items(), key=lambda item: item[0][0] != "rest")
            ],
            **kwargs,
        )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and self.optimizer is not None:
            first, *others = self.optimizer.param_groups  # what is logged is the rate of the first
            for group in others:
                if group.get("part", "rest") not in ("rest", first.get("part")):
                    name = f"learning_rate_{group['part'].replace(' ', '_')}"
                    logs[name] = logs["learning_rate"] * group["initial_lr"] / first["initial_lr"]
        super().log(logs, start_time)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise self._explain_infinite(f"the loss is {loss.item()}")
        return loss

    def stop_at_infinite_gradients(self) -> None:
        """Raises before the optimizer would write a gradient that is no number into the weights."""
        if self.accelerator.scaler is not None:  # float16 skips such steps and lowers its scale by itself
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # every rank stops, or none
        if not norm.isfinite():
            raise self._explain_infinite("a gradient is not finite")

    def _explain_infinite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what} at step {self.state.global_step + 1}; the weights were not changed by it. "
            f"{self._name_last_checkpoint()} Usual causes: a learning rate that is too high, float16 instead of "
            "bfloat16, a broken image."
        )

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = folder.exists()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            if not existed and self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"could not save {folder}: {error}. What was written of it was removed; free some space and resume. "
                f"{self._name_last_checkpoint()}"
            ) from error

    def _name_last_checkpoint(self) -> str:
        return f"Last complete checkpoint: {find_last_checkpoint(self.args.output_dir) or 'none'}."

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's model card, with the recipe, the hyperparameters and the versions."""
        super().create_model_card(*args, **kwargs)
        file = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and file.exists():
            card = ModelCard.load(file)
            card.data.pipeline_tag = "image-text-to-text"
            adapter = next(iter(self.model.peft_config.values())) if isinstance(self.model, PeftModel) else None
            if adapter is not None:
                card.data.library_name = "peft"
            card.text += describe_training(self.args, self.recipe, self.data, adapter)
            card.save(file)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; processors without the instructions are hundreds of times slower in it."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe_training(
    args: ConvLlavaTrainingArguments, recipe: str | None, data: str | None, adapter: PeftConfig | None = None
) -> str:
    """The section of a model card that says how the model was trained."""
    rows = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    trained = (args.model_init_kwargs or {}).get("trainable") or args.optim_target_modules or []
    trained = [trained] if isinstance(trained, str) else trained
    if adapter is not None:
        layers = getattr(adapter, "target_modules", None) or "the model"
        layers = layers if isinstance(layers, str) else ", ".join(sorted(layers))
        whole = getattr(adapter, "modules_to_save", None) or []
        trained = [f"{adapter.peft_type.value} adapters of {layers}", *whole]
    settings = {
        "recipe": recipe,
        "data": data,
        "trained parameters": ", ".join(trained) or "all",
        "learning rate": args.learning_rate,
        "vision tower's": args.vision_learning_rate,
        "projector's": args.projector_learning_rate,
        "schedule": f"{args.lr_scheduler_type}, warm-up {args.warmup_steps}",
        "rows per step": f"{math.prod(rows)} ({' x '.join(map(str, rows))})",
        "epochs": args.num_train_epochs,
        "longest row": args.max_length,
        "weight decay": args.weight_decay,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "versions": f"transformers {transformers.__version__}, trl {trl.__version__}, torch {torch.__version__}",
    }
    settings = {name: str(value).replace("|", "\\|") for name, value in settings.items() if value is not None}
    lines = [f"| {name} | {value} |" for name, value in settings.items()]
    return "\n\n## How it was trained\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def get_parser() -> TrlParser:
    """The parser of `trl sft`, with our arguments in the place of TRL's."""
    return TrlParser((ScriptArguments, ConvLlavaTrainingArguments, ModelConfig, DatasetMixtureConfig))


def run_recipe(recipe: str, arguments: Iterable[str] = ()) -> ConvLlavaTrainer:
    """Trains by a recipe: what `trl sft --config RECIPE` does, with [`ConvLlavaTrainer`].

    Args:
        recipe: name of a recipe, or path of a config file of `trl sft`.
        arguments: command-line arguments that replace settings of the recipe: `["--learning_rate", "1e-5"]`.
            `--chat_template_path` also takes the name of a chat template of this package. `plain` shows captions
            without a question, as LLaVA v1.5 and TinyLLaVA pretrain; the saved processor keeps its own template.

    Returns:
        The trainer after training; model and processor are saved in its `output_dir`.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: settings or data that cannot be used.
    """
    file = find_file("recipe", recipe)
    script, args, model, mixture = get_parser().parse_args_and_config(["--config", str(file), *arguments])
    if not model.model_name_or_path:
        raise ValueError("no model to train: pass --model_name_or_path, a checkpoint's folder or Hub id.")
    if mixture.datasets:
        dataset = get_dataset(mixture)
    elif script.dataset_name:
        dataset = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    else:
        raise ValueError("no data to train on: pass --dataset_name, a folder of `convllava data build` or a Hub id.")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    processor, template, own_template = None, args.chat_template_path, None
    if template in list_chat_templates():
        processor = AutoProcessor.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
        )
        own_template = processor.chat_template
        processor.chat_template = build_chat_template(processor.tokenizer, template)
        args.chat_template_path = None
    trainer = ConvLlavaTrainer(
        model=model.model_name_or_path,
        processing_class=processor,
        args=args,
        recipe=file.stem,
        data=script.dataset_name or ", ".join(part.path for part in mixture.datasets),
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if template == CAPTIONS_ALONE:
        trainer.data_collator.processor = copy.copy(trainer.data_collator.processor)
        trainer.processing_class.chat_template = own_template
    resume = args.resume_from_checkpoint
    if str(resume).lower() in ("false", "none"):
        resume = None
    elif str(resume).lower() in ("true", "last"):
        resume = find_last_checkpoint(args.output_dir)
        logger.warning(f"resuming from {resume}." if resume else f"nothing to resume in {args.output_dir}: starting.")
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    # TRL writes the card with its checkpoints, which may be off; PEFT adds to it when it saves.
    trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=script.dataset_name)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer
