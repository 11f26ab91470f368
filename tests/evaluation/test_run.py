"""`convllava eval`: resumable, sharded, by a server, judged; what is wrong with the input is counted and named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from convllava_hf.cli.app import app
from convllava_hf.evaluation import answering
from convllava_hf.evaluation import run as running
from convllava_hf.evaluation.answering import build_chat, set_chat_template
from convllava_hf.evaluation.files import read_json_lines, write_json_lines
from convllava_hf.evaluation.questions import PROMPT_STYLES
from convllava_hf.evaluation.results import hash_checkpoint
from convllava_hf.evaluation.run import evaluate
from convllava_hf.evaluation.tasks import find_task
from convllava_hf.shipped import build_chat_template


CONVLLAVA = Path(sys.executable).with_name("convllava")
run = CliRunner().invoke


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions of several lengths about images of two shapes, and one about none."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(9):
        size = (64, 48) if number % 3 else (40, 90)
        Image.linear_gradient("L").convert("RGB").resize(size).rotate(37 * number).save(folder / f"{number}.png")
        text = (
            f"What is {' and '.join(['this'] * (number % 4 + 1))}?\nAnswer the question using a single word or phrase."
        )
        rows.append({"question_id": number, "image": f"{number}.png", "text": text, "answer": "x"})
    rows[4].pop("image")
    write_json_lines(folder / "questions.jsonl", rows)
    return folder / "questions.jsonl"


def build_command(checkpoint, questions: Path, output: Path, *more) -> list[str]:
    command = ["eval", checkpoint, "--task", "contains", "--questions", questions, "--images", questions.parent]
    command += ["--output", output, "--batch-size", 2, "--max-new-tokens", 6, *more]
    command += ["--device", "cpu"] if checkpoint else []
    return [str(part) for part in command if part is not None]


@pytest.fixture(scope="module")
def evaluated(converted, questions, tmp_path_factory) -> Path:
    """A whole evaluation of the reference checkpoint."""
    output = tmp_path_factory.mktemp("evaluated") / "results"
    result = run(app, build_command(converted, questions, output))
    assert result.exit_code == 0, result.output
    return output


def test_answers_are_those_of_one_at_a_time(evaluated, converted, questions):
    import convllava_hf

    model, processor = convllava_hf.load(converted, device="cpu")
    predictions = read_json_lines(evaluated / "predictions.jsonl")
    assert [row["question_id"] for row in predictions] == list(range(9))
    assert set(predictions[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    for row, asked in zip(predictions, read_json_lines(questions), strict=True):
        images = [questions.parent / asked["image"]] if "image" in asked else []
        alone = convllava_hf.answer(model, processor, asked["text"], images=images, max_new_tokens=6)
        assert row["text"] == alone and row["prompt"] == asked["text"]
    assert len({row["text"] for row in predictions}) > 3, "answers that are all alike would prove nothing"
    names = ("run.json", "answers-000.jsonl", "predictions.jsonl", "results.json", "outcomes.jsonl", "original.json")
    assert {file.name for file in evaluated.iterdir()} == set(names)
    results = json.loads((evaluated / "results.json").read_text())
    assert results["answers"] == 9 and results["asked"]["checkpoint"] and results["versions"]["transformers"]
    low, high = results["numbers"]["contains"]["ours_interval"]
    assert low <= results["numbers"]["contains"]["ours"] <= high


def test_a_torn_file_is_mended_to_the_same_bytes(evaluated, converted, questions, tmp_path):
    """What `kill -9` leaves: whole batches, a half batch and a torn line."""
    output = tmp_path / "results"
    output.mkdir()
    whole = (evaluated / "answers-000.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (output / "answers-000.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    (output / "run.json").write_bytes((evaluated / "run.json").read_bytes())
    assert run(app, build_command(converted, questions, output)).exit_code == 0
    assert (output / "answers-000.jsonl").read_bytes() == whole
    assert (output / "predictions.jsonl").read_bytes() == (evaluated / "predictions.jsonl").read_bytes()


def kill_at(command: list[str], answers: Path, lines: int) -> None:
    """Starts a process and kills it as soon as its file of answers has so many lines."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while lines and (not answers.exists() or answers.read_bytes().count(b"\n") < lines):
        assert process.poll() is None and time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


