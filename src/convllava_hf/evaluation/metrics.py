"""Scorers of short free answers: POPE, TextVQA, VQAv2, VizWiz, GQA, MM-Vet, MultimodalOCR, and plain comparisons.

Every scorer is a pure function of rows: `original` in its result is what the original's code gives, to the last digit;
`ours` differs where that rule rewards or punishes the form of an answer, and the docstrings say where.
"""

import re
from collections import defaultdict
from itertools import chain

import numpy as np

from .normalisers import normalise_multimodal_ocr, normalise_vqa
from .scores import Outcome, Score, Statistic, join_answers, mean_of, score_means


# ---- POPE


def parse_pope(text: str) -> str:
    """`"yes"` or `"no"` as the original reads it: everything is yes but a first sentence with a word No, no or not.

    Source: haotian-liu/LLaVA, `llava/eval/eval_pope.py`.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_yes_no(text: str) -> str:
    """`"yes"`, `"no"` or `"other"`: the first of these words, in any case."""
    found = re.search(r"\b(yes|no|not)\b", text.lower())
    return "other" if found is None else "yes" if found[1] == "yes" else "no"


def score_pope(questions: list[dict], answers: list[dict], labels: dict[str, list[dict]]) -> Score:
    """POPE: is an object in the image?

    The original pairs the answers of a category with its labels by position, so one missing answer shifts all that
    follow, and it counts everything that is not recognisably a no as a yes. Ours pairs by question and counts an answer
    that is neither yes nor no as wrong. The original prints one F1 per category; papers give their mean. The accuracy
    and the yes ratio of all categories together are those of its pairs and answers.

    Args:
        questions: `question_id`, `category`.
        answers: `question_id`, `text`.
        labels: category -> `label` (`"yes"` or `"no"`) in the order of the category's questions.

    Source: haotian-liu/LLaVA, `llava/eval/eval_pope.py`.
    """
    category_of = {question["question_id"]: question["category"] for question in questions}
    joined, problems = join_answers(answers, [question["question_id"] for question in questions])
    original, outcomes = {"categories": {}, "parsed": {}}, []
    if problems["answers without a question"]:
        original["error"] = f"KeyError: {problems['answers without a question'][0]}"
    pairs, read = {"original": {}, "ours": defaultdict(list)}, []
    for category, rows in labels.items():
        truths = ["no" if row["label"] == "no" else "yes" for row in rows]
        given = [answer for answer in answers if category_of.get(answer["question_id"]) == category]
        parsed = [parse_pope(answer["text"]) for answer in given]
        paired = list(zip(parsed, truths, strict=False))
        by_place = dict(zip([answer["question_id"] for answer in given], paired, strict=False))
        pairs["original"][category] = paired
        read += parsed
        if "error" not in original:
            try:
                original["categories"][category] = _count_pope(parsed, truths)
                original["parsed"] |= zip([str(answer["question_id"]) for answer in given], parsed, strict=True)
            except ZeroDivisionError:
                original["error"] = f"ZeroDivisionError: category {category!r} has a ratio without a denominator"
        asked = [question["question_id"] for question in questions if question["category"] == category]
        if len(asked) != len(truths):
            problems["categories with another number of labels than questions"].append(category)
        for name, truth in zip(asked, truths, strict=False):
            text = joined[name]["text"] if name in joined else None
            found = "missing" if text is None else parse_yes_no(text)
            if found == "other":
                problems["answers that are neither yes nor no"].append(name)
            pairs["ours"][category].append((found, truth))
            old = by_place.get(name)
            old = None if old is None else float(old[0] == old[1])
            outcomes.append(Outcome(name, float(found == truth), old, found, truth, category))
    score = score_means(original, outcomes, problems)
    every = {rule: [*chain.from_iterable(groups.values())] for rule, groups in pairs.items()}
    rules = ("original", "ours")
    score.numbers["accuracy"] = tuple(_rate_pairs(every[rule]) for rule in rules)
    score.numbers["F1, mean of categories"] = tuple(_compute_f1(pairs[rule]) for rule in rules)
    for name in labels:
        score.numbers[f"F1, {name}"] = tuple(_compute_f1({name: pairs[rule].get(name, [])}) for rule in rules)
        if len(labels) > 1:
            score.numbers[f"category: {name}"] = tuple(_rate_pairs(pairs[rule].get(name, [])) for rule in rules)
    said = (read, [found for found, _ in every["ours"]])
    score.numbers["yes ratio"] = tuple(mean_of(float(word == "yes") for word in words) for words in said)
    return score


def _rate_pairs(pairs: list[tuple[str, str]]) -> Statistic:
    return mean_of(float(said == truth) for said, truth in pairs)


def _count_pope(parsed: list[str], truths: list[str]) -> dict:
    pairs = list(zip(parsed, truths, strict=False))  # as far as the shorter one goes
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    tn, fn = pairs.count(("no", "no")), pairs.count(("no", "yes"))
    yes_ratio = parsed.count("yes") / len(parsed)
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    f1 = 2 * precision * recall / (precision + recall)
    accuracy = (tp + tn) / (tp + tn + fp + fn)
    return {
        "samples": len(parsed),
        **{"TP": tp, "FP": fp, "TN": tn, "FN": fn},
        **{"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio},
        "last_line": ", ".join(f"{value:.3f}" for value in (f1, accuracy, precision, recall, yes_ratio)),
    }


def _compute_f1(groups: dict[str, list[tuple[str, str]]]) -> Statistic:
    """The mean over groups of the F1 of each."""
    pairs = [*chain.from_iterable(groups.values())]
    said, true = (np.array([pair[place] == "yes" for pair in pairs], dtype=bool) for place in (0, 1))
    group = np.repeat(np.arange(len(groups)), [len(members) for members in groups.values()])

    def compute(indices):
        counts = [np.bincount(group[indices], marks[indices], len(groups)) for marks in (said & true, said, true)]
        members = np.bincount(group[indices], minlength=len(groups)) > 0
        return float((200 * counts[0] / np.maximum(counts[1] + counts[2], 1))[members].mean())

    return Statistic(len(pairs), compute)


# ---- VQA: TextVQA, VQAv2, VizWiz


def read_question(prompt: str) -> str:
    """The question inside a prompt of TextVQA, in lower case.

    Raises:
        ValueError: the prompt has none of the three forms.

    Source: haotian-liu/LLaVA, `llava/eval/eval_textvqa.py`.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"the prompt {prompt!r} has none of the three forms of TextVQA: see docs/evaluation.md.")


