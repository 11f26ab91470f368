"""TRL's `SFTTrainer` with per-part learning rates, grouped batches, whole images and safe checkpoints.

Everything else (arguments, PEFT, distribution, logging, the loss) is TRL's and transformers' own.
"""

import math
import re
import shutil
import sys
import time
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
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from transformers import EarlyStoppingCallback, LlavaImageProcessor, PreTrainedModel, ProgressCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging
from transformers.utils.generic import is_flash_attention_requested
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
from trl.trainer.utils import get_peak_flops

from ..images import COLUMNS, get_draft, set_image_size, undecode_images
from ..model.modeling_convllava import PADDED_ID_SCORE, find_names, set_trainable
from .arguments import ConvLlavaTrainingArguments
from .blank_images import add_passes, count_passes
from .callbacks import CurvesCallback, LossBarCallback, LossLinesCallback
from .collator import ConvLlavaCollator
from .flops import measure_flops
from .plans import PARTS, keep_trained_precise
from .runs import (
    UNFINISHED,
    find_last_checkpoint,
    place_checkpoint,
    remove_if_cut_short,
    replace_model,
    restore_checkpoints,
    write_manifest,
)
from .sample_answers import SampleAnswers, sample_questions
from .sampler import ModalityLengthSampler, describe_long_rows, measure_lengths
from .throughput import Throughput
from .vision_cache import VisionCache


