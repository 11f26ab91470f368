"""Push a checkpoint to the Hub in one commit, and pull one, whole or not at all.

Files are sent first and published afterwards, by one commit: an interrupted push leaves the repository as it was, and
the next one sends only what has not arrived. (huggingface_hub's `upload_folder` and `upload_large_folder` are resumable
as well, but publish a folder that takes long in several commits: for a time a model lacks some of its shards.)
What is pulled is compared with the hashes that the Hub lists.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open

from .checkpoint_io import (
    NO_SPACE,
    CheckpointReader,
    TensorToWrite,
    check_output,
    describe_file,
    hash_file,
    parse_size,
    stage_output,
    write_checkpoint,
)
from .model_cards import build_folder_card, fill_repo_id, has_trainer_card
from .registration import find_foreign_code, list_code_files
from .weight_maps import ConversionError


# What belongs to a checkpoint; logs, optimizer states, pickles and hidden files stay at home.
PUBLISHED = (
    *("*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt", "*.md", "*.yaml", "training_curve.png"),
    *("LICENSE*", "NOTICE*"),
)
NOT_PUBLISHED = ("trainer_state.json", ".*")
# Weights and code of an earlier push, which would be mixed with the new ones.
REPLACED = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "*.py")
SECRET = re.compile(r"\bhf_(?:[A-Za-z0-9]{30,}|oauth_[\w.-]{20,})")  # an access token of the Hub
FIXES = {
    400: "The Hub refused what was sent. Run the same command again; if it stays, check the file on this disk.",
    401: "You are not logged in, or the token is not valid, or the repository is private. Run `hf auth login`, or set "
    "HF_TOKEN to a token with the right to do this.",
    403: "The token has no right to do this. Use one that has; ask for access on the page of a gated model; a change "
    "can be proposed with --create-pr.",
    404: "There is no such repository or revision, or you may not see it. Check the name.",
    409: "Somebody else is changing the repository. Run the same command again.",
    412: "Somebody else changed the repository meanwhile. Run the same command again.",
    429: "The Hub asks for a pause. Run the same command again in a few minutes.",
    500: "The Hub has a fault. Run the same command again later; what has arrived is not sent again.",
}


class HubError(ValueError):
    """What keeps a checkpoint from being pushed or pulled, in one line, without any token."""


@dataclass
class PushReport:
    """What a push did, or would do.

    Attributes:
        repo_id, revision: where to.
        url: of the commit or of the pull request; `None` for a dry run, and where nothing changes.
        changes: file -> (`"new"`, `"changed"`, `"unchanged"` or `"deleted"`, bytes).
        left_out: files of the folder that are not published.
    """

    repo_id: str
    revision: str
    url: str | None = None
    changes: dict[str, tuple[str, int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line per file and one for the whole."""
        lines = [f"  {change:9} {size:>15,}  {name}" for name, (change, size) in sorted(self.changes.items())]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        sizes = [size for change, size in self.changes.values() if change in ("new", "changed")]
        total = f"{len(sizes)} file(s), {sum(sizes) / 1e9:.3f} GB, to {self.repo_id} at {self.revision}"
        if all(change == "unchanged" for change, _ in self.changes.values()):
            done = f"nothing to change in {self.repo_id} at {self.revision}"
        else:
            done = f"pushed {total}: {self.url}" if self.url else f"would push {total}"
        return "\n".join([*lines, done])


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    shard_size: int | str | None = None,
    dry_run: bool = False,
    token: str | None = None,
) -> PushReport:
    """Publishes the folder of a checkpoint: weights, code, template, configurations and card, in one commit.

    A folder without a README.md, or with that of a trainer, gets a card. Code files that are missing are added, and
    weights that an earlier push left behind are deleted by the same commit.

    Args:
        folder: with safetensors, as `convert`, `train` or `save_pretrained` writes it.
        repo_id: `"owner/name"`, or a name of one's own; the repository is created if it is not there.
        private: visibility of a new repository. Default: the owner's.
        revision: branch, created if it is not there. Default: `"main"`.
        create_pr: open a pull request instead.
        message: title of the commit.
        shard_size: write the weights anew, in files of so many bytes or such as `"5GB"`, beside the folder. Default: as
            they are.
        dry_run: only find out what would change.
        token: of the Hub. Default: that of `hf auth login`.

    Returns:
        The report.

    Raises:
        HubError: the folder is incomplete or holds other code, or the Hub refuses. Nothing is published then.
        ConversionError: weights that cannot be read, or a full disk while they are written anew.
    """
    folder = Path(os.path.expanduser(folder)).resolve()
    if create_pr and revision is not None:
        raise HubError(
            f"--create-pr proposes a change of main, but the revision is {revision!r}. Leave one of them out."
        )
    size = None if shard_size is None else parse_size(shard_size)
    api = HfApi(token=token)
    if message and find_secret(message, token):
        raise HubError("the message holds an access token; nothing was sent. Revoke it if it is used.")
    with explain_errors(f"pushing to {repo_id}", token), shard_weights(folder, size) as weights:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        files, left_out = collect_files(folder, repo_id, token)
        if weights is not None:
            files = {name: file for name, file in files.items() if not fnmatch(name, "*.safetensors*")}
            files |= {path.name: path for path in sorted(weights.iterdir())}
            if "conversion_report.json" in files:
                files["conversion_report.json"] = describe_files(files["conversion_report.json"], weights)
        branch = revision or "main"
        report = PushReport(repo_id, branch, left_out=left_out)
        if not dry_run:
            api.create_repo(repo_id, private=private, exist_ok=True)
        parent, there = list_remote(api, repo_id, branch)
        for name, file in files.items():
            change = "new" if name not in there else "changed" if differs(file, there[name]) else "unchanged"
            report.changes[name] = (change, len(file) if isinstance(file, bytes) else file.stat().st_size)
        stale = [name for name in there if name not in files and "/" not in name]
        deleted = [name for name in stale if any(fnmatch(name, rule) for rule in REPLACED)]
        report.changes |= {name: ("deleted", there[name].size) for name in deleted}
        if dry_run or (parent and all(change == "unchanged" for change, _ in report.changes.values())):
            return report
        if parent is None and branch != "main":
            api.create_branch(repo_id, branch=branch)
        operations = [CommitOperationDelete(name) for name in deleted]
        operations += [CommitOperationAdd(name, file) for name, file in files.items()]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or f"Upload {folder.name}",
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent,
        )
        report.url = commit.pr_url or commit.commit_url
    return report


