"""What stands before every request, over real sockets: what is let through, what is answered instead, and when."""

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="opsin[serve] is not installed")
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from opsin.serve import guard as guarding
from opsin.serve.guard import Guard, Protocol
from opsin.serve.metrics import Metrics
from opsin.serve.settings import Settings


class Told(Metrics):
    """Keeps what it was told of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[dict[str, Any]] = []

    def request(self, **told: Any) -> None:
        super().request(**told)
        self.requests.append(told)


class Fleet:
    arriving = 0


class Guarded(NamedTuple):
    """A running server, with an application that does little."""

    port: int
    app: FastAPI
    server: uvicorn.Server
    metrics: Told

    @property
    def fleet(self) -> Fleet:
        return self.app.state.fleet

    def talk(self, *parts: bytes | float) -> list["Answer"]:
        return talk(self.port, *parts)

    def told(self, count: int = 1) -> list[dict[str, Any]]:
        """What the metrics were told, once there were so many requests."""
        until(lambda: len(self.metrics.requests) >= count)
        return self.metrics.requests


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # by names in lower case
    body: bytes

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]


def application() -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.state.fleet = Fleet()

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    @app.post("/early")
    async def early() -> Response:
        return JSONResponse({"error": "not now"}, 429)

    @app.post("/swallow")
    async def swallow(request: Request) -> Response:
        with contextlib.suppress(Exception):
            await request.body()
        return Response(b"all is well")

    @app.get("/boom")
    async def boom() -> Response:
        raise RuntimeError("a secret")

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(30_000_000))

    @app.api_route("/models/{model:path}", methods=["GET", "POST"])
    async def model(model: str, request: Request) -> Response:
        return JSONResponse({"state": {name: str(value) for name, value in request.scope["state"].items()}})

    return app


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "LINGER_SECONDS", 0.3)


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[..., Guarded]]:
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(**settings: Any) -> Guarded:
            app, metrics = application(), Told()
            app.middleware_stack = Guard(app.build_middleware_stack(), Settings(**settings), metrics)
            server = uvicorn.Server(
                uvicorn.Config(app, port=0, http=Protocol, log_level="error", timeout_graceful_shutdown=5)
            )
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            until(lambda: server.started)
            return Guarded(server.servers[0].sockets[0].getsockname()[1], app, server, metrics)

        yield start


@pytest.fixture
def guarded(servers: Callable[..., Guarded]) -> Callable[..., Guarded]:
    """`guarded(**settings)` → a server with them; those of the tests before have let it go."""

    def found(**settings: Any) -> Guarded:
        server = servers(**settings)
        state = server.server.server_state
        until(lambda: not state.connections and not state.tasks)
        server.metrics.requests.clear()
        return server

    return found


def until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be so"
        time.sleep(0.005)


def talk(port: int, *parts: bytes | float) -> list[Answer]:
    """Send, sleep for the numbers among the parts, and read until the server closes; then what it answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                if isinstance(part, bytes):
                    connection.sendall(part)
                else:
                    time.sleep(part)
        return answers(read_all(connection))


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return received


def answers(received: bytes) -> list[Answer]:
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", "0"))
        found.append(Answer(int(first.split()[1]), headers, received[:length]))
        received = received[length:]
    return found


