"""`convllava convert` and `convllava init`, and the examples that convert, as processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


CONVLLAVA = Path(sys.executable).with_name("convllava")
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def llm(reference):
    return reference / "convllava" / "llm"


def test_convert_reports_and_never_overwrites(llm, reference, tmp_path):
    output = tmp_path / "converted"
    command = [CONVLLAVA, "convert", llm, "--vision-tower", reference / "convllava" / "vision", "--output", output]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert "108 read" in result.stdout and "GB of memory at the peak" in result.stdout
    report = json.loads((output / "conversion_report.json").read_text())
    assert report["counts"]["read"] == 108 and len(report["sources"]) == 2
    before = (output / "config.json").stat().st_mtime_ns
    again = run(*command)
    assert again.returncode == 2 and "--force" in again.stderr and again.stderr.count("\n") == 1
    assert (output / "config.json").stat().st_mtime_ns == before


def test_a_missing_tower_is_one_line_and_leaves_nothing(llm, tmp_path):
    result = run(CONVLLAVA, "convert", llm, "--output", tmp_path / "converted")
    assert result.returncode == 2 and "--vision-tower" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_convert_and_compare():
    result = run(sys.executable, EXAMPLES / "convert_and_compare.py")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "logits" in result.stdout


def test_build_your_own(tmp_path):
    result = run(sys.executable, EXAMPLES / "build_your_own.py", "--output", tmp_path / "model")
    assert result.returncode == 0, result.stderr[-2000:]
    assert any(path.name == "config.json" for path in tmp_path.rglob("config.json"))


def test_init_joins_two_parts(llm, reference, tmp_path):
    # The converted tower and a language model that transformers knows, both made here.
    tower, text, output = tmp_path / "tower", tmp_path / "text", tmp_path / "model"
    result = run(CONVLLAVA, "convert", reference / "convllava" / "vision", "--output", tower)
    assert result.returncode == 0, result.stderr
    code = (
        "import sys; from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer; "
        f"LlamaTokenizer.from_pretrained({str(llm)!r}, legacy=False).save_pretrained({str(text)!r}); "
        "LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=1, "
        f"num_attention_heads=2)).save_pretrained({str(text)!r})"
    )
    assert run(sys.executable, "-c", code).returncode == 0
    arguments = ["--vision", tower, "--text", text, "--resolution", "256", "--output", output]
    result = run(CONVLLAVA, "init", *arguments, "--projector-type", "mlp3x_gelu")
    assert result.returncode == 0, result.stderr
    assert json.loads((output / "config.json").read_text())["projector_type"] == "mlp3x_gelu"
