"""`convllava ask` and `chat` as people run them, and the example scripts, on a tiny random model."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from _thread import interrupt_main
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint
from transformers import LogitsProcessor
from typer.testing import CliRunner

import convllava_hf
from convllava_hf import load
from convllava_hf.cli.app import app
from convllava_hf.images import fit_to_corner
from convllava_hf.inference import answer as answering


ROOT = Path(__file__).parents[2]
CONVLLAVA = Path(sys.executable).with_name("convllava")
QUESTION = "What is written on the sign?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a sign.png"
    Image.effect_noise((200, 100), 90).save(path)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint, image):
    """The answer that Python gives, to 5 tokens."""
    return answering.answer(*load(checkpoint, device="cpu"), QUESTION, image, max_new_tokens=5)


def run(*arguments, stdin=None, **options):
    """Runs a command in this process; returns its exit code, stdout and stderr."""
    arguments = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, arguments, input=stdin, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def run_process(*arguments, **options):
    """Runs a program in a process of its own; returns the completed process."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        timeout=240,
        encoding="utf-8",
        **options,
    )


# ---- ask


def test_the_installed_command_answers_and_keeps_stdout_clean(checkpoint, image, expected):
    """And stderr with --quiet, where the weights' progress would be."""
    options = ["--json", "--quiet", "--max-new-tokens", 5, "--device", "cpu"]
    result = run_process(CONVLLAVA, "ask", image, "-m", checkpoint, *options, input=QUESTION)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert report["answer"] == expected
    assert (report["image_tokens"], report["new_tokens"], report["finish_reason"]) == (4, 5, "length")
    assert report["prompt_tokens"] > 4
    assert 0 < report["seconds_to_first_token"] <= report["seconds"]
    assert report["tokens_per_second"] > 0
    assert report["model"] == str(checkpoint)
    assert result.stderr == ""


def test_ask_prints_the_answer(checkpoint, image, expected):
    code, out, err = run("ask", image, QUESTION, "-m", checkpoint, "--max-new-tokens", 5)
    assert (code, out) == (0, expected + "\n")
    assert "Loading weights: 100%" in err
    assert "(cut after 5 tokens; --max-new-tokens sets the limit)" in err


def test_ask_puts_images_into_the_corner_of_a_black_square(checkpoint, image, tmp_path):
    """LLaVAR's way: the same answer as to the image that was put there beforehand."""
    with Image.open(image) as opened:
        fit_to_corner(opened, 100).save(tmp_path / "fitted.png")
    arguments = (QUESTION, "-m", checkpoint, "--max-new-tokens", 5)
    expected = run("ask", tmp_path / "fitted.png", *arguments)[:2]
    assert run("ask", image, *arguments, "--fit-to-corner", 100)[:2] == expected
    assert run("ask", image, *arguments)[:2] != expected


def test_ask_takes_several_images_and_a_budget(checkpoint, image):
    options = ("-m", checkpoint, "--json", "--max-new-tokens", 2)
    tokens = []
    for arguments in ((image, image, QUESTION), (image, image, QUESTION, "--max-image-tokens", 3), (QUESTION,)):
        code, out, _ = run("ask", *arguments, *options)
        assert code == 0
        tokens.append(json.loads(out)["image_tokens"])
    assert tokens == [8, 2, 0]


