"""The server's process: its socket, workers, signals and log.

    run ─┬─ one worker: serves here
         └─ several: a parent that serves nothing, and processes that share its socket

A signal drains: `/readyz` turns 503; for a while all goes on, but each answer closes its connection, so that clients
and load balancers move away; then nobody new is let in, what was taken is answered, and the process ends.
"""

import asyncio
import contextlib
import ctypes
import errno
import json
import logging
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from ipaddress import ip_address
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from opsin.errors import ModelError
from opsin.serve.app import create_app
from opsin.serve.guard import Protocol
from opsin.serve.health import tell_queues
from opsin.serve.settings import Settings

DONE, NOT_LISTENING, MODEL_FAILED, INTERRUPTED = 0, 1, 4, 130  # exit codes, as of every command
SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048  # connections that wait to be accepted
RECEIVE_BYTES = 2**20  # of a connection, in the kernel: room for a photo, or its end waits 40 ms for an acknowledgement
KEEP_ALIVE_SECONDS = 75  # longer than load balancers keep a connection (60): it is theirs to close
FIRST_REQUEST_SECONDS = 1.0  # that a connection without a request is waited for, once nobody new is let in
RESTART_SECONDS = 0.5  # until a worker that died is replaced; doubled each time, up to a minute
STEADY_SECONDS = 60.0  # one that lived so long is replaced as soon as the first that died

log = logging.getLogger(__name__)


def run(
    settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, workers: int = 1, drain_seconds: float = 1.0
) -> int:
    """Serve until a signal; a second one stops at once. Takes over the log of the process.

    Args:
        settings: models and limits, of each worker.
        host, port: where to listen; 0 takes a free port, and the log says which.
        workers: processes; each has all models, and its share of the cores. Of several, nobody is answered until one
            has its models; one alone says 503 while it loads them.
        drain_seconds: for which connections are still taken after the first signal.
    Returns:
        The exit code: 0 drained, 1 the port cannot be had, 4 a model cannot be loaded, 130 stopped at once.
    """
    log_to_stderr()
    try:
        listener = _listen(host, port)
    except OSError as error:
        log.error("cannot listen on %s: %s", _address(host, port), _advice(error, port))
        return NOT_LISTENING
    with listener:
        url = f"http://{_address(host, listener.getsockname()[1])}"
        log.info("listening on %s: open it in a browser for the page", url, extra={"url": url, "workers": workers})
        if not settings.api_keys and not _is_loopback(host):
            log.warning("%s is open to others, and no key is asked of them: --api-key, OPSIN_SERVE_API_KEY", host)
        if workers == 1:
            return _serve(settings, listener, drain_seconds)
        return _supervise(settings, listener, workers, drain_seconds)


