"""Push and pull against a small Hub on loopback, through huggingface_hub's real client.

The processes that must not have the package, or must be offline, are processes of their own.
"""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import READ_TOKEN, WRITE_TOKEN, Fault, HubServer
from huggingface_hub import constants
from tiny_sources import edit_json
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from typer.testing import CliRunner

from convllava_hf.checkpoints.code_files import HUB_FILES
from convllava_hf.checkpoints.reading import CheckpointReader
from convllava_hf.checkpoints.staging import MANIFEST
from convllava_hf.checkpoints.weight_maps import ConversionError
from convllava_hf.cli.app import app
from convllava_hf.hub.client import HubError, describe_error
from convllava_hf.hub.doctor import check_checkpoint
from convllava_hf.hub.pull import pull_checkpoint
from convllava_hf.hub.push import push_checkpoint


REPO = "someone/tiny"
HUB_FOLDER = Path(sys.modules["convllava_hf"].__file__).parent / "model"
COMMIT = r"/api/models/.*/commit/.*"


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def hash_tensors(folder: Path) -> dict[str, str]:
    reader = CheckpointReader(folder)
    return {name: hashlib.sha256(reader.read(name).numpy().tobytes()).hexdigest() for name in reader.tensors}


def load(folder: Path) -> tuple:
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def list_titles(hub: HubServer) -> list[str]:
    return [commit["title"] for commit in hub.read_repo(REPO)["commits"].values()]


# ---- what arrives is what was sent


def test_push_and_pull_give_the_same_files_by_one_commit(hub, checkpoint, tmp_path):
    report = push_checkpoint(checkpoint, REPO)
    assert report.url.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert list_titles(hub) == ["initial commit", "Upload tiny"]
    for folder in (pull_checkpoint(REPO), pull_checkpoint(REPO, tmp_path / "out")):
        pulled = read_folder(folder)
        assert REPO.encode() in pulled.pop("README.md")
        del pulled[".gitattributes"]
        pulled.pop(MANIFEST, None)
        assert pulled == read_folder(checkpoint)
    assert {path.name for path in tmp_path.iterdir()} == {"server", "cache", "out"}, "something was left behind"


LOAD_AND_ANSWER = """
import hashlib, json, sys
sys.modules["convllava_hf"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

source, revision = sys.argv[1:]
options = {"trust_remote_code": True, "revision": revision} if revision else {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(source, **options)
processor = AutoProcessor.from_pretrained(source, **options)
image = torch.arange(3 * 96 * 160).reshape(3, 96, 160).remainder(251).byte()
inputs = processor(text="a<image>b", images=image, return_tensors="pt")
logits = model(**inputs).logits
config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
print(json.dumps({
    "module": type(model).__module__,
    "tensors": {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()},
    "config": config,
    "logits": hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest(),
}, sort_keys=True))
"""


@pytest.mark.slow
def test_other_machines_compute_the_same_without_the_package_and_offline(hub, checkpoint, tmp_path):
    pushed = push_checkpoint(checkpoint, REPO, shard_size="100KB")
    assert sum(name.endswith(".safetensors") for name in pushed.changes) > 2
    pinned = pushed.url.rsplit("/", 1)[-1]
    # A later commit breaks the model; who has pinned a revision does not notice.
    api = huggingface_hub.HfApi()
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, commit_message="breaks it")

    def answer(source: str, revision: str, **more: str) -> dict:
        # Each has caches of its own; the second one finds the first one's.
        environment = {**os.environ, **hub.environment(tmp_path / "other machine"), **more, "HF_TOKEN": READ_TOKEN}
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", LOAD_AND_ANSWER, source, revision]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert READ_TOKEN not in result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    online = answer(REPO, pinned)
    count = len(hub.requests)
    offline = answer(REPO, pinned, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == count, "a request was made offline"
    assert online == offline
    assert online["module"].startswith("transformers_modules.")

    import torch

    model, processor = load(checkpoint)
    image = torch.arange(3 * 96 * 160).reshape(3, 96, 160).remainder(251).byte()
    logits = model(**processor(text="a<image>b", images=image, return_tensors="pt")).logits.detach().numpy().tobytes()
    expected = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in model.state_dict().items()}
    assert online["tensors"] == expected
    config = json.loads(json.dumps(model.config.to_dict()))
    del config["_name_or_path"]
    assert online["config"] == config
    assert online["logits"] == hashlib.sha256(logits).hexdigest()