ANSWERER = """
import sys
from pathlib import Path
from convllava_hf.evaluation.run import evaluate

def answer(batch):
    return [f"{question.question_id} of {len(batch)}" for question in batch]

questions, output = map(Path, sys.argv[1:])
settings = {"model_id": "toy", "checkpoint_hash": "0", "batch_size": 3}
evaluate("contains", questions, output, make_answerer=lambda *_: answer, **settings)
"""


def test_killed_again_and_again_the_same_command_ends_with_the_same_bytes(tmp_path):
    """At once, at random lines, and when the last one was just written."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"question_id": n, "text": "?" * (n % 7), "answer": "of 3"} for n in range(600)]
    write_json_lines(questions, rows)
    command = [sys.executable, "-c", ANSWERER, str(questions)]
    whole, output = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, stderr=subprocess.DEVNULL)
    for lines in (0, *sorted(random.Random(0).sample(range(1, 590), 3)), 600):
        kill_at([*command, str(output)], output / "answers-000.jsonl", lines)
    subprocess.run([*command, str(output)], check=True, stderr=subprocess.DEVNULL)
    assert {file.name for file in output.iterdir()} == {file.name for file in whole.iterdir()}
    for name in ("answers-000.jsonl", "predictions.jsonl", "outcomes.jsonl", "original.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow  # processes that import everything
def test_a_model_killed_again_and_again_gives_the_same_bytes(evaluated, converted, questions, tmp_path):
    output = tmp_path / "results"
    command = [str(CONVLLAVA), *build_command(converted, questions, output)]
    for lines in (0, 1, 4, 7):
        kill_at(command, output / "answers-000.jsonl", lines)
    subprocess.run(command, check=True)
    for name in ("answers-000.jsonl", "predictions.jsonl"):
        assert (output / name).read_bytes() == (evaluated / name).read_bytes()


@pytest.mark.slow
def test_two_processes_give_one_result(evaluated, converted, questions, tmp_path):
    """`--multi_gpu` has accelerate start two processes; `--device cpu` of ours then takes gloo."""
    output = tmp_path / "results"
    launch = [CONVLLAVA.with_name("accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", CONVLLAVA]
    done = subprocess.run([*launch, *build_command(converted, questions, output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {file.name for file in evaluated.iterdir()} | {"answers-001.jsonl"}
    assert {file.name for file in output.iterdir()} == expected
    assert (output / "predictions.jsonl").read_bytes() == (evaluated / "predictions.jsonl").read_bytes()


def test_photos_are_drafted_by_the_flag_or_by_the_image_processor(converted, tmp_path, monkeypatch):
    import convllava_hf

    Image.linear_gradient("L").convert("RGB").resize((1024, 768)).save(tmp_path / "0.jpg")
    write_json_lines(tmp_path / "q.jsonl", [{"question_id": 0, "image": "0.jpg", "text": "What?", "answer": "x"}])
    sizes, load_image = [], answering.load_image
    monkeypatch.setattr(answering, "load_image", lambda *a, **k: sizes.append((i := load_image(*a, **k)).size) or i)
    for flag in (None, "--draft-photos"):
        result = run(app, build_command(converted, tmp_path / "q.jsonl", tmp_path / f"results{flag}", flag))
        assert result.exit_code == 0, result.output
    model, processor = convllava_hf.load(converted, device="cpu")
    processor.image_processor.draft_photos = True
    answer = answering.make_local_answerer(model, processor, tmp_path, PROMPT_STYLES["checkpoint"], 2, {})
    answer(find_task("contains")[1].read(tmp_path / "q.jsonl", PROMPT_STYLES["checkpoint"]))
    assert sizes[0] == (1024, 768) and sizes[1] == sizes[2] and sizes[1][0] < 1024


def test_a_limit_takes_the_first_questions(evaluated, converted, questions, tmp_path):
    command = build_command(converted, questions, tmp_path / "results", "--limit", 3)
    assert run(app, command).exit_code == 0
    whole, some = (read_json_lines(folder / "predictions.jsonl") for folder in (evaluated, tmp_path / "results"))
    assert [(row["question_id"], row["text"]) for row in some] == [
        (row["question_id"], row["text"]) for row in whole[:3]
    ]
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["numbers"]["contains"]["count"] == 3 and not results["problems"]
    refused = run(app, build_command(converted, questions, tmp_path / "results", "--limit", 4))
    assert refused.exit_code == 3 and "limit (3 there, 4 here)" in refused.output


def test_a_checkpoint_of_the_hub_is_known_by_its_commit(hub, tmp_path):
    from huggingface_hub import HfApi

    commits = []
    HfApi().create_repo("someone/model")
    for number in range(2):
        (tmp_path / "config.json").write_text(json.dumps({"number": number}))
        done = HfApi().upload_file(
            path_or_fileobj=tmp_path / "config.json", path_in_repo="config.json", repo_id="someone/model"
        )
        commits.append(done.oid)
    assert hash_checkpoint("someone/model") == commits[1]
    assert hash_checkpoint("someone/model", commits[0]) == commits[0]


def test_prompts_are_those_of_each_project(reference, converted, tmp_path):
    """From question files through the readers to what the tokenizer gets, against the recorded prompts."""
    from transformers import AutoProcessor

    recorded = json.loads((reference / "evaluation" / "prompts.json").read_text())
    checked = 0

    def check(project, style, task, entries, tag=None):
        nonlocal checked
        processor = AutoProcessor.from_pretrained(converted)
        if tag:  # what a checkpoint was trained with around its images
            processor.chat_template = build_chat_template(processor.tokenizer, "chatml", tag)
        set_chat_template(processor, PROMPT_STYLES[style])
        entries = [entry for entry in entries if "full_prompt" in entry]
        if task == "mmbench":
            file = reference / "evaluation" / "mmbench" / "mmbench_dev_20230712.tsv"
        else:
            file = tmp_path / "questions.jsonl"
            rows = [
                {
                    "question_id": number,
                    "text": entry.get("question_text") or entry["text"],
                    "sent": entry.get("sentence"),
                }
                | {"image": "x.png" if entry.get("image", True) else None, "question": entry.get("question_text")}
                | {"image_path": "x.png"}
                for number, entry in enumerate(entries)
            ]
            write_json_lines(file, rows)
        asked = find_task(task)[1].read(file, PROMPT_STYLES[style])
        if task == "mmbench":
            wanted = {entry["question_id"] for entry in entries}
            asked = [question for question in asked if question.question_id in wanted]
        for question, entry in zip(asked, entries, strict=True):
            images = [Image.new("RGB", (8, 8))] if question.image else []
            chat = build_chat(question, images, PROMPT_STYLES[style])
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            text = text.removeprefix(processor.tokenizer.bos_token).lstrip()
            assert text == entry["full_prompt"].replace("<im_patch>{576}", "<im_patch>"), (project, task)
            if "stored_prompt" in entry:
                assert question.prompt == entry["stored_prompt"]
            checked += 1

    for project, style in (("llava_v1_5", "llava"), ("tinyllava", "tinyllava")):
        for key, entries in recorded[project].items():
            entries = entries if isinstance(entries, list) else [entries]
            if key == "mmbench":
                check(project, style, "mmbench", entries)
            elif key == "scienceqa_single_pred_prompt":
                rows = [
                    {**entry, "text": entry["stored_prompt"].removeprefix("<image>\n").rpartition("\n")[0]}
                    | {"image": "<image>" in entry["stored_prompt"]}
                    for entry in entries
                ]
                check(project, style, "scienceqa", rows)
            elif all(isinstance(entry, dict) and "question_text" in entry for entry in entries):
                check(project, style, "pope", entries, "<im_start><image><im_end>" if "im_start" in key else None)
    check("convllava", "convllava", "refcoco", recorded["convllava"]["refcoco"])
    tag = "<im_start><im_patch><im_end>"
    for key in ("mme", "multimodal_ocr", "instruction_following", "scienceqa"):
        entries = recorded["llavar"][key]
        task = key if key in ("multimodal_ocr", "scienceqa") else "pope"
        check("llavar", "llavar", task, entries if isinstance(entries, list) else [entries], tag)
    check("llavar", "llavar", "pope", [recorded["llavar"]["mm_use_im_start_end_false"]], "<im_patch>")
    assert checked > 40


def test_ground_draws_the_box_of_the_answer(converted, questions, tmp_path, monkeypatch):
    """The tiny model knows no boxes, so its second answer is set here."""
    command = ["ground", str(questions.parent / "1.png"), "the red cup", "--model", str(converted), "--device", "cpu"]
    command += ["--out", str(tmp_path / "boxed.png")]
    result = run(app, command)
    assert result.exit_code == 3 and "the model gave no box but" in result.output
    assert not (tmp_path / "boxed.png").exists()
    asked = []
    monkeypatch.setattr(
        "convllava_hf.inference.answer.answer",
        lambda model, processor, text, **options: asked.append(text) or "[0.25, 0.25, 0.75, 0.75]",
    )
    result = run(app, command)
    assert result.exit_code == 0, result.output
    assert asked == ["Please provide the bounding box coordinate of the region this sentence describes: the red cup."]
    # 64 x 48 on a square of 64: 8 rows above.
    assert result.stdout.startswith("[16.0, 8.0, 48.0, 40.0]")
    in_json = json.loads(run(app, [*command, "--json"]).stdout)
    assert in_json == {"output": str(tmp_path / "boxed.png"), "box": [16.0, 8.0, 48.0, 40.0]}
    with Image.open(questions.parent / "1.png") as image, Image.open(tmp_path / "boxed.png") as boxed:
        assert boxed.size == image.size
        assert boxed.getpixel((16, 24)) == boxed.getpixel((32, 40)) == (212, 42, 32)
        assert boxed.getpixel((30, 24)) == image.convert("RGB").getpixel((30, 24))


def test_rescore_needs_the_predictions_alone(evaluated, tmp_path):
    output = tmp_path / "moved"
    output.mkdir()
    for name in ("run.json", "predictions.jsonl"):
        (output / name).write_bytes((evaluated / name).read_bytes())
    result = run(app, ["eval", "--rescore", str(output), "--json"])
    assert result.exit_code == 0, result.output
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (output, evaluated))
    assert found["numbers"] == expected["numbers"]
    assert json.loads(result.stdout) == {"output": str(output), **found}


def test_a_folder_of_another_checkpoint_is_refused(evaluated, converted, questions, tmp_path):
    known = json.loads((evaluated / "run.json").read_text())
    known["asked"]["checkpoint"] = "0" * 64
    (tmp_path / "run.json").write_text(json.dumps(known))
    result = run(app, build_command(converted, questions, tmp_path))
    assert result.exit_code == 3 and "checkpoint" in result.output


def test_missing_images_are_counted_and_named(converted, questions, tmp_path):
    rows = read_json_lines(questions)[:3]
    rows[1]["image"] = "nowhere.png"
    file = tmp_path / "questions.jsonl"
    write_json_lines(file, rows)
    command = build_command(converted, file, tmp_path / "results")
    command[command.index("--images") + 1] = str(questions.parent)
    stopped = run(app, command)
    assert stopped.exit_code == 3 and "1 of 3 images" in stopped.output and "nowhere.png" in stopped.output
    assert run(app, [*command, "--skip-bad-images"]).exit_code == 0
    problems = json.loads((tmp_path / "results" / "results.json").read_text())["problems"]
    assert problems["images that cannot be read"] == {"count": 1, "first": [1]}
    assert problems["questions without an answer"] == {"count": 1, "first": [1]}


def test_an_image_that_breaks_off_costs_its_own_row_only(converted, questions, tmp_path):
    """Its first bytes tell a size, so only reading it whole shows the fault."""
    rows = read_json_lines(questions)[:3]
    for row in rows:
        with Image.open(questions.parent / row["image"]) as image:
            image.save(tmp_path / f"{row['question_id']}.jpg", quality=95)
        row["image"] = f"{row['question_id']}.jpg"
    content = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(content[: len(content) * 2 // 3])
    file = tmp_path / "questions.jsonl"
    write_json_lines(file, rows)
    command = build_command(converted, file, tmp_path / "results")
    stopped = run(app, command)
    assert stopped.exit_code == 3 and "1 images cannot be read, the first of question 1" in stopped.output
    assert [row["question_id"] for row in read_json_lines(tmp_path / "results" / "predictions.jsonl")] == [0, 2]
    assert run(app, [*command, "--skip-bad-images"]).exit_code == 0
    problems = json.loads((tmp_path / "results" / "results.json").read_text())["problems"]
    assert problems["images that cannot be read"] == {"count": 1, "first": [1]}
    assert "requests that failed" not in problems


def ask_in_process(questions, output, make, **options):
    """An evaluation whose model is a function of this process."""
    settings = {"images": questions.parent, "model_id": "toy", "checkpoint_hash": "0", "batch_size": 2}
    return evaluate("contains", questions, output, make_answerer=make, **settings, **options)


FIRST_OF_TWO = SimpleNamespace(process_index=0, num_processes=2)


def test_a_line_that_another_process_is_writing_stays(questions, tmp_path, monkeypatch):
    """What is torn is mended before anyone appends; afterwards a half line may be a write that is going on."""
    other = tmp_path / "answers-001.jsonl"
    monkeypatch.setattr(running, "gather", lambda rows, state: rows)

    def make(style, longest, settings):
        other.write_bytes(b'{"index": 1, "te')
        return lambda batch: ["x"] * len(batch)

    ask_in_process(questions, tmp_path, make, state=FIRST_OF_TWO)
    assert other.read_bytes() == b'{"index": 1, "te'


def test_answers_may_hold_any_line_separator(questions, tmp_path):
    text = "one\u2028two\x85three\x1cfour"
    for _ in range(2):  # and again, from the files
        ask_in_process(questions, tmp_path, lambda *_: lambda batch: [text] * len(batch))
    assert {row["text"] for row in read_json_lines(tmp_path / "predictions.jsonl")} == {text}


def test_samples_per_second_and_failures_are_those_of_all_processes(questions, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(running.time, "monotonic", lambda: next(clock))
    other = {"failures": [(7, False)], "count": 4, "seconds": 1.0}
    monkeypatch.setattr(running, "gather", lambda rows, state: [*rows, other] if rows else [])
    results = ask_in_process(questions, tmp_path, lambda *_: lambda batch: ["x"] * len(batch), state=FIRST_OF_TWO)
    assert 0 < results["answers"] < 9 and results["samples_per_second"] == (results["answers"] + 4) / 2
    assert results["problems"]["requests that failed"]["first"] == [7]


@pytest.mark.parametrize(
    ("task", "missing"), [("pope", "coco_pope_"), ("textvqa", "TextVQA_"), ("mme", "MME_Benchmark_release_version")]
)
def test_truths_that_are_missing_are_named_before_anything_is_asked(questions, tmp_path, task, missing):
    def make(*_):
        raise AssertionError("nothing may be loaded")

    with pytest.raises(ValueError, match=missing):
        evaluate(task, questions, tmp_path, questions.parent, make_answerer=make, model_id="", checkpoint_hash="")
    with pytest.raises(ValueError, match="--judge-url"):
        evaluate("gpt-review", questions, tmp_path, make_answerer=make, model_id="", checkpoint_hash="")


@pytest.mark.parametrize("task", ["textvqa", "mme"])
def test_a_limit_counts_no_other_question_about_the_same_image(reference, tmp_path, task):
    room = reference / "evaluation" / task
    truths = room / "TextVQA_0.5.1_val.json"
    if task == "mme":
        room = room / "converter"
        truths = room / "MME_Benchmark_release_version"
    file = room / ("answers/toy.jsonl" if task == "mme" else "answers.jsonl")
    rows = [{"question_id": row["question_id"], "text": row["prompt"]} for row in read_json_lines(file)]
    write_json_lines(tmp_path / "q.jsonl", rows)

    def make(*_):
        return lambda batch: ["Yes"] * len(batch)

    settings = {"model_id": "toy", "checkpoint_hash": "0", "limit": 2, "make_answerer": make}
    results = evaluate(task, tmp_path / "q.jsonl", tmp_path / "results", annotations=truths, **settings)
    outcomes = read_json_lines(tmp_path / "results" / "outcomes.jsonl")
    assert len(outcomes) == 2 and sorted(row["prediction"] for row in outcomes) == [0, 1]
    assert "questions without an answer" not in results["problems"]


def test_duplicates_and_strangers_are_counted_and_named(questions, tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [{"question_id": name, "prompt": "", "text": "x"} for name in (0, 0, 1, 99)]
    write_json_lines(file, rows)
    result = run(app, ["score", "contains", "--questions", str(questions), "--predictions", str(file)])
    assert result.exit_code == 0
    for line in ("answered twice: 1 (0)", "answers without a question: 1 (99)", "questions without an answer: 7"):
        assert line in result.output


# ---- a server on loopback


class Talk(BaseHTTPRequestHandler):
    """Answers chats with what the test put into `reply`; refuses as many as `failures` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": "toy", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send(503, {"error": {"message": "busy"}}, {"retry-after-ms": "1"})
            return
        text = self.server.reply(body)
        if text is None:
            self.send(400, {"error": {"message": "refused"}})
            return
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        self.send(200, {**head, "choices": [message], "usage": usage})

    def send(self, status: int, content: dict, headers: dict | None = None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def talk():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Talk)
    server.requests, server.failures, server.reply = [], 0, lambda body: "X marks it"
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_is_asked_with_retries_and_its_errors_are_never_scored(talk, questions, tmp_path):
    talk.failures = 2
    talk.reply = lambda body: None if "this and this and this and this" in str(body["messages"]) else "X marks it"
    command = build_command(None, questions, tmp_path / "results", "--server", talk.url)
    result = run(app, command)
    assert result.exit_code == 3 and "2 requests failed" in result.output
    answered = [row["question_id"] for row in read_json_lines(tmp_path / "results" / "predictions.jsonl")]
    assert answered == [0, 1, 2, 4, 5, 6, 8]
    parts = next(body for body in talk.requests if "single word" in str(body))["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text"]
    talk.reply, asked = (lambda body: "X marks it"), len(talk.requests)
    assert run(app, command).exit_code == 0
    assert len(talk.requests) - asked == 2, "only what has no answer is asked again"
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["numbers"]["contains"]["ours"] == 100 and "requests that failed" not in results["problems"]