logger = logging.get_logger(__name__)
# Modules of PEFT that train something in the place of the module inside them, and what they add to names.
PEFT_WRAPPERS = (BaseTunerLayer, ModulesToSaveWrapper)
PEFT_NAME_PARTS = r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)"


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
        self.is_saving, self.longest_row = False, None
        model_kwargs = args.model_init_kwargs or {}
        if args.ddp_find_unused_parameters is None and "trainable" in model_kwargs:
            args.ddp_find_unused_parameters = False  # text-only batches run an idle vision pass
        rows = kwargs.get("train_dataset")
        has_images = isinstance(rows, Dataset) and bool(set(COLUMNS) & set(rows.column_names))
        joins_rows, args.padding_free = args.padding_free and has_images, args.padding_free and not has_images
        super().__init__(args=args, **kwargs)
        args.padding_free |= joins_rows  # which TRL refuses for images
        if isinstance(self.model, PeftModel):
            self._report_what_peft_freezes([*(model_kwargs.get("trainable") or []), *(args.trainable or [])])
        elif args.trainable:
            set_trainable(self.model, args.trainable)
        if isinstance(self.model, PeftModel) and (args.bf16 or args.fp16):
            keep_trained_precise(self.model)
        if args.image_aspect_ratio is not None:
            set_aspect_ratio(self.processing_class, args.image_aspect_ratio)
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
            self.data_collator.padding_free = joins_rows and self._can_join_rows()
        self.sample = self._sample_questions() if args.eval_generate else None
        self.throughput = self._measure_throughput()
        self._silence_padded_ids()
        if self.is_fsdp_enabled:
            self._name_sharded_layers()
            self._unwrap().base_model.register_forward_hook(self._gather_output_layer)
        self.add_callback(CurvesCallback())
        if self.pop_callback(ProgressCallback):
            self.add_callback(LossBarCallback() if sys.stderr.isatty() else LossLinesCallback())
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def _unwrap(self) -> PreTrainedModel:
        """The model without PEFT around it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _name_sharded_layers(self) -> None:
        """Names the layers to shard, as accelerate stops at one that a model lists and lacks (CLIP's text layers)."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            there = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(there & set(self.model._no_split_modules or ()))

    def _gather_output_layer(self, *_) -> None:
        """Gathers the output layer's weight as FSDP2 does it for a module that runs.

        TRL's fused loss reads the weight and does not run the layer. It would gather it by itself, past FSDP2, and
        each rank would keep the gradient of its own batch where the mean over all ranks belongs.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()

    def _report_what_peft_freezes(self, patterns: list[str]) -> None:
        """PEFT trains its adapters and the modules it saves, whatever a recipe trains without it.

        Raises:
            ValueError: a pattern that matches no parameter.
        """
        model = self._unwrap()
        wrapped = [name for name, module in model.named_modules() if isinstance(module, PEFT_WRAPPERS)]
        names = {re.sub(PEFT_NAME_PARTS, "", name): name for name, _ in model.named_parameters()}
        tied = {re.sub(PEFT_NAME_PARTS, "", name) for name, _ in model.named_parameters(remove_duplicate=False)}
        frozen = Counter()
        for name in sorted(find_names([*names, *sorted(tied - names.keys())], patterns) & names.keys()):
            if not names[name].startswith(tuple(f"{module}." for module in wrapped)):
                part = re.match(r".*?\.stages\.\d+|(model\.)?[^.]+", name)[0]
                frozen[part.removeprefix("model.")] += 1
        if frozen:
            logger.warning(
                "use_peft trains nothing but its adapters and lora_modules_to_save. Of what the recipe trains without "
                f"it, these tensors stay frozen: {', '.join(f'{count} of {part}' for part, count in frozen.items())}."
            )

    def _sample_questions(self) -> SampleAnswers:
        """The questions of `eval_generate`."""
        if self.eval_dataset is None or isinstance(self.eval_dataset, dict):
            raise ValueError(
                f"eval_generate={self.args.eval_generate} needs evaluation data, as one dataset: --eval_strategy "
                "steps, and a split `test`, which `convllava data build --holdout` makes."
            )
        if not isinstance(self.data_collator, ConvLlavaCollator):
            raise ValueError("eval_generate is for rows with images.")
        original_rgb = getattr(self.processing_class.image_processor, "original_rgb", False)
        questions = sample_questions(self.eval_dataset, self.args.eval_generate, original_rgb)
        return SampleAnswers(questions, Path(self.args.output_dir))

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates as transformers does, and answers the sample; the share of exact answers is one of the metrics."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.sample is not None:
            step = self.state.global_step
            self.sample.load_record(step)
            # Every process answers everything, as sharded weights are gathered by all of them together.
            with self.compute_loss_context_manager():
                exact = self.sample.ask(self.model, self.processing_class, step)
            output.metrics[f"{metric_key_prefix}_exact_match"] = exact
            if self.is_world_process_zero():
                self.sample.write()
        return output

    def _can_join_rows(self) -> bool:
        """Whether attention takes rows without padding as they are; but for flash attention, a mask over all tokens."""
        if is_flash_attention_requested(self.model.config.get_text_config()):
            return True
        logger.warning(
            "padding_free needs --attn_implementation flash_attention_2 (or another flash attention): padding batches."
        )
        return False

    def _measure_throughput(self) -> Throughput:
        """What counts the run's speed; with the share of the device's peak, where TRL knows that."""
        dtype = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
        device = self.args.device
        peak = get_peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
        model = self._unwrap()
        if peak is None or is_deepspeed_zero3_enabled() or not hasattr(model.model, "vision_tower"):
            return Throughput()
        size = self.processing_class.image_processor.size
        return Throughput(measure_flops(model, size.get("height") or size["shortest_edge"]), peak)

    def _fill_cache(self) -> VisionCache:
        """Computes the tower's features of all training images, as this run would."""
        if not isinstance(self.train_dataset, Dataset) or self.eval_dataset is not None:
            raise ValueError("vision_cache needs data that is no stream, and eval_strategy='no'.")
        columns = self.train_dataset.column_names
        if not set(COLUMNS) & set(columns):
            raise ValueError(f"vision_cache needs a column 'images' or 'image'; got {', '.join(columns)}.")
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else self.model.dtype
        model = self._unwrap().to(self.args.device)
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
            counts_passes=self.model.config.model_type == "convllava",
            draft=get_draft(self.processing_class.image_processor, self.args.draft_photos or None),
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

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        samples = super().get_batch_samples(*args, **kwargs)
        self.throughput.waited += time.perf_counter() - start
        return samples

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        if self.model.training:
            self.throughput.count(inputs)
        pixels = inputs.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            mean, std = (value.to(pixels.device) for value in self._normalization())
            inputs["pixel_values"] = (pixels.float() - mean) / std
        if self.accelerator.num_processes > 1 and getattr(self.processing_class, "image_token", None) is not None:
            passes = 1  # also without images: DDP stops at a projector without a gradient
            if self._sizes_vary():
                found = inputs.get("vision_passes")
                found = count_passes(inputs, self.model.config) if found is None else found
                found = torch.tensor(found, device=self.args.device)
                torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
                passes = max(passes, found.item())
            inputs = add_passes(inputs, passes, self.processing_class, self.model.config)
        return inputs

    def _sizes_vary(self) -> bool:
        """Whether a batch may have images of several sizes, so that the tower runs more than once."""
        if self.model.config.model_type != "convllava":
            return False
        settings = self.processing_class.image_processor
        return settings.image_aspect_ratio == "native" or not settings.do_resize

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
        is_ours = self.args.group_by_modality_length and self.args.train_sampling_strategy == "random"
        if not is_ours or not isinstance(dataset, Dataset):
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
        self.longest_row = max(lengths, default=0)
        rows = self.args.train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthSampler(lengths, has_images, rows, seed)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Makes the optimizer as transformers does; with learning rates per part, its groups are split by part.

        Raises:
            ValueError: a learning rate of a part that is frozen, or an optimizer whose groups hold something else.
        """
        rates = {"vision tower": self.args.vision_learning_rate, "projector": self.args.projector_learning_rate}
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if is_given or not any(rate is not None for rate in rates.values()):
            return optimizer
        parts = {}
        for name, parameter in (self.model if model is None else model).named_parameters():
            part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "rest")
            if parameter.requires_grad:
                parts[id(parameter)] = part if rates.get(part) is not None else "rest"
        for part, rate in rates.items():
            if rate is not None and part not in parts.values():
                raise ValueError(
                    f"a learning rate of {rate} is set for the {part}, but none of its parameters are trained: see "
                    "`convllava plan`, or leave the learning rate out."
                )
        groups: dict[tuple[str, int], dict] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in parts:
                    raise ValueError(
                        f"optim={self.args.optim.value!r} does not hold the model's own parameters, so parts cannot "
                        "have rates of their own: leave vision_learning_rate and projector_learning_rate out."
                    )
                part = parts[id(parameter)]
                rate = group["lr"] if part == "rest" else rates[part]
                own = groups.setdefault((part, number), {**group, "params": [], "lr": rate, "part": part})
                own["params"].append(parameter)
        optimizer.param_groups[:] = sorted(groups.values(), key=lambda group: group["part"] != "rest")
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs and self.optimizer is not None:
            first, *others = self.optimizer.param_groups  # what is logged is the rate of the first
            for group in others:
                if group.get("part", "rest") not in ("rest", first.get("part")):
                    name = f"learning_rate_{group['part'].replace(' ', '_')}"
                    logs[name] = logs["learning_rate"] * group["initial_lr"] / first["initial_lr"]
        if "loss" in logs:
            logs.update(self.throughput.summarise(self.accelerator))
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        if self.args.should_save:
            restore_checkpoints(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise self._explain_infinite(f"the loss is {loss.item()}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that transformers has for its log; raises before the optimizer writes what is no number.

        DeepSpeed steps inside the backward pass, so its norm comes after the step, but before a checkpoint is saved.
        """
        # A step without images moves the projector by its momentum on several processes, and in the originals.
        for group in [] if self.is_deepspeed_enabled else self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None and parameter in self.optimizer.state:
                    parameter.grad = torch.zeros_like(parameter)
        norm = super()._get_grad_norm(model, grad_norm)
        is_scaled = self.accelerator.scaler is not None or self.args.fp16  # skips such steps, and lowers its scale
        if norm is not None and not is_scaled and not math.isfinite(norm):
            raise self._explain_infinite("a gradient is not finite", self.is_deepspeed_enabled)
        return norm

    def _explain_infinite(self, what: str, is_written: bool = False) -> FloatingPointError:
        weights = "the weights in memory are spoilt, no checkpoint is" if is_written else "the weights were not changed"
        return FloatingPointError(
            f"{what} at step {self.state.global_step + 1}; {weights} by it. "
            f"{self._name_last_checkpoint()} Usual causes: a learning rate that is too high, float16 instead of "
            "bfloat16, a broken image."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(Path(self.state.best_model_checkpoint), self.model)

    def _load_renamed(self, folder: Path, model) -> None:
        """Loads weights that are saved under other names than the model's, as those of transformers' LLaVA are.

        `Trainer` looks for the model's own names there, finds none, and goes on with the weights that it has.
        """
        names = set()
        for file in folder.glob("model*.safetensors"):
            with safe_open(file, "pt") as content:
                names.update(content.keys())
        if not names <= set(model.state_dict()) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())

    def _get_output_dir(self, trial=None) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self.is_saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Writes a checkpoint beside its name, with a list of its files, and gives it the name when it is whole."""
        run_dir = Path(self._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = run_dir / UNFINISHED / folder.name
        self.is_saving = True
        try:
            with remove_if_cut_short(unfinished.parent, self._name_last_checkpoint):
                super()._save_checkpoint(model, trial)
                if self.args.should_save and self.state.best_model_checkpoint == str(unfinished):
                    self.state.best_model_checkpoint = str(folder)  # the name that it will have
                    self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(unfinished)
        finally:
            self.is_saving = False
        if self.args.should_save:
            place_checkpoint(unfinished, folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model and processor; files get their names when all of them are whole."""
        if self.is_saving or not self.args.should_save:
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        unfinished = folder / UNFINISHED
        with remove_if_cut_short(unfinished, self._name_last_checkpoint):
            unfinished.mkdir(parents=True, exist_ok=True)
            if (folder / "README.md").exists():
                shutil.copy(folder / "README.md", unfinished)  # PEFT adds to the card that it finds
            super().save_model(str(unfinished), _internal_call=True)
        replace_model(folder, unfinished)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

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


def set_aspect_ratio(processor, value: str) -> None:
    """Sets how a processor brings images to the tower's shape.

    Raises:
        ValueError: a way that its image processor lacks.
    """
    settings = processor.image_processor
    if hasattr(settings, "image_aspect_ratio"):
        ways = ("pad", "native", "squash")
    elif type(settings).__name__.startswith(("CLIP", "Llava")):
        ways = ("pad", "crop")
    else:
        ways = ()
    if value not in ways:
        raise ValueError(
            f"image_aspect_ratio={value!r}: {type(settings).__name__} has {', '.join(ways) or 'one way only'}."
        )
    if hasattr(settings, "image_aspect_ratio"):
        settings.image_aspect_ratio = value
    elif isinstance(settings, LlavaImageProcessor):
        settings.do_pad = value == "pad"
    elif value == "pad":
        known = {key: item for key, item in settings.to_dict().items() if key != "image_processor_type"}
        processor.image_processor = LlavaImageProcessor(**{**known, "do_pad": True})


def describe_training(
    args: ConvLlavaTrainingArguments, recipe: str | None, data: str | None, adapter: PeftConfig | None = None
) -> str:
    """The section of a model card that says how the model was trained."""
    rows = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    trained = (args.model_init_kwargs or {}).get("trainable") or args.trainable or []
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
