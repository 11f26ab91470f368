"""Push a checkpoint to the Hub in one commit.

Files are sent first and published afterwards, by one commit: an interrupted push leaves the repository as it was, and
the next one sends only what has not arrived. (huggingface_hub's `upload_folder` and `upload_large_folder` are resumable
as well, but publish a folder that takes long in several commits: for a time a model lacks some of its shards.)
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from safetensors import safe_open

from ..checkpoints.cards import build_folder_card, fill_repo_id, has_trainer_card
from ..checkpoints.code_files import HUB_FOLDER, find_foreign_code, list_code_files
from ..checkpoints.reading import CheckpointReader, describe_file, hash_file
from ..checkpoints.staging import stage_output
from ..checkpoints.writing import TensorToWrite, parse_size, write_checkpoint
from .client import HubError, explain_errors, find_secret, list_remote


# What belongs to a checkpoint; logs, optimizer states, pickles and hidden files stay at home.
PUBLISHED = (
    *("*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt", "*.md", "*.yaml", "training_curve.png"),
    *("LICENSE*", "NOTICE*"),
)


NOT_PUBLISHED = ("trainer_state.json", ".*")


# Weights and code of an earlier push, which would be mixed with the new ones.
REPLACED = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "*.py")


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


def describe_files(report: Path, weights: Path) -> bytes:
    """A conversion report with other weight files in it."""
    content = json.loads(report.read_text(encoding="utf-8"))
    content["files"] = [describe_file(path) for path in sorted(weights.glob("*.safetensors"))]
    return (json.dumps(content, indent=1) + "\n").encode()


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
    files |= {name: HUB_FOLDER / name for name, state in code.items() if state == "missing"}
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


def differs(file: Path | bytes, remote) -> bool:
    """Whether a file is another than that on the Hub, told by size and hash."""
    if remote.size != (len(file) if isinstance(file, bytes) else file.stat().st_size):
        return True
    if remote.lfs is not None and isinstance(file, Path):
        return hash_file(file) != remote.lfs.sha256
    content = file if isinstance(file, bytes) else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != remote.blob_id  # the id that git gives it
