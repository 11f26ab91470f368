"""Pull a checkpoint from the Hub, whole or not at all: files are compared with the hashes that the Hub lists."""

import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, snapshot_download

from ..checkpoints.staging import check_output, stage_output
from .client import HubError, explain_errors, guard_responses, list_remote


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
    with explain_errors(f"pulling {repo_id}", token), guard_responses():
        if output is None:
            if not is_offline_mode():
                list_remote(HfApi(token=token), repo_id, revision or "main", must_exist=True)
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
