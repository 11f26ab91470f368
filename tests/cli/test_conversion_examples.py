"""`convllava convert` and `convllava init`, one mistake in a process of its own, and the examples that convert."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from typer.testing import CliRunner

from convllava_hf.cli.app import app


CONVLLAVA = Path(sys.executable).with_name("convllava")
EXAMPLES = Path(__file__).parents[2] / "examples"


def call(*command):
    return CliRunner().invoke(app, [str(part) for part in command])


@pytest.fixture(scope="module")
def llm(reference):
    return reference / "convllava" / "llm"


def test_convert_reports_and_never_overwrites(llm, reference, tmp_path):
    output = tmp_path / "converted"
    command = ["convert", llm, "--vision-tower", reference / "convllava" / "vision", "--output", output]
    result = call(*command)
    assert result.exit_code == 0, result.output
    assert "108 read" in result.stdout and "GB of memory at the peak" in result.stdout
    report = json.loads((output / "conversion_report.json").read_text())
    assert report["counts"]["read"] == 108 and len(report["sources"]) == 2
    before = (output / "config.json").stat().st_mtime_ns
    again = call(*command)
    assert again.exit_code == 3 and "--force" in again.stderr and again.stderr.count("\n") == 1
    assert (output / "config.json").stat().st_mtime_ns == before


def test_a_missing_tower_is_one_line_and_leaves_nothing(llm, tmp_path):
    command = [CONVLLAVA, "convert", llm, "--output", tmp_path / "converted"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 3 and "--vision-tower" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_convert_and_compare(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_and_compare.py"])
    runpy.run_path(str(EXAMPLES / "convert_and_compare.py"), run_name="__main__")
    assert "logits" in capsys.readouterr().out


def test_build_your_own(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["build_your_own.py", "--output", str(tmp_path / "model")])
    runpy.run_path(str(EXAMPLES / "build_your_own.py"), run_name="__main__")
    assert (tmp_path / "model" / "config.json").is_file()


def test_init_joins_two_parts(llm, reference, tmp_path):
    # The converted tower and a language model that transformers knows, both made here.
    tower, text, output = tmp_path / "tower", tmp_path / "text", tmp_path / "model"
    result = call("convert", reference / "convllava" / "vision", "--output", tower)
    assert result.exit_code == 0, result.output
    LlamaTokenizer.from_pretrained(llm, legacy=False).save_pretrained(text)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)).save_pretrained(text)
    arguments = ["--vision", tower, "--text", text, "--resolution", "256", "--output", output]
    result = call("init", *arguments, "--projector-type", "mlp3x_gelu")
    assert result.exit_code == 0, result.output
    assert json.loads((output / "config.json").read_text())["projector_type"] == "mlp3x_gelu"
