"""A judge behind OpenAI's API reviews answers. Every reply is kept the moment it arrives: none is paid for twice."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from threading import Lock

from tqdm import tqdm
from transformers.utils import logging

from .files import append_rows, read_appended, read_json_lines, write_json_lines
from .gpt_review import JUDGES, build_requests, parse_review


WORKERS = 4  # requests at a time
logger = logging.get_logger(__name__)


def review_answers(
    client,
    questions: Path,
    references: Path,
    context: Path | None,
    kind: str,
    judge: str | None,
    limit: int | None,
    folder: Path,
) -> dict:
    """Has answers reviewed and writes `reviews.jsonl`, as the original does; what has no reply is left out and named.

    Args:
        client: of the judge's server, from `client.connect`.
        questions, references, context, kind, judge: see `build_requests`; the first three are files.
        limit: only so many questions.
        folder: of the results, with the predictions.

    Returns:
        Who judged, tokens and counts, and the ids of questions without a review.

    Raises:
        ValueError: questions and references do not belong together.
    """
    answered = {row["question_id"]: row for row in read_json_lines(folder / "predictions.jsonl")}
    pairs = list(zip_longest(read_json_lines(questions)[:limit], read_json_lines(references)[:limit]))
    for number, (question, reference) in enumerate(pairs, 1):
        if question is None or reference is None or question["question_id"] != reference["question_id"]:
            raise ValueError(
                f"line {number} of {questions} and of {references} are not about one question; they belong together by "
                "their order, as in the original."
            )
    rows = [(*pair, answered[pair[0]["question_id"]]) for pair in pairs if pair[0]["question_id"] in answered]
    known = read_json_lines(context) if context else []
    built = build_requests(*([row[place] for row in rows] for place in range(3)), known, kind, judge)
    replies, usage = ask_judge(client, folder / "judge_replies.jsonl", [row["request"] for row in built])
    reviews, missing = [], []
    for row, reply in zip(built, replies, strict=True):
        if reply is None:
            missing.append(row["review"]["question_id"])
        else:
            reviews.append({**row["review"], "content": reply, "tuple": parse_review(reply)})
    write_json_lines(folder / "reviews.jsonl", reviews)
    return {"model": judge or JUDGES[kind], "kind": kind, **usage, "without a review": missing}


def ask_judge(client, cache: Path, requests: list[dict]) -> tuple[list[str | None], dict]:
    """Replies in the order of the requests, `None` where they keep failing.

    Args:
        client: from `client.connect`.
        cache: JSON Lines of replies; made where it is missing.
        requests: `judge`, `messages`, `temperature`, `max_tokens`.

    Returns:
        The replies; and `prompt_tokens`, `completion_tokens` of all of them, `cached` and `failed` requests.
    """
    from openai import OpenAIError

    replies, lock = {row["request"]: row for row in read_appended(cache, mend=True)}, Lock()

    def ask(key: str, request: dict) -> None:
        arguments = {"model" if name == "judge" else name: value for name, value in request.items()}
        try:
            reply = client.chat.completions.create(**arguments)
        except OpenAIError as error:
            logger.warning(f"The judge did not answer: {error}")
            return
        if not reply.choices or reply.choices[0].message.content is None:
            return
        row = {
            "request": key,
            "content": reply.choices[0].message.content,
            "model": reply.model,
            "prompt_tokens": reply.usage and reply.usage.prompt_tokens,
            "completion_tokens": reply.usage and reply.usage.completion_tokens,
        }
        with lock:
            append_rows(cache, [row])
            replies[key] = row

    keys = [hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest() for request in requests]
    todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in replies}
    with ThreadPoolExecutor(WORKERS) as pool:
        list(tqdm(pool.map(ask, todo, todo.values()), total=len(todo), unit=" reviews"))
    found = [replies.get(key) for key in keys]
    usage = {kind: sum(row[kind] or 0 for row in found if row) for kind in ("prompt_tokens", "completion_tokens")}
    usage |= {"cached": len(set(keys)) - len(todo), "failed": sum(row is None for row in found)}
    return [row["content"] if row else None for row in found], usage
