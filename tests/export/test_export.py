"""Exports say what their checkpoint says, answer through every way in, and are refused or undone whole."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import Lfm2Config, PaliGemmaConfig, pipeline
from transformers.image_utils import httpx
from typer.testing import CliRunner

from convllava_hf import ConvLlavaConfig
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.export import run as running
from convllava_hf.export.agreement import Agreement, generate_greedily, make_probes
from convllava_hf.export.graphs import TracedPart
from convllava_hf.export.run import export_checkpoint
from convllava_hf.export.write import write_graphs
from convllava_hf.inference.answer import answer
from convllava_hf.inference.load import load
from convllava_hf.inference.runtime import GRAPHS, load_export
from convllava_hf.registration import register


needs_exporters = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="exporting needs the exporters of transformers 5.23"
)

PACKAGES = {
    "onnx": ("onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "executorch": ("executorch",),
}
# Tracing takes as long as the machine is busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="session")
def exported(converted, tmp_path_factory):
    """Exports the ConvLLaVA reference once per target and quantisation."""
    register()
    done = {}

    def export(target, quantize=None):
        for package in PACKAGES[target]:
            pytest.importorskip(package)
        if (target, quantize) not in done:
            folder = tmp_path_factory.mktemp("export") / f"{target}-{quantize}"
            done[target, quantize] = export_checkpoint(converted, target, folder, quantize)
        return done[target, quantize]

    return export


@pytest.fixture(scope="session")
def before(converted):
    return load(converted, device="cpu", dtype="float32")


@needs_exporters
@pytest.mark.parametrize(
    "target",
    ["onnx", *(pytest.param(target, marks=pytest.mark.slow) for target in ("openvino", "executorch"))],
)
class TestRuntimes:
    def test_greedy_tokens_and_scores_are_the_checkpoints(self, exported, target):
        report = exported(target)
        assert report.agreement.equal_tokens == report.agreement.tokens == 48
        assert report.agreement.logit_difference < 1e-4
        assert set(report.sizes) == set(GRAPHS) and all(report.sizes.values())

    def test_the_folder_names_itself_and_holds_no_weights_of_torch(self, exported, target):
        folder = exported(target).output
        assert json.loads((folder / "export.json").read_text())["target"] == target
        assert not list(folder.rglob("*.safetensors"))

    def test_the_batch_is_named_as_transformers_js_expects(self, exported, target):
        if target == "onnx":
            model, _ = load(exported(target).output, runtime=target)
            assert model.graphs["decoder_model_merged"].inputs["past_key_values.0.key"][0] == "batch_size"

    def test_answers_are_the_checkpoints_at_other_sizes_than_the_traced_ones(self, exported, before, target):
        model, processor = load(exported(target).output, runtime=target)
        wide = Image.effect_mandelbrot((200, 70), (-2, -1, 1, 1), 50).convert("RGB")
        # ExecuTorch has memory for pictures up to the processor's size.
        for aspect_ratio in ("pad",) if target == "executorch" else ("pad", "native"):
            for instance in (processor, before[1]):
                instance.image_processor.image_aspect_ratio = aspect_ratio
            try:
                pictures = [wide, wide.rotate(90, expand=True)]
                given = [
                    answer(*each, "What is it?", pictures, max_new_tokens=8) for each in ((model, processor), before)
                ]
            finally:
                for instance in (processor, before[1]):
                    instance.image_processor.image_aspect_ratio = "pad"
            assert given[0] == given[1]

    def test_batches_beams_and_streams(self, exported, before, photo, target):
        model, processor = load(exported(target).output, runtime=target)
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": text}]}]
            for text in ("What is it?", "What is it, and which of its colours is the first one?")
        ]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"text_kwargs": {"padding": True, "padding_side": "left"}},
        )
        for settings in ({}, {"num_beams": 2}):
            outputs = [m.generate(**inputs, max_new_tokens=6, do_sample=False, **settings) for m in (model, before[0])]
            assert torch.equal(*outputs)
        stream = answer(model, processor, "What is it?", photo, max_new_tokens=6, stream=True)
        assert "".join(stream) == answer(*before, "What is it?", photo, max_new_tokens=6)

    def test_pipeline_takes_it(self, exported, photo, target):
        model, processor = load(exported(target).output, runtime=target)
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]}]
        assert isinstance(ask(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"], str)

    def test_ask_answers_from_it(self, exported, before, photo, target, tmp_path):
        photo.save(tmp_path / "photo.png")
        command = ["ask", str(tmp_path / "photo.png"), "What is it?", "-m", str(exported(target).output)]
        result = CliRunner().invoke(app, [*command, "--runtime", target, "--max-new-tokens", "6"])
        assert result.exit_code == 0
        assert result.stdout.strip() == answer(*before, "What is it?", photo, max_new_tokens=6)

    def test_chat_answers_from_it(self, exported, before, photo, target, tmp_path):
        photo.save(tmp_path / "photo.png")
        command = ["chat", str(tmp_path / "photo.png"), "-m", str(exported(target).output), "--runtime", target]
        result = CliRunner().invoke(app, [*command, "--max-new-tokens", "6"], input="What is it?\n")
        assert result.exit_code == 0
        assert result.stdout.strip() == answer(*before, "What is it?", photo, max_new_tokens=6)

    def test_batch_answers_from_it(self, exported, before, photo, target, tmp_path):
        """Through the engine that `serve` has: images are encoded apart, and rows of different lengths run together."""
        pictures = {"a.png": photo, "b.png": photo.rotate(90, expand=True), "c.png": photo.resize((32, 32))}
        (tmp_path / "photos").mkdir()
        for name, picture in pictures.items():
            picture.save(tmp_path / "photos" / name)
        command = ["batch", str(tmp_path / "photos"), "-q", "What is it?", "--max-new-tokens", "6"]
        command += ["-m", str(exported(target).output), "--runtime", target, "-o", str(tmp_path / "answers.jsonl")]
        assert CliRunner().invoke(app, command).exit_code == 0
        rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert {row["id"]: row["answer"] for row in rows} == {
            name: answer(*before, "What is it?", picture, max_new_tokens=6) for name, picture in pictures.items()
        }

    def test_eval_answers_from_it(self, exported, before, photo, target, tmp_path):
        rows, said = [], []
        for number, size in enumerate([(64, 96), (64, 96), (80, 40)]):
            photo.resize(size).save(tmp_path / f"{number}.png")
            rows.append({"question_id": number, "image": f"{number}.png", "text": f"What is {number}?", "answer": "x"})
            said.append(answer(*before, rows[-1]["text"], tmp_path / f"{number}.png", max_new_tokens=6))
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["eval", exported(target).output, "--runtime", target, "--task", "contains", "--max-new-tokens", 6]
        command += ["--questions", tmp_path / "questions.jsonl", "--images", tmp_path, "--output", tmp_path / "results"]
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
        lines = (tmp_path / "results" / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == said

    def test_serve_answers_from_it(self, exported, before, target, monkeypatch):
        """The command's own application; only the listening is left out."""
        from convllava_hf.serving import server

        replies = []

        async def ask(served):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://127.0.0.1") as client:
                body = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 6}
                replies.append((await client.post("/v1/chat/completions", json=body, timeout=120)).json())

        monkeypatch.setattr(server, "run_server", lambda served, host, port: asyncio.run(ask(served)))
        result = CliRunner().invoke(app, ["serve", str(exported(target).output), "--runtime", target])
        assert result.exit_code == 0, result.output
        given = replies[0]["choices"][0]["message"]["content"]
        assert given == answer(*before, "What is it?", max_new_tokens=6)


