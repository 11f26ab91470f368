"""Exports say what their checkpoint says, answer through every way in, and are refused or undone whole."""

import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.export import run as running
from convllava_hf.export.agreement import Agreement, generate_greedily, make_probes
from convllava_hf.export.run import export_checkpoint
from convllava_hf.inference.answer import answer
from convllava_hf.inference.load import load
from convllava_hf.inference.runtime import GRAPHS, load_export
from convllava_hf.registration import register


needs_exporters = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="exporting needs the exporters of transformers 5.23"
)

# Tracing takes as long as the machine is busy.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="session")
def exported(converted, tmp_path_factory):
    """Exports the ConvLLaVA reference once per target and quantisation."""
    register()
    done = {}

    def export(target, quantize=None):
        for package in ("onnxscript", "onnxruntime") if target in ("onnx", "web") else ("openvino", "nncf"):
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
@pytest.mark.parametrize("target", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
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
        for aspect_ratio in ("pad", "native"):
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
@pytest.mark.parametrize("family", ["llava_v1_5", "llava_v0_delta", "tinyllava"])
def test_the_llava_family_goes_too(convert_family, family, tmp_path):
    pytest.importorskip("onnxscript")
    report = export_checkpoint(convert_family(family), "onnx", tmp_path / "out")
    assert report.agreement.equal_tokens == report.agreement.tokens


@needs_exporters
def test_images_that_do_not_match_their_placeholders_are_refused(exported):
    model, processor = load_export(exported("onnx").output, "onnx")
    inputs = make_probes(model, processor)[0]
    with pytest.raises(ValueError, match="placeholders with id"):
        model(**inputs | {"input_ids": inputs["input_ids"][:, :-20]})


@needs_exporters
def test_an_export_that_says_something_else_is_thrown_away(converted, tmp_path, monkeypatch):
    """The comparison is what stands between a broken graph and its name."""
    pytest.importorskip("onnxscript")

    def write_nothing(parts, folder, runtime, quantize):
        return {}

    monkeypatch.setattr(running, "write_graphs", write_nothing)
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
        ("tflite", None, "'tflite' is unknown; expected one of onnx, openvino, web, gguf"),
        ("executorch", None, "'executorch' is not supported"),
        ("onnx", "int2", "int2.*expected int8 or int4"),
        ("gguf", "int8", "llama-quantize"),
    ],
)
def test_unknown_ways_are_refused_before_anything_is_loaded(target, quantize, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        export_checkpoint(tmp_path / "no checkpoint", target, tmp_path / "out", quantize)


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
    with pytest.raises(ValueError, match="no export.json.*convllava export"):
        load(converted, runtime="onnx")
    with pytest.raises(ValueError, match="expected 'onnx' or 'openvino'"):
        load(converted, runtime="tensorrt")
    with pytest.raises(ValueError, match="do not go with runtime"):
        load(converted, runtime="onnx", quantize="4bit")
    with pytest.raises(ValueError, match="runs on the CPU"):
        load(converted, runtime="onnx", device="cuda")


@needs_exporters
def test_a_missing_graph_is_named(exported, tmp_path):
    shutil.copytree(exported("onnx").output, tmp_path / "out")
    (tmp_path / "out" / "onnx" / "vision_encoder.onnx").unlink()
    with pytest.raises(ValueError, match="lacks onnx/vision_encoder.onnx"):
        load(tmp_path / "out", runtime="onnx")