def test_revisions_can_be_pinned_and_stay_in_the_cache(hub, checkpoint, tmp_path, monkeypatch):
    first = push_checkpoint(checkpoint, REPO).url.rsplit("/", 1)[-1]
    huggingface_hub.HfApi().create_tag(REPO, tag="v1")
    huggingface_hub.HfApi().upload_file(path_or_fileobj=b"later", path_in_repo="later.txt", repo_id=REPO)
    for revision in (first, "v1"):
        assert pull_checkpoint(REPO, revision=revision).name == first
    assert (pull_checkpoint(REPO) / "later.txt").is_file()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull_checkpoint(REPO, revision="v1").name == first
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull_checkpoint("someone/other")


def test_other_shards_replace_those_of_an_earlier_push(hub, checkpoint):
    before = hash_tensors(checkpoint)
    for size in ("100KB", "250KB", None):
        report = push_checkpoint(checkpoint, REPO, shard_size=size)
        pulled = pull_checkpoint(REPO)
        assert hash_tensors(pulled) == before
        stored = {name for name in hub.list_files(REPO) if "safetensors" in name}
        kept = {name for name, (change, _) in report.changes.items() if change != "deleted"}
        assert stored == {name for name in kept if "safetensors" in name}
    assert stored == {"model.safetensors"}
    assert [path.name for path in checkpoint.parent.iterdir()] == ["tiny"]


def test_dry_run_lists_what_would_change_and_changes_nothing(hub, checkpoint, tmp_path):
    report = push_checkpoint(checkpoint, REPO, dry_run=True)
    assert {change for change, _ in report.changes.values()} == {"new"}
    assert report.changes["model.safetensors"][1] == (checkpoint / "model.safetensors").stat().st_size
    assert all(request.method == "GET" for request in hub.requests)
    push_checkpoint(checkpoint, REPO, shard_size="100KB")
    count = len(hub.read_repo(REPO)["commits"])
    changes = push_checkpoint(checkpoint, REPO, dry_run=True).changes
    assert changes["model.safetensors"][0] == "new" and changes["config.json"][0] == "unchanged"
    assert changes["model-00001-of-00007.safetensors"][0] == "deleted", changes
    text = push_checkpoint(checkpoint, REPO, dry_run=True).summary()
    assert "would push 1 file(s)" in text and f"{(checkpoint / 'model.safetensors').stat().st_size:,}" in text
    assert len(hub.read_repo(REPO)["commits"]) == count


def test_the_commands_report_in_json(hub, checkpoint, tmp_path):
    run = CliRunner().invoke
    planned = run(app, ["push", str(checkpoint), REPO, "--dry-run", "--json"])
    report = json.loads(planned.stdout)
    assert report["repo_id"] == REPO and report["url"] is None
    assert all(request.method == "GET" for request in hub.requests)
    assert {change["change"] for change in report["changes"]} == {"new"}
    pushed = json.loads(run(app, ["push", str(checkpoint), REPO, "--json"]).stdout)
    assert pushed["url"] and pushed["changes"] == report["changes"]
    pulled = run(app, ["pull", REPO, "--output", str(tmp_path / "there"), "--json"])
    assert json.loads(pulled.stdout) == {"output": str(tmp_path / "there"), "base": None}
    missing = run(app, ["pull", "someone/other", "--json"])
    assert missing.exit_code == 3 and missing.stdout == "" and "error: " in missing.stderr


def test_private_branch_pull_request_and_message(hub, checkpoint, monkeypatch):
    push_checkpoint(checkpoint, REPO, private=True, revision="draft", message="A draft")
    repo = hub.read_repo(REPO)
    assert repo["private"] and set(repo["refs"]) == {"main", "draft"}
    assert list_titles(hub)[-1] == "A draft" and "model.safetensors" not in hub.list_files(REPO)
    url = push_checkpoint(checkpoint, REPO, create_pr=True).url
    assert url.endswith("/discussions/1") and "model.safetensors" not in hub.list_files(REPO)
    assert pull_checkpoint(REPO, revision="refs/pr/1").is_dir()
    with pytest.raises(HubError, match="--create-pr .*'draft'"):
        push_checkpoint(checkpoint, REPO, create_pr=True, revision="draft")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="HTTP 401.*hf auth login"):
        pull_checkpoint(REPO, revision="draft")