def request(method: str, path: str, *headers: str, body: bytes = b"", close: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: here", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


# ── the id of a request ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clients_id_is_kept_if_it_is_safe(guarded: Callable[..., Guarded]) -> None:
    server = guarded()
    for given in ("abc-1_2.3", "x" * 64):
        (answer,) = server.talk(request("GET", "/models/a", f"X-Request-ID: {given}"))
        assert answer.headers["x-request-id"] == given == json.loads(answer.body)["state"]["request_id"]


@pytest.mark.parametrize("given", ["x" * 65, "a b", 'a"b', "é", "a;b", ""])
def test_another_id_is_replaced(guarded: Callable[..., Guarded], given: str) -> None:
    (answer,) = guarded().talk(request("GET", "/models/a", f"X-Request-ID: {given}"))
    assert answer.headers["x-request-id"] != given and len(answer.headers["x-request-id"]) == 16


def test_every_answer_has_an_id(guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture) -> None:
    server = guarded(max_body_bytes=5)
    wanted = {"/models/a": 200, "/nowhere": 404, "/echo": 405, "/boom": 500, "/%00": 400}
    ids = set()
    for path, status in wanted.items():
        (answer,) = server.talk(request("GET", path))
        assert answer.status == status and answer.headers["x-content-type-options"] == "nosniff"
        ids.add(answer.headers["x-request-id"])
    (answer,) = server.talk(request("POST", "/echo", body=b"123456"))
    ids.add(answer.headers["x-request-id"])
    assert len(ids) == 6


def test_an_error_of_ours_is_in_the_log_under_its_id_and_not_in_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a secret")

    sent = ask(fails, headers=[(b"x-request-id", b"mine")])
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"] == "an error of our own; the log has it, under this id."
    assert "request mine" in caplog.text and "a secret" in caplog.text


def test_the_state_of_a_request_is_its_own() -> None:
    shared = {"lifespan": "theirs"}
    states = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["error"] = "mine"
        states.append(scope["state"])
        await Response()(scope, receive, send)

    for _ in range(2):
        ask(app, state=shared)
    assert shared == {"lifespan": "theirs"}
    assert [state["lifespan"] for state in states] == ["theirs", "theirs"]
    assert states[0]["request_id"] != states[1]["request_id"]


def ask(app: Any, *, headers: list[tuple[bytes, bytes]] | None = None, **scope: Any) -> list[Any]:
    """What a guarded application sends, without a server."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    default = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": headers or []}
    asyncio.run(Guard(app, Settings(), Told())(default | scope, receive, send))
    return sent


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

KEYS = ("sesame", "schlüssel")


@pytest.mark.parametrize(
    "header",
    ["Authorization: Bearer sesame", "authorization: bearer  sesame ", "X-API-Key: sesame", "x-api-key: schlüssel"],
)
def test_a_key_opens(guarded: Callable[..., Guarded], header: str) -> None:
    line = header.encode().decode("latin-1")  # the bytes of UTF-8
    (answer,) = guarded(api_keys=KEYS).talk(request("GET", "/models/a", line))
    assert answer.status == 200


def test_one_of_two_keys_is_enough(guarded: Callable[..., Guarded]) -> None:
    (answer,) = guarded(api_keys=KEYS).talk(
        request("GET", "/models/a", "Authorization: Bearer no", "X-API-Key: sesame")
    )
    assert answer.status == 200


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("Accept: */*", "a key is wanted. Send `Authorization: Bearer KEY` or `X-API-Key: KEY`"),
        ("Authorization: Basic c2VzYW1l", "a key is wanted"),
        ("Authorization: sesame", "a key is wanted"),
        ("Authorization: Bearer", "is not one of this server's"),
        ("Authorization: Bearer sesam", "is not one of this server's. Ask its operator"),
        ("X-API-Key: Sesame", "is not one of this server's"),
        ("X-API-Key: schl\xfcssel", "is not one of this server's"),  # the bytes of Latin-1
        ("X-API-Key: \xff\xfe", "is not one of this server's"),
        ("X-API-Key: ", "is not one of this server's"),
        ("X-API-Key: " + "x" * 9000, "is not one of this server's"),
    ],
)
def test_without_a_right_key_nothing_is_read(guarded: Callable[..., Guarded], header: str, message: str) -> None:
    server = guarded(api_keys=KEYS)
    (answer,) = server.talk(request("POST", "/echo", header, body=b"x"))
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert message in answer.error and "sesam" not in answer.error
    assert server.told()[0]["error"] == "unauthorized"


def test_all_keys_are_compared(guarded: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest

    def counted(key: bytes, given: bytes) -> bool:
        compared.append((len(key), len(given)))
        return compare(key, given)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    guarded(api_keys=("a", "bb", "ccc")).talk(request("GET", "/models/a", "X-API-Key: a"))
    assert compared == [(32, 32)] * 3


def test_an_empty_key_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="an API key is empty. Give each at least one character"):
        Settings(api_keys=("sesame", ""))


def test_what_is_open_without_a_key(serve: Callable[..., str]) -> None:
    port = port_of(serve(api_keys=KEYS))
    for path in ("/", "/livez", "/readyz", "/health", "/metrics", "/static/none.js"):
        for method in ("GET", "HEAD"):
            assert talk(port, request(method, path))[0].status != 401, path
    for path in ("/v2", "/v2/health/live", "/v1/models", "/models/org/tiny", "/openapi.json", "/static", "/nowhere"):
        assert talk(port, request("GET", path))[0].status == 401, path
    for path in ("/", "/livez", "/static/none.js", "/classify"):
        assert talk(port, request("POST", path, body=b"x"))[0].status == 401, path
    assert talk(port, request("OPTIONS", "/"))[0].status == 401


def test_a_refusal_is_written_as_its_protocol_does(serve: Callable[..., str]) -> None:
    (answer,) = talk(port_of(serve(api_keys=KEYS)), request("GET", "/v1/models"))
    error = json.loads(answer.body)["error"]
    assert error["code"] == 401 and error["type"] == "unauthorized" and error["message"].startswith("a key is wanted")


# ── bodies ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CHUNKED = "Transfer-Encoding: chunked"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def test_a_body_within_the_limit_keeps_the_connection(guarded: Callable[..., Guarded]) -> None:
    server = guarded(max_body_bytes=500)
    chunks = chunk(b"a" * 300) + chunk(b"b" * 200) + chunk(b"")
    first, second, third = server.talk(
        request("POST", "/echo", body=b"c" * 500, close=False),
        0.05,
        request("POST", "/echo", CHUNKED, close=False) + chunks,
        0.05,
        request("POST", "/echo", body=b"d"),
    )
    assert [answer.status for answer in (first, second, third)] == [200, 200, 200]
    assert (first.body, second.body, third.body) == (b"c" * 500, b"a" * 300 + b"b" * 200, b"d")
    assert "connection" not in first.headers


def test_an_announced_body_over_the_limit_is_not_read(guarded: Callable[..., Guarded]) -> None:
    server = guarded(max_body_bytes=500)
    (answer,) = server.talk(request("POST", "/echo", "Content-Length: 501"))
    assert answer.status == 413 and answer.headers["connection"] == "close"
    assert answer.error == "the body has 501 bytes; at most 500 are read. Send smaller images, or fewer at a time."
    assert server.told()[0]["error"] == "too_large"


@pytest.mark.parametrize(("path", "status"), [("/echo", 413), ("/early", 429)])
def test_a_client_that_sends_all_before_it_reads_sees_the_answer(
    guarded: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch, path: str, status: int
) -> None:
    monkeypatch.setattr(guarding, "LINGER_SECONDS", 5)
    server = guarded(max_body_bytes=20_000_000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request("POST", path, body=bytes(20_000_000 + (status == 413)), close=False))
        (answer,) = answers(read_all(connection))
    assert answer.status == status and answer.headers["connection"] == "close"


def test_a_chunked_body_is_counted_as_it_comes(guarded: Callable[..., Guarded]) -> None:
    server = guarded(max_body_bytes=500)
    (answer,) = server.talk(
        request("POST", "/echo", CHUNKED), chunk(bytes(400)), 0.05, chunk(bytes(101)), chunk(bytes(9)), chunk(b"")
    )
    assert answer.status == 413 and answer.headers["connection"] == "close"
    assert "bytes and more; at most 500 are read" in answer.error


def test_a_refusal_is_answered_whatever_the_application_makes_of_it(guarded: Callable[..., Guarded]) -> None:
    (answer,) = guarded(max_body_bytes=5).talk(request("POST", "/swallow", CHUNKED), chunk(b"123456"), chunk(b""))
    assert answer.status == 413


@pytest.mark.parametrize("path", ["/echo", "/early", "/nowhere"])
def test_a_client_that_sends_on_is_cut_off(guarded: Callable[..., Guarded], path: str) -> None:
    server = guarded(max_body_bytes=500)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request("POST", path, CHUNKED))
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 5:
                connection.sendall(chunk(bytes(100)))
                time.sleep(0.005)
    assert time.monotonic() < began + 4
    until(lambda: not server.server.server_state.connections)
    assert server.told()[0]["status"] in (413, 429, 404) and server.told()[0]["seconds"] < 0.2


@pytest.mark.parametrize("length", ["-1", "5x", "", "0x10", "1_000", "٣"])
def test_a_length_that_is_no_number(length: str) -> None:
    sent = ask(application(), method="POST", headers=[(b"content-length", length.encode())])
    assert sent[0]["status"] == 400
    assert "it must be a number of bytes" in json.loads(sent[1]["body"])["error"]


def test_a_length_of_many_digits() -> None:
    sent = ask(application(), method="POST", headers=[(b"content-length", b"9" * 6000)])
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("parts", [(), (b"half",), (b"dr", 0.3, b"ip", 0.3, b"s")])
def test_a_late_body(guarded: Callable[..., Guarded], parts: tuple[Any, ...]) -> None:
    server = guarded(body_seconds=1)
    (answer,) = server.talk(request("POST", "/echo", "Content-Length: 1000", close=False), *parts)
    assert answer.status == 408 and answer.headers["connection"] == "close"
    count = sum(len(part) for part in parts if isinstance(part, bytes))
    assert f"the body was not complete after 1 s; {count} bytes had come" in answer.error
    assert server.told()[0]["error"] == "timeout" and 0.9 < server.told()[0]["seconds"] < 3


def test_an_aborted_upload_is_no_error_of_ours(
    guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture
) -> None:
    server = guarded()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request("POST", "/echo", "Content-Length: 1000") + b"half")
        until(lambda: server.fleet.arriving == 1)
    (told,) = server.told()
    assert (told["status"], told["error"]) == (400, "client_left")
    assert server.fleet.arriving == 0 and not caplog.records


def test_arriving_is_counted_while_a_body_is(guarded: Callable[..., Guarded]) -> None:
    server = guarded(max_body_bytes=500)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request("POST", "/echo", "Content-Length: 5") + b"12")
        until(lambda: server.fleet.arriving == 1)
        connection.sendall(b"345")
        assert answers(read_all(connection))[0].body == b"12345"
    assert server.fleet.arriving == 0
    for sent in (
        request("POST", "/early", body=b"x"),
        request("POST", "/echo", body=bytes(501)),
        request("POST", "/nowhere", body=b"x"),
        request("POST", "/echo", CHUNKED) + chunk(bytes(501)),
        request("POST", "/echo"),
        request("GET", "/models/a"),
    ):
        assert len(server.talk(sent)) == 1
    server.told(7)
    assert server.fleet.arriving == 0


def test_after_its_answer_a_request_is_not_arriving(guarded: Callable[..., Guarded]) -> None:
    server = guarded()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request("POST", "/early", "Content-Length: 5"))
        assert connection.recv(65536).startswith(b"HTTP/1.1 429")
        assert server.server.server_state.tasks and server.fleet.arriving == 0


# ── other sites, and the browser ─────────────────────────────────────────────────────────────────────────────────────

PREFLIGHT = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")


def test_other_sites_may_not_by_default(guarded: Callable[..., Guarded]) -> None:
    server = guarded()
    for sent in (request("GET", "/models/a", "Origin: http://a.example"),
                 request("OPTIONS", "/models/a", "Origin: http://a.example", *PREFLIGHT)):  # fmt: skip
        (answer,) = server.talk(sent)
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("origins", "allowed"), [(("http://a.example",), "http://a.example"), (("*",), "*")])
def test_sites_that_are_named_may(guarded: Callable[..., Guarded], origins: tuple[str, ...], allowed: str) -> None:
    server = guarded(cors_origins=origins, api_keys=KEYS)
    (answer,) = server.talk(request("OPTIONS", "/models/a", "Origin: http://a.example", *PREFLIGHT))
    assert answer.status == 204 and answer.headers["access-control-allow-origin"] == allowed
    assert "Authorization" in answer.headers["access-control-allow-headers"]
    assert "POST" in answer.headers["access-control-allow-methods"] and "x-request-id" in answer.headers
    for key, status in (("sesame", 200), ("no", 401)):
        (answer,) = server.talk(request("GET", "/models/a", "Origin: http://a.example", f"X-API-Key: {key}"))
        assert answer.status == status and answer.headers["access-control-allow-origin"] == allowed
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["http://b.example", "https://a.example", "http://a.example:81", "null", "\xff"])
def test_other_sites_may_not(guarded: Callable[..., Guarded], origin: str) -> None:
    server = guarded(cors_origins=("http://a.example/",))
    (answer,) = server.talk(request("GET", "/models/a", f"Origin: {origin}"))
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers
    (answer,) = server.talk(request("OPTIONS", "/models/a", f"Origin: {origin}", *PREFLIGHT))
    assert answer.status == 400 and "may not use this server; see its --cors-origin" in answer.error


def test_the_page_may_load_from_nowhere_else(serve: Callable[..., str]) -> None:
    port = port_of(serve())
    policy = talk(port, request("GET", "/"))[0].headers["content-security-policy"]
    for part in ("default-src 'self'", "img-src 'self' blob: data:", "frame-ancestors 'none'"):
        assert part in policy
    assert "content-security-policy" not in talk(port, request("GET", "/livez"))[0].headers


# ── metrics and log ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_know_routes_not_paths(guarded: Callable[..., Guarded]) -> None:
    server = guarded()
    server.talk(request("GET", "/models/org/tiny"))
    server.talk(request("GET", "/models/org%2Fother"))
    server.talk(request("GET", "/nowhere/17"))
    told = [(each["route"], each["status"], each["error"]) for each in server.told(3)]
    assert told == [("/models/{model:path}", 200, None)] * 2 + [("unmatched", 404, None)]


def test_metrics_are_told_of_refusals_by_the_application(serve: Callable[..., str]) -> None:
    port = port_of(serve())
    talk(port, request("GET", "/nowhere"))
    (answer,) = talk(port, request("GET", "/metrics"))
    assert b'opsin_errors_total{type="not_found"} 1.0' in answer.body


def test_the_log_has_one_line_for_a_request(guarded: Callable[..., Guarded], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "opsin.serve.access")
    server = guarded()
    server.talk(
        request("POST", "/models/org/%E7%8C%AB?api_key=sesame", "X-Request-ID: mine", "X-API-Key: k", body=b"pixels")
    )
    server.talk(request("GET", f"/{'x' * 10_000}"))
    server.talk(request("GET", "/a%0Ab%1B[31m%7F"))
    server.told(3)
    first, second, third = (json.loads(record.getMessage()) for record in caplog.records)
    assert first.pop("time").endswith("+00:00") and first.pop("ms") > 0
    assert first == {
        "id": "mine", "method": "POST", "path": "/models/org/猫", "status": 200, "bytes_in": 0, "model": "org/猫",
    }  # fmt: skip
    assert second["path"] == "/" + "x" * 199 and second["status"] == 404
    assert third["path"] == "/a\nb\x1b[31m\x7f" and third["error"] == "validation"
    for record in caplog.records:
        assert record.getMessage().isprintable() and record.getMessage().isascii()
        assert "sesame" not in record.getMessage() and "pixels" not in record.getMessage()


# ── hostile lines ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hostile_paths_are_no_error_of_ours(serve: Callable[..., str]) -> None:
    port = port_of(serve())
    paths = [
        "/%00", "/models/a%00b", "/static/%00", "/static/../app.js", "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/static/%2e%2e/%2e%2e/etc/passwd", "/../../etc/passwd", "//", "//evil.example/x", "/models/" + "x" * 10_000,
        "/models/%ff%fe", "/models/%C0%AF", "/%", "/%zz", "/models/../../x", "/models/%0d%0aSet-Cookie:x",
        "/v2/models//infer", "/?%ff", "/nowhere?\xff", "/models/a?x=%00", "/;x", "/v1/models/%E2%80%AE", "*",
        "http://evil.example/nowhere", "/v2/models/a/versions/../infer", "/static/", "/static//etc/passwd",
        "/static/c:\\x", "/#x", "/nowhere/\xe9",
    ]  # fmt: skip
    for path in paths:
        for method, body in (("GET", b""), ("POST", b"x")):
            for answer in talk(port, request(method, path, body=body)):
                assert answer.status < 500, (method, path)
                assert b"root:" not in answer.body and "set-cookie" not in answer.headers, path


def test_a_query_that_is_not_ascii_is_refused() -> None:  # uvicorn's parser refuses it before, others do not
    sent = ask(application(), query_string=b"\xff")
    assert sent[0]["status"] == 400 and "Quote it" in json.loads(sent[1]["body"])["error"]


@pytest.mark.parametrize("host", ["[", "a b", "evil.example:99999", "\xff", ""])
def test_hostile_hosts_are_no_error_of_ours(serve: Callable[..., str], host: str) -> None:
    port = port_of(serve())
    for path in ("/nowhere", "/livez/", "/models/a"):
        sent = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1")
        assert talk(port, sent)[0].status < 500


def test_websockets_are_refused(serve: Callable[..., str]) -> None:
    upgrade = (
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: " + "A" * 22 + "==",
    )
    (answer,) = talk(port_of(serve()), request("GET", "/", *upgrade, close=False))
    assert answer.status == 403


# ── before there is a request ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch, guarded: Callable[..., Guarded]) -> Guarded:
    """A server with little patience."""
    monkeypatch.setattr(guarding, "MAX_HEAD_BYTES", 2000)
    monkeypatch.setattr(guarding, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(guarding, "WRITE_SECONDS", 0.2)
    return guarded()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * 2600,
        b"GET / HTTP/1.1\r\nX: " + b"x" * 2000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * 420,
        b"GET /" + b"x" * 2000,
        b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\n\r\n",
        b"\r\n" * 1001,
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a:b\r\n" * 420,
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * 3001,
    ],
    ids=[
        "one header",
        "one header, complete",
        "many",
        "URL",
        "URL, complete",
        "empty lines",
        "trailers",
        "one trailer",
    ],
)
@pytest.mark.parametrize("size", [500, 5000])
def test_large_headers(hasty: Guarded, sent: bytes, size: int) -> None:
    answer = hasty.talk(*(sent[start : start + size] for start in range(0, len(sent), size)))[-1]
    assert (
        answer.status == 431 and answer.headers["connection"] == "close" and len(answer.headers["x-request-id"]) == 16
    )
    assert answer.error == "the headers have more than 2000 bytes."


def test_headers_of_the_size_that_is_read(guarded: Callable[..., Guarded]) -> None:
    server = guarded()
    assert server.talk(request("GET", "/models/a", "X: " + "x" * 64_000))[0].status == 200
    assert server.talk(request("GET", "/models/a", "X: " + "x" * 66_000))[0].status == 431


def test_large_bodies_are_not_taken_for_headers(hasty: Guarded) -> None:
    small = b"".join(chunk(b"%d" % i) for i in range(3000))
    first, second = hasty.talk(
        request("POST", "/echo", CHUNKED, close=False),
        small + chunk(b""),
        0.1,
        request("POST", "/echo", body=bytes(70_000)),
    )
    assert (first.status, second.status) == (200, 200) and len(second.body) == 70_000


@pytest.mark.parametrize(
    "parts",
    [
        (b"G",),
        (b"GET / HTTP/1.1\r\nHost: h\r\n", 0.1, b"a: b\r\n", 0.1, b"c: d\r\n"),
        (b"GET /models/a HTTP/1.1\r\nHost: h\r\n\r\n", 0.05, b"GET / HTTP/1.1\r\n"),
        (b"\r\n",),
    ],
)
def test_late_headers(hasty: Guarded, parts: tuple[Any, ...]) -> None:
    answer = hasty.talk(*parts)[-1]
    assert answer.status == 408 and answer.error == "the headers were not complete after 0.2 s."


def test_a_connection_without_a_request_is_closed(hasty: Guarded) -> None:
    assert hasty.talk() == []


def test_a_request_may_take_longer_than_its_headers(hasty: Guarded) -> None:
    assert hasty.talk(request("POST", "/echo", "Content-Length: 2"), 0.4, b"ok")[0].body == b"ok"


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                                  b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])  # fmt: skip
def test_what_is_not_http(guarded: Callable[..., Guarded], sent: bytes) -> None:
    answer = guarded().talk(sent)[-1]
    assert answer.status == 400 and answer.headers["content-type"] == "application/json"
    assert answer.error == "this is not HTTP/1.1 as it is read here."


def test_a_client_that_does_not_read_is_cut_off(hasty: Guarded) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port)) as connection:
        connection.sendall(request("GET", "/large"))
        hasty.told()
        until(lambda: not hasty.server.server_state.connections and not hasty.server.server_state.tasks)


def test_bodies_that_are_kept_have_a_limit_together(
    guarded: Callable[..., Guarded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarding, "HELD_BODIES", 2)
    server = guarded(max_body_bytes=1000)
    guard: Any = server.app.middleware_stack
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(2)]
        for connection in waiting:
            connection.sendall(request("POST", "/echo", body=bytes(1000))[:-1])
        until(lambda: guard.held_bytes == 1998)
        (answer,) = server.talk(request("POST", "/echo", body=b"123"))
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert answer.error.startswith("the bodies of all requests together are more than this server keeps.")
        for connection in waiting:
            connection.sendall(b"\0")
            assert answers(read_all(connection))[0].status == 200
    until(lambda: guard.held_bytes == 0)
    (answer,) = server.talk(request("POST", "/echo", body=b"123"))
    assert answer.status == 200
