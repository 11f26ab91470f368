"""Conversion of a released checkpoint: weights, report, tokenizer, processor, and repositories on the Hub."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest
import torch
from safetensors.torch import load_file
from tiny_sources import edit_json, list_hidden
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, GenerationConfig

import convllava_hf
from convllava_hf import ConvLlavaConfig
from convllava_hf.checkpoints.staging import MANIFEST
from convllava_hf.checkpoints.weight_maps import CONVLLAVA, ConversionError
from convllava_hf.conversion.convert import convert_checkpoint


def test_weights_are_those_of_the_sources_bit_by_bit(done, released):
    written = load_file(done.output / "model.safetensors")
    language = {}
    for path in sorted((released / "llm").glob("*.bin")):
        language |= torch.load(path, weights_only=True)
    tower = torch.load(released / "vision" / "pytorch_model.bin", weights_only=True)
    for name, tensor in language.items():
        target = written.pop(CONVLLAVA.rename(name))
        assert target.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(target[: len(tensor)], tensor)
        assert len(target) == (1024 if len(tensor) == 1000 else len(tensor))
    for name, tensor in tower.items():
        assert torch.equal(written.pop(f"model.vision_tower.{name}"), tensor)
    assert not written


def test_report_accounts_for_everything(done, released):
    content = json.loads((done.output / "conversion_report.json").read_text())
    assert content == json.loads(json.dumps(done.content))
    assert content["counts"] == {
        "read": 108,
        "renamed": 106,
        "extended": 2,
        "dropped": 0,
        "initialised": 0,
        "written": 108,
    }
    assert content["vocabulary"] == {
        "rows_before": 1000,
        "rows_after": 1024,
        "added": {"<image>": 1000, "<pad>": 1001},
    }
    for source, folder in zip(content["sources"], ("llm", "vision"), strict=True):
        assert {file["name"] for file in source["files"]} == {path.name for path in released.glob(f"{folder}/*.bin")}
        for file in source["files"]:
            data = (released / folder / file["name"]).read_bytes()
            assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    (file,) = content["files"]
    assert file["sha256"] == hashlib.sha256((done.output / file["name"]).read_bytes()).hexdigest()
    records = {record["name"]: record for record in content["tensors"]}
    assert len(records) == 108
    assert records["lm_head.weight"] == {
        "action": "extended",
        "source": "language model",
        "name": "lm_head.weight",
        "file": "pytorch_model-00002-of-00002.bin",
        "dtype": "bfloat16",
        "target": "lm_head.weight",
        "shape": [1024, 64],
        "target_dtype": "bfloat16",
    }
    assert 50e6 < content["peak_memory_bytes"] < 50e9


def test_summary_names_what_matters(done):
    summary = done.summary()
    for text in ("llm", "vision", "106 renamed", "1000 -> 1024 rows", "<image> = 1000", "GB of memory at the peak"):
        assert text in summary
    assert str(done.output) in summary


def test_output_holds_what_loading_needs_and_no_local_path(done, released):
    names = {path.name for path in done.output.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
    package = Path(convllava_hf.__file__).parent / "model"
    for name in ("configuration", "image_processing", "modeling", "processing"):
        code = f"{name}_convllava.py"
        assert (done.output / code).read_text() == (package / code).read_text()
    for path in done.output.iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text()
            assert str(released) not in text and str(done.output.parent) not in text, path.name
    assert list_hidden(done.output.parent) == []


def test_configuration(done):
    config = ConvLlavaConfig.from_pretrained(done.output)
    assert config.vision_config.hidden_sizes == [8, 16, 24, 32, 40]
    assert config.vision_config.depths == [1, 1, 2, 1, 2]
    assert config.projector_type == "mlp2x_gelu"
    assert (config.text_config.rms_norm_eps, config.text_config.vocab_size, config.vocab_padding) == (1e-5, 1024, 22)
    assert (config.image_token_id, config.text_config.pad_token_id, config.text_config.eos_token_id) == (1000, 1001, 2)
    assert config.dtype == torch.bfloat16
    assert config.num_image_tokens(128, 128) == 4
    assert config.text_config.use_cache is True


def test_generation_config_bounds_answers_without_warnings(done):
    generation = GenerationConfig.from_pretrained(done.output)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 1001, 1)
    assert generation.max_new_tokens == 1024
    assert generation.suppress_tokens == [1000]  # <image>
    assert "max_length" not in json.loads((done.output / "generation_config.json").read_text())
    assert not generation.do_sample


@pytest.mark.parametrize(
    "load", [AutoTokenizer.from_pretrained, lambda path: AutoProcessor.from_pretrained(path).tokenizer]
)
def test_tokenizer_reloads_with_the_original_ids(done, released, load):
    tokenizer = load(done.output)
    expected = json.loads((released / "expected.json").read_text())["tokenizer"]["strings"]
    checked = 0
    for entry in expected:
        # A leading space is the processor's work (see get_text_with_replacements); "<image>" is a token now.
        if "<image>" not in entry["text"] and not entry["text"].startswith((" ", "\u2581")):
            assert tokenizer(entry["text"])["input_ids"] == entry["tokenizer_input_ids"], entry["text"]
            checked += 1
    assert checked == 15
    assert (tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id, len(tokenizer)) == (1000, 1001, 1002)
    assert (tokenizer.pad_token, tokenizer.padding_side, tokenizer.model_max_length) == ("<pad>", "left", 2048)
    assert {"<image>", "<pad>"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.decode(tokenizer("a<image>b")["input_ids"], skip_special_tokens=True) == "ab"


def test_image_processor_is_the_towers(done):
    processor = AutoImageProcessor.from_pretrained(done.output)
    assert dict(processor.size) == {"height": 128, "width": 128}
    assert (processor.image_aspect_ratio, processor.downsampling_factor, int(processor.resample)) == ("pad", 64, 3)
    assert list(processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]


def test_converting_twice_gives_the_same_files(done, released, tmp_path):
    again = convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision")
    names = sorted(path.name for path in done.output.iterdir())
    assert names == sorted(path.name for path in again.output.iterdir())
    for name in names:
        if name not in ("conversion_report.json", MANIFEST):  # the report holds the time and the memory that it took
            assert (done.output / name).read_bytes() == (again.output / name).read_bytes(), name


def test_shards_are_bounded_and_load_like_one_file(done, released, tmp_path):
    report = convert_checkpoint(
        released / "llm", tmp_path / "model", vision_tower=released / "vision", max_shard_size="150KB"
    )
    names = [file["name"] for file in report.content["files"]]
    assert names == [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    assert len(names) >= 5
    index = json.loads((report.output / "model.safetensors.index.json").read_text())
    whole = load_file(done.output / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for name in names:
        shard = load_file(report.output / name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 150_000
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(shard)
    model = AutoModelForImageTextToText.from_pretrained(report.output)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(done, released, tmp_path, dtype):
    report = convert_checkpoint(released / "llm", tmp_path / "model", vision_tower=released / "vision", dtype=dtype)
    wanted = getattr(torch, dtype)
    stored = load_file(done.output / "model.safetensors")
    for name, tensor in load_file(report.output / "model.safetensors").items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor[:1000], stored[name][:1000].to(wanted))
    assert AutoModelForImageTextToText.from_pretrained(report.output, dtype="auto").dtype == wanted


def test_missing_tower(broken):
    with pytest.raises(ConversionError, match=r"'ConvLLaVA/ConvLLaVA-ConvNeXt-tiny'.*Pass --vision-tower"):
        convert_checkpoint(broken / "llm", broken / "output")
    with pytest.raises(ConversionError, match=r"no folder '/does/not/exist'.*Pass --vision-tower"):
        convert_checkpoint(broken / "llm", broken / "output", vision_tower="/does/not/exist")
    edit_json(broken / "llm/config.json", mm_vision_tower=str(broken / "vision"))
    assert convert_checkpoint(broken / "llm", broken / "output").content["counts"]["written"] == 108


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'; expected one of auto, float32"),
        ({"max_shard_size": "five"}, "size 'five'"),
        ({"max_shard_size": 0}, "size 0"),
        ({"revision": "main"}, "revision 'main' needs a Hub id"),
        ({"source": "vision"}, "'mm_vision_tower'.*--vision-tower"),
    ],
)
def test_bad_arguments(released, tmp_path, options, message):
    source = released / options.pop("source", "llm")
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(source, tmp_path / "output", vision_tower=released / "vision", **options)
    assert list(tmp_path.iterdir()) == []


def test_converted_checkpoints_are_not_converted_again(done, tmp_path):
    with pytest.raises(ConversionError, match="'convllava'"):
        convert_checkpoint(done.output, tmp_path / "output")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as listing and downloading two repositories takes."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, Path]
    fetched: set[str]

    def answer(self, code: int, body: bytes = b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        is_api = path[:2] == ["api", "models"]
        name = "/".join(path[2:4] if is_api else path[:2])
        if name not in self.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        commit = hashlib.sha1(name.encode()).hexdigest()
        files = {path.name: path for path in sorted(self.repositories[name].iterdir())}
        if is_api and path[4:5] == ["tree"]:
            answer = [{"type": "file", "path": f, "size": p.stat().st_size, "oid": "0" * 40} for f, p in files.items()]
            return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        if is_api:
            answer = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        data = files[path[-1]].read_bytes()
        self.fetched.add(path[-1])
        self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(released, tmp_path, monkeypatch):
    """A Hub on this machine with the reference checkpoint; yields the names of the files that were fetched."""
    shutil.copytree(released / "llm", tmp_path / "hub")
    (tmp_path / "hub" / "training_args.bin").write_text("not needed")
    Hub.repositories = {"ConvLLaVA/tiny": tmp_path / "hub", "ConvLLaVA/ConvLLaVA-ConvNeXt-tiny": released / "vision"}
    Hub.fetched = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("ENDPOINT", endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield Hub.fetched
    server.shutdown()


def test_hub_ids(hub, tmp_path, monkeypatch):
    """Both repositories come from the Hub: what is needed is fetched, and the commits are recorded."""
    report = convert_checkpoint("ConvLLaVA/tiny", tmp_path / "model", revision="v1")
    names = ["ConvLLaVA/tiny", "ConvLLaVA/ConvLLaVA-ConvNeXt-tiny"]
    commits = [hashlib.sha1(name.encode()).hexdigest() for name in names]
    assert [(source["name"], source["revision"]) for source in report.content["sources"]] == list(
        zip(names, commits, strict=True)
    )
    card = (report.output / "README.md").read_text()
    assert "base_model:\n- ConvLLaVA/tiny\n- ConvLLaVA/ConvLLaVA-ConvNeXt-tiny" in card
    assert all(commit in card for commit in commits)
    assert hub >= {"pytorch_model-00001-of-00002.bin", "tokenizer.model", "preprocessor_config.json"}
    assert "training_args.bin" not in hub

    with pytest.raises(ConversionError, match=r"'ConvLLaVA/absent' is no folder .* Pass a Hub id or a folder\.$"):
        convert_checkpoint("ConvLLaVA/absent", tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = convert_checkpoint("ConvLLaVA/tiny", tmp_path / "again", revision=commits[0])
    assert again.content["sources"][0]["revision"] == commits[0]
