"""Folders, repositories and endpoints that were made to harm: keys that leave, links, odd reports, odd answers."""

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import READ_TOKEN
from tiny_checkpoint import save_tiny_checkpoint
from tiny_sources import edit_json, edit_weights

from convllava_hf.hub.client import HubError, check_names, find_secret, guard_responses
from convllava_hf.hub.doctor import check_checkpoint
from convllava_hf.hub.info import describe_checkpoint
from convllava_hf.hub.pull import pull_checkpoint
from convllava_hf.hub.push import push_checkpoint
from convllava_hf.inference.load import load
from convllava_hf.registration import register


REPO = "someone/tiny"


def find_problems(folder: Path) -> dict[str, str]:
    return {check.name: check.problem for check in check_checkpoint(folder) if check.problem}


# ---- keys that would leave

LETTERS = "abcdefghijABCDEFGHIJ0123456789klmnopqrst"
KEYS = {
    "Hugging Face": "hf_" + LETTERS[:34],
    "AWS": "AKIA" + "IOSFODNN7EXAMPL2",
    "GitHub": "ghp_" + LETTERS[:36],
    "fine-grained GitHub": "github_pat_" + LETTERS + "_" + LETTERS,
    "OpenAI": "sk-proj-" + LETTERS,
    "old OpenAI": "sk-" + LETTERS + "12345678",
    "Anthropic": "sk-ant-api03-" + LETTERS,
    "Slack": "xoxb-" + LETTERS,
    "Google": "AIza" + LETTERS[:35],
    "GitLab": "glpat-" + LETTERS[:20],
    "Weights & Biases": "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "OpenAI service": "sk-svcacct-" + LETTERS,
    "OAuth of Hugging Face": "hf_oauth_" + LETTERS[:34],
    "temporary AWS": "ASIA" + "IOSFODNN7EXAMPL2",
    "Slack app": "xoxe.xoxp-1-" + LETTERS,
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "PEM private key": "-----BEGIN PRIVATE KEY-----",
    "PGP private key": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
}


@pytest.mark.parametrize("key", KEYS.values(), ids=list(KEYS))
def test_keys_are_found_however_they_are_written(key):
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in key)
    for content in (
        key,
        f"x{key}".encode(),
        f"token_{key}\n".encode(),
        json.dumps({"a": f"line\n{key}"}).encode(),
        f'"{escaped}"'.encode(),
        key.encode("utf-16"),
        key.encode("utf-16-be"),
        b"\x00" + key.encode("utf-16-le"),
        b"\x0a\x07\x80\xff" + key.encode() + b"\x00",
    ):
        assert find_secret(content, None), content


def test_what_belongs_to_checkpoints_is_no_key(checkpoint, converted):
    for path in [*checkpoint.iterdir(), *converted.iterdir()]:
        if path.suffix != ".safetensors":
            assert find_secret(path.read_bytes(), None) is None, path
    assert find_secret(b"convllava_hf_checkpoints sk-learn AKIA -----BEGIN CERTIFICATE-----", None) is None
    assert find_secret("my-own-secret-token", "my-own-secret-token")


def test_everything_that_is_sent_is_searched(hub, checkpoint, tmp_path):
    def put_text(folder):
        (folder / "notes.txt").write_bytes(f"key_{READ_TOKEN}".encode("utf-16"))

    def put_model(folder):
        (folder / "tokenizer.model").write_bytes(b"\x00\x01" + READ_TOKEN.encode())

    def put_image(folder):
        (folder / "training_curves.png").write_bytes(b"\x89PNG\x00tEXt" + READ_TOKEN.encode())

    def put_name(folder):
        edit_weights(folder / "model.safetensors", lambda weights: weights.update({READ_TOKEN: torch.zeros(1)}))

    for put in (put_text, put_model, put_image, put_name):
        folder = Path(shutil.copytree(checkpoint, tmp_path / put.__name__))
        put(folder)
        with pytest.raises(HubError, match="Hugging Face") as raised:
            push_checkpoint(folder, REPO)
        assert READ_TOKEN not in str(raised.value)
    assert not hub.requests