@needs_exporters
@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_exports_are_smaller_and_close(exported, target, quantize):
    report = exported(target, quantize)
    assert report.sizes["decoder_model_merged"] < exported(target).sizes["decoder_model_merged"]
    assert report.agreement.logit_difference < {"int8": 0.1, "int4": 0.5}[quantize]


@needs_exporters
@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "executorch"])
@pytest.mark.parametrize("family", ["llava_v1_5", "llava_v0_delta", "tinyllava"])
def test_the_llava_family_goes_too(convert_family, family, target, tmp_path):
    pytest.importorskip(PACKAGES[target][0])
    report = export_checkpoint(convert_family(family), target, tmp_path / "out")
    assert set(report.sizes) == set(GRAPHS)
    assert report.agreement.equal_tokens == report.agreement.tokens


@needs_exporters
def test_images_that_do_not_match_their_placeholders_are_refused(exported):
    model, processor = load_export(exported("onnx").output, "onnx")
    inputs = make_probes(model, processor)[0]
    with pytest.raises(ValueError, match=str(model.config.image_token_id)):
        model(**inputs | {"input_ids": inputs["input_ids"][:, :-20]})


@needs_exporters
def test_an_export_that_says_something_else_is_thrown_away(converted, tmp_path, monkeypatch):
    """The comparison is what stands between a broken graph and its name."""
    pytest.importorskip("onnxscript")

    monkeypatch.setattr(running, "write_graphs", lambda *arguments: {})
    monkeypatch.setattr(running, "load_export", lambda *args, **kwargs: (None, load(converted, device="cpu")[1]))
    monkeypatch.setattr(running, "compare", lambda *args: Agreement(48, 47, 0.1, 1.0, 1.0))
    register()
    with pytest.raises(ConversionError, match="47 of 48"):
        export_checkpoint(converted, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_comparing_notices_another_model(before):
    """The check itself can fail: weights that differ give other tokens or scores."""
    model, processor = before
    probe = make_probes(model, processor)[0]
    tokens, scores, _ = generate_greedily(model, probe)
    model.lm_head.weight.data.neg_()
    try:
        others, other_scores, _ = generate_greedily(model, probe)
    finally:
        model.lm_head.weight.data.neg_()
    assert tokens != others and not torch.allclose(scores, other_scores)


@pytest.mark.parametrize(
    ("target", "quantize", "message"),
    [
        ("tflite", None, "tflite.*onnx, openvino, executorch, web, gguf"),
        ("onnx", "int2", "int2.*int8.*int4"),
        ("executorch", "int8", "int8.*executorch"),
        ("gguf", "int8", "llama-quantize"),
    ],
)
def test_unknown_ways_are_refused_before_anything_is_loaded(target, quantize, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(tmp_path / "no checkpoint", target, tmp_path / "out", quantize)


@needs_exporters
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PaliGemmaConfig(), "paligemma.*convllava.*llava"),
        (
            ConvLlavaConfig(
                text_config=Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), image_token_id=3
            ),
            "lfm2",
        ),
    ],
)
def test_families_that_cannot_go_are_refused_before_weights_are_read(config, message, tmp_path):
    """There are no weights in the folder."""
    pytest.importorskip("onnxscript")
    register()
    config.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(tmp_path / "checkpoint", "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Unknown(torch.nn.Module):
    """Computes with an operator that no runtime has."""

    def forward(self, x):
        return torch.special.airy_ai(x)


@needs_exporters
@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_an_operator_that_the_runtime_lacks_is_named(runtime, tmp_path):
    pytest.importorskip(PACKAGES[runtime][0])
    part = TracedPart(Unknown(), {"x": torch.rand(2, 3)}, {"x": None})
    with pytest.raises(ConversionError, match=rf"vision_encoder.*{runtime}.*airy_ai"):
        write_graphs({"vision_encoder": part}, tmp_path / "out", runtime, None)


@needs_exporters
def test_the_command_reports_in_json(exported, converted, tmp_path, monkeypatch):
    """The report of a real export, which is not made a second time."""
    report = exported("onnx")
    monkeypatch.setattr(running, "export_checkpoint", lambda *_: report)
    command = ["export", str(converted), "--to", "onnx", "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["output"] == str(report.output) and told["sizes"] == report.sizes
    assert told["agreement"]["equal_tokens"] == told["agreement"]["tokens"] == 48


@needs_exporters
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export_leaves_nothing_under_the_name(converted, how, tmp_path):
    pytest.importorskip("onnxscript")
    command = [Path(sys.executable).with_name("convllava"), "export", converted, "--to", "onnx", "--output", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob(".out.incomplete-*/onnx/*.onnx")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=120)
    assert not (tmp_path / "out").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in said
        assert not list(tmp_path.iterdir())


@needs_exporters
@pytest.mark.parametrize("present", ["notes.txt", "config.json"])
def test_a_folder_that_is_no_export_is_never_replaced(converted, present, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / present).write_text("{}")
    with pytest.raises(ConversionError):
        export_checkpoint(converted, "onnx", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [present]


def test_what_is_no_export_is_refused_by_load(converted, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"export\.json.*--to onnx"):
        load(converted, runtime="onnx")
    with pytest.raises(ValueError, match="tensorrt.*'onnx', 'openvino'"):
        load(converted, runtime="tensorrt")
    with pytest.raises(ValueError, match="4bit.*onnx"):
        load(converted, runtime="onnx", quantize="4bit")
    with pytest.raises(ValueError, match="cuda.*onnx"):
        load(converted, runtime="onnx", device="cuda")


@needs_exporters
@pytest.mark.slow
def test_what_is_larger_than_the_memory_of_an_export_is_refused(exported):
    model, processor = load_export(exported("executorch").output, "executorch")
    side = model.graphs["vision_encoder"].inputs["pixel_values"][2]
    assert side == processor.image_processor.size["height"]
    with pytest.raises(ValueError, match=f"{side + 64}.*{side}"):
        model.get_image_features(torch.zeros(1, 3, side, side + 64))


@needs_exporters
def test_a_missing_graph_is_named(exported, tmp_path):
    shutil.copytree(exported("onnx").output, tmp_path / "out")
    (tmp_path / "out" / "onnx" / "vision_encoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"onnx/vision_encoder\.onnx"):
        load(tmp_path / "out", runtime="onnx")