class Touch:
    """Unpickled where everything is allowed, makes a file through os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_ask_runs_nothing_of_a_pickle_and_says_so_in_one_line(checkpoint, tmp_path):
    hostile, mark = tmp_path / "hostile", tmp_path / "executed"
    shutil.copytree(checkpoint, hostile)
    weights = load_file(hostile / "model.safetensors")
    (hostile / "model.safetensors").unlink()
    torch.save({**weights, "more": Touch(mark)}, hostile / "pytorch_model.bin")
    result = run_process(CONVLLAVA, "ask", QUESTION, "-m", hostile, "--device", "cpu", "--quiet")
    assert (result.returncode, result.stdout) == (3, ""), result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert f"{str(hostile)!r} cannot be read: unpickling them asks for 'posix.system'" in result.stderr
    assert "weights_only" not in result.stderr  # torch advises to let it run
    assert not mark.exists()
    torch.load(hostile / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # so the file is what it is meant to be


@pytest.mark.parametrize("marker", [(), ("-",)])
def test_the_question_may_come_from_stdin(marker, checkpoint, image, expected):
    arguments = ("ask", image, *marker, "-m", checkpoint, "--max-new-tokens", 5)
    assert run(*arguments, stdin=f"\n{QUESTION}\n")[:2] == (0, expected + "\n")


def test_sampling_is_repeatable(checkpoint):
    options = ("-m", checkpoint, "--temperature", 2, "--max-new-tokens", 20, "--seed")
    outputs = [run("ask", QUESTION, *options, seed)[1] for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "What?"], "missing.png"),
        (["photo.png"], "photo.png: no such file (the last argument is the question"),
        (["IMAGE"], "there is no question: none was given after the images, and standard input is empty"),
        (["IMAGE", "-"], "there is no question"),
        ([__file__, "What?"], "test_ask.py: not an image"),
        (["What?", "-m", "./nowhere"], "there is no folder 'nowhere'"),
        (["What?", "-m", "no-such-model"], "cannot load 'no-such-model'"),
        (["What?", "--device", "cuda:99"], "device='cuda:99' is not present here; torch sees cpu"),
        (["What?", "--dtype", "int8"], "dtype='int8'; expected"),
        (["What?", "--quantize", "2bit"], "quantize='2bit'; expected '4bit', '8bit' or 'int8'"),
        (["What?", "--max-new-tokens", "600"], "no room for max_new_tokens=600: the model takes 512"),
        (["<image> What?"], "the text contains '<image>'"),
    ],
)
def test_wrong_input_is_one_line_on_stderr(arguments, message, checkpoint, image):
    arguments = [str(image) if argument == "IMAGE" else argument for argument in arguments]
    if "-m" not in arguments:
        arguments += ["-m", str(checkpoint)]
    code, out, err = run("ask", *arguments)
    assert (code, out) == (3, "")
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in err


def test_wrong_options_are_refused_before_anything_loads():
    for arguments in (
        ["ask", "What?"],
        ["ask", "What?", "-m", "x", "--max-image-tokens", "0"],
        ["chat", "-m", "x", "--no"],
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Error" in err


def test_a_template_of_strangers_is_tried_in_bounds(checkpoint, tmp_path):
    bomb = shutil.copytree(checkpoint, tmp_path / "bomb")
    (bomb / "chat_template.jinja").write_text("{{ 'a' * 2000000 }}")
    code, stdout, stderr = run("ask", QUESTION, "-m", bomb)
    assert (code, stdout) == (3, "")
    assert "2000000 characters" in stderr


def test_what_the_machine_lacks_gives_another_exit_code(checkpoint, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(answering, "answer", fail)
    code, out, err = run("ask", "What?", "-m", checkpoint)
    assert (code, out) == (1, "")
    assert "error: out of memory: try --quantize 4bit" in err


def test_a_bug_is_not_hidden(checkpoint, monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("surprise")

    monkeypatch.setattr(answering, "answer", fail)
    with pytest.raises(KeyError, match="surprise"):
        run("ask", "What?", "-m", checkpoint)


@pytest.mark.parametrize("command", [(), ("ask",), ("chat",)])
def test_help_teaches(command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage" in out
    if command:
        assert f"convllava {command[0]} photo.jpg" in out


def test_version():
    assert run("--version") == (0, f"convllava {convllava_hf.__version__}\n", "")


# ---- chat


def test_chat_keeps_history_and_images(checkpoint, image, monkeypatch):
    asked = []
    real = answering.answer

    def listen(model, processor, question, images, history, **options):
        stream = real(model, processor, question, images, history, **options)
        asked.append((question, len(images), len(history), stream.stats.image_tokens))
        return stream

    monkeypatch.setattr(answering, "answer", listen)
    lines = f"One?\n\n/image '{image}' '{image}'\nTwo?\n/help\nThree?\n/reset\n  Four?  \n/exit\nNever?\n"
    code, out, err = run("chat", image, "-m", checkpoint, "--max-new-tokens", 2, stdin=lines)
    assert code == 0
    assert asked == [("One?", 1, 0, 4), ("Two?", 2, 2, 12), ("Three?", 0, 4, 12), ("Four?", 0, 0, 0)]
    assert err.count("/image PATH") == 1
    assert out.endswith("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image missing.png", "missing.png"),
        ("/image", "/image "),
        ("/image 'open", "quotation"),
        ("/imgae x.png", "unknown command /imgae"),
    ],
)
def test_a_piped_chat_ends_with_the_first_error(line, message, checkpoint):
    code, out, err = run("chat", "-m", checkpoint, "--max-new-tokens", 2, stdin=f"{line}\nHello?\n")
    assert (code, out) == (3, "")
    assert message in err.replace("\r", "\n").splitlines()[-1]


class Terminal:
    """A process behind a pseudo-terminal, as a person sees it."""

    def __init__(self, *arguments):
        import pty

        self.fd, inner = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            start_new_session=True,
            # The terminal must be the session's own, so that Ctrl-C becomes a signal.
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(inner)
        self.seen = ""

    def wait_for(self, text):
        """Reads until `text` appears; returns what came before it."""
        while text not in self.seen:
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # how a closed terminal reads on Linux
                data = b""
            if not data:
                raise AssertionError(f"the program ended before {text!r}: {self.seen[-2000:]!r}")
            self.seen += data.decode("utf-8", "replace")
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def close(self):
        code = self.process.wait(60)
        os.close(self.fd)
        return code


# The real command, with a model that counts slowly.
SLOW = """
import sys, time
sys.argv[0] = "convllava"
from convllava_hf.cli.app import app
from convllava_hf.inference import answer as answering
import torch
from transformers import LogitsProcessor

