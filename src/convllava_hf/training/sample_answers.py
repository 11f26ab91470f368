"""Answers to a fixed sample of the evaluation data, each time that a run evaluates, and a page that shows them."""

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..images import decode_image, encode_thumbnail, list_images
from ..inference.answer import answer
from ..tokens import list_parts, place_images


PAGE = "evaluation_answers.html"
RECORD = "evaluation_answers.json"
THUMBNAIL = 280  # pixels
LONGEST = 128  # tokens of an answer
SPARE = 8  # tokens that an answer may be longer than the expected one, so that one that goes on shows
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
section { border-top: 1px solid #ddd; padding: 1rem 0; overflow: auto; } img { float: left; margin: 0 1rem .5rem 0; }
td, th { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top; white-space: pre-wrap; }
.right { background: #b9e6c0; }
"""


@dataclass(frozen=True)
class Question:
    """The last question of a conversation, what came before it, and the expected answer."""

    history: list[dict]
    text: str
    images: list[Image.Image]
    expected: str


@dataclass
class SampleAnswers:
    """Asks the questions of a sample, and keeps what was answered at which step.

    Args:
        questions: the sample, in a fixed order.
        folder: of the page and the record.
        answers: step -> an answer per question.
    """

    questions: list[Question]
    folder: Path
    answers: dict[int, list[str]] = field(default_factory=dict)

    def load_record(self, step: int) -> None:
        """Takes over what a run that is resumed answered before this step, if it had the same questions."""
        file = self.folder / RECORD
        record = json.loads(file.read_text(encoding="utf-8")) if step and not self.answers and file.is_file() else {}
        if record.get("expected") == [question.expected for question in self.questions]:
            self.answers = {int(key): value for key, value in record["answers"].items() if int(key) < step}

    def ask(self, model: PreTrainedModel, processor: ProcessorMixin, step: int) -> float:
        """Answers all questions, always with the most likely token.

        Returns:
            The share of answers that equal the expected ones, white space aside.
        """
        answers = []
        for question in self.questions:
            expected = len(processor.tokenizer(question.expected)["input_ids"])
            limit = min(expected + SPARE, LONGEST)
            asked = {"images": question.images, "history": question.history, "max_new_tokens": limit}
            answers.append(answer(model, processor, question.text, **asked, use_cache=True))
        self.answers[step] = answers
        pairs = zip(answers, self.questions, strict=True)
        return sum(is_exact(text, question.expected) for text, question in pairs) / len(answers)

    def write(self) -> None:
        """Writes the record and the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"expected": [question.expected for question in self.questions], "answers": self.answers}
        (self.folder / RECORD).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        (self.folder / PAGE).write_text(self.render(), encoding="utf-8", errors="replace")

    def render(self) -> str:
        """The page: for each question its pictures, the expected answer, and the answer at each step."""
        body = ["<h1>Answers at each evaluation</h1>"]
        for number, question in enumerate(self.questions):
            sources = [encode_thumbnail(image, THUMBNAIL) for image in question.images]
            images = "".join(f"<img alt='picture of the question' src='{source}'>" for source in sources)
            lines = [f"<tr><th>expected</th><td>{html.escape(question.expected)}</td></tr>"]
            for step, answers in sorted(self.answers.items()):
                kind = " class='right'" if is_exact(answers[number], question.expected) else ""
                lines.append(f"<tr><th>step {step}</th><td{kind}>{html.escape(answers[number])}</td></tr>")
            text = html.escape(question.text)
            body.append(f"<section>{images}<p>{text}</p><table>{''.join(lines)}</table></section>")
        head = f"<meta charset='utf-8'><title>Answers at each evaluation</title><style>{STYLE}</style>"
        return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>\n"


def is_exact(text: str, expected: str) -> bool:
    return text.split() == expected.split()


def sample_questions(rows: Iterable[dict], count: int, original_rgb: bool = False) -> list[Question]:
    """Takes questions at equal distances, so that every run on the same data asks the same; of a stream the first.

    Args:
        rows: a dataset with the columns `messages`, and `images` or `image`.
        count: how many; fewer, where there are fewer rows or some do not end in a question and its answer.
        original_rgb: see `load_image`.

    Raises:
        ValueError: no row ends in a question and its answer; an image cannot be read.
    """
    if hasattr(rows, "select"):
        most = min(count, len(rows))
        rows = rows.select([number * len(rows) // most for number in range(most)])
    questions = [make_question(row, original_rgb) for row in islice(rows, count)]
    found = [question for question in questions if question is not None]
    if not found:
        raise ValueError("eval_generate needs rows whose `messages` end in a question and its answer.")
    return found


def make_question(row: dict, original_rgb: bool = False) -> Question | None:
    """The last question of a row; `None` where its conversation does not end in one and its answer."""
    images = list_images(row)
    messages = list_parts(row.get("messages") or [], len(images))
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        return None
    *history, asked, expected = place_images(messages, [decode_image(image, original_rgb) for image in images])
    text, answered = ("".join(part.get("text") or "" for part in message["content"]) for message in (asked, expected))
    if not text.strip():
        return None
    pictures = [part["image"] for part in asked["content"] if part["type"] == "image"]
    return Question(history, text.strip(), pictures, answered.strip())