def test_changes_of_others_repositories_can_be_proposed_only(hub, checkpoint):
    hub.make_repo("another/tiny")
    with pytest.raises(HubError, match="HTTP 403.*--create-pr"):
        push_checkpoint(checkpoint, "another/tiny")
    assert push_checkpoint(checkpoint, "another/tiny", create_pr=True).url.endswith("/discussions/1")
    assert set(hub.list_files("another/tiny")) == {".gitattributes"}
    assert "model.safetensors" in hub.list_files("another/tiny", "refs/pr/1")


# ---- what is published


def test_a_push_to_a_new_branch_leaves_no_weights_of_main_beside_the_new_ones(hub, checkpoint):
    push_checkpoint(checkpoint, REPO)
    planned = push_checkpoint(checkpoint, REPO, revision="shards", shard_size="250KB", dry_run=True)
    report = push_checkpoint(checkpoint, REPO, revision="shards", shard_size="250KB")
    assert planned.changes == report.changes and report.changes["model.safetensors"][0] == "deleted"
    stored = {name for name in hub.list_files(REPO, "shards") if "safetensors" in name}
    assert stored == {name for name, (change, _) in report.changes.items() if "safetensors" in name} - {
        "model.safetensors"
    }
    assert hash_tensors(pull_checkpoint(REPO, revision="shards")) == hash_tensors(checkpoint)
    assert "model.safetensors" in hub.list_files(REPO)


def test_code_of_others_stays_in_the_repository_unless_asked(hub, checkpoint, tmp_path):
    api = huggingface_hub.HfApi()
    push_checkpoint(checkpoint, REPO)
    for name in ("handler.py", "app.py"):
        api.upload_file(path_or_fileobj=b"import os", path_in_repo=name, repo_id=REPO)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "tiny"))
    (folder / "training_curves.png").write_bytes(b"\x89PNG")
    report = push_checkpoint(folder, REPO)
    assert report.other_code == ["app.py", "handler.py"] and "app.py, handler.py" in report.summary()
    assert {"app.py", "handler.py", "training_curves.png"} <= set(hub.list_files(REPO))
    report = push_checkpoint(folder, REPO, delete_other_code=True)
    assert {name for name in hub.list_files(REPO) if name.endswith(".py")} == set(HUB_FILES)
    sent = [request.path for request in hub.requests if "preupload" in request.path or "/lfs/objects" in request.path]
    count = len(sent)
    push_checkpoint(folder, REPO)
    sent = [request.path for request in hub.requests if "preupload" in request.path or "/lfs/objects" in request.path]
    assert len(sent) == count, "what has not changed was prepared for sending"


def test_published_code_is_the_packages_own(hub, copy):
    (copy / HUB_FILES[0]).unlink()
    push_checkpoint(copy, REPO)
    assert {name for name in hub.list_files(REPO) if name.endswith(".py")} == set(HUB_FILES)
    for name in HUB_FILES:
        assert hub.read_file(REPO, name) == (HUB_FOLDER / name).read_bytes()
    before = hub.read_repo(REPO)
    for name in (HUB_FILES[1], "helper.py"):
        (copy / name).write_text("import os\n")
        with pytest.raises(HubError, match=name):
            push_checkpoint(copy, REPO)
        (copy / name).unlink()
    assert hub.read_repo(REPO) == before


def test_what_is_no_part_of_a_checkpoint_stays_at_home(hub, copy):
    (copy / "checkpoint-2").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", ".env", "checkpoint-2/config.json"):
        (copy / name).write_text("{}")
    report = push_checkpoint(copy, REPO)
    left_out = [".env", "checkpoint-2/", "optimizer.pt", "trainer_state.json", "training_args.bin"]
    assert report.left_out == left_out and "left out: .env" in report.summary()
    assert not set(left_out) & set(hub.list_files(REPO))


