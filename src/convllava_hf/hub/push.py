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
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.hf_api import RepoFile
from safetensors import safe_open

from ..checkpoints.adapters import ADAPTER_CONFIG, is_adapter, read_adapter
from ..checkpoints.cards import build_folder_card, fill_repo_id, read_trainer_card, split_links
from ..checkpoints.code_files import HUB_FILES, HUB_FOLDER, find_foreign_code, list_code_files
from ..checkpoints.reading import CheckpointReader, read_json
from ..checkpoints.staging import MANIFEST, name_stale, stage_output
from ..checkpoints.writing import TensorToWrite, WrittenFile, parse_size, write_checkpoint
from .client import HubError, explain_errors, find_secret, guard_responses, list_remote


# What belongs to a checkpoint; logs, optimizer states, pickles and hidden files stay at home.
PUBLISHED = (
    *("*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt", "*.md", "*.yaml", "training_curves.png"),
    *("LICENSE*", "NOTICE*"),
)
NOT_PUBLISHED = ("trainer_state.json", ".*")
# Weights and code of an earlier push, which would be mixed with the new ones.
REPLACED = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json", *HUB_FILES),
)


@dataclass
class PushReport:
    """What a push did, or would do.

    Attributes:
        repo_id, revision: where to.
        url: of the commit or of the pull request; `None` for a dry run, and where nothing changes.
        changes: file -> (`"new"`, `"changed"`, `"unchanged"` or `"deleted"`, bytes).
        left_out: files of the folder that are not published.
        other_code: code at the top of the repository that is not this package's and stays there.
    """

    repo_id: str
    revision: str
    url: str | None = None
    changes: dict[str, tuple[str, int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    other_code: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A line per file and one for the whole."""
        lines = [f"  {change:9} {size:>15,}  {name}" for name, (change, size) in sorted(self.changes.items())]
        if self.left_out:
            lines.append(f"  left out: {', '.join(self.left_out)}")
        if self.other_code:
            lines.append(f"  stays in the repository: {', '.join(self.other_code)} (--delete-other-code deletes it)")
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
    base: str | None = None,
    delete_other_code: bool = False,
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
        base: Hub id that an adapter shall name as its base. Default: what it names.
        delete_other_code: delete `*.py` at the top of the repository that are not this package's.
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
    if message and (kind := find_secret(message, token)):
        raise HubError(f"the message holds {kind}; nothing was sent. Revoke it if it is used.")
    if size is not None and is_adapter(folder):
        raise HubError(f"{folder} is an adapter, which has one weight file. Leave --shard-size out.")
    explained = explain_errors(f"pushing to {repo_id}", token)
    with explained, guard_responses(), shard_weights(folder, size) as (weights, written):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        files, left_out = collect_files(folder, repo_id, token, base)
        if weights is not None:
            files = {name: file for name, file in files.items() if not fnmatch(name, "*.safetensors*")}
            files |= {path.name: path for path in sorted(weights.iterdir()) if not path.name.startswith(".")}
            if "conversion_report.json" in files:
                content = read_json(files["conversion_report.json"]) | {"files": [file.describe() for file in written]}
                files["conversion_report.json"] = (json.dumps(content, indent=1) + "\n").encode()
        branch = revision or "main"
        report = PushReport(repo_id, branch, left_out=left_out)
        if not dry_run:
            validate_card(files.get("README.md"))  # else a refused card would leave an empty repository
            api.create_repo(repo_id, private=private, exist_ok=True)
        parent, there = list_remote(api, repo_id, branch)
        if parent is None and branch != "main":  # a new branch starts with what main holds
            if not dry_run:
                api.create_branch(repo_id, branch=branch)
            parent, there = list_remote(api, repo_id, "main" if dry_run else branch)
        check_kind(folder, repo_id, set(there))
        operations = []
        for name, file in files.items():
            change, operation = compare_file(name, file, there.get(name), dry_run)
            report.changes[name] = (change, len(file) if isinstance(file, bytes) else file.stat().st_size)
            if change != "unchanged":
                operations.append(operation)
        others = [name for name in there if name not in files and "/" not in name]
        code = [name for name in others if name.endswith(".py") and name not in HUB_FILES]
        deleted = [name for name in others if any(fnmatch(name, rule) for rule in REPLACED)]
        deleted += code if delete_other_code else []
        report.other_code = [] if delete_other_code else code
        report.changes |= {name: ("deleted", there[name].size) for name in deleted}
        operations = [*map(CommitOperationDelete, deleted), *operations]
        if dry_run or not operations:
            return report
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


def check_kind(folder: Path, repo_id: str, there: set[str]):
    """Refuses to put an adapter over a whole model, or the other way round.

    transformers loads the adapter wherever it finds `adapter_config.json`, beside which weights.

    Raises:
        HubError: the branch holds the other kind.
    """
    other = {"config.json"} if is_adapter(folder) else {ADAPTER_CONFIG}
    if found := sorted(other & (there - {path.name for path in folder.iterdir()})):
        kinds = ("an adapter", "a whole model") if is_adapter(folder) else ("a whole model", "an adapter")
        raise HubError(
            f"{folder} is {kinds[0]}, and {repo_id} holds {kinds[1]} ({found[0]}); expected one kind, as what loads "
            "them would take the adapter. Push to another repository, or delete what is there."
        )


def compare_file(
    name: str, file: Path | bytes, remote: RepoFile | None, dry_run: bool
) -> tuple[str, CommitOperationAdd | None]:
    """What would happen to a file of the repository, and what does it: `None` where nothing is to be sent.

    The operation hashes the file when it is made, so a weight file is hashed once.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if remote is None or remote.size != size:
        return "new" if remote is None else "changed", None if dry_run else CommitOperationAdd(name, file)
    operation = CommitOperationAdd(name, file)
    if remote.lfs is not None:
        same = operation.upload_info.sha256.hex() == remote.lfs.sha256
    else:  # the id that git gives it
        content = file if isinstance(file, bytes) else file.read_bytes()
        same = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob_id
    return ("unchanged", None) if same else ("changed", operation)


def validate_card(card: Path | bytes | None) -> None:
    """Lets the Hub check the metadata of a card before a repository is made for it."""
    if card is not None:
        text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
        try:
            ModelCard(text, ignore_metadata_errors=True).validate(repo_type="model")
        except ValueError as error:
            raise HubError(describe_bad_card(error)) from error


def collect_files(
    folder: Path, repo_id: str, token: str | None = None, base: str | None = None
) -> tuple[dict[str, Path | bytes], list[str]]:
    """Chooses what to publish of a folder.

    Args:
        folder: of the checkpoint or of a PEFT adapter.
        repo_id: for the card.
        token: that must not be in any file, beside all that looks like one.
        base: Hub id that an adapter shall name as its base.

    Returns:
        File name -> path, or content where it is not the folder's; and the names of what is left out.

    Raises:
        HubError: it is no checkpoint, its weights are no safetensors, or it holds code that is not this package's, a
            key, a link that leads out of it, or a card that cannot be read.
        ConversionError: weights are missing or damaged.
    """
    if is_adapter(folder):
        weights = [read_adapter(folder).weights]
    elif (folder / "config.json").is_file():
        weights = CheckpointReader(folder).files
    else:
        raise HubError(f"{folder} has no config.json; expected the folder of a checkpoint. Pass another folder.")
    if pickles := [path.name for path in weights if path.suffix != ".safetensors"]:
        raise HubError(
            f"{folder} holds its weights in {pickles[0]}, a pickle; only safetensors are pushed. Load and save it with "
            "save_pretrained, or use `convllava convert`."
        )
    files, left_out = {}, []
    is_single = (folder / "model.safetensors").is_file()
    for path in sorted(folder.iterdir()):
        wanted = any(fnmatch(path.name, rule) for rule in PUBLISHED)
        wanted = wanted and (path.suffix != ".safetensors" or path in weights)  # no other set of weights
        wanted = wanted and not (is_single and path.name == "model.safetensors.index.json")
        if path.is_file() and wanted and not any(fnmatch(path.name, rule) for rule in NOT_PUBLISHED):
            check_link(path)
            files[path.name] = path
        elif path.name != MANIFEST:
            left_out.append(path.name + "/" * path.is_dir())
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
        own = "README.md" in files and read_trainer_card(folder) is None
    except yaml.YAMLError as error:
        raise HubError(describe_bad_card(error)) from error
    card = (folder / "README.md").read_text(encoding="utf-8") if own else build_folder_card(folder)
    if is_adapter(folder):
        files[ADAPTER_CONFIG], card = name_base(folder, card, base)
    filled = fill_repo_id(card, repo_id)
    try:
        ModelCard(filled)  # raises on metadata that cannot be read, before anything is sent
    except Exception as error:  # errors of YAML and of its content have no common base
        raise HubError(describe_bad_card(error)) from error
    if not own or filled != card:
        files["README.md"] = filled.encode()
    for name, content in files.items():
        if name.endswith(".safetensors"):
            with safe_open(content, "pt") as file:
                content = json.dumps([file.metadata() or {}, list(file.keys())])
        if kind := find_secret(content.read_bytes() if isinstance(content, Path) else content, token):
            raise HubError(
                f"{folder / name} holds {kind}; nothing was sent. Remove it there, and revoke it if it is used."
            )
    return files, left_out


def check_link(path: Path):
    """Refuses a link that leads out of its folder; in the cache of the Hub, to anything but a blob of the repository.

    Raises:
        HubError: names the link.
    """
    folder = path.parent.resolve()
    allowed = {folder}
    if folder.parent.name == "snapshots":
        allowed.add(folder.parents[1] / "blobs")
    target = path.resolve()
    if allowed.isdisjoint(target.parents):
        raise HubError(
            f"{path} is a link to {target}, out of the folder; put the file itself there, or delete the link."
        )


def name_base(folder: Path, card: str, base: str | None) -> tuple[Path | bytes, str]:
    """The configuration and the card of an adapter with the Hub id of its base in them.

    Raises:
        HubError: the base is a folder of this machine, and no id was given in its place.
    """
    adapter = read_adapter(folder)
    linked, _ = split_links(base or adapter.base, folder)
    if not linked:
        raise HubError(
            f"{folder / ADAPTER_CONFIG} names the base {adapter.base!r}, which others cannot load; push it first, and "
            "name it with --base OWNER/NAME."
        )
    if base is None:
        return folder / ADAPTER_CONFIG, card
    settings = {**adapter.settings, "base_model_name_or_path": base}
    for name in split_links(adapter.base, folder)[1]:
        card = card.replace(f'"{name}"', f'"{base}"').replace(f"`{name}`", f"`{base}`")
    changed = ModelCard(card)
    changed.data.base_model = base
    return (json.dumps(settings, indent=2) + "\n").encode(), str(changed)


def describe_bad_card(error: Exception) -> str:
    return f"the metadata of README.md cannot be read: {' '.join(str(error).split())} Correct the card."


@contextmanager
def shard_weights(folder: Path, shard_size: int | None) -> Iterator[tuple[Path | None, list[WrittenFile]]]:
    """Writes the weights of a checkpoint anew, in files of `shard_size` bytes, into a folder that lasts as long as the
    block. Gives the folder and the files, or `None` and nothing where there is no size."""
    if shard_size is None:
        yield None, []
        return
    for name in (folder.name, f".{folder.name}"):  # whole ones, and such as were still written
        name_stale(folder.with_name(name), "shards")
    reader = CheckpointReader(folder)
    tensors = [
        TensorToWrite(name, stored.shape, stored.dtype, partial(reader.read, name))
        for name, stored in reader.tensors.items()
    ]
    shards = folder.parent / f".{folder.name}.shards-{secrets.token_hex(4)}"
    with stage_output(shards, sum(tensor.num_bytes for tensor in tensors), force=False) as staging:
        written = write_checkpoint(staging, tensors, shard_size)
    try:
        yield shards, written
    finally:
        reader.close()
        shutil.rmtree(shards, ignore_errors=True)