def pull_checkpoint(
    repo_id: str,
    output: str | Path | None = None,
    revision: str | None = None,
    *,
    force: bool = False,
    token: str | None = None,
) -> Path:
    """Fetches a checkpoint and compares every file with the hash that the Hub lists.

    Args:
        repo_id: `"owner/name"`.
        output: folder to make. Default: the cache, where `from_pretrained(repo_id)` finds it, also offline.
        revision: branch, tag or commit.
        force: replace a model that is at `output`.
        token: of the Hub. Default: that of `hf auth login`.

    Returns:
        The folder.

    Raises:
        HubError: the Hub refuses, the connection breaks, the disk is full, or a file is damaged, which is then removed.
            The next call fetches what is missing.
        ConversionError: the same, of the folder `output`.
    """
    with explain_errors(f"pulling {repo_id}", token):
        if output is None:
            folder = Path(snapshot_download(repo_id, revision=revision, token=token))
            if not is_offline_mode():
                check_hashes(repo_id, folder.name, folder, {}, token)
            return folder
        output = Path(os.path.expanduser(output)).resolve()
        check_output(output, force)
        commit, there = list_remote(HfApi(token=token), repo_id, revision or "main", must_exist=True)
        size = sum(entry.size for entry in there.values())
        with stage_output(output, size, force, resume=commit[:12]) as folder:
            snapshot_download(repo_id, revision=commit, local_dir=folder, token=token)
            check_hashes(repo_id, commit, folder, {"local_dir": folder}, token)
            shutil.rmtree(folder / ".cache", ignore_errors=True)  # bookkeeping of the download
        return output