def test_folders_that_are_no_checkpoint_are_refused_before_anything_is_sent(hub, checkpoint, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    with pytest.raises(HubError, match="config.json"):
        push_checkpoint(folder, REPO)
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(ConversionError, match="model.safetensors"):
        push_checkpoint(folder, REPO)
    import torch

    torch.save({"a": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(HubError, match=r"pytorch_model.bin"):
        push_checkpoint(folder, REPO)
    assert not hub.requests


@pytest.mark.parametrize(
    "metadata", ["license: no such", "model-index:\n- name: tiny", "license: [", "base_model: a b c"]
)
def test_cards_that_the_hub_refuses_are_named(hub, copy, metadata):
    (copy / "README.md").write_text(f"---\n{metadata}\n---\n# Tiny\n")
    with pytest.raises(HubError, match="README.md") as raised:
        push_checkpoint(copy, REPO)
    assert "\n" not in str(raised.value)
    assert hub.uploaded() == 0


def test_the_code_of_a_pushed_checkpoint_is_the_packages_own_and_no_other(hub, checkpoint, tmp_path):
    """Also where the repository held other code, and whatever the configurations name."""
    api, copy = huggingface_hub.HfApi(), tmp_path / "tiny"
    api.create_repo(REPO)
    for name in ("handler.py", "model-variants/x.safetensors"):
        api.upload_file(path_or_fileobj=b"import os", path_in_repo=name, repo_id=REPO)
    push_checkpoint(checkpoint, REPO)
    assert "model-variants/x.safetensors" in api.list_repo_files(REPO)

    config = json.loads((checkpoint / "config.json").read_text())
    own = config.pop("auto_map")
    for name, auto_map, problem in (
        ("config.json", None, "no auto_map for AutoConfig and AutoModelForImageTextToText"),
        ("config.json", {**own, "AutoConfig": "someone/else--configuration_convllava.ConvLlavaConfig"}, "someone/else"),
        ("tokenizer_config.json", {"AutoTokenizer": ["tok.Tok", None]}, "'tok.Tok' as its AutoTokenizer"),
    ):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        edit_json(copy / name, auto_map=auto_map)
        with pytest.raises(HubError, match=problem):
            push_checkpoint(copy, REPO)
        assert any(problem in (check.problem or "") for check in check_checkpoint(copy))


def test_only_the_weights_that_are_loaded_are_pushed(hub, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "tiny")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "tiny", max_shard_size="100KB")
    assert any("two sets of weights" in (check.problem or "") for check in check_checkpoint(tmp_path / "tiny"))
    report = push_checkpoint(tmp_path / "tiny", REPO, dry_run=True)
    assert [name for name in report.changes if "safetensors" in name] == ["model.safetensors"]


def test_tokens_are_found_wherever_they_are(hub, checkpoint, tmp_path):
    secret = "hf_oauth_eyJhbGciOi.abc-def_0123456789"
    for name, text in (("notes.txt", f"token: {secret}"), ("notes.md", f"used: {os.environ['HF_TOKEN']}")):
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        shutil.copytree(checkpoint, tmp_path / "tiny")
        (tmp_path / "tiny" / name).write_text(text)
        with pytest.raises(HubError, match=name):
            push_checkpoint(tmp_path / "tiny", REPO)
    with pytest.raises(HubError, match="message .* Hugging Face token"):
        push_checkpoint(checkpoint, REPO, message=secret)
    assert not hub.uploaded()


def test_a_name_without_an_owner_is_ones_own(hub, checkpoint):
    report = push_checkpoint(checkpoint, REPO.split("/")[1])
    assert report.repo_id == REPO and "config.json" in huggingface_hub.HfApi().list_repo_files(REPO)


def test_a_proposal_of_nothing_says_so(hub, checkpoint):
    push_checkpoint(checkpoint, REPO)
    report = push_checkpoint(checkpoint, REPO, create_pr=True)
    assert report.url is None and report.summary().endswith(f"nothing to change in {REPO} at main")


def test_the_report_of_a_conversion_names_the_shards_that_are_pushed(hub, converted, tmp_path):
    push_checkpoint(converted, REPO, shard_size="100KB")
    pulled = pull_checkpoint(REPO, tmp_path / "out")
    assert len(list(pulled.glob("*.safetensors"))) > 1
    checks = check_checkpoint(pulled)
    assert "weight files have the hashes of conversion_report.json" in [check.name for check in checks]
    assert not any(check.problem for check in checks)


# ---- faults


def run_twice(action):
    """Old versions of huggingface_hub do not connect again by themselves after a drop; then the second run has to."""
    try:
        return action()
    except HubError as error:
        assert "Check the connection" in str(error)
        return action()


def test_a_connection_that_drops_while_a_file_is_sent(hub, checkpoint):
    hub.faults.append(Fault("PUT", "/lfs/.*", drop_after=200_000))
    run_twice(lambda: push_checkpoint(checkpoint, REPO))
    size = (checkpoint / "model.safetensors").stat().st_size
    assert 200_000 + size <= hub.uploaded() < 2 * size
    assert hash_tensors(pull_checkpoint(REPO)) == hash_tensors(checkpoint)
    assert list_titles(hub) == ["initial commit", "Upload tiny"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("PUT", "/lfs/.*", status=403, skip=2), "HTTP 403"),
        (Fault("PUT", "/lfs/.*", corrupt=True, skip=2), "HTTP 400.*refused what was sent"),
        (Fault("POST", COMMIT, status=500), "HTTP 500.*The Hub has a fault"),
        (Fault("POST", COMMIT, status=412), "HTTP 412.*meanwhile"),
        (Fault("POST", COMMIT, drop_after=0), "Check the connection"),
        (Fault("POST", r"/api/repos/create", status=503), "HTTP 503"),
    ],
)
def test_a_push_that_fails_publishes_nothing_and_the_next_sends_the_rest(hub, checkpoint, fault, message):
    hub.faults.append(fault)
    with pytest.raises(HubError, match=f"^pushing to {REPO} failed: .*{message}") as raised:
        push_checkpoint(checkpoint, REPO, shard_size="100KB")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    if fault.path != r"/api/repos/create":
        assert list_titles(hub) == ["initial commit"] and set(hub.list_files(REPO)) == {".gitattributes"}
    arrived = {path.name for path in (hub.root / "objects").iterdir()}
    first = len(hub.requests)
    push_checkpoint(checkpoint, REPO, shard_size="100KB")
    sent = {request.path.rsplit("/", 1)[-1] for request in hub.requests[first:] if request.method == "PUT"}
    assert not sent & arrived
    assert len(sent | arrived) == sum(name.endswith(".safetensors") for name in hub.list_files(REPO))
    assert hash_tensors(pull_checkpoint(REPO)) == hash_tensors(checkpoint)


