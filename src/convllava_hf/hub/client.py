"""What pushing, pulling and looking share: the files of a repository, and errors of the Hub in words."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from ..checkpoints.staging import NO_SPACE
from ..checkpoints.weight_maps import ConversionError


# Forms of keys that their makers document; what looks like no key (a password) is not found.
SECRETS = {
    "a Hugging Face token": r"hf_(?:[A-Za-z0-9]{30,}|oauth_[\w.-]{20,})",
    "an AWS key": r"(?:AKIA|ASIA|AGPA|AROA|AIDA)[A-Z0-9]{16}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}",
    "a GitLab token": r"glpat-[\w-]{20,}",
    "an OpenAI or Anthropic key": r"sk-(?:ant-[\w-]{24,}|(?:proj|svcacct|admin)-[\w-]{24,}|[A-Za-z0-9]{40,})",
    "a Google key": r"AIza[\w-]{35}",
    "a Slack token": r"xox[abeoprs]-[A-Za-z0-9-]{20,}",
    "a Weights & Biases key": r"(?i:wandb_?api_?key)\W{1,6}[0-9a-f]{40}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
}
SECRET = re.compile("|".join(f"(?:{pattern})" for pattern in SECRETS.values()))
# Where a token may go beside the endpoint; mirrors redirect there.
HUB_ADDRESSES = ("https://huggingface.co", "https://hf.co")
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


def find_secret(content: str | bytes, token: str | None) -> str | None:
    """Names what looks like a key in a text or in the bytes of a file.

    Args:
        content: bytes are read as UTF-8 and UTF-16, strings inside JSON also without their escapes.
        token: that is used; it must not occur whatever it looks like.

    Returns:
        Such as `"a Hugging Face token"`, or `None`.
    """
    texts = [content] if isinstance(content, str) else [content.decode("latin-1")]
    if isinstance(content, bytes):
        if b"\0" in content:
            texts += [content[start:].decode("utf-16-le", "ignore") for start in (0, 1)]
            texts += [content[start:].decode("utf-16-be", "ignore") for start in (0, 1)]
        texts += [texts[0].replace("\\\n", "").replace("\\\r\n", "")]
    if any("\\" in text for text in texts):
        texts += [re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text) for text in texts]
        texts += [re.sub(r"\\x([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text) for text in texts]
        texts += [text.replace("\\/", "/") for text in texts]
    used = [known.strip() for known in (token, get_token()) if known and len(known.strip()) > 8]
    for text in texts:
        if any(known in text for known in used):
            return "the token that is used"
        if SECRET.search(text):
            return next(name for name, pattern in SECRETS.items() if re.search(pattern, text))
    return None


@contextmanager
def guard_responses() -> Iterator[None]:
    """Refuses answers of an endpoint that would lead huggingface_hub astray, while the block lasts: an ETag, which
    names a file of the cache, that is no name of a file; a next page on another host, which would get the token. No
    request with a token leaves for a host that is neither the endpoint nor the Hub."""
    client = get_session()
    homes = {_get_origin(client.build_request("GET", url).url) for url in (constants.ENDPOINT, *HUB_ADDRESSES)}

    def check_request(request):
        if "authorization" in request.headers and _get_origin(request.url) not in homes:
            raise HubError(f"the endpoint asked to send the token to {request.url.host}; it was not sent.")

    def check(response):
        for header in ("etag", "x-linked-etag", "x-repo-commit"):
            value = response.headers.get(header, "").removeprefix("W/").strip('"')
            if not re.fullmatch(r"[\w.:+=-]*", value) or value in (".", ".."):
                raise HubError(
                    f"{response.request.url.host} sent the {header} {value[:80]!r}, which is no name of a file."
                )
        here = response.request.url
        links = [link.get("url", "") for link in response.links.values()]
        for page in map(here.join, [*links, response.headers.get("x-xet-refresh-route", "")]):
            if _get_origin(page) not in {_get_origin(here), *homes}:
                raise HubError(f"{here.host} sent a next page on another host, {page.host}.")

    before = client.event_hooks
    client.event_hooks = {
        "request": [*before.get("request", []), check_request],
        "response": [*before.get("response", []), check],
    }
    try:
        yield
    finally:
        client.event_hooks = before


def _get_origin(url) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def check_names(names: Iterable[str]):
    """Refuses a listing of files that lie outside the repository.

    Raises:
        HubError: names the first of them.
    """
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise HubError(f"the Hub lists a file {name!r}, which is no name inside a repository; nothing was fetched.")


def list_remote(api: HfApi, repo_id: str, revision: str, must_exist: bool = False) -> tuple[str | None, dict]:
    """The commit of a revision and its files by name; nothing, if it may be missing and is."""
    try:
        commit = api.model_info(repo_id, revision=revision).sha
        tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        files = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        check_names(files)
        return commit, files
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
        cause = error
        while cause is not None:  # huggingface_hub wraps what a guard raised
            if isinstance(cause, HubError):
                raise cause from None
            cause = cause.__cause__
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
