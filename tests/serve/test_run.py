"""The server as a process: what it answers while it ends, what it ends with, what it logs, and several of it."""

import base64
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="opsin[serve] is not installed")
from opsin.cli import output
from opsin.serve import run as running
from opsin.serve.run import _let_nobody_in, run
from opsin.serve.settings import Settings

MARK = b"what-is-in-the-picture"  # behind the end of a JPEG, where no reader minds it
CLIENTS = 36


class Process:
    """`opsin serve` on a free port; its log is a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, env=environment)
        self.port = int(self.wait_for("listening")["url"].rpartition(":")[2])

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the log is JSON."""
        whole, _, _ = self.log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for(self, message: str, count: int = 1) -> dict[str, Any]:
        """The line of the log that has a message for so many times."""
        until = time.monotonic() + 60
        while len(found := [line for line in self.lines() if message in line.get("message", "")]) < count:
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        return found[count - 1]

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.connect()
        return connection

    def get(self, path: str) -> tuple[int, str]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 60
        while self.get("/readyz")[0] != 200:
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture
def start(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`start(*flags)` → a process that serves the tiny model."""
    started = []

    def begin(*flags: str, command: list[str] | None = None) -> Process:
        serve = [sys.executable, "-m", "opsin", "serve", "--model", f"org/tiny={tiny}", "--dtype", "fp32"]
        process = Process((command or serve) + (["--port", "0", *flags] if command is None else []), tmp_path / "log")
        started.append(process.process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` in this process: the log stays pytest's."""
    monkeypatch.setattr(running, "log_to_stderr", lambda: None)


def post_until_refused(server: Process, body: bytes, answers: list[Any], *, keep: bool) -> None:
    """Ask again and again; `answers` gets the statuses, and what was raised after a connection was there."""
    connection = None
    while True:
        try:
            connection = connection or server.connect()
        except ConnectionError:
            return
        try:
            connection.request("POST", "/models/org/tiny", body)
            answer = connection.getresponse()
            answer.read()
            answers.append(answer.status)
            if not keep or answer.getheader("connection") == "close":
                connection.close()
                connection = None
        except (OSError, http.client.HTTPException) as error:
            answers.append(error)
            return


def test_every_accepted_request_is_answered(start: Callable[..., Process], photos: Path) -> None:
    server = start("--drain-seconds", "0.5")
    server.wait_until_ready()
    idle = server.connect()
    idle.request("GET", "/livez")
    idle.getresponse().read()
    body = (photos / "rocket.jpg").read_bytes() + MARK
    answers: list[Any] = []
    clients = [
        threading.Thread(target=post_until_refused, args=(server, body, answers), kwargs={"keep": number % 2 == 0})
        for number in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    while len(answers) < CLIENTS:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    idle.request("GET", "/readyz")
    answer = idle.getresponse()
    assert (answer.status, answer.getheader("connection")) == (503, "close")
    assert "the server is shutting down" in answer.read().decode()
    assert server.get("/livez")[0] == 200  # a new connection
    assert server.process.wait(30) == 0
    idle.close()
    for client in clients:
        client.join()
    assert set(answers) == {200}
    assert server.lines()[-1]["message"] == "drained"
    log = server.log.read_bytes()
    assert MARK not in log and base64.b64encode(body[-30:])[:20] not in log
    assert {"time", "level", "logger", "message", "pid"} <= server.lines()[0].keys()


def test_a_body_on_its_way_is_waited_for_and_a_second_signal_does_not_wait(start: Callable[..., Process]) -> None:
    server = start("--drain-seconds", "0")
    server.wait_until_ready()
    whole, half, new = server.connect(), server.connect(), server.connect()
    for connection in (whole, half):
        connection.putrequest("POST", "/models/org/tiny")
        connection.putheader("Content-Length", "8")
        connection.endheaders(b"half")
    time.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("draining")
    with pytest.raises((ConnectionRefusedError, TimeoutError)):
        while True:
            server.connect().close()
    new.request("GET", "/livez")  # of a connection that was made before, and had asked nothing
    assert new.getresponse().status == 200
    whole.send(b"half")
    assert whole.getresponse().status in (415, 422)  # not an image: an answer
    assert server.process.poll() is None
    assert server.stop() == running.INTERRUPTED
    for connection in (whole, half, new):
        connection.close()


def test_a_model_that_is_still_loading_is_not_waited_for(start: Callable[..., Process]) -> None:
    program = """
import sys, time
import opsin.pipeline
opsin.pipeline.load = lambda *a, **k: time.sleep(100)
from opsin.serve.run import run
from opsin.serve.settings import Settings
sys.exit(run(Settings(), port=0, drain_seconds=0))
"""
    server = start(command=[sys.executable, "-c", program])
    status, body = server.get("/readyz")
    assert (status, "it is loading" in body) == (503, True)
    assert server.stop() == 0


def test_several_workers_share_a_port_and_their_numbers(start: Callable[..., Process], photos: Path) -> None:
    server = start("--workers", "2", "--drain-seconds", "0.2")
    server.wait_until_ready()  # from then on nobody is told that a model is loading, by whichever worker
    body = (photos / "rocket.jpg").read_bytes()

    def ask(count: int) -> None:
        for _ in range(count):
            with contextlib.closing(server.connect()) as connection:
                connection.request("POST", "/models/org/tiny", body)
                assert connection.getresponse().status == 200

    def images() -> float:
        lines = server.get("/metrics")[1].splitlines()
        return float(next(line for line in lines if line.startswith("opsin_images_total")).split()[-1])

    ask(13)
    assert images() == 13  # whichever answers
    server.wait_for("is loaded", 2)
    pids = {line["pid"] for line in server.lines() if "is loaded" in line.get("message", "")}
    assert len(pids) == 2 and server.process.pid not in pids
    environment = Path(f"/proc/{min(pids)}/environ").read_text().split("\0")
    folder = Path(next(line.partition("=")[2] for line in environment if line.startswith("PROMETHEUS_MULTIPROC_DIR=")))
    assert folder.stat().st_mode & 0o777 == 0o700
    os.kill(min(pids), signal.SIGKILL)
    server.wait_for("exit code -9")
    ask(3)  # by the other
    server.wait_for("is loaded", 3)
    ask(4)
    assert images() == 20  # those of the dead one are counted
    answers: list[Any] = []
    clients = [
        threading.Thread(target=post_until_refused, args=(server, body, answers), kwargs={"keep": number % 2 == 0})
        for number in range(11)
    ]
    for client in clients:
        client.start()
    time.sleep(0.3)
    assert server.stop() == 0
    for client in clients:
        client.join()
    assert set(answers) == {200}
    assert sum("drained" in line.get("message", "") for line in server.lines()) == 2
    assert not folder.exists()


def test_workers_without_a_model_end_all(start: Callable[..., Process], tmp_path: Path) -> None:
    server = start("--workers", "2", "--model", str(tmp_path / "nowhere"))
    assert server.process.wait(60) == running.MODEL_FAILED
    assert any("could not be loaded" in line["message"] and line["level"] == "error" for line in server.lines())


def test_a_model_that_cannot_be_loaded(quiet: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(models=(f"cats={tmp_path / 'nowhere'}",))
    assert run(settings, port=0, drain_seconds=60) == running.MODEL_FAILED == output.MODEL_FAILED
    assert "cats could not be loaded: " in caplog.text and "nowhere" in caplog.text


def test_a_port_in_use(quiet: None, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(Settings(), port=port) == running.NOT_LISTENING == output.NOT_WRITTEN
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use. Stop what listens there, or take another: " in (
        caplog.text
    )
    assert f"--port {port + 1}." in caplog.text


def test_an_address_of_another_machine(quiet: None, caplog: pytest.LogCaptureFixture) -> None:
    assert run(Settings(), host="192.0.2.1", port=0) == running.NOT_LISTENING
    assert "--host is an address of this machine: 127.0.0.1, or 0.0.0.0 for all that it has." in caplog.text


@pytest.mark.parametrize(("host", "keys", "warned"), [("0.0.0.0", (), True), ("0.0.0.0", ("k",), False),
                                                      ("127.0.0.1", (), False), ("localhost", (), False)])  # fmt: skip
def test_others_without_a_key_are_warned_of(
    quiet: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str, keys: Any, warned: bool
) -> None:
    monkeypatch.setattr(running, "_serve", lambda *_: 0)
    assert run(Settings(api_keys=keys), host=host, port=0) == 0
    assert (f"{host} is open to others, and no key is asked of them" in caplog.text) is warned


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_who_was_let_in_is_accepted_and_nobody_else_is(family: socket.AddressFamily) -> None:
    with socket.create_server(("127.0.0.1" if family == socket.AF_INET else "::1", 0), family=family) as listener:
        address = listener.getsockname()[:2]
        with socket.create_connection(address, timeout=5) as early:
            early.sendall(b"early")
            _let_nobody_in(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.2)
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(99) == b"early"


def test_a_line_of_the_log_is_json_and_short() -> None:
    record = logging.makeLogRecord(
        {"name": "opsin.x", "levelname": "ERROR", "msg": "%s\n\x1b[31m", "args": ("7" * 9999,), "url": "u"}
    )
    line = running.JsonLines().format(record)
    assert "\n" not in line and "\x1b" not in line and len(line) < 3000
    assert json.loads(line)["url"] == "u"
    record = logging.makeLogRecord({"name": "opsin.x", "msg": "a\x1b[31mb"})
    assert running.Text().format(record).endswith(" a\\x1b[31mb")


def test_a_line_of_the_guard_is_passed_on_and_told_on_a_terminal() -> None:
    line = {"method": "POST", "path": "/classify", "status": 422, "ms": 3.21, "error": "corrupt"}
    record = logging.makeLogRecord({"name": running.ACCESS, "msg": "%s", "args": (json.dumps(line),)})
    assert json.loads(running.JsonLines().format(record)) == line
    assert running.Text().format(record).endswith(" POST /classify 422 3.2 ms corrupt")


def test_a_connection_has_room_for_a_photo_in_the_kernel() -> None:
    with running._listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= running.RECEIVE_BYTES
