"""What pushing, pulling and looking share: the files of a repository, and errors of the Hub in words."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..checkpoints.staging import NO_SPACE
from ..checkpoints.weight_maps import ConversionError


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


def find_secret(text: str, token: str | None) -> bool:
    """Whether a text holds what looks like an access token, or the one that is used."""
    used = [known.strip() for known in (token, get_token()) if known and len(known.strip()) > 8]
    return bool(SECRET.search(text)) or any(known in text for known in used)


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
