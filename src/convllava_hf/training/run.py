"""Runs a recipe, which is a config file of `trl sft`."""

import copy
from collections.abc import Iterable
from pathlib import Path

from datasets import load_dataset
from transformers import AutoProcessor
from transformers.utils import logging
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..shipped import build_chat_template, find_file, list_chat_templates
from .arguments import ConvLlavaTrainingArguments
from .trainer import ConvLlavaTrainer, find_last_checkpoint


logger = logging.get_logger(__name__)


# The chat template for captions alone: nothing to chat with, so what is trained with it keeps its own.
CAPTIONS_ALONE = "plain"


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
