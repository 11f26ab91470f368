"""Joins a tower and a language model into one checkpoint: what all families share, and ConvLLaVA.

Source of the original behaviour: alibaba/conv-llava, `llava/model/multimodal_encoder/convnext_encoder.py` (`add_stage`)
and `llava/model/multimodal_projector/builder.py` (new modules are initialised by torch's defaults).
"""

import copy
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..checkpoints.cards import list_image_tokens
from ..checkpoints.code_files import HUB_FILES, HUB_FOLDER
from ..checkpoints.shapes import check_counts, list_shapes
from ..checkpoints.turn_ends import find_turn_end
from ..checkpoints.weight_maps import VISION_TOWER, ConversionError, WeightMap, describe_cause
from ..model.configuration_convllava import ConvLlavaConfig
from ..model.image_processing_convllava import ConvLlavaImageProcessor
from ..model.modeling_convllava import ConvLlavaForConditionalGeneration
from ..model.processing_convllava import ConvLlavaProcessor
from ..shipped import build_chat_template
from .sources import LanguageModel, Tower
from .vocabulary import add_tokens, count_ids, list_end_ids
from .writer import CheckpointWriter, ConversionReport, check_stored, plan_weights


# Bounds answers that do not end by themselves, where a caller gives no bound.
MAX_NEW_TOKENS = 1024
# Which tensors a tower other than ConvNextModel has, its class says.
OTHER_VISION_TOWER = WeightMap("a vision tower", {"{rest}": "model.vision_tower.{rest}"})


