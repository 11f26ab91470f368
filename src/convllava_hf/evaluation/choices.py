"""Scorers of multiple choice: ScienceQA and SEED-Bench; prompts and submission of MMBench."""

import csv
import re
import sys
from collections import Counter
from pathlib import Path

from .scores import Outcome, Score, join_answers, mean_of, score_means


LETTERS = "ABCDE"
SCIENCEQA_TOPICS = (
    "punctuation literacy-in-science verbs pronouns civics culture word-study economics physics units-and-measurement "
    "science-and-engineering-practices reading-comprehension global-studies grammar figurative-language us-history "
    "writing-strategies world-history reference-skills biology earth-science phonological-awareness capitalization "
    "chemistry vocabulary geography"
).split()


def find_letter(text: str, count: int) -> str | None:
    """The option that an answer names in any usual form ("b", "(B)", "B. iron", "The answer is B"), within `count`."""
    text = text.strip()
    found = re.match(r"\(?([A-Za-z])\)?(?:[.:,)]|\s*$)", text)
    if found is None:
        letters = re.findall(r"answer is:?\s*\(?([A-Z])\b", text)
        found = letters[0] if len(set(letters)) == 1 else None
    else:
        found = found[1].upper()
    return found if found is not None and ord(found) - ord("A") < count else None


# ---- ScienceQA


def parse_scienceqa(text: str, by_pattern_only: bool = False) -> str:
    """The letter of an answer as the originals read it, or `"FAILED"`; nothing is stripped.

    Args:
        text: of the answer.
        by_pattern_only: LLaVAR's rule, which knows only sentences.

    Source: haotian-liu/LLaVA and SALT-NLP/LLaVAR, `llava/eval/eval_science_qa.py`.
    """
    if not by_pattern_only:
        if text in tuple(LETTERS):
            return text
        if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
            return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else "FAILED"


def score_scienceqa(problems_file: dict[str, dict], split: list[str], answers: list[dict]) -> Score:
    """ScienceQA by the rules of LLaVA and LLaVAR, with the categories of the benchmark's own script.

    Ours reads the letter in any usual form. In LLaVA a missing answer counts as wrong, in LLaVAR it is left out; LLaVAR
    guesses where it cannot read an answer, which counts as wrong here.

    Args:
        problems_file: question id -> `choices`, `answer` (index), `subject`, `topic`, `grade`, `hint`, `image`.
        split: ids of the questions that count.
        answers: `question_id`, `prompt`, `text`.

    Source: as above, and lupantech/ScienceQA, `tools/evaluate_acc.py`.
    """
    found, issues = join_answers(answers, split)
    outcomes, indices, llava, llavar = [], {}, {}, {}
    for name in split:
        problem = problems_file[name]
        answer = found.get(name)
        text, prompt = (answer["text"], answer["prompt"]) if answer else ("FAILED", "Unknown")
        for samples, by_pattern_only in ((llava, False), (llavar, True)):
            if by_pattern_only and answer is None:
                continue
            letter = parse_scienceqa(text, by_pattern_only)
            place = LETTERS.find(letter) if letter in tuple(LETTERS[: len(problem["choices"])]) else -1
            samples[name] = {
                "parsed_ans": letter,
                "ground_truth": LETTERS[problem["answer"]],
                "is_multimodal": "<image>" in prompt,
                "correct": place == problem["answer"],
                "pred_idx": place,
            }
        indices[name] = llava[name]["pred_idx"]
        if llava[name]["parsed_ans"] == "FAILED" and answer:
            issues["answers that the original cannot read"].append(name)
        letter = find_letter(text, len(problem["choices"])) if answer else None
        if answer and letter is None:
            issues["answers that name no choice"].append(name)
        truth = LETTERS[problem["answer"]]
        old = float(llava[name]["correct"])
        outcomes.append(Outcome(name, float(letter == truth), old, letter or "", truth, problem.get("subject", "")))
    original = {"llava": _count_scienceqa(llava, with_images=True), "llavar": _count_scienceqa(llavar)}
    if "error" in original["llava"]:
        original |= {"error": original["llava"]["error"]}
    original["official_categories"] = _count_categories(problems_file, indices)
    score = score_means(original, outcomes, issues)
    pictured = [o for o in outcomes if problems_file[o.question_id].get("image")]
    seen = [o.original for o in outcomes if llava[o.question_id]["is_multimodal"]]
    score.numbers["image accuracy"] = (mean_of(seen), mean_of(o.ours for o in pictured))
    return score


