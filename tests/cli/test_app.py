"""What all commands share: exit codes that CI can tell apart, `--quiet`, `--json`, help, completion, `env`."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from safetensors import SafetensorError
from tiny_checkpoint import save_tiny_checkpoint
from typer.testing import CliRunner

import convllava_hf
from convllava_hf.cli import options
from convllava_hf.cli.app import app
from convllava_hf.cli.environment import describe_environment
from convllava_hf.cli.options import QUIET_ENVIRONMENT, CheckFailed, MachineError, report_errors
from convllava_hf.cli.training import spell_as_trl
from convllava_hf.shipped import read_titles


def run(*arguments, **settings):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def checkpoint(tmp_path):
    return save_tiny_checkpoint(tmp_path / "model")


# These stream, serve, or write a file whose path the caller gave.
NO_REPORT = {"train", "chat", "serve", "demo", "batch", "eval-report", "eval-convert"}


def list_commands() -> dict[str, list[str]]:
    """The words of every command -> its options."""
    from typer.main import get_command

    found = {}
    for name, command in get_command(app).commands.items():
        for group, inner in getattr(command, "commands", {"": command}).items():
            found[f"{name} {group}".strip()] = [option for parameter in inner.params for option in parameter.opts]
    return found


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("a bad\nvalue"), 3, "error: a bad value"),
        (ImportError("pip install it"), 3, "error: pip install it"),
        (FileNotFoundError("no such file"), 3, "error: no such file"),
        (SafetensorError("header too large"), 3, "error: header too large (SafetensorError)"),
        (CheckFailed("2 of 3 checks"), 1, "error: 2 of 3 checks"),
        (MachineError("the disk is slow"), 1, "error: the disk is slow"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan"),
        (RuntimeError("CUDA out of memory."), 1, "error: out of memory: try --quantize 4bit"),
        (RuntimeError("TensorBoardCallback requires tensorboard"), 1, "CONVLLAVA_TRACEBACK=1 shows where"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(error, code, message, capsys):
    with pytest.raises(typer.Exit) as exited, report_errors():
        raise error
    assert exited.value.exit_code == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == bool(message) and printed.out == ""


@pytest.mark.parametrize("mistake", [KeyError("x"), TypeError("x"), AttributeError("x"), AssertionError("x")])
def test_mistakes_of_the_program_are_not_hidden(mistake):
    with pytest.raises(type(mistake)), report_errors():
        raise mistake


def test_the_traceback_can_be_had(monkeypatch):
    monkeypatch.setenv(options.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="bad value"), report_errors():
        raise ValueError("bad value")


def test_exit_codes_of_commands(checkpoint, tmp_path):
    assert run("info", checkpoint, "--nonsense")[0] == 2
    assert run("nonsense")[0] == 2
    assert run("info", tmp_path / "nothing")[0] == 3
    assert run("doctor", checkpoint)[0] == 0
    (checkpoint / "modeling_convllava.py").write_text("# other code\n")
    assert run("doctor", checkpoint)[0] == 1


def test_a_truncated_safetensors_file_is_one_line(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    code, out, err = run("ask", "What?", "-m", checkpoint, "--device", "cpu")
    assert (code, out) == (3, "") and "Traceback" not in err
    assert err.replace("\r", "\n").strip().splitlines()[-1].startswith("error: ")


def test_the_codes_are_in_the_help():
    help_text = run("--help")[1]
    for code, meaning in ((1, "a check failed"), (2, "the command line is wrong"), (3, "input"), (130, "interrupted")):
        assert re.search(rf"^\s+{code}\s+.*{meaning}", help_text, re.MULTILINE)


def test_no_line_of_help_is_cut_off():
    """Of 80 columns; only commands to copy are longer."""
    for name in ("", "data", *list_commands()):
        code, out, _ = run(*name.split(), "--help", terminal_width=80)
        assert code == 0
        listed = out.partition("Commands:")[2].splitlines()
        assert bool(listed) == (name in ("", "data")) and not [line for line in listed if line.endswith("...")], out
        assert not [line for line in out.splitlines() if len(line) > 80 and not line.startswith("    ")], out


def test_every_command_takes_quiet_and_those_that_report_take_json():
    commands = list_commands()
    assert commands.keys() > NO_REPORT and len(commands) >= 28
    assert not [name for name, options in commands.items() if "--quiet" not in options]
    assert not [name for name, options in commands.items() if "--json" not in options and name not in NO_REPORT]


def test_doctor_and_info_and_plan_and_recipe_report_in_json(checkpoint):
    checks = json.loads(run("doctor", checkpoint, "--json")[1])["checks"]
    assert len(checks) >= 9 and not any(check["problem"] for check in checks)
    assert json.loads(run("info", checkpoint, "--json")[1])["parts"].keys() == {
        "vision tower",
        "projector",
        "language model",
    }
    plan = json.loads(run("plan", checkpoint, "--stage", 3, "--json")[1])
    assert plan["stage"] == 3 and {part["part"] for part in plan["parts"]} >= {"projector", "language model"}
    recipes = json.loads(run("recipe", "--json")[1])["recipes"]
    assert recipes == read_titles("recipe") and "tiny_cpu_stage1" in recipes
    file = json.loads(run("recipe", "tiny_cpu_stage1", "--json")[1])["path"]
    shown = json.loads(run("recipe", "tiny_cpu_stage1", "--show", "--json")[1])
    assert shown == {"path": file, "text": Path(file).read_text()}
    assert json.loads(run("data", "mixtures", "--json")[1]) == {"mixtures": read_titles("mixture")}


def test_what_failed_is_on_stdout_as_json_and_the_error_on_stderr(checkpoint):
    (checkpoint / "modeling_convllava.py").write_text("# other code\n")
    code, out, err = run("doctor", checkpoint, "--json")
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: 1 of")
    assert [check["name"] for check in json.loads(out)["checks"] if check["problem"]] == [
        "code files are those of the installed version"
    ]
    assert run("info", checkpoint / "nothing", "--json")[:2] == (3, "")


def test_quiet_leaves_errors_alone(checkpoint, monkeypatch):
    for name in QUIET_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with warnings.catch_warnings():
        code, out, err = run("recipe", "--quiet")
        assert (code, err) == (0, "") and "tiny_cpu_stage1" in out
        assert all(os.environ[name] == value for name, value in QUIET_ENVIRONMENT.items())
    for name in QUIET_ENVIRONMENT:
        os.environ.pop(name, None)  # which the command set, so monkeypatch would bring it back
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_warning()
    with warnings.catch_warnings():
        assert run("info", checkpoint / "nothing", "--quiet")[2].startswith("error: ")
    for name in QUIET_ENVIRONMENT:
        os.environ.pop(name, None)
    transformers_logging.set_verbosity_warning()


def test_env_says_what_a_bug_report_needs_and_not_who_or_where():
    described = json.loads(run("env", "--json")[1])
    assert described["convllava-hf"] == convllava_hf.__version__
    assert {"python", "torch", "transformers", "processor", "system"} <= described.keys()
    text = run("env")[1]
    assert os.uname().nodename not in text and os.path.expanduser("~") not in text.replace("/", " /")
    assert described == {name: str(value) for name, value in describe_environment().items()}


def test_the_shell_completes_commands():
    environment = {
        **os.environ,
        "_CONVLLAVA_COMPLETE": "complete_bash",
        "COMP_WORDS": "convllava doc",
        "COMP_CWORD": "1",
    }
    program = "import sys; sys.argv = ['convllava']; from convllava_hf.cli.app import app; app(prog_name='convllava')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["doctor"], done.stderr


def test_settings_of_training_begin_with_ours():
    out = run("train", "x", "--flags")[1]
    ours, theirs = out.index("settings of convllava-hf"), out.index("settings of TRL and transformers")
    assert ours < out.index("--vision_learning_rate") < theirs < out.index("--gradient_accumulation_steps")


def test_one_set_of_names(tmp_path):
    """The checkpoint is `--model` or the first argument, the result `--output`, the side of images `--image-size`."""
    names = {"ask": ["--model"], "convert": ["--output", "--chat-template"], "merge": ["--output"]}
    names |= {"init": ["--output", "--image-size", "--chat-template"], "apply-delta": ["--output"]}
    for command, expected in names.items():
        text = run(command, "--help")[1]
        assert all(name in text for name in expected)
    assert not [name for name, options in list_commands().items() if {"--out", "--output"} & {*options} == {"--out"}]
    given = ["--model", "a", "--output=b", "--image-size", "128", "--chat-template", "plain", "--data", "c"]
    assert spell_as_trl([*given, "--learning_rate", "1"]) == [
        *("--model_name_or_path", "a", "--output_dir=b", "--image_size", "128", "--chat_template_path", "plain"),
        *("--dataset_name", "c", "--learning_rate", "1"),
    ]


def test_the_notice_of_a_kernel_package_is_not_shown():
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level >= logging.ERROR