def rate_vqa_answers(answers: list[str]) -> dict[str, float]:
    """What each normalised answer is worth: the mean over the ten people left out in turn of min(1, agreeing / 3).

    Raises:
        ValueError: there are not ten answers.
    """
    if len(answers) != 10:
        raise ValueError(f"{len(answers)} answers of people; expected 10.")
    answers = [normalise_vqa(answer) for answer in answers]
    rated = {}
    for answer in dict.fromkeys(answers):
        parts = [min(1, (answers.count(answer) - (other == answer)) / 3) for other in answers]
        rated[answer] = sum(parts) / len(parts)
    return rated


def score_textvqa(annotations: dict, answers: list[dict], name: str = "answers") -> Score:
    """TextVQA. In the original an empty answer scores where people gave "a" or "the"; in ours it does not.

    The original takes the mean over the answers that are there; ours over the questions, of which each counts once,
    with its last answer, and as wrong without any.

    Args:
        annotations: `data`: `image_id`, `question`, `question_id`, `answers` (10).
        answers: `question_id` (the image's), `prompt` (which holds the question), `text`.
        name: of the predictions file, which the original prints.

    Raises:
        ValueError: a prompt that holds no question, or one that the annotations lack.

    Source: haotian-liu/LLaVA, `llava/eval/eval_textvqa.py`, `m4c_evaluator.py`.
    """
    known = {(row["image_id"], row["question"].lower()): row for row in annotations["data"]}
    problems, rows, outcomes, exact, seen = defaultdict(list), [], [], [], {}
    for place, answer in enumerate(answers):
        key = (answer["question_id"], read_question(answer["prompt"]))
        if key not in known:
            raise ValueError(f"KeyError: the annotations have no question {key[1]!r} about image {key[0]!r}.")
        if key in seen:
            problems["answered twice"].append(key)
            outcomes[seen[key]].ours = None
        seen[key] = place
        row, predicted = known[key], normalise_vqa(answer["text"])
        rated = rate_vqa_answers(row["answers"])
        rows.append(
            {
                "image_id": key[0],
                "question_key": key[1],
                "question_id": row["question_id"],
                "pred_processed": predicted,
                "gt_scores": rated,
                "score": rated.get(predicted, 0.0),
            }
        )
        exact.append(float(predicted in rated))
        worth = rows[-1]["score"]
        best = max(rated, key=rated.get)
        ours = worth if answer["text"].strip() else 0.0
        outcomes.append(Outcome(row["question_id"], ours, worth, predicted, best, prediction=place))
    missing = [row["question_id"] for key, row in known.items() if key not in seen]
    problems["questions without an answer"] += missing
    outcomes += [Outcome(name, 0.0, None) for name in missing]
    if not rows:
        return score_means({"error": "ZeroDivisionError: no answers"}, outcomes, problems)
    accuracy = sum(row["score"] for row in rows) / len(rows)
    original = {
        "stdout": f"{name}\nSamples: {len(rows)}\nAccuracy: {100.0 * accuracy:.2f}%",
        "accuracy": accuracy,
        "samples": len(rows),
        "per_sample": rows,
        "stvqa_accuracy_same_file": sum(exact) / len(exact),
    }
    return score_means(original, outcomes, problems)


