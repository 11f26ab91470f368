"""TRL's `SFTTrainer` with per-part learning rates, grouped batches, whole images and safe checkpoints.

Everything else (arguments, PEFT, distribution, logging, the loss) is TRL's and transformers' own.
"""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..images import COLUMNS, set_image_size, undecode_images
from ..model.modeling_convllava import PADDED_ID_SCORE, find_names, set_trainable
from .arguments import ConvLlavaTrainingArguments
from .callbacks import CurvesCallback, LossBarCallback
from .collator import ConvLlavaCollator
from .plans import PARTS
from .sampler import ModalityLengthSampler, describe_long_rows, measure_lengths
from .vision_cache import VisionCache


logger = logging.get_logger(__name__)


# Modules of PEFT that train something in the place of the module inside them, and what they add to names.
PEFT_WRAPPERS = (BaseTunerLayer, ModulesToSaveWrapper)


PEFT_NAME_PARTS = r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)"


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
            draft_side=self._get_draft_side() if self.args.draft_photos else None,
        )

    def _get_draft_side(self) -> int:
        """Pixels that the longer side of a photo keeps at least while it is decoded."""
        settings = self.processing_class.image_processor
        if getattr(settings, "image_aspect_ratio", None) not in ("pad", "squash"):
            raise ValueError(
                "draft_photos is for images of one size: image_aspect_ratio 'pad' or 'squash' of our models."
            )
        return max(settings.size["height"], settings.size["width"])

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
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) == len(dataset):
            dataset = self.train_dataset  # the same rows, with the columns that tell their lengths
        processor, most = getattr(self.data_collator, "processor", None), self.args.max_length
        with self.args.main_process_first(desc="measuring rows"):
            lengths, has_images = measure_lengths(dataset, processor, most)
        message = describe_long_rows(dataset, lengths, has_images, processor, most)
        if message and self.is_world_process_zero():
            logger.warning(message)
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
