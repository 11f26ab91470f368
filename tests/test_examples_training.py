"""The examples that train, run as a reader runs them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_checkpoint

from convllava_hf.data.build import build_dataset


EXAMPLES = Path(__file__).parent.parent / "examples"
# llm-compressor's pins conflict with ours, so it has an environment of its own:
#     LLM_COMPRESSOR_PYTHON=path/of/its/python make test ARGS="-m slow tests/test_examples_training.py"
LLM_COMPRESSOR = os.environ.get("LLM_COMPRESSOR_PYTHON")
COMPARE = """
import sys, torch
from transformers import AutoModelForImageTextToText
inputs = {"input_ids": torch.tensor([[2, 1, 1, 1, 1, 40, 50]]), "pixel_values": torch.ones(1, 3, 128, 128)}
models = [AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True) for path in sys.argv[1:]]
with torch.no_grad():
    logits = [model.eval()(**inputs).logits[0, -1].float() for model in models]
print(torch.nn.functional.cosine_similarity(*logits, dim=0).item())
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_three_stages(tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    script = [str(EXAMPLES / "three_stages.sh"), str(tmp_path / "out")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in (1, 2, 3):
        assert (tmp_path / "out" / f"stage{stage}" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "stage3" / "training_curves.png").is_file()
    assert done.stdout.strip().splitlines()[-1].startswith("the model: ")


def test_finetune_lora(tmp_path, monkeypatch, capsys):
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "page.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
    text = [{"from": "human", "value": "And without?"}, {"from": "gpt", "value": "None."}]
    rows = [{"id": "1", "image": "page.png", "conversations": turns}, {"id": "2", "conversations": text}]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    script = EXAMPLES / "finetune_lora.py"
    assert len(script.read_text().splitlines()) < 120
    arguments = (
        f"--model {checkpoint} --llava-json {tmp_path}/my.json --image-root {tmp_path} --output {tmp_path}/tuned"
    )
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split(), "--epochs", "1", "--rank", "2"])
    runpy.run_path(str(script), run_name="__main__")
    assert "the adapter: " in capsys.readouterr().out
    assert (tmp_path / "tuned" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "tuned" / "training_curves.png").is_file()


def test_preferences(tmp_path, monkeypatch):
    """Questions with solutions; pairs of the right answer and what a model of random weights says."""
    data = tmp_path / "data"
    Image.new("RGB", (90, 60), "red").save(tmp_path / "page.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
    more = [{"from": "human", "value": "And the sky?"}, {"from": "gpt", "value": "Blue."}]
    rows = [{"id": "1", "image": "page.png", "conversations": turns + more}, {"id": "2", "conversations": more}]
    (tmp_path / "my.json").write_text(json.dumps(rows))
    build_dataset([(tmp_path / "my.json", tmp_path)], data)
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    script = str(EXAMPLES / "training" / "preferences.py")
    for output, model in (("questions", []), ("pairs", ["--model", str(checkpoint)])):
        arguments = [script, "--data", str(data), "--output", str(tmp_path / output), *model]
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(script, run_name="__main__")
        made = load_dataset(str(tmp_path / output), split="train")
        assert made["solution"][:] == ["Blue.", "Blue."]
        assert [[message["role"] for message in prompt] for prompt in made["prompt"]] == [
            ["user", "assistant", "user"],
            ["user"],
        ]
        assert [len(images) for images in made["images"]] == [1, 0]
    right = [{"role": "assistant", "content": [{"type": "text", "text": "Blue."}]}]
    assert made["chosen"][:] == [right] * 2
    assert all(len(answer) == 1 and answer != right for answer in made["rejected"])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not LLM_COMPRESSOR, reason="set LLM_COMPRESSOR_PYTHON to the python of an environment with it")
@pytest.mark.parametrize(("scheme", "bits", "agreement"), [("W8A16", 8, 0.999), ("W4A16", 4, 0.95)])
def test_quantize(scheme, bits, agreement, tmp_path):
    """The linear layers of the language model in few bits, the rest to the bit; what is written loads and agrees."""
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny", width=128)  # four bits go in groups of 128
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "small"), "--scheme", scheme]
    if bits == 4:
        for number in range(8):
            Image.new("RGB", (90, 60), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
        rows = [{"id": str(number), "image": f"{number}.png", "conversations": turns} for number in range(8)]
        (tmp_path / "my.json").write_text(json.dumps(rows))
        build_dataset([(tmp_path / "my.json", tmp_path)], tmp_path / "data")
        arguments += ["--data", str(tmp_path / "data")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = {"env": environment, "capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run([LLM_COMPRESSOR, str(EXAMPLES / "training" / "quantize.py"), *arguments], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "small"))
    packed = {name.removesuffix("_packed") for name in after if name.endswith(".weight_packed")}
    assert packed == {name for name in before if "language_model" in name and name.endswith("_proj.weight")}
    assert all(after[name].equal(before[name]) for name in before.keys() - packed)
    assert all(after[f"{name}_packed"].numel() * 32 // bits == before[name].numel() for name in packed)
    done = subprocess.run([LLM_COMPRESSOR, "-c", COMPARE, str(checkpoint), str(tmp_path / "small")], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert agreement < float(done.stdout.split()[-1]) < 1


@pytest.mark.parametrize("file", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configurations(file):
    config = load_config_from_file(str(file))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "multi_node": "FSDP"}
    assert config.distributed_type == kinds.get(file.stem, "DEEPSPEED")
    assert config.num_machines == (2 if file.stem == "multi_node" else 1)
    assert f"examples/accelerate/{file.name}" in file.read_text()
