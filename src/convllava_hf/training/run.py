"""Runs a recipe, which is a config file of `trl sft`."""

import copy
import re
import warnings
from collections.abc import Iterable
from contextlib import ExitStack
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

from ..checkpoints.architecture import check_source
from ..inference.load import is_fast_on_cpu
from ..shipped import build_chat_template, find_file, list_chat_templates
from .arguments import ConvLlavaTrainingArguments
from .runs import claim_output, find_damage, find_last_checkpoint, remove_checkpoints
from .summaries import StartSummaryCallback, StopCallback, describe_end, describe_stop
from .trainer import ConvLlavaTrainer


logger = logging.get_logger(__name__)
# The chat template for captions alone: nothing to chat with, so what is trained with it keeps its own.
CAPTIONS_ALONE = "plain"
DATA_FILES = (".json", ".jsonl", ".parquet", ".csv", ".arrow")
LAST = ("true", "last")  # say to resume from the newest complete checkpoint
PEEK = 2**16  # characters of a JSON that tell its format


def get_parser() -> TrlParser:
    """The parser of `trl sft`, with our arguments in the place of TRL's."""
    return TrlParser((ScriptArguments, ConvLlavaTrainingArguments, ModelConfig, DatasetMixtureConfig))


def format_settings() -> str:
    """Every setting of a recipe with its meaning and default: this package's own first."""
    parser = get_parser()
    ours = set(vars(ConvLlavaTrainingArguments)["__annotations__"])
    formatter = parser._get_formatter()
    for title, is_own in (("settings of convllava-hf", True), ("settings of TRL and transformers", False)):
        formatter.start_section(title)
        formatter.add_arguments([action for action in parser._actions if (action.dest in ours) == is_own])
        formatter.end_section()
    return formatter.format_help()


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
        ValueError: settings or data that cannot be used; an `output_dir` that was used; a recipe of another command.
        OSError: another run writes to `output_dir`.
        KeyboardInterrupt: the run was asked to stop, and has saved a checkpoint.
    """
    # TRL and PEFT use a setting by a name that transformers has changed.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated")
    file = find_file("recipe", recipe)
    command = re.search(r"^# +trl (\w+) --config", file.read_text(encoding="utf-8"), re.MULTILINE)
    if command and command[1] != "sft":
        raise ValueError(f"{file.stem} is a recipe of `trl {command[1]}`; its first lines say how that is launched.")
    script, args, model, mixture = get_parser().parse_args_and_config(["--config", str(file), *arguments])
    if args.trust_remote_code:
        logger.warning("trust_remote_code is for `trl sft`: this command brings the model's code and runs no other.")
        args.trust_remote_code = False
    if not model.model_name_or_path:
        raise ValueError("no model to train: pass --model_name_or_path, a checkpoint's folder or Hub id.")
    if mixture.datasets:
        dataset = get_dataset(mixture)
    elif script.dataset_name:
        path, arguments = locate_data(script.dataset_name)
        dataset = load_dataset(path, name=script.dataset_config, streaming=script.dataset_streaming, **arguments)
    else:
        raise ValueError("no data to train on: pass --dataset_name, a folder of `convllava data build` or a Hub id.")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
        "trust_remote_code": False,
    }
    if args.use_cpu and args.model_init_kwargs["dtype"] not in (None, "float32") and not is_fast_on_cpu("bfloat16"):
        args.model_init_kwargs["dtype"] = "float32"
    data = script.dataset_name or ", ".join(part.path for part in mixture.datasets)
    identity = {
        "recipe": file.stem,
        "data": data,
        "model": model.model_name_or_path,
        "rows per step": f"{args.train_batch_size * args.world_size} x {args.gradient_accumulation_steps}",
    }
    wanted = str(args.resume_from_checkpoint)
    is_resumed = wanted.lower() not in ("false", "none")
    resumed = wanted if is_resumed and wanted.lower() not in LAST else is_resumed
    with ExitStack() as stack:
        if args.process_index == 0:
            stack.enter_context(claim_output(args.output_dir, identity, resumed, replace=args.overwrite_output_dir))
        check_source(model.model_name_or_path, args.model_init_kwargs["revision"])
        processor, template, own_template = None, args.chat_template_path, None
        if template in list_chat_templates():
            processor = AutoProcessor.from_pretrained(model.model_name_or_path, revision=model.model_revision)
            own_template = processor.chat_template
            processor.chat_template = build_chat_template(processor.tokenizer, template)
            args.chat_template_path = None
        trainer = ConvLlavaTrainer(
            model=model.model_name_or_path,
            processing_class=processor,
            args=args,
            recipe=file.stem,
            data=data,
            train_dataset=dataset[script.dataset_train_split],
            eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
        if template == CAPTIONS_ALONE:
            trainer.data_collator.processor = copy.copy(trainer.data_collator.processor)
            trainer.processing_class.chat_template = own_template
        resume = find_resumed(wanted, args.output_dir) if is_resumed else None
        if args.process_index == 0 and not is_resumed:
            remove_checkpoints(args.output_dir)
        trainer.add_callback(StartSummaryCallback(trainer))
        stop = StopCallback()
        trainer.add_callback(stop)
        with stop.listen():
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if stop.is_asked:
            if args.process_index == 0:
                logger.warning(describe_stop(trainer, recipe))
            raise KeyboardInterrupt
        # TRL writes the card with its checkpoints, which may be off; PEFT adds to it when it saves.
        trainer.create_model_card(model_name=Path(args.output_dir).name, dataset_name=script.dataset_name)
        trainer.save_model(args.output_dir)
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=script.dataset_name)
        if args.process_index == 0:
            logger.warning(describe_end(trainer))
    return trainer


def locate_data(name: str) -> tuple[str, dict[str, str]]:
    """What `load_dataset` is to read, without asking the Hub for what can only be here.

    Args:
        name: `--dataset_name`: a folder, a file, or `OWNER/NAME` on the Hub.

    Returns:
        The first argument of `load_dataset`, and others.

    Raises:
        FileNotFoundError: a folder or file that is not there.
        ValueError: a JSON in LLaVA's format, which is to be built first.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        with path.open(encoding="utf-8", errors="replace") as file:
            if '"conversations"' in file.read(PEEK):
                raise ValueError(
                    f"--dataset_name {name} is in LLaVA's format. Build the data of it, and train on that: convllava "
                    f"data build --llava-json {name} --image-root FOLDER_OF_THE_IMAGES --output data"
                )
        return "json", {"data_files": str(path)}
    if path.is_file() and path.suffix == ".parquet":
        return "parquet", {"data_files": str(path)}
    if path.exists():
        return str(path), {}
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in DATA_FILES
    if not is_on_hub or path.parent.is_dir():
        raise FileNotFoundError(
            f"--dataset_name {name}: there is no such file or folder in {Path.cwd()}; expected a folder of `convllava "
            "data build`, or OWNER/NAME of a dataset on the Hub."
        )
    return name, {}


def find_resumed(wanted: str, output_dir: str) -> Path | None:
    """The checkpoint to resume from: the one that is named, or for `last` (or `true`) the newest complete one.

    Raises:
        ValueError: the checkpoint that is named is not complete.
    """
    if wanted.lower() in LAST:
        found = find_last_checkpoint(output_dir)
        logger.warning(f"resuming from {found}." if found else f"nothing to resume in {output_dir}: starting.")
        return found
    if damage := find_damage(Path(wanted)):
        last = find_last_checkpoint(output_dir) or "none"
        raise ValueError(f"cannot resume from {wanted}: {damage}. Last complete checkpoint: {last}.")
    return Path(wanted)