@pytest.mark.slow
def test_a_connection_that_keeps_dropping_ends_in_one_line(hub, checkpoint):
    hub.faults.append(Fault("PUT", "/lfs/.*", drop_after=100_000, times=1000))  # the client gives up after 6 tries
    with pytest.raises(HubError, match="Check the connection"):
        push_checkpoint(checkpoint, REPO)
    assert set(hub.list_files(REPO)) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "HTTP 401.*hf auth login"), ("hf_" + "x" * 34, "HTTP 401.*not valid"), (READ_TOKEN, "HTTP 403.*no right")],
)
def test_pushing_without_the_right_to(hub, checkpoint, monkeypatch, token, message):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message):
        push_checkpoint(checkpoint, REPO)
    assert not list((hub.root / "repos").iterdir())


def test_a_download_that_drops_goes_on_where_it_was(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # it keeps whole chunks, by default of 10 MB
    push_checkpoint(checkpoint, REPO)
    hub.faults.append(Fault("GET", "/cdn/.*", drop_after=200_000))
    assert hash_tensors(run_twice(lambda: pull_checkpoint(REPO))) == hash_tensors(checkpoint)
    ranges = [request.headers.get("range") for request in hub.requests if request.path.startswith("/cdn/")]
    assert any(value and not value.startswith("bytes=0-") for value in ranges), ranges


@pytest.mark.parametrize("to_folder", [False, True])
def test_what_is_damaged_on_its_way_is_not_kept(hub, checkpoint, tmp_path, to_folder):
    push_checkpoint(checkpoint, REPO)
    hub.faults.append(Fault("GET", "/cdn/.*", corrupt=True))
    output = tmp_path / "out" if to_folder else None
    with pytest.raises(HubError, match="model.safetensors .*[0-9a-f]{64}.*[0-9a-f]{64}"):
        pull_checkpoint(REPO, output)
    assert not (tmp_path / "out").exists()
    assert hash_tensors(pull_checkpoint(REPO, output)) == hash_tensors(checkpoint)


@pytest.mark.parametrize("to_folder", [False, True])
def test_a_full_disk_on_pull(hub, checkpoint, tmp_path, to_folder):
    push_checkpoint(checkpoint, REPO, shard_size="400KB")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = tmp_path / "out" if to_folder else None
    # No file may grow beyond this: the small files arrive and a shard does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises((HubError, ConversionError), match=os.strerror(errno.EFBIG)) as raised:
            pull_checkpoint(REPO, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    whole = {request.path for request in hub.requests if request.path.startswith("/cdn/") and request.sent < 300_000}
    first = len(hub.requests)
    assert hash_tensors(pull_checkpoint(REPO, output)) == hash_tensors(checkpoint)
    again = [request.path for request in hub.requests[first:] if request.path.startswith("/cdn/")]
    assert whole and not whole & set(again), "a file that had arrived was fetched again"


@pytest.mark.parametrize(("status", "message"), [(500, "HTTP 500"), (429, "HTTP 429.*pause")])
def test_a_hub_that_fails_on_pull(hub, checkpoint, tmp_path, status, message):
    push_checkpoint(checkpoint, REPO)
    hub.faults.append(Fault("GET", r"/api/models/.*", status=status, times=100))
    with pytest.raises(HubError, match=message) as raised:
        pull_checkpoint(REPO, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_names_that_do_not_exist(hub, checkpoint, tmp_path):
    with pytest.raises(HubError, match="someone/missing .*HTTP 404"):
        pull_checkpoint("someone/missing")
    with pytest.raises(HubError, match="a b c"):
        pull_checkpoint("a b c")
    push_checkpoint(checkpoint, REPO)
    with pytest.raises(HubError, match="HTTP 404.*revision"):
        pull_checkpoint(REPO, revision="nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ConversionError, match="out .*--force"):
        pull_checkpoint(REPO, tmp_path / "out")


# ---- tokens


def test_tokens_are_neither_printed_nor_written(hub, checkpoint, copy, tmp_path, capfd, caplog):
    caplog.set_level("DEBUG")
    push_checkpoint(checkpoint, REPO, private=True, token=WRITE_TOKEN)
    pull_checkpoint(REPO, tmp_path / "out", token=WRITE_TOKEN)
    pull_checkpoint(REPO)
    hub.faults.append(Fault("POST", COMMIT, status=403))
    (copy / "more.txt").write_text("more")
    with pytest.raises(HubError) as raised:
        push_checkpoint(copy, REPO, token=WRITE_TOKEN)
    printed = "".join(capfd.readouterr()) + caplog.text + str(raised.value)
    assert WRITE_TOKEN not in printed
    for folder in (tmp_path, checkpoint):
        for path in folder.rglob("*"):
            assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes(), path
    assert any(WRITE_TOKEN in request.headers.get("authorization", "") for request in hub.requests), "none was used"
    assert not any("authorization" in r.headers for r in hub.requests if r.path.startswith(("/cdn/", "/lfs/")))


def test_files_with_a_token_in_them_are_not_published(hub, copy):
    (copy / "notes.txt").write_text(f"export HF_TOKEN={READ_TOKEN}\n")
    with pytest.raises(HubError, match="notes.txt .*Hugging Face") as raised:
        push_checkpoint(copy, REPO)
    assert READ_TOKEN not in str(raised.value) and not hub.requests


def test_tokens_in_messages_of_others_are_blotted_out():
    text = describe_error(OSError(f"bad header Bearer {READ_TOKEN} and my-secret"), "pushing", ["my-secret", None])
    assert READ_TOKEN not in text and "my-secret" not in text and text.count("***") == 2


# ---- transformers' own ways


def test_push_to_hub_of_transformers(hub, checkpoint, tmp_path):
    model, processor = load(checkpoint)
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    for name in HUB_FILES:
        assert hub.read_file(REPO, name) == (HUB_FOLDER / name).read_bytes()
    pulled = pull_checkpoint(REPO)
    assert hash_tensors(pulled) == hash_tensors(checkpoint)
    assert json.loads((pulled / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    assert AutoProcessor.from_pretrained(REPO).chat_template == processor.chat_template


def test_push_to_hub_of_trainer(hub, checkpoint, tmp_path):
    model, processor = load(checkpoint)
    args = TrainingArguments(str(tmp_path / "run"), hub_model_id=REPO, report_to="none", use_cpu=True)
    Trainer(model, args, processing_class=processor).push_to_hub()
    pulled = pull_checkpoint(REPO)
    assert hash_tensors(pulled) == hash_tensors(checkpoint)
    assert {*HUB_FILES, "README.md", "chat_template.jinja", "generation_config.json"} <= set(hub.list_files(REPO))
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or WRITE_TOKEN.encode() not in path.read_bytes(), path
