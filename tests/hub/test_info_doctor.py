"""`convllava info` and `convllava doctor`: what a checkpoint is, and what is wrong with one that was damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import save_tiny_checkpoint
from tiny_sources import edit_json, edit_weights
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.utils.logging import disable_propagation, enable_propagation
from typer.testing import CliRunner

from convllava_hf.checkpoints.reading import CheckpointReader
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.hub.client import HubError
from convllava_hf.hub.doctor import check_checkpoint
from convllava_hf.hub.info import describe_checkpoint
from convllava_hf.inference.load import UNQUANTIZED_MODULES


@pytest.fixture(scope="module")
def llava(convert_family) -> Path:
    return convert_family("llava_v1_5")


def count(folder: Path) -> int:
    return sum(torch.Size(stored.shape).numel() for stored in CheckpointReader(folder).tensors.values())


@pytest.mark.parametrize("command", ["info", "doctor"])
@pytest.mark.parametrize("after", ["first rename", "second rename"])
def test_a_model_that_a_killed_run_left_beside_its_place_is_named(copy, caplog, command, after):
    """As a kill in the middle of `--force` leaves it: the first rename takes the old model away."""
    old = copy.with_name(f".tiny.replaced-{command}")
    copy.rename(old)
    if after == "second rename":
        shutil.copytree(old, copy)
    enable_propagation()
    try:
        done = CliRunner().invoke(app, [command, str(copy)])
    finally:
        disable_propagation()
    assert done.exit_code == (0 if after == "second rename" else 3), done.output
    way = "delete it if it is not needed" if after == "second rename" else "rename it to get it back"
    assert f"{old} is the model that was at {copy} before a run was killed; {way}." in caplog.text


# ---- info


def test_info_of_a_convllava(checkpoint):
    info = describe_checkpoint(checkpoint)
    assert list(info.parts) == ["vision tower", "projector", "language model"]
    assert sum(info.parts.values()) == count(checkpoint)
    assert info.tensors == len(CheckpointReader(checkpoint).tensors)
    assert (768, 768, 144) in info.image_tokens
    assert info.chat_template == "chatml" and set(info.code.values()) == {"same"}
    assert info.memory["float32"] == 4 * count(checkpoint) and info.memory["bfloat16"] == 2 * count(checkpoint)
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # what bitsandbytes quantises: the layers of the language model
    assert info.memory["8-bit"] == 2 * count(checkpoint) - linear
    assert info.memory["bfloat16"] > info.memory["8-bit"] > info.memory["4-bit"]
    text = info.summary()
    assert "768x768: 144 tokens" in text and "equal to the installed version" in text and "not recorded" in text


def test_info_of_conversions_and_originals(converted, llava, reference):
    info = describe_checkpoint(converted)
    assert info.chat_template == "vicuna_v1" and info.provenance[0].startswith("language model llm")
    info = describe_checkpoint(llava)
    assert info.image_tokens == [(56, 56, 16)] and info.code == {} and info.chat_template == "vicuna_v1"
    for family in ("convllava/llm", "llava_v1_5/model", "tinyllava_stablelm/model"):
        info = describe_checkpoint(reference / family)
        assert info.kind.startswith("original format") and info.chat_template is None
        assert sum(info.parts.values()) == count(reference / family), "the header of a pickle was misread"
        assert info.parts["projector"] > 0 and "to be converted" in info.summary()


@pytest.mark.parametrize("name", ["tiny", "original"])
def test_info_of_the_hub_reads_no_weights(hub, checkpoint, reference, name, monkeypatch):
    import huggingface_hub

    folder = checkpoint if name == "tiny" else reference / "convllava" / "llm"
    huggingface_hub.HfApi().create_repo("someone/model")
    huggingface_hub.HfApi().upload_folder(repo_id="someone/model", folder_path=folder)
    hub.requests.clear()
    here, there = describe_checkpoint(folder), describe_checkpoint("someone/model")
    assert there.name.startswith("someone/model at ")
    there.name = here.name
    assert there == here
    size = sum(path.stat().st_size for path in CheckpointReader(folder).files)
    fetched = sum(request.sent for request in hub.requests if request.path.startswith("/cdn/"))
    assert all(request.headers.get("range") for request in hub.requests if request.path.startswith("/cdn/"))
    assert fetched < min(size, 1_100_000), "more than the ends of the weight files were fetched"
    from huggingface_hub import constants

    huggingface_hub.snapshot_download("someone/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = describe_checkpoint("someone/model")
    offline.name = here.name
    assert offline == here


def quantise(checkpoint, folder, **settings):
    config = BitsAndBytesConfig(
        **settings,
        bnb_4bit_quant_type="nf4",  # bitsandbytes' oldest supported version has no other on a CPU
        llm_int8_skip_modules=UNQUANTIZED_MODULES,
    )
    AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config).save_pretrained(folder)
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},  # as FSDP needs it
    ],
)
def test_quantised_checkpoints(settings, checkpoint, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra 'quantization'")
    quantise(checkpoint, tmp_path, **settings)
    info, full = describe_checkpoint(tmp_path), describe_checkpoint(checkpoint)
    assert info.quantization == "bitsandbytes" and full.quantization is None
    assert (info.parts, info.memory) == (full.parts, full.memory)
    assert 0 < (tmp_path / "model.safetensors").stat().st_size - info.stored_bytes < 2**15
    assert info.stored_bytes < full.stored_bytes == full.memory["float32"]
    assert "quantised by bitsandbytes" in info.summary()
    assert not [check for check in check_checkpoint(tmp_path) if check.problem]

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][1:].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert name in str([check.problem for check in check_checkpoint(tmp_path)])


def test_old_quantised_checkpoints_name_no_method(checkpoint, copy):
    edit_json(copy / "config.json", quantization_config={"load_in_8bit": True})
    assert describe_checkpoint(copy).quantization == "bitsandbytes"


def test_other_quantisations_are_told_and_not_guessed_at(copy):
    edit_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    info = describe_checkpoint(copy)
    assert info.quantization == "gptq" and not info.memory and "numbers" in info.summary()
    with pytest.raises(ConversionError, match="gptq.*bitsandbytes"):
        check_checkpoint(copy)


def test_eight_bit_floats_are_read(checkpoint, copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    info = describe_checkpoint(copy)
    assert info.dtypes["float8_e4m3fn"] == tensors[name].numel() and info.parts == describe_checkpoint(checkpoint).parts
    assert not [check for check in check_checkpoint(copy) if check.problem]
    tensors[name].view(torch.uint8)[0, 0] = 0x7F  # not a number
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert f"the first is {name}" in str([check.problem for check in check_checkpoint(copy)])


def test_info_never_runs_a_pickle(tmp_path, reference):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = Path(shutil.copytree(reference / "convllava" / "llm", tmp_path / "evil"))
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    torch.save({"a": torch.zeros(2), "b": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin: its pickle asks for '\w+.mkdir'"):
        describe_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_info_names_what_is_wrong(copy, tmp_path):
    with pytest.raises(ConversionError, match="revision 'main'"):
        describe_checkpoint(copy, revision="main")
    (copy / "model.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(ConversionError, match="header of model.safetensors"):
        describe_checkpoint(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="expected .*model.safetensors"):
        describe_checkpoint(copy)
    with pytest.raises(HubError, match="no/such"):
        describe_checkpoint("no/such")


# ---- doctor


def test_sound_checkpoints_pass(checkpoint, converted, llava):
    for folder, number in ((checkpoint, 11), (converted, 12), (llava, 11)):
        checks = check_checkpoint(folder)
        assert len(checks) == number and not [check for check in checks if check.problem], checks


def test_what_cannot_be_checked_is_named(copy, reference):
    with pytest.raises(ConversionError, match="convllava convert"):
        check_checkpoint(reference / "convllava" / "llm")
    edit_json(copy / "config.json", model_type="bert")
    with pytest.raises(ConversionError, match="'bert'.* convllava, llava"):
        check_checkpoint(copy)


def change_tensors(change):
    return lambda folder: edit_weights(folder / "model.safetensors", change)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (change_tensors(lambda t: t.pop("lm_head.weight")), "1 tensor.s. are missing.*lm_head.weight"),
        (change_tensors(lambda t: t.update(x=torch.zeros(1))), "1 tensor.s. are unknown.* x$"),
        (
            change_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(3, 64)})),
            r"lm_head.weight has the shape \[3, 64\]; expected \[320, 64\]",
        ),
        (
            change_tensors(lambda t: t["lm_head.weight"][5].fill_(float("nan"))),
            "1 tensor.s. hold values that are not finite, the first is lm_head.weight",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "truncated or damaged"),
        (lambda f: edit_json(f / "config.json", image_token_id=7), "'<image>' has the id 1; config.json says 7"),
        (lambda f: (f / "tokenizer.json").unlink(), ""),
        (lambda f: (f / "chat_template.jinja").write_text("{{ messages[0].nothing.at_all }}"), "no attribute"),
        (lambda f: (f / "chat_template.jinja").write_text("no image"), "0 (<image>|image) tokens"),
        (
            lambda f: (f / "modeling_convllava.py").write_text("import os\n"),
            "modeling_convllava.py is modified",
        ),
        (lambda f: (f / "processing_convllava.py").unlink(), "processing_convllava.py is missing"),
        (lambda f: (f / "helper.py").touch(), "helper.py is unknown"),
    ],
)
def test_damage_is_found(copy, damage, problem):
    damage(copy)
    wrong = [check.problem for check in check_checkpoint(copy) if check.problem is not None]
    assert wrong and any(re.search(problem, text) for text in wrong), wrong
    assert not any("\n" in text for text in wrong)


def test_damage_since_the_conversion_is_found(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "copy"))
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert [check.problem for check in check_checkpoint(folder) if check.problem] == [
        f"{file.name} was changed or damaged since the conversion"
    ]


# ---- the commands


def test_commands(hub, copy, monkeypatch):
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        return result.exit_code, result.stdout if result.exit_code == 0 else result.output

    assert run("doctor", copy) == (0, "".join(f"ok     {check.name}\n" for check in check_checkpoint(copy)))
    code, output = run("push", copy, "someone/tiny", "--dry-run")
    assert code == 0 and "would push" in output and "model.safetensors" in output
    code, output = run("push", copy, "someone/tiny", "--private", "--message", "First", "--shard-size", "300KB")
    assert code == 0 and f"{hub.endpoint}/someone/tiny/commit/" in output
    assert hub.read_repo("someone/tiny")["private"]
    code, output = run("push", copy, "someone/tiny", "--create-pr")
    assert code == 0 and "/discussions/1" in output
    code, output = run("info", "someone/tiny", "--json")
    assert code == 0 and json.loads(output)["chat_template"] == "chatml"
    code, output = run("pull", "someone/tiny", "--output", copy.parent / "pulled", "--revision", "refs/pr/1")
    assert code == 0 and (copy.parent / "pulled" / "model.safetensors").is_file()
    code, output = run("doctor", copy.parent / "pulled")
    assert code == 0, output
    (copy / "helper.py").touch()
    code, output = run("doctor", copy)
    assert code == 1 and "wrong  code files" in output and "error: 1 of 11 checks" in output
    monkeypatch.delenv("HF_TOKEN")
    code, output = run("info", "someone/tiny")
    assert code == 3 and output.splitlines()[-1].startswith("error: looking at someone/tiny failed: HTTP 401")


def test_doctor_in_a_process_of_its_own(tmp_path):
    """Nothing has registered the classes there, and no one is at the terminal to be asked about the code files."""
    folder = save_tiny_checkpoint(tmp_path / "tiny")
    command = [str(Path(sys.executable).parent / "convllava"), "doctor", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("ok ") == len(done.stdout.splitlines()) == 11
