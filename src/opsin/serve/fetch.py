"""A URL in a request → the bytes behind it, from hosts that the operator has allowed, at public addresses only.

    URL ─▶ host allowed? ─▶ resolve, once ─▶ all addresses public? ─▶ connect to one of these ─▶ 200: bytes
     ▲                                                                                             │
     └────────────────────────────── redirect: everything again ◀──────────────────────────────────┘

Written on asyncio's streams and h11, which uvicorn brings along. A stream is opened to an address and checks the
certificate of a name, so nothing resolves the name again, or looks for a proxy; and one deadline holds for the names,
the connections, the redirects and every byte. http.client has one for each read, in a thread that cannot be stopped.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import h11
import idna

from opsin import __version__
from opsin.serve.refusals import Refusal, TooLarge, Unprocessable

MAX_URL = 2048  # characters
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
CHUNK_BYTES = 2**16
SAFE = "%!$&'()*+,;=:@/?~"  # as they are, in a path or query

LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")  # as the last label: an IPv4 address, in one of many spellings

UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is given out
EMBEDDING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))  # NAT64; IPv4-compatible
INTERNAL = (  # of IPv4, that `is_global` takes for public
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # a cloud's own services
)


class _Target(NamedTuple):
    """A URL that may be asked for."""

    scheme: str
    host: str  # lower case, ASCII; an IPv6 address without brackets
    port: int
    path: str  # with the query

    @property
    def authority(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == PORTS[self.scheme] else f"{name}:{self.port}"


async def fetch(url: str, *, allow_hosts: Sequence[str], max_bytes: int, seconds: float = 10) -> bytes:
    """The body of the 200 answer to a GET.

    Args:
        url: http or https.
        allow_hosts: `HOST`, for the ports 80 and 443, or `HOST:PORT`; no others are asked, after redirects either.
        max_bytes: of the body.
        seconds: for everything.
    Raises:
        Unprocessable: a URL that is not one, or not allowed; no answer, another than 200, or a late one. What it says
            of a host that is not public is the same whether or not something is there.
        TooLarge: more bytes.
    """
    if not allow_hosts:
        raise _refusal(
            "URLs are not fetched by this server; send the bytes of the image. Its operator sets --allow-url-host."
        )
    try:
        return await asyncio.wait_for(_follow(url, allow_hosts, max_bytes), seconds)
    except asyncio.TimeoutError:
        raise _refusal(f"the image at {url[:200]!r} had not come after {seconds:g} s. Send its bytes.") from None


def _refusal(message: str) -> Unprocessable:
    return Unprocessable(message, kind="url")


async def _follow(url: str, allow_hosts: Sequence[str], max_bytes: int) -> bytes:
    for _ in range(1 + MAX_REDIRECTS):
        target = _target(url)
        _check_allowed(target, allow_hosts)
        answer = await _get(target, await _addresses(target), max_bytes)
        if isinstance(answer, bytes):
            return answer
        try:
            url = urljoin(url, answer.location)
        except ValueError as error:
            raise _refusal(f"{target.host} leads to {answer.location[:200]!r}, which is not a URL: {error}.") from None
    raise _refusal(f"more than {MAX_REDIRECTS} redirects. Name the URL that they lead to.")


# ── which URLs ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _target(url: str) -> _Target:
    """
    Raises:
        Unprocessable: not an http or https URL, or one that is written so that programs disagree about its host.
    """
    shown = repr(url[:200])
    if len(url) > MAX_URL:
        raise _refusal(f"a URL of {len(url)} characters; at most {MAX_URL} are read. Send the bytes of the image.")
    if not url.isprintable() or " " in url or "\\" in url:  # urlsplit would take some of these out
        raise _refusal(f"{shown} has blanks, line breaks or backslashes. Write them as %XX.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _refusal(f"{shown} is not a URL: {error}.") from None
    if parts.scheme not in PORTS:
        raise _refusal(f"{shown} does not begin with http:// or https://; no other URLs are fetched.")
    if "@" in parts.netloc:
        raise _refusal(f"{shown} has a user name or password; such URLs are not fetched.")
    try:
        host = _host(parts.hostname or "", bracketed="[" in parts.netloc)
    except ValueError as error:
        raise _refusal(f"{shown}: {error}.") from None
    path = quote(parts.path or "/", safe=SAFE) + (parts.query and f"?{quote(parts.query, safe=SAFE)}")
    return _Target(parts.scheme, host, PORTS[parts.scheme] if port is None else port, path)


def _host(name: str, *, bracketed: bool) -> str:
    """A host in the one spelling that is compared and resolved.

    Raises:
        ValueError: it is no name and no address, or an address in an unusual spelling.
    """
    if bracketed:
        return str(IPv6Address(name))
    if not name.isascii():
        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError:
            raise ValueError(f"the host {name!r} is not a name that IDNA knows") from None
    name = name.lower()
    labels = name.split(".")
    if NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(name))
        except ValueError:
            raise ValueError(f"the host {name!r} is a number, but not an IPv4 address such as 192.0.2.1") from None
    if len(name) > 253 or not all(LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"the host {name!r} is not a name such as images.example.org")
    return name


@lru_cache(maxsize=256)
def parse_allowed(entry: str) -> tuple[str, int | None]:
    """`HOST` or `HOST:PORT` of `--allow-url-host` → the host as it is compared, and the port.

    Raises:
        ValueError: it is neither.
    """
    try:
        parts = urlsplit(f"//{entry}")
        port = parts.port
        if parts.netloc != entry or "@" in entry or not entry.isprintable() or " " in entry:
            raise ValueError("more than a host")
        return _host(parts.hostname or "", bracketed="[" in entry), port
    except ValueError as error:
        raise ValueError(
            f"{entry!r} is not a host ({error}). Write images.example.org, or images.example.org:8080."
        ) from None


def _check_allowed(target: _Target, allow_hosts: Sequence[str]) -> None:
    for host, port in map(parse_allowed, allow_hosts):
        if host == target.host and (target.port in PORTS.values() if port is None else port == target.port):
            return
    raise _refusal(
        f"{target.host}:{target.port} is not one that images are fetched from. Its operator sets --allow-url-host."
    )


# ── which addresses ──────────────────────────────────────────────────────────────────────────────────────────────────


async def _addresses(target: _Target) -> list[str]:
    """Where a host is.

    Raises:
        Unprocessable: nowhere, or at an address that is not public.
    """
    try:
        found = await _resolve(target.host, target.port)
    except OSError:
        found = []
    if not found:
        raise _refusal(f"the host {target.host} has no address.")
    if not all(map(_is_public, found)):
        raise _refusal(f"the host {target.host} is not at public addresses only; images are not fetched from others.")
    return found


async def _resolve(host: str, port: int) -> list[str]:
    """All addresses of a name, in the order to try them; an IPv6 address may end in %scope."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(_written(info[4]) for info in infos))