class Count(LogitsProcessor):
    def __init__(self, processor):
        self.tokens = processor.tokenizer.encode("one two three four five six seven eight nine ten ")
        self.said = 0
    def __call__(self, input_ids, scores):
        time.sleep(0.05)
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[self.said % len(self.tokens)]] = 0.0
        self.said += 1
        return forced

real = answering.answer
def answer(model, processor, *arguments, **options):
    return real(model, processor, *arguments, logits_processor=[Count(processor)], **options)
answering.answer = answer
app(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_in_a_terminal(checkpoint, image):
    terminal = Terminal(
        sys.executable, "-c", SLOW, "chat", "-m", checkpoint, "--device", "cpu", "--max-new-tokens", 400
    )
    try:
        terminal.wait_for("Ctrl-C stops an answer")
        terminal.wait_for("> ")
        terminal.type("/image missing.png\r")
        terminal.wait_for("error: missing.png: no such file")
        terminal.wait_for("> ")
        terminal.type(f"/image '{image}'\r")
        terminal.wait_for("> ")
        terminal.type("Count.\r")
        terminal.wait_for("one two")  # piece by piece: the whole answer would take 20 seconds
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_ctrl_c_ends_a_command(command, checkpoint, monkeypatch):
    """The interrupt comes while the model generates; Ctrl-C in a terminal's chat is tested above."""
    real = answering.answer

    class Interrupt(LogitsProcessor):
        said = 0

        def __call__(self, input_ids, scores):
            self.said += 1
            if self.said == 3:
                interrupt_main()
            time.sleep(0.01)
            return scores

    interrupt = Interrupt()
    monkeypatch.setattr(answering, "answer", lambda *a, **k: real(*a, logits_processor=[interrupt], **k))
    arguments, stdin = (["Count."], None) if command == "ask" else ([], "Count.\nAgain.\n")
    code, _, err = run(command, *arguments, "-m", checkpoint, "--device", "cpu", "--max-new-tokens", 400, stdin=stdin)
    assert code == 130
    assert interrupt.said < 100
    assert "Traceback" not in err


# ---- examples


def run_example(script, *arguments, monkeypatch, capsys):
    """Runs a script in this process, which has loaded torch already; returns what it prints."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return capsys.readouterr().out


def test_example_ask_in_a_process_of_its_own(checkpoint, image, expected):
    script = ROOT / "examples" / "ask.py"
    result = run_process(sys.executable, script, image, QUESTION, "--model", checkpoint, "--max-new-tokens", 5)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == expected + "\n"


def test_example_ask_draws_an_image(checkpoint, monkeypatch, capsys):
    out = run_example("ask.py", "--model", checkpoint, "--max-new-tokens", 5, monkeypatch=monkeypatch, capsys=capsys)
    assert out.strip()


@pytest.mark.parametrize("options", [(), ("--native",)])
def test_example_batched_generate(options, checkpoint, monkeypatch, capsys):
    arguments = ("--model", checkpoint, "--max-new-tokens", 5, *options)
    out = run_example("batched_generate.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    counts = re.findall(r"^\[(\d) images\] .* -> .", out, re.MULTILINE)
    assert counts == ["1", "1", "1", "0"]


@pytest.mark.parametrize("script", ["ask.py", "batched_generate.py"])
def test_examples_register_and_say_where_their_model_comes_from(script, tmp_path, monkeypatch, capsys):
    assert "\nimport convllava_hf " in (ROOT / "examples" / script).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_example(script, monkeypatch=monkeypatch, capsys=capsys)
    assert "run `make quickstart`, or name a model with --model" in capsys.readouterr().err
