"""GPT-assisted review: what a judge is asked, how its replies are read, and how reviews are summed up.

A judge sees a question, what is known of the image, a reference answer and the model's answer, and writes two scores.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from .files import read_json, read_json_lines
from .scores import Outcome, Score, Statistic


RULES = Path(__file__).with_name("review_rules.json")  # category -> what LLaVA and LLaVAR tell the judge
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
# The judge that each of the original scripts asks.
JUDGES = {"text": "gpt-4", "visual": "gpt-4-0314", "bench": "gpt-4-0314", "llavar": "GPT4"}


def build_requests(
    questions: list[dict],
    references: list[dict],
    answers: list[dict],
    context: list[dict] = (),
    kind: str = "visual",
    judge: str | None = None,
) -> list[dict]:
    """What the judge is asked, one request per question.

    Args:
        questions: `question_id`, `text`, `category`, and `image` where there is one.
        references, answers: in the order of the questions.
        context: `image`, and `captions` with `instances` (`category`, `bbox`), or `caption` (bench).
        kind: `"text"` (no images), `"visual"`, `"bench"` (LLaVA-Bench in the wild) or `"llavar"`.
        judge: name of the model. Default: the one of the original script.

    Returns:
        `review` (`id`, `question_id`, `answer1_id`, `answer2_id`, `category`) and `request` (`judge`, `messages`,
        `temperature`, `max_tokens`) for each.

    Raises:
        KeyError: an image without context, a context without the parts of its kind, or a category without a rule.
        ValueError: no such kind.

    Source: haotian-liu/LLaVA, SALT-NLP/LLaVAR, `llava/eval/eval_gpt_review{,_visual,_bench}.py`. LLaVAR's released
    context has a string of captions and no boxes: its script stops with a KeyError there, and so does this.
    """
    if kind not in JUDGES:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(JUDGES)}.")
    rules = read_json(RULES)
    known = {row["image"]: row for row in context}
    requests = []
    for number, (question, first, second) in enumerate(zip(questions, references, answers, strict=False), 1):
        category = f"llava_bench_{question['category']}" if kind == "bench" else question["category"]
        rule = rules.get(category, rules["default"]) if kind == "text" else rules[category]
        seen = ""
        if kind == "bench":
            caption = known[question["image"]]["caption"]
            seen = f"[Context]\n{caption if isinstance(caption, str) else _join(caption)}\n\n"
        elif kind != "text":
            row = known[question["image"]]
            boxes = _join(f"{instance['category']}: {instance['bbox']}" for instance in row["instances"])
            seen = f"[Context]\n{_join(row['captions'])}\n\n{boxes}\n\n"
        content = f"{seen}[Question]\n{question['text']}\n\n"
        for place, answer in (("1", first), ("2", second)):
            name = f"{rule['role']} {place}"
            content += f"[{name}]\n{answer['text']}\n\n[End of {name}]\n\n"
        content += f"[System]\n{rule['prompt']}\n\n"
        review = {
            "id": number,
            "question_id": question["question_id"],
            "answer1_id": first.get("answer_id", first["question_id"]),
            "answer2_id": second.get("answer_id", second["question_id"]),
            "category": category,
        }
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        request = {"judge": judge or JUDGES[kind], "messages": messages, "temperature": 0.2, "max_tokens": 1024}
        requests.append({"review": review, "request": request})
    return requests


def _join(lines) -> str:
    return "\n".join(lines)


def parse_review(reply: str) -> list[float]:
    """The two scores of a reply, or `[-1, -1]`: the first line must be two numbers and one space or comma.

    Source: as above, `parse_score`.
    """
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = words
        return [float(first), float(second)]
    except ValueError:
        return [-1, -1]


def read_scores(reply: str) -> list[float] | None:
    """The two scores of a reply as a reader would find them: also in brackets, after labels, below an empty line."""
    line = next((line for line in reply.splitlines() if line.strip()), "")
    line = re.sub(r"[Aa]ssistant \d", " ", re.sub(r"(\d) ?/ ?10\b", r"\1", line))
    numbers = [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w])", line)]
    return numbers if len(numbers) == 2 and all(0 <= number <= 10 for number in numbers) else None


def summarise_reviews(reviews: list[dict]) -> dict[str, list[float]]:
    """Category -> mean scores of both sides, to three decimals; failures count as -1, as in the original.

    Args:
        reviews: rows with `tuple` (or the older `score`) and, where known, `category`.

    Source: haotian-liu/LLaVA, `llava/eval/summarize_gpt_review.py`.
    """
    groups = defaultdict(list)
    for review in reviews:
        pair = review["tuple"] if "category" in review or "tuple" in review else review["score"]
        if "category" in review:
            groups[review["category"]].append(pair)
        groups["all"].append(pair)
    return {name: [round(x, 3) for x in np.asarray(pairs).mean(0).tolist()] for name, pairs in groups.items()}


def print_summary(files: list[Path]) -> list[str]:
    """The lines that LLaVA's script prints for files of reviews, in JSON Lines."""
    lines = []
    for file in sorted(files, key=str):
        lines.append(Path(file).name.replace("gpt4_text_", "").replace(".jsonl", ""))
        for category, (first, second) in sorted(summarise_reviews(read_json_lines(file)).items()):
            lines.append(f"{category} {round(second / first * 100, 1)} {round(first * 10, 1)} {round(second * 10, 1)}")
        lines.append("=================================")
    return lines


def print_llavar_summary(file: Path, name: str) -> list[str]:
    """The lines that LLaVAR's script prints for one file; `name` is the path as it was given."""
    lines = [f"GPT-4 vs. {name}"]
    for category, stats in summarise_reviews(read_json_lines(file)).items():
        lines.append(f"{category} {stats} {round(stats[1] / stats[0] * 100, 1)}")
    return [*lines, "================================="]


def score_reviews(reviews: list[dict]) -> Score:
    """The model's score relative to the reference's, in percent.

    In the original a reply that it cannot read counts as -1 on both sides; ours reads more forms, and leaves out and
    names what it cannot read.

    Args:
        reviews: rows with `content`, `tuple` and `category`.
    """
    problems, outcomes = defaultdict(list), []
    pairs = {"original": [], "ours": []}
    for review in reviews:
        old = review.get("tuple", review.get("score"))
        new = read_scores(review["content"]) if "content" in review else old
        pairs["original"].append(old)
        if old == [-1, -1]:
            problems["replies that the original cannot read"].append(review["question_id"])
        if new is None:
            problems["replies without two scores"].append(review["question_id"])
        else:
            pairs["ours"].append(new)
        category = review.get("category", "")
        values = [None if pair is None else pair[1] / 10 for pair in (new, old)]
        outcomes.append(Outcome(review["question_id"], *values, str(new), category=category))
    summary = summarise_reviews(reviews) if reviews else {}
    score = Score({"summary": summary}, outcomes, problems=problems)
    score.numbers["relative score"] = tuple(_divide_means(pairs[rule]) for rule in ("original", "ours"))
    return score


def _divide_means(pairs: list) -> Statistic:
    table = np.asarray(pairs, dtype=float).reshape(-1, 2)

    def compute(indices):
        first, second = table[indices].mean(0)
        return 100 * second / first if first else float("nan")

    return Statistic(len(table), compute)