def convert_vqav2(questions: list[dict], answers: list[dict], error_lines: int = 0) -> Score:
    """The file that VQAv2's server takes. Questions without an answer get an empty one, and are counted.

    Args:
        questions: of the split, in its order.
        answers: of the model.
        error_lines: lines of its file that were no JSON.

    Source: haotian-liu/LLaVA, `scripts/convert_vqav2_for_submission.py`.
    """
    found, problems = join_answers(answers, [question["question_id"] for question in questions])
    submission = [
        {
            "question_id": question["question_id"],
            "answer": normalise_vqa(found.get(question["question_id"], {"text": ""})["text"]),
        }
        for question in questions
    ]
    return Score({"stdout": _count_lines(found, questions, error_lines), "submission": submission}, problems=problems)


def convert_vizwiz(questions: list[dict], answers: list[dict], error_lines: int = 0) -> Score:
    """The file that VizWiz's server takes. A question without an answer stops the original, and gives an error here.

    Source: haotian-liu/LLaVA, `scripts/convert_vizwiz_for_submission.py`.
    """
    found, problems = join_answers(answers, [question["question_id"] for question in questions])
    if problems["questions without an answer"]:
        return Score(
            {"error": f"AssertionError: no answer to question {problems['questions without an answer'][0]!r}"},
            problems=problems,
        )
    submission = [
        {"image": question["image"], "answer": normalise_vqa(found[question["question_id"]]["text"])}
        for question in questions
    ]
    return Score({"stdout": _count_lines(found, questions, error_lines), "submission": submission}, problems=problems)


def _count_lines(found: dict, questions: list, error_lines: int) -> str:
    return f"total results: {len(found)}, total split: {len(questions)}, error_line: {error_lines}"


# ---- GQA, MM-Vet


def score_gqa(truths: dict[str, dict], answers: list[dict]) -> Score:
    """GQA: exact equality after lower case and without dots at the end. Ours also drops spaces around.

    Args:
        truths: question id -> a row with `answer`.
        answers: of the model.

    Source: haotian-liu/LLaVA, `scripts/convert_gqa_for_eval.py`; the comparison is GQA's.
    """
    predictions = [
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()} for answer in answers
    ]
    found, problems = join_answers(answers, truths)
    said = {row["questionId"]: row["prediction"] for row in predictions}
    exact, outcomes = {}, []
    for name, row in truths.items():
        exact[name] = said.get(name) == row["answer"]
        ours = name in found and found[name]["text"].strip().rstrip(".").strip().lower() == row["answer"]
        outcomes.append(Outcome(name, float(ours), float(exact[name]), said.get(name, ""), row["answer"]))
    original = {"predictions": predictions, "exact_match": exact, "accuracy": sum(exact.values()) / max(len(exact), 1)}
    return score_means(original, outcomes, problems)