def _written(address: tuple) -> str:  # (host, port), or (host, port, flow, scope)
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{scope}" if scope and "%" not in address[0] else str(address[0])


def _is_public(address: str) -> bool:
    """Whether an address is one of the internet's, and does not stand for another that is not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in INTERNAL))
    if ip.scope_id is not None:
        return False
    if (inner := _embedded(ip)) is not None:
        return all(_is_public(str(each)) for each in inner)
    return ip in UNICAST and ip.is_global


def _embedded(ip: IPv6Address) -> tuple[IPv4Address, ...] | None:
    """The IPv4 addresses that an IPv6 address leads to: mapped, compatible, NAT64, 6to4, Teredo."""
    if ip.ipv4_mapped is not None:
        return (ip.ipv4_mapped,)
    if ip.sixtofour is not None:
        return (ip.sixtofour,)
    if ip.teredo is not None:
        return ip.teredo
    if any(ip in network for network in EMBEDDING):
        return (IPv4Address(int(ip) & 0xFFFFFFFF),)
    return None


# ── the exchange ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Redirect(NamedTuple):
    location: str


async def _get(target: _Target, addresses: Sequence[str], max_bytes: int) -> bytes | _Redirect:
    """The answer to a GET from the first address that takes a connection."""
    reader, writer = await _connected(target, addresses)
    try:
        return await _exchange(target, reader, writer, max_bytes)
    except (h11.RemoteProtocolError, OSError) as error:
        raise _refusal(
            f"{target.host} did not answer as a web server does: {error or 'it closed the connection'}."
        ) from None
    finally:
        writer.transport.abort()


async def _connected(target: _Target, addresses: Sequence[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for address in addresses:
        try:
            return await _connect(address, target.port, target.host if target.scheme == "https" else None)
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", "") or error.reason or "no TLS"
            raise _refusal(f"{target.host} does not prove that it is {target.host}: {reason}.") from None
        except OSError:
            continue
    raise _refusal(f"{target.host} takes no connection on port {target.port}.")


async def _connect(address: str, port: int, tls_name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream to an address, which is not resolved; with `tls_name`, to who holds a certificate of that name."""
    if tls_name is None:
        return await asyncio.open_connection(address, port, limit=CHUNK_BYTES)
    return await asyncio.open_connection(address, port, limit=CHUNK_BYTES, ssl=_tls(), server_hostname=tls_name)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _exchange(
    target: _Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, max_bytes: int
) -> bytes | _Redirect:
    peer = h11.Connection(our_role=h11.CLIENT)
    headers = [
        ("Host", target.authority),
        ("User-Agent", f"opsin/{__version__}"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=target.path, headers=headers)
    writer.write((peer.send(request) or b"") + (peer.send(h11.EndOfMessage()) or b""))
    await writer.drain()

    body = bytearray()
    while True:
        event = peer.next_event()
        if event is h11.NEED_DATA:
            peer.receive_data(await reader.read(CHUNK_BYTES))
        elif isinstance(event, h11.Response):
            if location := _location(target, event, max_bytes):
                return _Redirect(location)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                raise _too_large(target, max_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)


def _location(target: _Target, response: h11.Response, max_bytes: int) -> str | None:
    """Where an answer leads to; None: its body is the one that is wanted.

    Raises:
        Refusal: it is not.
    """
    headers = {name: value.decode("latin-1") for name, value in response.headers}
    if response.status_code in REDIRECTS and b"location" in headers:
        return headers[b"location"]
    if response.status_code != 200:
        raise _refusal(f"{target.host} answered {response.status_code}; 200 is wanted. Is the URL right, and public?")
    if headers.get(b"content-encoding", "identity").lower() != "identity":
        raise _refusal(f"{target.host} compressed its answer, which was not asked for. Send the bytes of the image.")
    if int(headers.get(b"content-length", "0")) > max_bytes:  # h11 has checked that it is a number
        raise _too_large(target, max_bytes)
    return None


def _too_large(target: _Target, max_bytes: int) -> Refusal:
    return TooLarge(f"the image at {target.host} has more than {max_bytes} bytes. Name a smaller one.")
