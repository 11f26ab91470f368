"""Fetches the images of requests: from `data:` URLs, and from named hosts whose addresses are public.

A server that fetches what strangers name must not become their way into the network that it stands in. So a host has
to be on the list, the addresses that its name resolves to are checked, the connection goes to a checked address (and
not to what the name resolves to a moment later), and redirects start again from the beginning.
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urljoin

# The HTTP client that transformers itself fetches images with: its distribution differs between versions.
from transformers.image_utils import httpx

from .. import __version__
from .requests import RequestError


MAX_REDIRECTS = 3
PORTS = (None, 80, 443)  # None is the scheme's own
FETCH_SECONDS = 20.0  # for everything: names, connections, redirects and the body
NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def fetch_image(url: str, allowed_hosts: Collection[str], max_bytes: int) -> bytes:
    """The file behind the URL of an image.

    Args:
        url: `data:image/...;base64,...`, or `http(s)://` on an allowed host.
        allowed_hosts: names of hosts, in lower case; ports are the scheme's own.
        max_bytes: longest file.

    Raises:
        RequestError: another kind of URL, a host that is not allowed or has an address that is not public, or a file
            that cannot be fetched within the limits.
    """
    if url[:5].lower() == "data:":
        return _decode_data_url(url, max_bytes)
    try:
        return await asyncio.wait_for(_fetch(url, allowed_hosts, max_bytes), FETCH_SECONDS)
    except asyncio.TimeoutError:  # noqa: UP041 -- another class in Python 3.10
        raise RequestError(f"an image could not be fetched within {FETCH_SECONDS:g} seconds") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        # The text of such an error could describe the network that the server stands in.
        raise RequestError(f"an image could not be fetched ({type(error).__name__})") from None


def _decode_data_url(url: str, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise RequestError("an image URL starts with 'data:' but not with 'data:image/...;base64,'")
    if len(payload) * 3 // 4 > max_bytes + 2:
        raise RequestError(f"an image has more than {max_bytes} bytes", status=413)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("an image is broken base64") from None


async def _fetch(url: str, allowed_hosts: Collection[str], max_bytes: int) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        target = httpx.URL(url)
        if target.scheme not in ("http", "https"):
            raise RequestError("an image URL is neither data:, http: nor https:; files of the server are never read")
        host = target.host.lower().rstrip(".")
        if host not in allowed_hosts:
            raise RequestError("images are not fetched from that host; send the image as a data: URL")
        if target.userinfo or target.port not in PORTS:
            raise RequestError("an image URL names a user or an unusual port; both are refused")
        address = await resolve_public(host, target.port or (443 if target.scheme == "https" else 80))
        headers = {
            "Host": target.netloc.decode("ascii"),
            "User-Agent": f"convllava-hf/{__version__}",
            "Accept-Encoding": "identity",  # and nothing is unpacked below: few bytes could become many
        }
        # One client per hop, so no cookies; trust_env would send the request to a proxy instead of that address.
        async with (
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
            client.stream(
                "GET", target.copy_with(host=address), headers=headers, extensions={"sni_hostname": host}
            ) as response,
        ):
            if response.has_redirect_location:
                url = urljoin(url, response.headers["location"])
                continue
            if response.status_code != 200:
                raise RequestError(f"an image could not be fetched: HTTP status {response.status_code}")
            data = bytearray()
            async for chunk in response.aiter_raw(65536):
                data += chunk
                if len(data) > max_bytes:
                    raise RequestError(f"an image has more than {max_bytes} bytes", status=413)
            return bytes(data)
    raise RequestError(f"an image URL redirects more than {MAX_REDIRECTS} times")


async def resolve_public(host: str, port: int) -> str:
    """An address of a host, all of whose addresses are public.

    Raises:
        RequestError: the name is unknown, or any of its addresses is loopback, private, link-local or otherwise not
            public.
    """
    try:
        found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RequestError("the host of an image URL is unknown") from None
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise RequestError("the host of an image URL has an address that is not public")
    return min(addresses, key=lambda address: ":" in address)  # many networks have no way out for version 6


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where it wraps an address of the other version."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 6:
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if parsed in NAT64:
            inner = ipaddress.ip_address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast
