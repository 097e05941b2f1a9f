"""Images behind URLs: from allowed hosts, at public addresses only, within the limits, whatever they send."""

import asyncio
import datetime
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="opsin[serve] is not installed")

from opsin.serve import fetch as fetching
from opsin.serve.fetch import fetch, parse_allowed
from opsin.serve.refusals import TooLarge, Unprocessable

PUBLIC, OTHER, PUBLIC6 = "93.184.216.34", "151.101.1.69", "2606:2800:220:1:248:1893:25c8:1946"
HOST = "images.example"
ALLOWED = (HOST, "cdn.example:8443")

Page = bytes | Callable[[asyncio.StreamWriter], Any]


def page(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return page(b"elsewhere", f"Location: {location}", status=status)


class Web:
    """Names, with the addresses that they have each time they are asked for; and pages, which are on loopback."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[list[str]]] = {HOST: [[PUBLIC]], "cdn.example": [[OTHER]]}
        self.pages: dict[str, Page] = {}
        self.asked: list[str] = []
        self.connected: list[tuple[str, int, str | None]] = []
        self.requests: list[str] = []
        self.dead: set[str] = set()  # addresses
        self.tls: ssl.SSLContext | None = None
        self._open = fetching._connect
        monkeypatch.setattr(fetching, "_resolve", self._resolve)
        monkeypatch.setattr(fetching, "_connect", self._connect)

    def get(self, url: str, **options: Any) -> bytes:
        return asyncio.run(self._get(url, {"allow_hosts": ALLOWED, "max_bytes": 1000, "seconds": 5} | options))

    async def _get(self, url: str, options: dict[str, Any]) -> bytes:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls) as server:
            self._port = server.sockets[0].getsockname()[1]
            return await fetch(url, **options)

    async def _resolve(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        answers = self.names.get(host, [[]])
        return answers[min(len(self.asked), len(answers)) - 1]

    async def _connect(self, address: str, port: int, tls_name: str | None) -> Any:
        self.connected.append((address, port, tls_name))
        if address in self.dead:
            raise ConnectionRefusedError
        return await self._open("127.0.0.1", self._port, tls_name)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        found = self.pages.get(head.split()[1], page(b"", status="404 Not Found"))
        try:
            if isinstance(found, bytes):
                writer.write(found)
            else:
                await found(writer)
        except (ConnectionError, asyncio.CancelledError):  # the test is over
            pass
        writer.close()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Web:
    return Web(monkeypatch)


# ── what is fetched ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_of_an_allowed_host(web: Web) -> None:
    web.pages["/cat.jpg?size=7"] = page(b"a cat")
    assert web.get(f"http://{HOST}/cat.jpg?size=7#whiskers") == b"a cat"
    assert web.connected == [(PUBLIC, 80, None)]
    (head,) = web.requests
    assert f"Host: {HOST}\r\n" in head and "Accept-Encoding: identity\r\n" in head


def test_chunks_and_answers_without_a_length(web: Web) -> None:
    web.pages["/chunks"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\na c\r\n2\r\nat\r\n0\r\n\r\n"
    web.pages["/until-closed"] = b"HTTP/1.0 200 OK\r\n\r\na cat"
    assert web.get(f"http://{HOST}/chunks") == web.get(f"http://{HOST}/until-closed") == b"a cat"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("HTTP://IMAGES.EXAMPLE/x", HOST),
        (f"http://{HOST}:80/x", HOST),
        (f"http://{HOST}:443/x", f"{HOST}:443"),
        ("http://cdn.example:8443/x", "cdn.example:8443"),
    ],
)
def test_ports_and_case(web: Web, url: str, host: str) -> None:
    web.pages["/x"] = page(b"x")
    assert web.get(url) == b"x"
    assert f"Host: {host}\r\n" in web.requests[0]


def test_names_and_paths_in_other_scripts(web: Web) -> None:
    web.names["xn--bcher-kva.example"] = [[PUBLIC]]
    web.pages["/%E7%8C%AB.png"] = page(b"a cat")
    assert web.get("http://Bücher.example/猫.png", allow_hosts=["bücher.example"]) == b"a cat"
    assert web.asked == ["xn--bcher-kva.example"]
    assert web.get("http://xn--bcher-kva.example/%E7%8C%AB.png", allow_hosts=["BÜCHER.example"]) == b"a cat"


def test_addresses_are_tried_in_turn(web: Web) -> None:
    web.names[HOST] = [[PUBLIC6, PUBLIC]]
    web.dead.add(PUBLIC6)
    web.pages["/x"] = page(b"x")
    assert web.get(f"http://{HOST}/x") == b"x"
    assert [address for address, _, _ in web.connected] == [PUBLIC6, PUBLIC]


def test_redirects_are_followed_and_checked_again(web: Web) -> None:
    web.pages["/old"] = redirect("/newer", "301 Moved Permanently")
    web.pages["/newer"] = redirect("//cdn.example:8443/x?y=1")
    web.pages["/x?y=1"] = page(b"x")
    assert web.get(f"http://{HOST}/old") == b"x"
    assert web.asked == [HOST, HOST, "cdn.example"]
    assert web.connected[-1] == (OTHER, 8443, None)


# ── what is not asked for ────────────────────────────────────────────────────────────────────────────────────────────


def refused(web: Web, url: str, message: str, **options: Any) -> None:
    with pytest.raises(Unprocessable, match=message) as caught:
        web.get(url, **options)
    assert caught.value.kind == "url"


def test_without_allowed_hosts_nothing_is_fetched(web: Web) -> None:
    message = "URLs are not fetched by this server; send the bytes of the image. Its operator sets --allow-url-host"
    refused(web, f"http://{HOST}/x", message, allow_hosts=())
    assert not web.asked


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "does not begin with http:// or https://"),
        ("gopher://images.example/x", "does not begin with http"),
        ("ftp://images.example/x", "does not begin with http"),
        ("data:image/png;base64,AAAA", "does not begin with http"),
        ("//images.example/x", "does not begin with http"),
        ("images.example/x", "does not begin with http"),
        ("", "does not begin with http"),
        ("http:///x", "the host '' is not a name"),
        ("http:images.example", "the host '' is not a name"),
        ("http://user@images.example/", "has a user name or password"),
        ("http://images.example:80@evil.example/", "has a user name or password"),
        ("http://@images.example/", "has a user name or password"),
        ("http://images.example/a b", "has blanks, line breaks or backslashes"),
        (" http://images.example/", "has blanks"),
        ("http://images.example/\r\nHost: evil.example", "has blanks, line breaks"),
        ("ht\ntp://images.example/", "has blanks, line breaks"),
        ("http://images.exam\tple/", "has blanks, line breaks"),
        ("http://images.example\\@evil.example/", "backslashes"),
        ("http://images.example\x00.evil.example/", "has blanks, line breaks"),
        ("http://images.example:port/", "is not a URL"),
        ("http://images.example:99999/", "is not a URL"),
        ("http://[::1/", "is not a URL"),
        ("http://images.example./x", "the host 'images.example.' is not a name"),
        ("http://images..example/x", "is not a name"),
        ("http://images%2eexample/x", "is not a name"),
        ("http://2130706433/", "is a number, but not an IPv4 address"),
        ("http://0177.0.0.1/", "is a number, but not"),
        ("http://0x7f000001/", "is a number, but not"),
        ("http://0x7f.0.0.0x1/", "is a number, but not"),
        ("http://127.1/", "is a number, but not"),
        ("http://127.0.0.1./", "is not a name"),
        ("http://１２７.０.０.１/", "127.0.0.1:80 is not one that images are fetched from"),
        ("http://127.0.0.1/", "127.0.0.1:80 is not one that images are fetched from"),
        ("http://[::1]/", "::1:80 is not one"),
        ("http://[::ffff:127.0.0.1]/", "is not one that"),
        ("http://[::ffff:7f00:1]/", "is not one that"),
        ("http://[fe80::1%25eth0]/", "is not one that"),
        ("http://localhost/", "localhost:80 is not one"),
        ("http://evil.example/", "evil.example:80 is not one that images are fetched from. Its operator sets"),
        ("http://images.example.evil.example/", "is not one"),
        ("http://sub.images.example/", "is not one"),
        ("http://images.example:8080/", "images.example:8080 is not one"),
        ("http://cdn.example/", "cdn.example:80 is not one"),
        ("http://images.example/" + "x" * 3000, "a URL of 3022 characters; at most 2048"),
    ],
)  # fmt: skip
def test_urls_that_are_not_asked_for(web: Web, url: str, message: str) -> None:
    refused(web, url, message)
    assert not web.asked and not web.connected


@pytest.mark.parametrize(
    "entry", ["http://a.example", "a.example/x", "*.example", "a b", "u@a.example", "a:x", "", "127.1"]
)
def test_entries_that_are_not_hosts(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host .*Write images.example.org, or images.example.org:8080"):
        parse_allowed(entry)


def test_entries() -> None:
    assert parse_allowed("Images.Example") == (HOST, None)
    assert parse_allowed("cdn.example:8443") == ("cdn.example", 8443)
    assert parse_allowed("[2606:2800::1]:81") == ("2606:2800::1", 81)


# ── where a host may be ──────────────────────────────────────────────────────────────────────────────────────────────

NOT_PUBLIC = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200",
    "192.0.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "192.88.99.1",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "2002:7f00:1::1", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "fc00::1", "fd12::1",
    "fe80::1", "fe80::1%2", "fec0::1", "ff02::1", "2001:db8::1", "100::1", "2606:2800:220:1::1%eth0", "nonsense",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not fetching._is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, OTHER, PUBLIC6, f"::ffff:{PUBLIC}", f"64:ff9b::{PUBLIC}", "8.8.8.8"])
def test_addresses_that_are_public(address: str) -> None:
    assert fetching._is_public(address)


@pytest.mark.parametrize("found", [["127.0.0.1"], [PUBLIC, "10.0.0.7"], ["::1", PUBLIC6], ["169.254.169.254"]])
def test_one_address_that_is_not_public_is_enough(web: Web, found: list[str]) -> None:
    web.names[HOST] = [found]
    refused(web, f"http://{HOST}/", f"the host {HOST} is not at public addresses only; images are not fetched")
    assert not web.connected


def test_the_message_tells_nothing_of_an_internal_address(web: Web) -> None:
    messages = set()
    for address in ("127.0.0.1", "10.11.12.13"):  # the server of this test is at one of them
        web.names[HOST] = [[address]]
        with pytest.raises(Unprocessable) as caught:
            web.get(f"http://{HOST}/")
        messages.add(str(caught.value))
    assert len(messages) == 1 and "127" not in messages.pop()


def test_an_allowed_host_that_is_an_internal_address_is_refused(web: Web) -> None:
    web.names["127.0.0.1"] = [["127.0.0.1"]]
    refused(web, "http://127.0.0.1/", "not at public addresses only", allow_hosts=["127.0.0.1"])


def test_a_name_that_rebinds_is_asked_once(web: Web) -> None:
    web.names[HOST] = [[PUBLIC], ["127.0.0.1"]]
    web.pages["/x"] = page(b"x")
    assert web.get(f"http://{HOST}/x") == b"x"
    assert web.asked == [HOST] and web.connected == [(PUBLIC, 80, None)]


def test_a_name_that_rebinds_in_a_redirect_is_refused(web: Web) -> None:
    web.names[HOST] = [[PUBLIC], ["127.0.0.1"]]
    web.pages["/x"] = redirect("/y")
    refused(web, f"http://{HOST}/x", "not at public addresses only")
    assert len(web.connected) == 1


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1/", "127.0.0.1:80 is not one"),
        ("http://169.254.169.254/latest/meta-data", "is not one"),
        ("http://[::ffff:10.0.0.1]/", "is not one"),
        ("http://2130706433/", "is a number"),
        ("http://evil.example/", "evil.example:80 is not one"),
        ("file:///etc/passwd", "does not begin with http"),
        ("gopher://images.example:80/", "does not begin with http"),
        ("http://user:pass@images.example/", "user name"),
        ("//images.example:22/", "images.example:22 is not one"),
    ],
)
def test_redirects_that_are_not_followed(web: Web, location: str, message: str) -> None:
    web.pages["/x"] = redirect(location)
    refused(web, f"http://{HOST}/x", message)
    assert len(web.connected) == 1


def test_redirects_without_end(web: Web) -> None:
    web.pages["/x"] = redirect("/x", "307 Temporary Redirect")
    refused(web, f"http://{HOST}/x", "more than 5 redirects")
    assert len(web.connected) == 6


def test_a_stream_to_an_address_resolves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(*args: Any, **options: Any) -> Any:
        raise AssertionError(args)

    async def connected() -> str:
        async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            monkeypatch.setattr(socket, "getaddrinfo", resolved)
            _, writer = await fetching._connect("127.0.0.1", port, None)
            writer.close()
            return writer.get_extra_info("peername")[0]

    assert asyncio.run(connected()) == "127.0.0.1"


def test_scopes_of_addresses_are_kept_and_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    infos = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (PUBLIC6, 80, 0, 3)), (2, 1, 6, "", (PUBLIC, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: infos)
    assert asyncio.run(fetching._resolve(HOST, 80)) == [f"{PUBLIC6}%3", PUBLIC]


def test_proxies_of_the_environment_are_not_asked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    web.pages["/x"] = page(b"x")
    assert web.get(f"http://{HOST}/x") == b"x"
    assert web.requests[0].startswith("GET /x HTTP/1.1")


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "status", ["404 Not Found", "206 Partial Content", "304 Not Modified", "500 Oops", "302 Found"]
)
def test_anything_but_200_is_refused(web: Web, status: str) -> None:
    web.pages["/x"] = page(b"", status=status)
    refused(web, f"http://{HOST}/x", f"{HOST} answered {status[:3]}; 200 is wanted")


def test_an_image_as_large_as_the_limit(web: Web) -> None:
    web.pages["/x"] = page(b"x" * 1000)
    assert len(web.get(f"http://{HOST}/x")) == 1000


@pytest.mark.parametrize(
    "answer",
    [
        page(b"x" * 1001),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
    ],
    ids=["sent", "announced", "unannounced", "chunked"],
)
def test_larger_images_are_refused(web: Web, answer: bytes) -> None:
    web.pages["/x"] = answer
    with pytest.raises(TooLarge, match=f"the image at {HOST} has more than 1000 bytes"):
        web.get(f"http://{HOST}/x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (page(b"x", "Content-Encoding: gzip"), "compressed its answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "did not answer as a web server does"),
        (b"", "did not answer as a web server does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut", "did not answer as a web server does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n", "did not answer as a web server does"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "did not answer as a web server does"),
    ],
    ids=["gzip", "ssh", "nothing", "cut", "two lengths", "endless header"],
)
def test_answers_that_are_not_read(web: Web, answer: bytes, message: str) -> None:
    web.pages["/x"] = answer
    refused(web, f"http://{HOST}/x", message)


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b".")
        await writer.drain()
        await asyncio.sleep(0.02)


async def informs(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def sleeps(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(1)


@pytest.mark.parametrize("answer", [drip, informs, sleeps])
def test_one_deadline_for_all_of_it(web: Web, answer: Page) -> None:
    web.pages["/x"] = answer
    refused(web, f"http://{HOST}/x", "had not come after 0.2 s. Send its bytes", seconds=0.2)


def test_the_deadline_holds_for_names_too(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(5)
        return [PUBLIC]

    monkeypatch.setattr(fetching, "_resolve", slow)
    refused(web, f"http://{HOST}/x", "had not come after 0.1 s", seconds=0.1)


def test_hosts_that_are_nowhere_or_silent(web: Web) -> None:
    web.dead.add(PUBLIC)
    refused(web, f"http://{HOST}:443/", f"{HOST} takes no connection on port 443")
    web.names[HOST] = [[]]
    refused(web, f"http://{HOST}/", f"the host {HOST} has no address")


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tls(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The pages have a certificate of images.example, which is trusted."""
    pytest.importorskip("cryptography", reason="certificates are made with it")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "both.pem"
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, *private) + certificate.public_bytes(serialization.Encoding.PEM)
    )
    web.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    web.tls.load_cert_chain(pem)
    monkeypatch.setattr(fetching, "_tls", lambda: ssl.create_default_context(cafile=pem))
    return web


def test_https_proves_the_name(tls: Web) -> None:
    tls.pages["/x"] = page(b"x")
    assert tls.get(f"https://{HOST}/x") == b"x"
    assert tls.connected == [(PUBLIC, 443, HOST)]


def test_another_names_certificate_is_refused(tls: Web) -> None:
    refused(tls, "https://cdn.example:8443/x", "cdn.example does not prove that it is cdn.example: .*mismatch")


def test_a_stranger_is_refused(tls: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_tls", ssl.create_default_context)
    refused(tls, f"https://{HOST}/x", f"{HOST} does not prove that it is {HOST}: self.signed certificate")


def test_a_redirect_to_what_is_no_url_is_refused(web: Web) -> None:
    web.pages["/old"] = redirect("http://[cdn/x")
    refused(web, f"http://{HOST}/old", rf"{HOST} leads to 'http://\[cdn/x', which is not a URL: Invalid IPv6 URL\.")
