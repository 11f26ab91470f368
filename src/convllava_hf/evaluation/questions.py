"""The question files of the benchmarks, and how each project puts a question to its model."""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

from . import choices, grounding
from .files import read_rows


LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"


@dataclass(frozen=True)
class PromptStyle:
    """How a project asks.

    Args:
        template: one of the package's chat templates; `None` keeps the checkpoint's own.
        image_last: whether images follow the question.
        suffix: whether ScienceQA and MMBench ask for a letter (other suffixes are part of the question files).
    """

    template: str | None = None
    image_last: bool = False
    suffix: bool = True


# Source: the `model_vqa*.py` of each project.
PROMPT_STYLES = {
    "checkpoint": PromptStyle(),
    "convllava": PromptStyle("vicuna_v1"),
    "llava": PromptStyle("vicuna_v1"),
    "tinyllava": PromptStyle("vicuna_v1"),
    "llavar": PromptStyle("llavar", image_last=True, suffix=False),
}


@dataclass
class Question:
    """One question.

    Args:
        question_id: as the scorer knows it.
        prompt: what the predictions file keeps.
        text: what the model gets, without placeholders of images.
        image: path below the folder of images, bytes, a list of either or of Pillow images, or `None`.
        extra: more columns of the predictions file.
    """

    question_id: str | int
    prompt: str
    text: str
    image: str | bytes | list | None = None
    extra: dict = field(default_factory=dict)


def drop_placeholders(text: str) -> str:
    """The text of a training file without `<image>`."""
    return re.sub(r"\s*<image>\s*", "\n", text).strip()


def read_llava_questions(path: Path, style: PromptStyle) -> list[Question]:
    """LLaVA's question files (`question_id`, `image`, `text`) and training files (`id`, `image`, `conversations`)."""
    questions = []
    for number, row in enumerate(read_rows(path)):
        if "conversations" in row:
            text = drop_placeholders(row["conversations"][0]["value"])
        elif "text" in row or "question" in row:
            text = row["text"] if "text" in row else row["question"]
        else:
            raise ValueError(
                f"{path}, row {number}: neither 'text' nor 'conversations'; expected a LLaVA question file, or convert "
                "it: convllava eval-convert --help."
            )
        name = row.get("question_id", row.get("id", number))
        questions.append(Question(name, text, text, row.get("image")))
    return questions


def read_scienceqa_questions(path: Path, style: PromptStyle) -> list[Question]:
    questions = read_llava_questions(path, style)
    for question in questions:
        if style.suffix:
            question.text += f"\n{LETTER}"
        question.prompt = question.text
        if question.image:
            question.prompt = f"{question.text}\n<image>" if style.image_last else f"<image>\n{question.text}"
    return questions


def read_mmbench_questions(path: Path, style: PromptStyle, suffix: str = LETTER) -> list[Question]:
    rows = choices.read_mmbench(path)
    images = {row["index"]: base64.b64decode(row["image"]) for row in rows}
    return [
        Question(
            row["question_id"],
            row["stored_prompt"],
            row["text"],
            images[row["question_id"]],
            {key: row[key] for key in ("round_id", "options", "option_char")},
        )
        for row in choices.build_mmbench_prompts(rows, suffix if style.suffix else "")
    ]


def read_refcoco_questions(path: Path, style: PromptStyle) -> list[Question]:
    texts = [(grounding.PROMPT.format(row["sent"]), row["image"]) for row in read_rows(path)]
    return [Question(number, text, text, image) for number, (text, image) in enumerate(texts)]


def read_ocr_questions(path: Path, style: PromptStyle) -> list[Question]:
    rows = read_rows(path)
    return [Question(n, row["question"], row["question"], row["image_path"]) for n, row in enumerate(rows)]
