"""What stands before every request: its id, its key, its limits, its line in the log.

    socket ─▶ Protocol ─▶ Guard ─▶ application
              headers     key, origin, body, time

What is wrong with a body is raised where the application reads it, and answered here whatever the application makes of
it. An answer that is given before the body was read closes the connection, but the rest of the body is thrown away for
a while first: closed at once, the client would be told of a broken connection while it sends, and never see the answer.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import random
import re
import time
from asyncio import TimerHandle, Transport
from datetime import datetime, timezone
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from opsin.serve.metrics import Metrics
from opsin.serve.refusals import (
    BadRequest,
    BodyTimeout,
    Failed,
    Overloaded,
    Refusal,
    TooLarge,
    Unauthorized,
    refusal_response,
)
from opsin.serve.settings import Settings

MAX_HEAD_BYTES = 2**16  # of a request's first line and headers, trailers included
FRAME_BYTES = 64  # at most, around each part of a request: the method, the ends of lines, the length of a chunk
HEAD_SECONDS = 10.0  # from a connection's first moment, or a later request's first byte, to the end of the headers
WRITE_SECONDS = 60.0  # that a client may leave an answer unread
HELD_BODIES = 32  # of the size that one may have: so much is kept of all requests together
LINGER_SECONDS = 2.0  # that the rest of a body is thrown away after an early answer

OPEN = frozenset({"/", "/livez", "/readyz", "/health", "/metrics"})  # to be read without a key
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PAGE_POLICY = (
    b"default-src 'self'; img-src 'self' blob: data:; style-src 'self'; media-src 'self' blob:; "
    b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Inference-Header-Content-Length, X-API-Key, "
    "X-Request-ID",
    "Access-Control-Max-Age": "600",  # seconds
}

Headers = dict[bytes, bytes]

log = logging.getLogger(__name__)
access = logging.getLogger("opsin.serve.access")


class Guard:
    """ASGI middleware, for around the whole application: around what answers its unforeseen errors, too."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.held_bytes = 0  # of bodies, until their requests are answered
        self._keys = [_digest(key.encode("utf-8", "surrogateescape")) for key in settings.api_keys]
        self._origins = {origin.rstrip("/").lower().encode() for origin in settings.cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before it was accepted: 403
        else:
            await self.app(scope, receive, send)

    def check(self, scope: Scope, headers: Headers) -> None:
        """
        Raises:
            BadRequest, Unauthorized, TooLarge: why a request is not even read.
        """
        path, query = scope["path"], scope["query_string"]
        if not path.isprintable() or not query.isascii():
            raise BadRequest("the URL has control characters, or others that are not written as %XX. Quote it.")
        if self._keys and not self._is_open(scope):
            self._check_key(headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            raise BadRequest(f"Content-Length is {_shown(length)}; it must be a number of bytes.")
        if len(length) > 18 or int(length) > self.settings.max_body_bytes:
            raise self.too_large(f"{length[:18].decode()} bytes")

    def _is_open(self, scope: Scope) -> bool:
        if scope["method"] in ("GET", "HEAD"):
            return scope["path"] in OPEN or _is_page(scope)
        return is_preflight(scope)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [headers[b"x-api-key"]] if b"x-api-key" in headers else []
        if scheme.lower() == b"bearer":
            given.append(token.strip())
        if not given:
            raise Unauthorized("a key is wanted. Send `Authorization: Bearer KEY` or `X-API-Key: KEY`.")
        # every pair is compared, and in constant time, so that nothing can be learned from how long it takes
        if not sum(hmac.compare_digest(key, digest) for digest in map(_digest, given) for key in self._keys):
            raise Unauthorized("the key is not one of this server's. Ask its operator for one.")

    def too_large(self, size: str) -> TooLarge:
        limit = self.settings.max_body_bytes
        return TooLarge(f"the body has {size}; at most {limit} are read. Send smaller images, or fewer at a time.")

    @property
    def answers_preflights(self) -> bool:
        return bool(self._origins)

    def preflight(self, headers: Headers) -> Response:
        """What a browser is told when it asks whether a page of another site may send a request.

        Raises:
            BadRequest: not one of that site.
        """
        if not self._allowed(headers):
            raise BadRequest(f"pages of {_shown(headers[b'origin'])} may not use this server; see its --cors-origin.")
        return Response(status_code=204, headers=PREFLIGHT)

    def _allowed(self, headers: Headers) -> bytes | None:
        """What of Access-Control-Allow-Origin suits a request; None: nothing does."""
        origin = headers.get(b"origin")
        if b"*" in self._origins:
            return b"*"
        return origin if origin is not None and origin.lower() in self._origins else None

    def headers(self, scope: Scope, headers: Headers) -> list[tuple[bytes, bytes]]:
        """What is added to every answer."""
        found = [(b"x-content-type-options", b"nosniff")]
        if _is_page(scope):
            found.append((b"content-security-policy", PAGE_POLICY))
        if self._origins:
            found.append((b"vary", b"Origin"))
            if allowed := self._allowed(headers):
                found.append((b"access-control-allow-origin", allowed))
                found.append((b"access-control-expose-headers", b"X-Request-ID, Retry-After"))
        return found


def _is_page(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/static/"))


def is_preflight(scope: Scope) -> bool:
    if scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return names >= {b"origin", b"access-control-request-method"}


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _new_id() -> bytes:
    """Of a request: to tell it from others, and no secret."""
    return b"%016x" % random.getrandbits(64)


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))


class _Exchange:
    """One request and its answer."""

    __slots__ = (
        "_answered", "_began", "_body_bytes", "_body_complete", "_closes", "_fleet", "_guard", "_headers", "_id",
        "_receive", "_refusal", "_scope", "_send", "_state", "_status",
    )  # fmt: skip

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard, self._scope, self._receive, self._send = guard, scope, receive, send
        self._began = time.monotonic()
        self._answered = 0.0  # when it was
        self._headers = headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self._id = given if REQUEST_ID.fullmatch(given) else _new_id()
        # a dict of its own: the server's may be one for all requests
        self._state = scope["state"] = {**scope.get("state", {}), "request_id": self._id.decode()}
        self._body_complete = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"
        self._body_bytes = 0
        self._fleet: Any = None  # where this request is counted as arriving
        self._refusal: Refusal | None = None
        self._status = 0  # none is sent yet
        self._closes = False

    async def run(self) -> None:
        try:
            await self._pass()
            if not self._status:
                await self._refuse(self._refusal or Failed("an error of our own; the log has it, under this id."))
        except asyncio.CancelledError:  # the server stops, and waits no longer
            self._status = self._status or 503
            raise
        finally:
            self._guard.held_bytes -= self._body_bytes
            self._arrived()
            self._report()

    async def _pass(self) -> None:
        guard, scope = self._guard, self._scope
        try:
            guard.check(scope, self._headers)
            if guard.answers_preflights and is_preflight(scope):
                await guard.preflight(self._headers)(scope, self._receive, self._deliver)
                return
            self._arrives()
            await guard.app(scope, self._read, self._write)
        except Refusal as refusal:
            self._refusal = refusal
        except Exception:
            if not self._status and self._refusal is None:  # otherwise the application has logged it
                log.exception("request %s", self._id.decode())

    async def _refuse(self, refusal: Refusal) -> None:
        self._state["error"] = refusal.kind
        await refusal_response(self._scope["path"], refusal)(self._scope, self._receive, self._deliver)

    # ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _read(self) -> Message:
        """What the application receives.

        Raises:
            Refusal: the body is late, too large, one too many, or its client has left.
        """
        if self._body_complete:
            return await self._receive()
        try:
            return await self._read_body()
        except Refusal as refusal:
            self._refusal = refusal
            raise

    async def _read_body(self) -> Message:
        settings = self._guard.settings
        try:
            with anyio.fail_after(max(0.0, self._began + settings.body_seconds - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimeout(
                f"the body was not complete after {settings.body_seconds:g} s; {self._body_bytes} bytes had come. "
                "Send smaller images, or fewer at a time."
            ) from None
        if message["type"] == "http.disconnect":
            raise BadRequest("the client left before its body was complete.", kind="client_left")
        length = len(message.get("body", b""))
        self._body_bytes += length
        self._guard.held_bytes += length
        if self._body_bytes > settings.max_body_bytes:
            raise self._guard.too_large(f"{self._body_bytes} bytes and more")
        if self._guard.held_bytes > HELD_BODIES * settings.max_body_bytes:
            raise Overloaded("the bodies of all requests together are more than this server keeps. Try again in 1 s.")
        if not message.get("more_body", False):
            self._body_complete = True
            self._arrived()
        return message

    def _arrives(self) -> None:
        if self._scope["method"] == "POST":
            self._fleet = getattr(self._scope["app"].state, "fleet", None)
            if self._fleet is not None:
                self._fleet.arriving += 1

    def _arrived(self) -> None:
        if self._fleet is not None:
            self._fleet.arriving -= 1
            self._fleet = None

    # ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _write(self, message: Message) -> None:
        """What the application sends; after a refusal, nothing."""
        if self._refusal is None:
            await self._deliver(message)

    async def _deliver(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._arrived()
            self._status = message["status"]
            self._closes = not self._body_complete
            timing = b"app;dur=%.1f" % (1e3 * (time.monotonic() - self._began))
            headers = [*message.get("headers", ()), (b"x-request-id", self._id), (b"server-timing", timing)]
            headers += self._guard.headers(self._scope, self._headers)
            if self._closes:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif not message.get("more_body", False):
            self._answered = time.monotonic()
            if self._closes:
                await self._send({**message, "more_body": True})
                await self._linger()
                message = {"type": "http.response.body"}
        await self._send(message)

    async def _linger(self) -> None:
        with anyio.move_on_after(LINGER_SECONDS):
            more = True
            while more:
                message = await self._receive()
                more = message["type"] == "http.request" and message.get("more_body", False)

    def _report(self) -> None:
        scope, state = self._scope, self._state
        seconds = (self._answered or time.monotonic()) - self._began
        route = getattr(scope.get("route"), "path", "unmatched")
        error, model = state.get("error"), state.get("model") or scope.get("path_params", {}).get("model")
        self._guard.metrics.request(route=route, status=self._status, seconds=seconds, error=error)
        if not access.isEnabledFor(logging.INFO):
            return
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": self._status,
            "ms": round(1e3 * seconds, 3),
            "bytes_in": self._body_bytes,
            "model": model and model[:200],
            "error": error,
        }
        # without the query, which may hold keys; json writes control characters and all that is not ASCII as \uXXXX
        access.info("%s", json.dumps({name: value for name, value in line.items() if value is not None}))


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which by itself waits for headers without end, and keeps all of them.

    Headers of more than `MAX_HEAD_BYTES` are answered 431, such as take longer than `HEAD_SECONDS` 408. Who does not
    read his answer for `WRITE_SECONDS` is cut off.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # of the headers and trailers of the request that is being read
        self._open_bytes = 0  # received, and nothing has come of them: half a header, empty lines
        self._head_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._open_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._open_bytes > MAX_HEAD_BYTES:
            self._head_is_large()
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)  # ": " and the end of the line
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._came(len(body))
        super().on_body(body)

    def _came(self, length: int) -> None:
        self._open_bytes = max(0, self._open_bytes - length - FRAME_BYTES)

    def _count(self, length: int) -> None:
        self._came(length)
        self._head_bytes += length
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("too many headers")  # inside the parser, which ends with `send_400_response`

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            self._head_is_large()
        else:
            self._refuse(400, "validation", "this is not HTTP/1.1 as it is read here.")

    def _head_is_large(self) -> None:
        self._refuse(431, "too_large", f"the headers have more than {MAX_HEAD_BYTES} bytes.")

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.scope is None and not self._open_bytes:
            self.transport.close()  # nothing was asked
        elif not self.transport.is_closing():
            self._refuse(408, "timeout", f"the headers were not complete after {HEAD_SECONDS:g} s.")

    def _refuse(self, status: int, kind: str, message: str) -> None:
        """Answer, and close: the application never hears of it."""
        body = json.dumps({"error": message, "error_type": kind}).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-content-type-options", b"nosniff"),
            (b"x-request-id", _new_id()),
        ]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