def test_links_out_of_the_folder_are_not_followed(hub, copy, tmp_path):
    (tmp_path / "private.txt").write_text("mine")
    (copy / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(HubError, match="notes.txt .*private.txt"):
        push_checkpoint(copy, REPO)
    assert not hub.requests
    (copy / "notes.txt").unlink()
    (copy / "notes.txt").symlink_to("config.json")
    push_checkpoint(copy, REPO, dry_run=True)


def test_a_folder_named_snapshots_opens_nothing_but_blobs(hub, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "home" / "snapshots" / "model"))
    (tmp_path / "home" / "private.txt").write_text("mine")
    (folder / "notes.txt").symlink_to("../../private.txt")
    with pytest.raises(HubError, match="notes.txt .*private.txt"):
        push_checkpoint(folder, REPO)
    (folder / "notes.txt").unlink()
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "a.txt").write_text("of another model")
    (folder / "notes.txt").symlink_to("../other/a.txt")
    with pytest.raises(HubError, match="notes.txt .*other"):
        push_checkpoint(folder, REPO)
    assert not hub.requests


def test_a_snapshot_of_the_cache_can_be_pushed(hub, checkpoint):
    """There every file is a link into the repository's folder of the cache."""
    push_checkpoint(checkpoint, REPO)
    assert push_checkpoint(pull_checkpoint(REPO), "someone/again").url


# ---- cards