def _count_scienceqa(samples: dict[str, dict], with_images: bool = False) -> dict:
    correct, count = sum(sample["correct"] for sample in samples.values()), len(samples)
    pictured = [sample["correct"] for sample in samples.values() if sample["is_multimodal"]]
    if not count or (with_images and not pictured):
        return {"error": f"ZeroDivisionError: {count} answers, {len(pictured)} of them with an image"}
    accuracy = correct / count * 100
    line = f"Total: {count}, Correct: {correct}, Accuracy: {accuracy:.2f}%"
    if with_images:
        line += f", IMG-Accuracy: {sum(pictured) / len(pictured) * 100:.2f}%"
    return {
        "stdout": line,
        "acc": accuracy,
        "correct": correct,
        "count": count,
        "img_correct": sum(pictured),
        "img_count": len(pictured),
        "per_sample": samples,
    }


def _count_categories(problems_file: dict[str, dict], indices: dict[str, int]) -> dict:
    """Accuracy per category as text with two decimals; -1 for a category without questions."""
    rows = [(problem, problem["answer"] == indices[name]) for name, problem in problems_file.items() if name in indices]

    def rate(belongs) -> str | int:
        hits = [hit for problem, hit in rows if belongs(problem)]
        return f"{sum(hits) / len(hits) * 100:.2f}" if hits else -1

    def is_grade(problem, low, high):
        return problem.get("grade") in {f"grade{number}" for number in range(low, high + 1)}

    return {
        "acc_natural": rate(lambda p: p.get("subject") == "natural science"),
        "acc_social": rate(lambda p: p.get("subject") == "social science"),
        "acc_language": rate(lambda p: p.get("subject") == "language science"),
        "acc_has_text": rate(lambda p: p.get("hint")),
        "acc_has_image": rate(lambda p: p.get("image")),
        "acc_no_context": rate(lambda p: not p.get("hint") and not p.get("image")),
        "acc_grade_1_6": rate(lambda p: is_grade(p, 1, 6)),
        "acc_grade_7_12": rate(lambda p: is_grade(p, 7, 12)),
        "acc_average": rate(lambda p: True),
        **{f"acc_{topic}": rate(lambda p, topic=topic: p.get("topic") == topic) for topic in SCIENCEQA_TOPICS},
    }


# ---- SEED-Bench


def score_seed(annotations: dict, answers: list[dict]) -> Score:
    """SEED-Bench. The original wants the bare letter and stops on types of which no answer is right; ours does neither.

    Args:
        annotations: `question_type` (name -> number), `questions`.
        answers: of the model.

    Source: haotian-liu/LLaVA, `scripts/convert_seed_for_submission.py`.
    """
    outcomes, names = [], {number: name for name, number in annotations["question_type"].items()}
    ids = [_read_seed_id(question["question_id"]) for question in annotations["questions"]]
    found, problems = join_answers(answers, ids)
    for name, question in zip(ids, annotations["questions"], strict=True):
        text = found[name]["text"] if name in found else ""
        letter = find_letter(text, 4)
        truth = question["answer"]
        category = names.get(question["question_type_id"], str(question["question_type_id"]))
        outcomes.append(Outcome(name, float(letter == truth), float(text == truth), text, truth, category))
    try:
        lines = _print_seed(annotations["questions"], ids, found, names)
        submission = [
            {
                "question_id": question["question_id"],
                "prediction": found[question["question_id"] if question["question_id"] in found else name]["text"],
            }
            for name, question in zip(ids, annotations["questions"], strict=True)
        ]
        original = {"stdout": lines, "submission": submission}
    except (KeyError, ZeroDivisionError) as error:
        original = {"error": f"{type(error).__name__}: {error}"}
    return score_means(original, outcomes, problems)


def _read_seed_id(name) -> int | str:
    try:
        return int(name)
    except ValueError:
        return name