def check_hashes(repo_id: str, commit: str, folder: Path, place: dict, token: str | None):
    """Compares files with the hashes that the Hub lists; `place` says where they are, for huggingface_hub."""
    result = HfApi(token=token).verify_repo_checksums(repo_id, revision=commit, token=token, **place)
    for wrong in result.mismatches:
        (folder / wrong["path"]).resolve().unlink(missing_ok=True)
        (folder / wrong["path"]).unlink(missing_ok=True)
    if result.missing_paths:
        raise HubError(f"{result.missing_paths[0]} did not arrive. Run the same command again.")
    if result.mismatches:
        first = result.mismatches[0]
        raise HubError(
            f"{first['path']} has the hash {first['actual']}; the Hub lists {first['expected']}. It was damaged on its "
            "way or on this disk and is removed; run the same command again."
        )


def describe_files(report: Path, weights: Path) -> bytes:
    """A conversion report with other weight files in it."""
    content = json.loads(report.read_text(encoding="utf-8"))
    content["files"] = [describe_file(path) for path in sorted(weights.glob("*.safetensors"))]
    return (json.dumps(content, indent=1) + "\n").encode()


def find_secret(text: str, token: str | None) -> bool:
    """Whether a text holds what looks like an access token, or the one that is used."""
    used = [known.strip() for known in (token, get_token()) if known and len(known.strip()) > 8]
    return bool(SECRET.search(text)) or any(known in text for known in used)


def collect_files(folder: Path, repo_id: str, token: str | None = None) -> tuple[dict[str, Path | bytes], list[str]]:
    """Chooses what to publish of a folder.

    Args:
        folder: of the checkpoint.
        repo_id: for the card.
        token: that must not be in any file, beside all that look like one.

    Returns:
        File name -> path, or content where it is not the folder's; and the names of what is left out.

    Raises:
        HubError: it is no checkpoint, its weights are no safetensors, or it holds code that is not this package's, an
            access token, or a card that cannot be read.
        ConversionError: weights are missing or damaged.
    """
    if not (folder / "config.json").is_file():
        raise HubError(f"{folder} has no config.json; expected the folder of a checkpoint. Pass another folder.")
    reader = CheckpointReader(folder)
    if pickles := [path.name for path in reader.files if path.suffix != ".safetensors"]:
        raise HubError(
            f"{folder} holds its weights in {pickles[0]}, a pickle; only safetensors are pushed. Load and save it with "
            "save_pretrained, or use `convllava convert`."
        )
    files, left_out = {}, []
    for path in sorted(folder.iterdir()):
        wanted = any(fnmatch(path.name, rule) for rule in PUBLISHED)
        wanted = wanted and (path.suffix != ".safetensors" or path in reader.files)  # no other set of weights
        is_single = (folder / "model.safetensors").is_file()
        wanted = wanted and not (is_single and path.name == "model.safetensors.index.json")
        if path.is_file() and wanted and not any(fnmatch(path.name, rule) for rule in NOT_PUBLISHED):
            files[path.name] = path
        else:
            left_out.append(path.name + "/" * path.is_dir())
    for name, path in files.items():
        if name.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                text = json.dumps(file.metadata() or {})
        else:
            text = "" if name.endswith((".model", ".png")) else path.read_text("utf-8", "replace")
        if find_secret(text, token):
            raise HubError(
                f"{path} holds an access token; nothing was sent. Remove it there, and revoke it if it is used."
            )
    code = list_code_files(folder)
    if changed := [name for name, state in code.items() if state in ("modified", "unknown")]:
        raise HubError(
            f"{folder / changed[0]} is not the file of this version of convllava-hf; only the package's own code is "
            "pushed. Delete it; push adds what the checkpoint needs."
        )
    if foreign := find_foreign_code(folder):
        raise HubError(f"{folder}: {foreign}. Only the package's own code is pushed; save the model again.")
    files |= {name: Path(__file__).with_name(name) for name, state in code.items() if state == "missing"}
    try:
        own = "README.md" in files and not has_trainer_card(folder)
    except yaml.YAMLError as error:
        raise HubError(describe_bad_card(error)) from error
    card = (folder / "README.md").read_text(encoding="utf-8") if own else build_folder_card(folder)
    filled = fill_repo_id(card, repo_id)
    try:
        ModelCard(filled)  # raises on metadata that cannot be read, before anything is sent
    except Exception as error:  # errors of YAML and of its content have no common base
        raise HubError(describe_bad_card(error)) from error
    if not own or filled != card:
        files["README.md"] = filled.encode()
    return files, left_out


