"""Files of other projects made into question and training files: ScienceQA, OCR-VQA's images, mixtures."""

import re
from pathlib import Path

from ..images import load_image
from .choices import LETTERS
from .questions import drop_placeholders


INPUTS = "CQM QCM QCML QCME QCMLE QCLM QCEM QCLEM".split()
OUTPUTS = "A AL AE ALE AEL LA EA LEA ELA LEPA".split()


def convert_scienceqa(problems: dict[str, dict], split: list[str], prompt_format: str) -> list[dict]:
    """ScienceQA as LLaVA's training file.

    Args:
        problems: the content of problems.json.
        split: ids of its questions.
        prompt_format: input and output, such as `"CQM-A"` or `"QCM-LEPA"`: Context, Question, Multiple choices,
            Lecture, Explanation, Answer, with a Plan between in LEPA. In the originals AL gives the solution and AE the
            lecture, and so it does here.

    Returns:
        Rows of `id`, `image` where there is one, and `conversations`.

    Raises:
        ValueError: no such format.

    Source: haotian-liu/LLaVA, `scripts/convert_sqa_to_llava{,_base_prompt}.py`.
    """
    asked, _, answered = prompt_format.partition("-")
    if asked not in INPUTS or answered not in OUTPUTS:
        raise ValueError(
            f"prompt_format={prompt_format!r}; expected one of {', '.join(INPUTS)}, '-', one of {', '.join(OUTPUTS)}."
        )
    rows = []
    for name in split:
        question, answer = _write_scienceqa(problems[name], asked, answered)
        question, answer = _drop_label(question, "Question: "), _drop_label(answer, "Answer: ")
        row = {"id": name}
        if problems[name]["image"] is not None:
            row["image"] = f"{name}/{problems[name]['image']}"
            question += "\n<image>"
        turns = (("human", question), ("gpt", answer))
        rows.append({**row, "conversations": [{"from": who, "value": text} for who, text in turns]})
    return rows


def _drop_label(text: str, label: str) -> str:
    """Everywhere, in a text that begins with it."""
    return text.replace(label, "") if text.startswith(label) else text


def _write_scienceqa(problem: dict, asked: str, answered: str) -> tuple[str, str]:
    lecture, solution = (problem[part].replace("\\n", "\n") for part in ("lecture", "solution"))
    letter = LETTERS[problem["answer"]]
    context = problem["hint"].strip() or "N/A"
    options = " ".join(f"({LETTERS[place]}) {choice}" for place, choice in enumerate(problem["choices"]))
    reasons = " ".join({"L": lecture, "E": solution}[part] for part in asked[1:] if part in "LE")
    because = f"BECAUSE: {reasons}\n" if reasons or set(asked) & set("LE") else ""
    parts = {"C": f"Context: {context}\n", "Q": f"Question: {problem['question']}\n", "M": f"Options: {options}\n"}
    order = re.sub("[LE]+", "B", asked)
    question = "".join(because if part == "B" else parts[part] for part in order)
    if answered == "LEPA":
        answer = f"LECTURE: {lecture}\n" if lecture.strip() else ""
        answer += f"SOLUTION: {solution}\n" if solution.strip() else ""
        answer += f"###\nANSWER: {letter}."
    else:
        # Alone after the answer, L and E stand for each other in the originals.
        known = {"L": lecture, "E": solution}
        chosen = {"AL": [solution], "AE": [lecture]}.get(answered, [known[part] for part in answered if part != "A"])
        verdict = f"The answer is {letter}."
        if answered == "A":
            answer = f"Answer: {verdict}"
        elif answered.startswith("A"):
            answer = f"Answer: {verdict} BECAUSE: {' '.join(chosen)}"
        else:
            answer = f"Answer: {' '.join(chosen)} {verdict}"
    return _tidy(question), _tidy(answer)


def _tidy(text: str) -> str:
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def list_instructions(rows: list[dict]) -> list[dict]:
    """The same rows with `instruction` and `output`, the originals' JSON Lines format."""
    return [
        {
            **{key: row[key] for key in ("id", "image") if key in row},
            "instruction": row["conversations"][0]["value"],
            "output": row["conversations"][1]["value"],
        }
        for row in rows
    ]


def convert_images(folder: Path) -> tuple[int, dict[str, str]]:
    """Writes a JPEG beside every GIF and PNG of OCR-VQA that has none, from its first frame.

    Args:
        folder: of the images.

    Returns:
        How many were written, and what was wrong with the others, by name.

    Source: haotian-liu/LLaVA's note on OCR-VQA ("save all files as .jpg"); TinyLLaVABench's script of that purpose.
    """
    written, bad = 0, {}
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in (".gif", ".png")):
        target = file.with_suffix(".jpg")
        if target.exists():
            continue
        try:
            temporary = target.with_suffix(".jpg.tmp")
            load_image(file).save(temporary, "JPEG", quality=95)
            temporary.replace(target)
            written += 1
        except (ValueError, OSError) as error:
            bad[file.name] = str(error)
    return written, bad


def list_questions(rows: list[dict]) -> list[dict]:
    """Every round of a training file's conversations as a question with its answer.

    Args:
        rows: `id`, `image`, `conversations`, of LLaVA-format JSON.

    Returns:
        `question_id`, `image` where there is one, `text`, `answer`, and `category` where the row has one.
    """
    questions = []
    for number, row in enumerate(rows):
        turns = row["conversations"]
        for place in range(0, len(turns) - 1, 2):
            name = row.get("id", number)
            question = {"question_id": f"{name}-{place // 2}" if len(turns) > 2 else name}
            if row.get("image"):
                question["image"] = row["image"]
            text = drop_placeholders(turns[place]["value"])
            question |= {"text": text, "answer": turns[place + 1]["value"]}
            if "category" in row:
                question["category"] = row["category"]
            questions.append(question)
    return questions