def convert_mmvet(answers: list[dict]) -> Score:
    """The file that MM-Vet's judge takes.

    Source: haotian-liu/LLaVA, `scripts/convert_mmvet_for_eval.py`.
    """
    found, problems = join_answers(answers, [answer["question_id"] for answer in answers])
    problems.pop("asked twice")
    return Score({"results": {f"v1_{name}": answer["text"] for name, answer in found.items()}}, problems=problems)


# ---- MultimodalOCR


def score_multimodal_ocr(rows: list[dict]) -> Score:
    """MultimodalOCR, as LLaVAR is measured: a right answer occurs as words within the model's.

    In the original an empty truth is within every answer that has a word; ours leaves such a question out.

    Args:
        rows: `question`, `answer`, `gt_answers` (list or str).

    Source: Yuliang-Liu/MultimodalOCR, `eval.py`, `VQAEval.evaluate`.
    """
    problems, per_sample, outcomes = defaultdict(list), [], []
    for number, row in enumerate(rows):
        truths = row["gt_answers"] if isinstance(row["gt_answers"], list) else [row["gt_answers"]]
        said, expected = normalise_multimodal_ocr(row["answer"]), [normalise_multimodal_ocr(truth) for truth in truths]
        hits = [re.search(rf"\b{re.escape(truth)}\b", said) is not None for truth in expected]
        per_sample.append({"answer_normalised": said, "gt_normalised": expected, "correct": int(any(hits))})
        kept = [hit for hit, truth in zip(hits, expected, strict=True) if truth]
        if not kept:
            problems["questions whose truth is empty"].append(number)
        ours = float(any(kept)) if kept else None
        outcomes.append(Outcome(number, ours, float(any(hits)), said, "; ".join(expected)))
    if not rows:
        return score_means({"error": "ZeroDivisionError: no answers"}, [], problems)
    correct = sum(row["correct"] for row in per_sample)
    return score_means({"accuracy": correct / len(rows), "per_sample": per_sample}, outcomes, problems)


# ---- any question file


def compare_exact(said: str, truth: str) -> float:
    return float(said.strip().lower() == truth.strip().lower())


def compare_contains(said: str, truth: str) -> float:
    """1 where the truth occurs in the answer between word boundaries."""
    truth = truth.strip().lower()
    return float(bool(truth) and re.search(rf"(?<!\w){re.escape(truth)}(?!\w)", said.lower()) is not None)


def compare_anls(said: str, truth: str) -> float:
    """One minus the edit distance relative to the longer text, and 0 below a half: ANLS, the measure of DocVQA."""
    said, truth = (" ".join(text.lower().split()) for text in (said, truth))
    if not said or not truth:
        return float(said == truth)
    row = list(range(len(truth) + 1))
    for i, left in enumerate(said, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(truth, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    similarity = 1 - row[-1] / max(len(said), len(truth))
    return similarity if similarity >= 0.5 else 0.0


COMPARISONS = {"exact_match": compare_exact, "contains": compare_contains, "anls": compare_anls}


def score_plain(comparison: str, truths: dict, answers: list[dict], categories: dict | None = None) -> Score:
    """Compares answers with truths; of several truths the best counts, and a missing answer counts as wrong.

    Args:
        comparison: one of `COMPARISONS`.
        truths: question id -> text or list of texts.
        answers: of the model.
        categories: question id -> group.
    """
    found, problems = join_answers(answers, truths)
    outcomes = []
    for name, truth in truths.items():
        accepted = [str(text) for text in (truth if isinstance(truth, list) else [truth])]
        said = found[name]["text"] if name in found else ""
        worth = max(COMPARISONS[comparison](said, text) for text in accepted) if name in found else 0.0
        outcomes.append(Outcome(name, worth, None, said, "; ".join(accepted), (categories or {}).get(name) or ""))
    score = score_means({}, outcomes, problems)
    score.numbers = {comparison: (None, score.numbers["accuracy"][1])}
    mean = sum(outcome.ours for outcome in outcomes) / max(len(outcomes), 1)
    per_sample = {str(outcome.question_id): outcome.ours for outcome in outcomes}
    score.original = {"accuracy": mean, "samples": len(outcomes), "per_sample": per_sample}
    return score