# ── the socket ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _listen(host: str, port: int) -> socket.socket:
    if ":" not in host:
        listener = socket.create_server((host, port), backlog=BACKLOG)
    else:
        both = host == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server((host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=both)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    return listener


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _advice(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"the port is in use. Stop what listens there, or take another: --port {port + 1}."
    if isinstance(error, PermissionError):
        return f"{error.strerror}. Ports below 1024 are the system's: --port 8000."
    return f"{error.strerror}. --host is an address of this machine: 127.0.0.1, or 0.0.0.0 for all that it has."


def _let_nobody_in(listener: socket.socket) -> None:
    """Have the kernel drop those who want to connect; who has connected can still be accepted.

    To close a listening socket resets what waits in its queue. This filter, for Linux, lets the queue run empty first:
    it drops packets with SYN among the flags, which are byte 13 of a TCP header. Who is dropped tries again after a
    second, and then finds nobody, or the next server.
    """
    load, jump, end = 0x30, 0x45, 0x06  # of classic BPF: a byte, "if any of these bits", how many bytes pass
    program = [(load, 0, 0, 13), (jump, 0, 1, 0x02), (end, 0, 0, 0), (end, 0, 0, 0xFFFF)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    attach_filter = 26  # SO_ATTACH_FILTER, which Python does not name
    if sys.platform == "linux":
        listener.setsockopt(socket.SOL_SOCKET, attach_filter, struct.pack("HP", len(program), ctypes.addressof(code)))


def _has_unread(descriptor: int) -> bool:
    """Whether bytes, or a connection, wait in the kernel."""
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


# ── one process that serves ──────────────────────────────────────────────────────────────────────────────────────────


def _serve(settings: Settings, listener: socket.socket, drain_seconds: float, parent: int | None = None) -> int:
    server = Server(settings, drain_seconds=drain_seconds, parent=parent)
    server.run([listener])
    code = MODEL_FAILED if server.failed else DONE
    for thread in threading.enumerate():
        if thread.name.startswith("opsin-load"):
            thread.join(0.5)
            if thread.is_alive():
                os._exit(code)  # Python would wait for a model that is being downloaded
    return code


class Server(uvicorn.Server):
    """uvicorn's, which on a signal answers what was taken before it goes.

    uvicorn itself closes the listening socket at once, and with it what waits there; and it closes connections that
    have no request at that moment, also those whose request has been sent but not been read.

    Args:
        settings: the application's.
        drain_seconds: as in `run`.
        parent: process id of the parent of a worker. A worker accepts nobody before its models are loaded, as another
            may have them already; a second signal stops nothing (service managers signal all processes of a group, and
            so does the parent); and it does not outlive its parent.
    """

    def __init__(self, settings: Settings, *, drain_seconds: float, parent: int | None = None) -> None:
        self.app = create_app(settings, on_failure=self._fail)
        self.failed = False
        self._drain_seconds, self._parent = drain_seconds, parent
        super().__init__(
            uvicorn.Config(
                self.app,
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                callback_notify=self._every_second,
                timeout_notify=0,
            )
        )

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, ModelError):  # which the fleet has logged
            log.error("a model could not be loaded", exc_info=error)
        self.failed = self.should_exit = True

    async def _every_second(self) -> None:
        tell_queues(self.app.state)
        if self._parent is not None and os.getppid() != self._parent:
            log.error("the parent process has died; this worker ends")
            self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, does not raise the signal again at the end: the exit code is ours."""
        handled = SIGNALS if self._parent is None else (signal.SIGTERM,)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and self._parent is None:
            os._exit(INTERRUPTED)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        start = self.lifespan.startup

        async def start_and_load() -> None:
            await start()
            while self._parent is not None and self.app.state.fleet.problems and not self.should_exit:
                await asyncio.sleep(0.05)

        self.lifespan.startup = start_and_load
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.draining = True
        if not self.failed:
            log.info("draining: %d connections", len(self.server_state.connections))
            self._announce_end()
            await asyncio.sleep(self._drain_seconds)
        for listener in sockets or []:
            if self._parent is None:
                _let_nobody_in(listener)
            await _empty(listener)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        await self._answer_all()
        while self.server_state.tasks:
            await asyncio.sleep(0.02)
        await self.lifespan.shutdown()
        log.info("drained")

    @property
    def _connections(self) -> list[Any]:
        return list(self.server_state.connections)

    def _announce_end(self) -> None:
        """From now on every answer says that it is the last of its connection."""
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        for connection in self._connections:
            if _is_asked(connection):
                connection.cycle.keep_alive = False

    async def _answer_all(self) -> None:
        """Close each connection once it waits for nothing; `Protocol` and `Guard` end what would take for ever."""
        began = time.monotonic()
        while connections := self._connections:
            seconds = time.monotonic() - began
            for connection in connections:
                if not _is_asked(connection) and not self._may_be_asked(connection, seconds):
                    connection.transport.close()
            await asyncio.sleep(0.02)

    @staticmethod
    def _may_be_asked(connection: Any, seconds: float) -> bool:
        """Whether a request is on its way, as far as it can be seen from here."""
        if connection.cycle is None and seconds < FIRST_REQUEST_SECONDS:
            return True
        begun = connection.scope is not None and (
            connection.cycle is None or connection.cycle.scope is not connection.scope  # that of the request before
        )
        return begun or _has_unread(connection.transport.get_extra_info("socket").fileno())


async def _empty(listener: socket.socket) -> None:
    """Wait until all who were let in are accepted."""
    deadline = time.monotonic() + 1  # where others are let in all the time
    await asyncio.sleep(0.05)  # for handshakes on their way
    while _has_unread(listener.fileno()) and time.monotonic() < deadline:
        await asyncio.sleep(0.005)


def _is_asked(connection: Any) -> bool:
    """Whether a request of it has no answer yet."""
    return connection.cycle is not None and not connection.cycle.response_complete


# ── several processes ────────────────────────────────────────────────────────────────────────────────────────────────


def _work(settings: Settings, listener: socket.socket, drain_seconds: float, parent: int, workers: int) -> None:
    """A worker's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal it comes to the parent too
    log_to_stderr()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    sys.exit(_serve(settings, listener, drain_seconds, parent))


def _supervise(settings: Settings, listener: socket.socket, workers: int, drain_seconds: float) -> int:
    """Keep so many workers running until a signal, which is handed on; a second one ends them at once."""
    context = multiprocessing.get_context("spawn")
    signals: list[int] = []
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in SIGNALS}
    born: dict[BaseProcess, float] = {}  # time.monotonic()
    due = [0.0] * workers  # when those that are missing are to be started
    delay, replaced = RESTART_SECONDS, False

    def start_due() -> None:
        now = time.monotonic()
        while due and min(due) <= now:
            due.remove(min(due))
            arguments = (settings, listener, drain_seconds, os.getpid(), workers)
            process: BaseProcess = context.Process(target=_work, args=arguments, name="opsin-worker")
            process.start()
            born[process] = now

    def take_dead(seconds: float) -> list[tuple[BaseProcess, float]]:
        """Wait so long, or until one ends; those that have, and how long they lived."""
        wait([process.sentinel for process in born], seconds) if born else time.sleep(seconds)
        dead = [process for process in born if not process.is_alive()]
        for process in dead:
            mark_process_dead(process.pid, folder)
        return [(process, time.monotonic() - born.pop(process)) for process in dead]

    with tempfile.TemporaryDirectory(prefix="opsin-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # for the workers: their numbers are summed
        try:
            failed = False
            while not signals and not failed:
                start_due()
                for process, lived in take_dead(0.1):
                    if process.exitcode == MODEL_FAILED and not replaced:
                        failed = True
                        break
                    delay = RESTART_SECONDS if lived > STEADY_SECONDS else delay
                    log.error("a worker ended with exit code %s; the next begins in %g s", process.exitcode, delay)
                    due.append(time.monotonic() + delay)
                    delay, replaced = min(60.0, 2 * delay), True
            for process in born:
                process.terminate()
            closes_at = time.monotonic() + drain_seconds
            while born and len(signals) < 2:
                if time.monotonic() >= closes_at:
                    _let_nobody_in(listener)  # before the workers, which look again and again whether all are in
                take_dead(0.02)
            return INTERRUPTED if born else MODEL_FAILED if failed else DONE
        finally:
            for process in born:
                process.kill()
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
            for number, handler in before.items():
                signal.signal(number, handler)


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────────

OWN_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}  # of every record
MAX_TEXT = 2000  # characters: no image, whatever it is that is logged
ACCESS = "opsin.serve.access"  # the guard's


def log_to_stderr() -> None:
    """All that is logged goes to standard error: as JSON, a line each, or as text on a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(Text() if sys.stderr.isatty() else JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("opsin").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every request that is not HTTP


class JsonLines(logging.Formatter):
    """A record, with the fields of its `extra`, as one line of JSON; what the guard logs is one already."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == ACCESS:
            return record.getMessage()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MAX_TEXT],
            "pid": record.process,
        }
        line |= {name: str(value)[:MAX_TEXT] for name, value in vars(record).items() if name not in OWN_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Text(logging.Formatter):
    """A record for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, logging's name
        if record.name == ACCESS:
            line = json.loads(record.message)
            error = f" {line['error']}" if "error" in line else ""
            record.message = f"{line['method']} {line['path']} {line['status']} {line['ms']:.1f} ms{error}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().formatMessage(record))