@pytest.mark.parametrize(
    "option", ["--max-image-tokens 64", "--dtype float32", "--quantize 8bit", "--revision main", "--device cpu"]
)
def test_options_of_a_local_model_are_refused_with_a_server(questions, tmp_path, option):
    result = run(app, build_command(None, questions, tmp_path, "--server", "http://127.0.0.1:9/v1", *option.split()))
    assert result.exit_code == 3 and f"error: {option.split()[0]}:" in result.output


def test_a_review_without_references_is_refused_before_anything_is_asked(talk, questions, tmp_path):
    command = ["eval", "--server", talk.url, "--task", "gpt-review", "--questions", str(questions)]
    refused = run(app, [*command, "--output", str(tmp_path / "results"), "--judge-url", talk.url])
    assert refused.exit_code == 3 and "--references" in refused.output
    assert not talk.requests and not (tmp_path / "results").exists()


def test_a_judge_is_asked_once_and_no_reply_is_lost(talk, reference, tmp_path):
    room = reference / "evaluation" / "gpt_review"
    talk.reply = lambda body: "Steamed rice." if len(body["messages"]) == 1 else "(8, 6)\nBecause."
    command = ["eval", "--server", talk.url, "--task", "gpt-review", "--questions", room / "text_questions.jsonl"]
    command += ["--output", tmp_path, "--judge-url", talk.url, "--references", room / "text_answers_ref.jsonl"]
    command = [str(part) for part in [*command, "--review-kind", "text"]]
    judged, talk.failures = talk.reply, 2
    talk.reply = lambda body: None if "12 times 11" in str(body) and len(body["messages"]) > 1 else judged(body)
    first = run(app, command)
    assert first.exit_code == 0, first.output
    assert json.loads((tmp_path / "results.json").read_text())["judge"]["without a review"] == [2]
    talk.reply, asked = lambda body: "I cannot tell.", len(talk.requests)
    assert run(app, command).exit_code == 0
    assert len(talk.requests) - asked == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["judge"] == {
        **{"model": "gpt-4", "kind": "text", "prompt_tokens": 40, "completion_tokens": 8, "cached": 3, "failed": 0},
        "without a review": [],
    }
    # The rules for mathematics ask for a tuple, which the original cannot read: it counts -1 for both sides.
    relative = results["numbers"]["relative score"]
    assert relative["ours"] == pytest.approx(75) and relative["original"] == 100
    assert results["problems"]["replies that the original cannot read"]["count"] == 4
    assert results["problems"]["replies without two scores"] == {"count": 1, "first": [2]}
    short = tmp_path / "short.jsonl"
    short.write_text("".join((room / "text_answers_ref.jsonl").read_text().splitlines(keepends=True)[1:]))
    command[command.index("--references") + 1] = str(short)
    refused = run(app, command)
    assert refused.exit_code == 3 and f"line 1 of {room}" in refused.output and "short.jsonl" in refused.output