def make_fresh(model: nn.Module, name: str, seed: int) -> torch.Tensor:
    """Initialises a parameter of a model on the meta device by torch's defaults, in float32 on the CPU."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in ("layer_scale_parameter", "gamma"):
        return torch.full(getattr(module, leaf).shape, model.config.vision_config.layer_scale_init_value)
    if not hasattr(module, "reset_parameters"):  # ConvNeXt V2's response normalisation begins as nothing
        return torch.zeros(getattr(module, leaf).shape)
    # Weight and bias come from one initialisation, which is repeated for each of them.
    module = copy.deepcopy(module).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {owner}".encode()))
        module.reset_parameters()
    return getattr(module, leaf).detach()


def _build_generation_config(language: LanguageModel) -> GenerationConfig:
    text_config, tokenizer = language.config, language.tokenizer
    # The files of the sources also hold sampling settings, which the original's evaluation does not use, and a
    # `max_length`, which warns beside every `max_new_tokens`.
    ends = list_end_ids(language)
    turn_end = find_turn_end(tokenizer, tokenizer.chat_template).token_id
    if turn_end not in (None, *ends):
        ends.append(turn_end)
    # In these formats no token ends a turn. `stop_strings`, transformers' own setting, would make `generate` and the
    # pipelines fail where they are not given the tokenizer.
    stops = {"answer_stop_strings": ["###"]} if language.chat_template in ("llava_v0", "v0_mmtag") else {}
    return GenerationConfig(
        **stops,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=tokenizer.pad_token_id,
        # A placeholder in an answer stands for nothing.
        suppress_tokens=[tokenizer.convert_tokens_to_ids(language.image_token)],
        max_new_tokens=MAX_NEW_TOKENS,
    )


class JoinedModel:
    """A tower and a language model on their way into one checkpoint. A family is a subclass: it says what the parts
    make together (`build`), and where weights come from that neither has (`fresh`).

    Args:
        tower, language: the parts; both sources have the names that the new model stores.
    """

    model_class: type[PreTrainedModel]
    code_files: tuple[str, ...] = ()

    def __init__(self, tower: Tower, language: LanguageModel):
        self.tower, self.language = tower, language

    def build(self) -> tuple[PreTrainedConfig, ProcessorMixin]:
        """Makes configuration and processor; the tokenizer has all its tokens by then."""
        raise NotImplementedError

    def fresh(self, name: str) -> Callable[[], torch.Tensor] | None:
        """A function that makes a tensor that no source has, or `None` where there must be a source."""
        return None

    def save(self, folder: Path):
        """Writes everything but the weights."""
        for name in self.code_files:  # config.json names the code that lies beside it
            shutil.copyfile(HUB_FOLDER / name, folder / name)
        self.config.save_pretrained(folder)
        _build_generation_config(self.language).save_pretrained(folder)
        for transient in ("is_local", "local_files_only"):  # how the tokenizer was loaded is none of its settings
            self.language.tokenizer.init_kwargs.pop(transient, None)
        self.processor.save_pretrained(folder)

    def check(self, folder: Path) -> list[str]:
        """Loads what was saved, from the files alone, and compares the parts with each other."""
        vocabulary, tokenizer = self.vocabulary, self.language.tokenizer
        saved = type(self.config).from_pretrained(folder)
        with torch.device("meta"):
            check_stored(folder, self.model_class(saved), saved)
        loaded = type(self.processor).from_pretrained(folder)
        ids = {token: loaded.tokenizer.convert_tokens_to_ids(token) for token in vocabulary.added}
        image_token = loaded.tokenizer.convert_tokens_to_ids(self.language.image_token)
        sample = "A question. <image>\nAn answer.</s>And another."
        for what, found, expected in (
            ("new tokens", ids, vocabulary.added),
            ("image_token_id", saved.image_token_id, image_token),
            ("pad_token_id", saved.text_config.pad_token_id, loaded.tokenizer.pad_token_id),
            ("padding_side", loaded.tokenizer.padding_side, "left"),
            ("model_max_length", loaded.tokenizer.model_max_length, tokenizer.model_max_length),
            ("number of tokens", len(loaded.tokenizer), len(tokenizer)),
            ("vocab_size", saved.text_config.vocab_size, vocabulary.rows_after),
            ("tokens of a sample", loaded.tokenizer(sample)["input_ids"], tokenizer(sample)["input_ids"]),
            ("chat template", loaded.chat_template, tokenizer.chat_template),
            ("image processor", loaded.image_processor.to_dict(), self.processor.image_processor.to_dict()),
        ):
            if found != expected:
                raise ConversionError(f"{what}: read back as {found!r}, expected {expected!r}. Please report this.")
        return ["the model has exactly these tensors", "configuration, tokenizer and processor load and agree"]

    def write(self, writer: CheckpointWriter, content: dict) -> ConversionReport:
        """Adds the tokens, plans every tensor and writes the checkpoint; `content` begins the report."""
        language, tower = self.language, self.tower
        self.vocabulary = vocabulary = add_tokens(language)
        tokenizer = language.tokenizer
        # The tokenizer and the processor keep their template in one file.
        tokenizer.chat_template = build_chat_template(tokenizer, language.chat_template, language.image_tag)
        language.config.vocab_size = vocabulary.rows_after
        language.config.pad_token_id = tokenizer.pad_token_id
        try:
            self.config, self.processor = self.build()
            check_counts(self.config, len(language.source.tensors) + len(tower.source.tensors))
            with torch.device("meta"):
                self.model = self.model_class(self.config)
        except ConversionError:
            raise
        except Exception as error:  # settings that do not fit together fail in every class in its own way
            problem = f"{tower.source.name} and {language.source.name} make no model: {describe_cause(error)}"
            raise ConversionError(f"{problem} Correct the config.json that it is in.") from error
        sources = list(dict.fromkeys([language.source, tower.source]))
        shapes, tied = list_shapes(self.model, self.config)
        tensors, records = plan_weights(
            shapes, sources, dtype=writer.dtype, vocabulary=vocabulary, fresh=self.fresh, tied=tied
        )
        for part in (self.config, self.config.text_config, self.config.vision_config):
            part.dtype = next(tensor.dtype for tensor in tensors if tensor.name == language.embeddings)
        self.config.architectures = [self.model_class.__name__]
        content = {
            **content,
            "architecture": self.model_class.__name__,
            "image_tokens": list_image_tokens(self.config),
            "vocabulary": {
                "rows_before": vocabulary.rows_before,
                "rows_after": vocabulary.rows_after,
                "added": vocabulary.added,
            },
        }
        return writer.write(content, sources, tensors, records, self.save, self.check)


class JoinedConvLlava(JoinedModel):
    """A ConvNeXt and a language model. Tensors with names that begin with one of `fresh_names` come from `seed`."""

    model_class = ConvLlavaForConditionalGeneration
    code_files = HUB_FILES

    def __init__(self, tower, language, projector_type: str, image_size: int, fresh_names: tuple[str, ...], seed: int):
        super().__init__(tower, language)
        self.projector_type, self.image_size = projector_type, image_size
        self.fresh_names, self.seed = fresh_names, seed
        tower.source.rename(VISION_TOWER if tower.config.model_type == "convnext" else OTHER_VISION_TOWER)

    def build(self) -> tuple[PreTrainedConfig, ProcessorMixin]:
        tower, language, tokenizer = self.tower, self.language, self.language.tokenizer
        config = ConvLlavaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_id=tokenizer.convert_tokens_to_ids(language.image_token),
            projector_type=self.projector_type,
            vocab_padding=language.config.vocab_size - count_ids(tokenizer),
        )
        config.num_image_tokens(self.image_size, self.image_size)
        image_processor = ConvLlavaImageProcessor(
            image_aspect_ratio="pad",
            size={"height": self.image_size, "width": self.image_size},
            downsampling_factor=config.downsampling_factor,
            image_mean=tower.image_mean,
            image_std=tower.image_std,
            resample=tower.resample,
        )
        processor = ConvLlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            image_token=language.image_token,
            chunk_prefix_space="".join(tokenizer.tokenize("a")).startswith("\u2581"),  # SentencePiece's leading space
        )
        return config, processor

    def fresh(self, name: str) -> Callable[[], torch.Tensor] | None:
        return partial(make_fresh, self.model, name, self.seed) if name.startswith(self.fresh_names) else None


def write_convllava(
    writer: CheckpointWriter,
    content: dict,
    tower: Tower,
    language: LanguageModel,
    projector_type: str,
    image_size: int,
    fresh: tuple[str, ...] = (),
) -> ConversionReport:
    """Joins a ConvNeXt and a language model. Tensors whose names begin with one of `fresh` are initialised."""
    parts = JoinedConvLlava(tower, language, projector_type, image_size, fresh, content.get("seed", 0))
    return parts.write(writer, content)
