"""Fetches images by URL, for servers started with --allow-urls: public addresses only, no redirects."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import httpx

from fuselip_core.request_rules import Refusal

SECONDS = 10.0


def is_url(value: object) -> bool:
    """Whether a row's image is a URL."""
    return isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))


async def fetch_image(url: str, row: int, most_bytes: int) -> bytes:
    """The content of a public URL; raises a Refusal that names the row but not the URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme.lower() == "https" else 80)
        address = await _public_address(host, port, row)
        # The address that was checked, since the name may resolve to another one a moment later.
        shown = f"[{address}]" if ":" in address else address
        target = httpx.URL(url).copy_with(host=shown)
        async with (
            httpx.AsyncClient(timeout=SECONDS, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "GET", target, headers={"Host": parts.netloc.rpartition("@")[2]}, extensions={"sni_hostname": host}
            ) as answer,
        ):
            if answer.status_code != 200:
                raise Refusal(f"row {row}: the image's server answered with status {answer.status_code}")
            data = bytearray()
            async for part in answer.aiter_bytes():
                data += part
                if len(data) > most_bytes:
                    raise Refusal(f"row {row}: the image behind the URL has more than {most_bytes} bytes")
            return bytes(data)
    except Refusal:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise Refusal(f"row {row}: the image's URL can't be fetched ({type(error).__name__})") from None


async def _public_address(host: str, port: int, row: int) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise Refusal(f"row {row}: the image's URL leads to a private address; only public ones are fetched")
    return addresses[0]