def _print_seed(questions: list[dict], ids: list, found: dict, names: dict) -> list[str]:
    lines = []
    for kind in (None, "image", "video"):
        counts, hits = Counter(), {}
        for name, question in zip(ids, questions, strict=True):
            if kind not in (None, question["data_type"]):
                continue
            number = question["question_type_id"]
            counts[number] += 1
            if name not in found:
                hits[number] = hits.get(number, 0)
            elif found[name]["text"] == question["answer"]:
                hits[number] = hits.get(number, 0) + 1
        correct = 0
        for number in sorted(counts):
            correct += hits[number]  # KeyError, as in the original, for a type with answers and none right
            if kind is None:
                lines.append(f"{names[number]}: {hits[number] / counts[number] * 100:.2f}%")
        lines.append(f"{kind or 'Total'} accuracy: {correct / sum(counts.values()) * 100:.2f}%")
    return lines


# ---- MMBench

# What the original's script takes for a missing cell, and what its table reader does.
MISSING = {"nan", "none"}
MISSING_IN_TABLES = {
    *" #N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null".split(" "),
    "#N/A N/A",
}


def is_missing(value) -> bool:
    return value is None or value.lower() in MISSING


def build_mmbench_prompts(rows: list[dict], suffix: str = "", all_rounds: bool = False) -> list[dict]:
    """The prompts of MMBench: hint, question and options, once per question or once per rotation of the options.

    Args:
        rows: of the table, from `read_mmbench`.
        suffix: what asks for the letter.
        all_rounds: ask with every rotation.

    Returns:
        `question_id`, `round_id`, `stored_prompt`, `options`, `option_char`, and `text`, which the model gets.

    Source: haotian-liu/LLaVA, `llava/eval/model_vqa_mmbench.py`.
    """
    prompts = []
    for row in rows:
        options = []
        for letter in "ABCD":
            if is_missing(row.get(letter)):
                break
            options.append(row[letter])
        letters = list("ABCD")[: len(options)]
        for number in range(len(options) if all_rounds else 1):
            question = row["question"] if is_missing(row.get("hint")) else f"{row['hint']}\n{row['question']}"
            turned = options[number:] + options[:number]
            for letter, option in zip("ABCD", turned, strict=False):
                question += f"\n{letter}. {option}"
            prompts.append(
                {
                    "question_id": row["index"],
                    "round_id": number,
                    "stored_prompt": question,
                    "options": turned,
                    "option_char": letters[number:] + letters[:number],
                    "text": f"{question}\n{suffix}" if suffix else question,
                }
            )
    return prompts


def read_mmbench(path: Path) -> list[dict]:
    """Rows of the table; cells that the original's reader takes for missing are `None`.

    Raises:
        ValueError: no such columns.
    """
    csv.field_size_limit(sys.maxsize)  # images stand in the table
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or not {"index", "question"} <= set(rows[0]):
        raise ValueError(f"{path} lacks the columns 'index' and 'question'; expected MMBench's table.")
    return [
        {**{key: None if cell in MISSING_IN_TABLES else cell for key, cell in row.items()}, "index": int(row["index"])}
        for row in rows
    ]


def convert_mmbench(rows: list[dict], answers: list[dict]) -> Score:
    """The table that MMBench's server takes: answers as they are in a column after the options.

    There is no offline score. Ours reads letters and compares them with `answer`, where the table has it.

    Source: haotian-liu/LLaVA, `scripts/convert_mmbench_for_submission.py`.
    """
    found, problems = join_answers(answers, [row["index"] for row in rows])
    outcomes, table = [], []
    left_out = {"hint", "category", "source", "image", "comment", "l2-category"}
    columns = [column for column in (rows[0] if rows else {}) if column not in left_out]
    columns.insert(6, "prediction")
    for row in rows:
        said = found.get(row["index"], {"text": ""})["text"]
        cells = {**row, "prediction": said}
        table.append(["" if cells[column] is None else cells[column] for column in columns])
        if not is_missing(row.get("answer")):
            letter = find_letter(said, 4)
            right = float(letter == row["answer"])
            outcomes.append(Outcome(row["index"], right, None, letter or "", row["answer"], row.get("category") or ""))
    score = Score({"submission": {"columns": columns, "rows": table}}, outcomes, problems=problems)
    score.numbers = {"accuracy": (None, mean_of(outcome.ours for outcome in outcomes))}
    return score