def describe_bad_card(error: Exception) -> str:
    return f"the metadata of README.md cannot be read: {' '.join(str(error).split())} Correct the card."


@contextmanager
def shard_weights(folder: Path, shard_size: int | None) -> Iterator[Path | None]:
    """Writes the weights of a checkpoint anew, in other shards, into a folder that lasts as long as the block.

    Args:
        folder: of the checkpoint.
        shard_size: bytes per file. `None`: nothing is written.

    Yields:
        The folder with the weights, or `None`.
    """
    if shard_size is None:
        yield None
        return
    reader = CheckpointReader(folder)

    def load(name: str):
        return lambda: reader.read(name)

    tensors = [TensorToWrite(name, stored.shape, stored.dtype, load(name)) for name, stored in reader.tensors.items()]
    shards = folder.parent / f".{folder.name}.shards-{secrets.token_hex(4)}"
    with stage_output(shards, sum(tensor.num_bytes for tensor in tensors), force=False) as staging:
        write_checkpoint(staging, tensors, shard_size)
    try:
        yield shards
    finally:
        reader.close()
        shutil.rmtree(shards, ignore_errors=True)


def list_remote(api: HfApi, repo_id: str, revision: str, must_exist: bool = False) -> tuple[str | None, dict]:
    """The commit of a revision and its files by name; nothing, if it may be missing and is."""
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        return commit, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        if must_exist:
            raise
        return None, {}


def differs(file: Path | bytes, remote) -> bool:
    """Whether a file is another than that on the Hub, told by size and hash."""
    if remote.size != (len(file) if isinstance(file, bytes) else file.stat().st_size):
        return True
    if remote.lfs is not None and isinstance(file, Path):
        return hash_file(file) != remote.lfs.sha256
    content = file if isinstance(file, bytes) else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != remote.blob_id  # the id that git gives it


@contextmanager
def explain_errors(action: str, token: str | None) -> Iterator[None]:
    """Turns errors of the Hub, of the network and of the disk into a [`HubError`] that says what to do.

    Args:
        action: what is being done, for the message.
        token: what must not occur in a message, beside the token of this machine.
    """
    try:
        yield
    except (HubError, ConversionError):
        raise
    except Exception as error:  # errors of the Hub, of HTTP, of sockets and of the disk have no common base
        if not (isinstance(error, OSError | ValueError | RuntimeError) or is_connection_error(error)):
            raise  # a fault of ours
        raise HubError(describe_error(error, action, [token, get_token()])) from error


def is_connection_error(error: BaseException | None) -> bool:
    """Whether the network is to blame, for an error or for one that it came from."""
    while error is not None:
        client = type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "hf_xet"))
        if client or isinstance(error, ConnectionError | TimeoutError | LocalEntryNotFoundError):
            return True
        error = error.__cause__
    return False


def describe_error(error: Exception, action: str, tokens: list[str | None]) -> str:
    """One line about an error: its cause, and the way out."""
    cause, status, number = error, None, None
    # huggingface_hub says what is wrong with a card in an error that it makes of the Hub's.
    if str(error).startswith("Invalid metadata in README.md"):
        return f"{action} failed: {' '.join(str(error).split())}. Correct the card."
    while cause is not None and status is None and number is None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        number = getattr(cause, "errno", None)
        cause = cause.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if status is not None:
        fix = FIXES.get(status, FIXES[500] if status >= 500 else "")
        reason = f" ({error})" if isinstance(error, RuntimeError) else ""
        if said := getattr(error, "server_message", None):
            reason = f" ({' '.join(said.split())})"
        text = f"HTTP {status}{reason}. {fix}".strip()
    elif number in NO_SPACE:
        text = f"{os.strerror(number)}. Free some space and run the same command again; it goes on from there."
    elif is_offline_mode() and isinstance(error, ConnectionError | LocalEntryNotFoundError):
        text = "HF_HUB_OFFLINE is set, and this is not in the cache. Unset it, or pull once with a connection."
    elif is_connection_error(error):
        text = f"{text[:300].rstrip('.')}. Check the connection and run the same command again; it goes on from there."
    for secret in filter(None, tokens):
        text = text.replace(secret, "***").replace(secret.strip(), "***")
    return f"{action} failed: {SECRET.sub('***', text)}"