def test_a_model_trained_on_local_data_can_be_pushed(hub, copy, tmp_path, monkeypatch):
    """TRL's card names a path, and a relative one that reads as somebody's Hub id, as data set and base."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = "---\nbase_model: out/stage2\ndatasets:\n- /tmp/private/samples\n- data/train\n- liuhaotian/LLaVA-Pretrain\n"
    card += "tags:\n- generated_from_trainer\n- trl\nlicense: apache-2.0\n---\n# x\n\n"
    card += "## How it was trained\n\n| recipe | r |\n"
    (copy / "README.md").write_text(card)
    (copy.parent / "out" / "stage2").mkdir(parents=True)
    push_checkpoint(copy, REPO)
    pushed = huggingface_hub.ModelCard(hub.read_file(REPO, "README.md").decode())
    assert pushed.data.datasets == ["liuhaotian/LLaVA-Pretrain"] and not pushed.data.base_model
    assert "the data `samples`, the data `train`, the model `stage2`" in pushed.text
    assert "/tmp/private" not in str(pushed) and "| recipe | r |" in pushed.text


def test_a_card_that_the_hub_refuses_leaves_no_repository(hub, copy):
    (copy / "README.md").write_text("---\nlicense: no such\n---\n# Tiny\n")
    with pytest.raises(HubError, match="README.md"):
        push_checkpoint(copy, REPO)
    assert not list((hub.root / "repos").rglob("*.json"))


# ---- what doctor and ask say


def test_weights_that_are_not_finite_are_named(copy):
    register()
    edit_weights(copy / "model.safetensors", lambda weights: weights["lm_head.weight"][3].fill_(float("nan")))
    assert "lm_head.weight" in find_problems(copy)["values are finite"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(copy, device="cpu")


@pytest.mark.parametrize(("written", "read"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_relabelled_dtypes_are_named(tmp_path, written, read):
    register()
    folder = save_tiny_checkpoint(tmp_path / "tiny", dtype=getattr(torch, written))
    what = "values are of the dtype that they are stored as"
    assert not find_problems(folder)

    def relabel(weights):
        for name, tensor in weights.items():
            weights[name] = (tensor * 0.1).view(getattr(torch, read))

    edit_weights(folder / "model.safetensors", relabel)
    assert f"config.json says {written}" in find_problems(folder)[what]
    edit_json(folder / "config.json", dtype=read)
    assert f"look like {written}" in find_problems(folder)[what]
    with pytest.raises(ValueError, match="another 16-bit dtype|not finite"):
        load(folder, device="cpu")


@pytest.mark.parametrize("report", ["[]", "[" * 10**5, '{"files": 3, "sources": "x"}', '{"files": [{"name": "../x"}]}'])
def test_an_odd_report_does_not_lose_the_other_checks(copy, report):
    before = {check.name for check in check_checkpoint(copy)}
    (copy / "conversion_report.json").write_text(report)
    problems = find_problems(copy)
    assert list(problems) == ["weight files have the hashes of conversion_report.json"]
    assert before < {check.name for check in check_checkpoint(copy)}


def test_doctor_bounds_what_a_configuration_asks_for(copy):
    config = json.loads((copy / "config.json").read_text())
    edit_json(copy / "config.json", text_config={**config["text_config"], "num_hidden_layers": 10**6})
    assert any("1000000" in problem for problem in find_problems(copy).values())


def test_doctor_bounds_templates(copy):
    (copy / "chat_template.jinja").write_text("{{ 'a' * 9999999999 }}")
    problems = find_problems(copy)
    assert "memory" in problems["chat template renders, with the right number of image tokens"]
    assert "memory" in problems["answers end in an end token"]


def test_pipes_as_weights_are_not_read(copy):
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors"):
        describe_checkpoint(copy)
    assert "has no weights" in find_problems(copy)["weight files are whole"]


def test_damaged_weights_are_one_line_when_a_model_is_loaded(copy):
    register()
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=re.escape(str(copy))) as raised:
        load(copy, device="cpu")
    assert "\n" not in str(raised.value)


def test_a_model_that_a_killed_run_took_away_is_mentioned(copy):
    copy.rename(copy.with_name(".tiny.replaced-0123"))
    with pytest.raises(FileNotFoundError, match=r"\.tiny\.replaced-0123"):
        load(copy)


# ---- endpoints


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "a//b", "./x", "a\0b"])
def test_names_that_lead_out_of_a_repository_are_refused(name):
    with pytest.raises(HubError, match=re.escape(repr(name))):
        check_names(["config.json", name])
    check_names(["config.json", "a/b.c", "..a", ".gitattributes"])


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({"etag": '"../../x"'}, "etag"),
        ({"x-linked-etag": '"..\\\\x"'}, "x-linked-etag"),
        ({"x-repo-commit": "../x"}, "x-repo-commit"),
        ({"link": '<https://elsewhere.example/api?cursor=2>; rel="next"'}, "elsewhere.example"),
        ({"link": '<http://127.0.0.1:1/api>; rel="next"'}, "another host"),
        ({"link": 'http://elsewhere.example/x; rel="next"'}, "elsewhere.example"),
        ({"link": '"//elsewhere.example/x"; rel=next'}, "elsewhere.example"),
        ({"x-xet-refresh-route": "http://elsewhere.example/x"}, "elsewhere.example"),
    ],
)
def test_answers_that_lead_astray_are_refused(hub, checkpoint, headers, problem, tmp_path, monkeypatch):
    """The endpoint sends such a header with every answer."""
    from hub_server import Handler

    push_checkpoint(checkpoint, REPO)
    send = Handler.send_content

    def send_more(self, content, status, other):
        send(self, content, status, {**other, **{name.title(): value for name, value in headers.items()}})

    monkeypatch.setattr(Handler, "send_content", send_more)
    for output in (None, tmp_path / "out"):
        with pytest.raises(HubError, match=re.escape(problem)):
            pull_checkpoint(REPO, output)
    with pytest.raises(HubError, match=re.escape(problem)):
        push_checkpoint(checkpoint, REPO)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("x*"))
    monkeypatch.undo()
    with guard_responses():
        pass  # and the client is as it was


def test_a_write_token_is_not_sent_where_the_endpoint_points(hub, checkpoint, monkeypatch):
    """huggingface_hub reports an upload, with the token, to the address that the endpoint names for it."""
    from hub_server import Handler

    answer = Handler.answer

    def answer_elsewhere(self, body, *rest, **more):
        for item in body.get("objects", []) if isinstance(body, dict) else []:
            if "actions" in item:
                item["actions"]["verify"]["href"] = f"http://localhost:{hub.port}/stolen"
        answer(self, body, *rest, **more)

    monkeypatch.setattr(Handler, "answer", answer_elsewhere)
    with pytest.raises(HubError, match="token .*localhost"):
        push_checkpoint(checkpoint, REPO)
    assert not [request for request in hub.requests if request.path.startswith("/stolen")]
    assert any(request.method == "PUT" for request in hub.requests)
