"""`opsin serve` under load: its speed beside others, every answer it gives, what a stop loses, what to plan with.

python benchmarks/serve.py load [--seconds 5] [--rounds 5] [--photos 1000]    # beside LitServe, FastAPI, `opsin.bulk`
python benchmarks/serve.py soak [--requests 50000] [--hostile 0.05]           # each answer checked, and each refusal
python benchmarks/serve.py drain [--rounds 20] [--workers 1]                  # SIGTERM under load: is a request lost?
python benchmarks/serve.py capacity [--seconds 5] [--rounds 3]                # by connections, batch, wait and workers

On loopback, with opsin/vit-tiny; wants Linux and opsin[bench]. Each contender is a process of its own, started once;
it is stopped (SIGSTOP) while it is not its turn. The load comes from this process, which shares the cores: its own
part of a core is in each row, as `generator_cores`.
"""

import argparse
import asyncio
import base64
import contextlib
import gc
import gzip
import io
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import uvloop
from PIL import Image

import opsin
from opsin import bulk, checkpoints
from opsin.bench import import_library, machine
from opsin.data.inputs import plan
from opsin.pipeline import DEFAULT_MODEL

sys.path.insert(0, str(Path(__file__).parent))
from folder import PHOTOS, write_photos

from bulk import broken, encoded, good, odd, small_photos

try:  # its workers are processes that look for the class in this file
    from litserve import LitAPI  # type: ignore[import-untyped]
except ImportError:
    LitAPI = object

PHOTO_SIZES = ((640, 480), (320, 240))
CONNECTIONS = (32, 64, 128)  # that a contender is tried with at saturation
WARM_SECONDS = 0.5  # of each turn, that are not counted
WARM_TURN_SECONDS = 2.0  # of a server that was just started: the first batch of each size is slow
START_SECONDS = 120


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Process:
    """A command and its children; `stopped` while it has nothing to do."""

    def __init__(self, name: str, command: Sequence[str], *, talks: bool = False) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115, it is read as long as there is the process
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def _family(self) -> Iterator[tuple[int, list[str]]]:
        """(pid, what /proc/PID/stat has after the name) of each process of its session."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    values = (folder / "stat").read_text().rpartition(")")[2].split()
                    if values[3] == str(self.pid):
                        yield int(folder.name), values

    def cpu_seconds(self) -> float:
        return sum(int(values[11]) + int(values[12]) for _, values in self._family()) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Resident, of all of them."""
        return sum(int(values[21]) for _, values in self._family()) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid, _ in self._family())  # noqa: PTH208

    def threads(self) -> int:
        return sum(int(values[17]) for _, values in self._family())

    def pause(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def end(self) -> None:
        for number in (signal.SIGCONT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Server(Process):
    """One that answers on a port of loopback, from the time that it is made."""

    def __init__(
        self, name: str, command: Sequence[str], *, ready: str, request: Callable[[bytes], bytes] | None = None
    ) -> None:
        """
        Args:
            command: its end is to be the port.
            ready: a path that answers 200 when it is.
            request: the bytes of an image → a request that asks for its label.
        """
        self.port = free_port()
        super().__init__(name, [*command, str(self.port)])
        self.request = request or raw("/")
        deadline = time.monotonic() + START_SECONDS
        while get(self.port, ready) != 200:
            if not self.alive() or time.monotonic() > deadline:
                self.end()
                sys.exit(f"{name} did not come up:\n{self.log()[-3000:]}")
            time.sleep(0.05)


class Runner(Process):
    """The bulk runner in a process of its own; told on its standard input what to run, and for how long."""

    def run(self, how: str, photos: Path, seconds: float) -> float:
        """Images/s."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps([how, str(photos), seconds])}\n".encode())
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} died:\n{self.log()[-3000:]}")
        return json.loads(line)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(port: int, path: str) -> int:
    """Its status; 0: no answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ours(name: str, *options: str) -> Server:
    command = ["-m", "opsin", "serve", *options, "--host", "127.0.0.1", "--port"]
    return Server(name, command, ready="/readyz")


# ── what the others' users write ─────────────────────────────────────────────────────────────────────────────────────


class Twin:
    """The embedded model as timm has it: the same weights, in fp32, and its preprocessing by torchvision."""

    def __init__(self, folder: str) -> None:
        timm: Any = import_library("timm")
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config = timm.data.resolve_model_data_config(self.model)
        self.transform = timm.data.create_transform(**config, is_training=False)
        self.names = json.loads(Path(folder, "names.json").read_text())

    def pixels(self, image: bytes) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(image)).convert("RGB"))

    @torch.inference_mode()
    def predict(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).softmax(-1)

    def labels(self, probabilities: torch.Tensor) -> list[dict[str, Any]]:
        found = zip(*(each.tolist() for each in probabilities.topk(5)), strict=True)
        return [{"label": self.names[k], "score": score} for score, k in found]


class PhotoAPI(LitAPI):
    """As LitServe's guide has it: a file of a form is decoded one by one, and predicted with those that wait."""

    def __init__(self, folder: str, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.threads = folder, threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self.threads)
        self.twin = Twin(self.folder)

    def decode_request(self, request):  # LitServe would take an annotation for the schema of the body
        return self.twin.pixels(request["file"].file.read())

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self.twin.predict(x if x.ndim == 4 else x[None])  # one image, where batches are of one

    def encode_response(self, output: torch.Tensor) -> list[dict[str, Any]]:
        return self.twin.labels(output if output.ndim == 1 else output[0])


def run_litserve(folder: str, *, batch: int, workers: int, fast_queue: bool, port: int) -> None:
    litserve: Any = import_library("litserve")
    threads = max(1, torch.get_num_threads() // workers)
    api = PhotoAPI(folder, threads, max_batch_size=batch, batch_timeout=0.005 if batch > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, fast_queue=fast_queue)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False)


def run_naive(folder: str, *, threads: int, is_async: bool, port: int) -> None:
    import uvicorn
    from fastapi import Body, FastAPI, Request

    twin = Twin(folder)
    app = FastAPI()
    if threads:
        torch.set_num_threads(threads)

    def answer(image: bytes) -> list[dict[str, Any]]:
        return twin.labels(twin.predict(twin.pixels(image)[None])[0])

    if is_async:

        @app.post("/")
        async def classify(request: Request) -> list[dict[str, Any]]:
            return answer(await request.body())
    else:

        @app.post("/")
        def classify_in_a_thread(image: bytes = Body(media_type="image/jpeg")) -> list[dict[str, Any]]:
            return answer(image)

    app.get("/health")(lambda: "ok")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def run_bulk(dtype: str) -> None:
    """The bulk runner, whenever it is told to: images of bytes in memory, or files into a folder of results."""
    classifier = opsin.load(DEFAULT_MODEL, dtype=dtype, device="cpu")
    for line in sys.stdin:
        how, folder, seconds = json.loads(line)
        paths = [str(path) for path in sorted(Path(folder).iterdir())]
        images = [Path(path).read_bytes() for path in paths]
        sum(1 for _ in classifier.stream(images[:64]))
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            if how == "memory":
                count += sum(record["ok"] for record in classifier.stream(images))
            else:
                with tempfile.TemporaryDirectory() as out:
                    parts = bulk.Parts(Path(out), {"task": "classify", "format": "parquet"}, plan(paths), resume=False)
                    bulk.run(classifier, parts, parts.to_do(), batch_size=32)
                count += len(paths)
        print(json.dumps(count / passed), flush=True)


# ── HTTP, no more than is needed to be light ─────────────────────────────────────────────────────────────────────────


class Reply(NamedTuple):
    """Status 0: the connection was closed without an answer."""

    status: int
    head: bytes
    body: bytes


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def raw(path: str, kind: str = "image/jpeg") -> Callable[[bytes], bytes]:
    return lambda image: post(path, image, f"Content-Type: {kind}")


def form(path: str, *parts: tuple[str, str, str, bytes], boundary: str = "parts-are-parted-here") -> bytes:
    """Of (field, file name, type, data)."""
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{file}"\r\n'.encode()
        + f"Content-Type: {kind}\r\n\r\n".encode() + data + b"\r\n"
        for name, file, kind, data in parts
    )  # fmt: skip
    return post(path, body + f"--{boundary}--\r\n".encode(), f"Content-Type: multipart/form-data; boundary={boundary}")


def as_file(path: str) -> Callable[[bytes], bytes]:
    return lambda image: form(path, ("file", "photo.jpg", "image/jpeg", image))


def as_json(path: str, value: Any) -> bytes:
    return post(path, json.dumps(value).encode(), "Content-Type: application/json")


LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One request at a time, to a server that gives the length of its answers, or closes after them."""

    def __init__(self) -> None:
        self._reply: asyncio.Future[Reply] | None = None
        self._received = b""
        self._total: int | None = None
        self.closed = False

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._total is None and (head := self._received.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self._received, 0, head)
            self._total = head + 4 + int(length[1]) if length else sys.maxsize
        if self._total is not None and len(self._received) >= self._total:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._finish()

    def _finish(self) -> None:
        if self._reply is not None and not self._reply.done():
            head, _, body = self._received.partition(b"\r\n\r\n")
            whole = self._total is not None and (len(self._received) >= self._total or self._total == sys.maxsize)
            self._reply.set_result(Reply(int(head[9:12]), head, body) if whole else Reply(0, b"", self._received))

    def expect(self) -> "asyncio.Future[Reply]":
        """The next answer, of a request whose bytes are still to be written, in any way."""
        self._received, self._total = b"", None
        self._reply = asyncio.get_running_loop().create_future()
        if self.closed:
            self._finish()
        return self._reply

    async def ask(self, request: bytes) -> Reply:
        reply = self.expect()
        self.transport.write(request)
        return await reply


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Load:
    """What a turn gave: seconds from each request to its answer, of those answered in the time that is counted."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    samples: dict[int, bytes] = field(default_factory=dict)  # request → its first answer
    generator_cores: float = 0.0
    server_cores: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def add(self, other: "Load") -> None:
        self.generator_cores, self.server_cores = (
            (mine * self.seconds + its * other.seconds) / (self.seconds + other.seconds)
            for mine, its in (
                (self.generator_cores, other.generator_cores), (self.server_cores, other.server_cores),
            )
        )  # fmt: skip
        self.seconds += other.seconds
        self.latencies += other.latencies
        self.samples |= other.samples

    def row(self) -> dict[str, Any]:
        p50, p95, p99 = (round(1e3 * float(p), 2) for p in np.percentile(self.latencies, (50, 95, 99)))
        return {
            "images_per_s": round(self.rate, 1), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99,
            "generator_cores": round(self.generator_cores, 3), "server_cores": round(self.server_cores, 2),
        }  # fmt: skip


clock = time.perf_counter  # uvloop's own is of whole milliseconds


async def closed_loop(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Each connection asks again as soon as it is answered."""
    load, places = Load(seconds), itertools.count()
    begin = clock() + WARM_SECONDS
    end = begin + seconds

    async def client() -> None:
        connection = await connect(port)
        while (asked := clock()) < end:
            place = next(places) % len(requests)
            check(await connection.ask(requests[place]), place, load)
            if begin <= (answered := clock()) <= end:
                load.latencies.append(answered - asked)
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return load


async def open_loop(port: int, requests: Sequence[bytes], rate: float, seconds: float) -> Load:
    """Requests at random times, whatever is still unanswered; a latency begins when its request was due."""
    load, free = Load(seconds), [await connect(port) for _ in range(8)]
    rng = np.random.default_rng(0)
    begin = clock() + WARM_SECONDS

    async def client(place: int, due: float) -> None:
        connection = free.pop() if free else await connect(port)
        check(await connection.ask(requests[place]), place, load)
        if due >= begin:
            load.latencies.append(clock() - due)
        free.append(connection)

    due, tasks = clock(), []
    for number in itertools.count():
        due += rng.exponential(1 / rate)
        if due > begin + seconds:
            break
        await asyncio.sleep(max(0.0, due - clock()))
        tasks.append(asyncio.create_task(client(number % len(requests), due)))
    await asyncio.gather(*tasks)
    for connection in free:
        connection.transport.close()
    return load


def check(reply: Reply, place: int, load: Load) -> None:
    if reply.status != 200:
        raise SystemExit(f"status {reply.status}: {reply.body[:300].decode(errors='replace')}")
    load.samples.setdefault(place, reply.body)


def measured(server: Process, coroutine: Coroutine[Any, Any, Load]) -> Load:
    """In its turn, while the others are stopped."""
    server.resume()
    gc.collect()
    gc.freeze()  # else this process pauses for a fifth of a second, in some turns, to look through torch's modules
    began, cpu, own = time.perf_counter(), server.cpu_seconds(), time.process_time()
    load: Load = uvloop.run(coroutine)
    seconds = time.perf_counter() - began
    load.generator_cores = (time.process_time() - own) / seconds
    load.server_cores = (server.cpu_seconds() - cpu) / seconds
    server.pause()
    return load


def write_sets(folder: Path, count: int) -> dict[str, list[Path]]:
    """The photos in each of the sizes: size → files."""
    (large := folder / "640x480").mkdir()
    (small := folder / "320x240").mkdir()
    write_photos(large, count)
    for path in sorted(large.iterdir()):
        with Image.open(path) as photo:
            photo.resize((320, 240), Image.Resampling.BICUBIC).save(small / path.name, quality=90)
    return {each.name: sorted(each.iterdir()) for each in (large, small)}


def candidates(twin: Path) -> dict[str, list[Callable[[], Server]]]:
    """Contender → the ways to run it, of which the best takes part."""

    def peer(kind: str, **options: Any) -> Callable[[], Server]:
        name = ", ".join([kind, *(f"{key} {value}" for key, value in options.items())])
        command = [__file__, "peer", kind, str(twin), json.dumps(options)]
        request = as_file("/predict") if kind == "litserve" else raw("/")
        return lambda: Server(name, command, ready="/health", request=request)

    cores = torch.get_num_threads()
    workers = sorted({1, cores})
    return {
        "opsin auto": [lambda: ours("opsin auto")],
        "opsin fp32": [lambda: ours("opsin fp32", "--dtype", "fp32")],
        "LitServe fp32": [
            *(peer("litserve", batch=b, workers=w, fast_queue=False) for b in (1, 8, 32) for w in workers),
            peer("litserve", batch=8, workers=cores, fast_queue=True),
        ],
        "FastAPI fp32": [
            peer("naive", threads=0, is_async=False), peer("naive", threads=1, is_async=False),
            peer("naive", threads=0, is_async=True),
        ],
    }  # fmt: skip


class Contender(NamedTuple):
    server: Server
    connections: int  # with which it is fastest


def load(seconds: float, rounds: int, photos: int) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        sets = write_sets(folder, photos)
        checkpoint = checkpoints.read(DEFAULT_MODEL)
        twin = folder / "twin"
        checkpoints.write_as("timm", twin, checkpoint.model, checkpoint.preprocess, checkpoint.labels)
        assert checkpoint.labels is not None
        (twin / "names.json").write_text(json.dumps(checkpoint.labels.names))
        expected = {size: labels_of(paths) for size, paths in sets.items()}

        first = sets["640x480"]
        contenders = {kind: fastest(kind, ways, first, seconds, stack) for kind, ways in candidates(twin).items()}
        runners = {}
        for dtype in ("auto", "fp32"):
            runner = runners[f"bulk {dtype}"] = Runner(f"bulk {dtype}", [__file__, "peer", "bulk", dtype], talks=True)
            stack.callback(runner.end)
            runner.run("memory", first[0].parent, 0.1)
            runner.pause()
        for kind, (server, _) in contenders.items():
            say(contender=kind, idle_cores=idle(server), memory_mb=round(server.memory_bytes() / 1e6))

        for size, paths in sets.items():
            saturation: dict[str, list[Load]] = {kind: [] for kind in contenders}
            bars: dict[str, list[float]] = {f"{kind}, {how}": [] for kind in runners for how in ("memory", "files")}
            requests = {kind: requests_of(each.server, paths) for kind, each in contenders.items()}
            for _ in range(rounds):
                for kind, (server, connections) in contenders.items():
                    turn = closed_loop(server.port, requests[kind], connections, seconds)
                    saturation[kind].append(measured(server, turn))
                for kind, runner in runners.items():
                    for how in ("memory", "files"):
                        runner.resume()
                        bars[f"{kind}, {how}"].append(runner.run(how, paths[0].parent, seconds))
                        runner.pause()
            rates = {kind: [turn.rate for turn in turns] for kind, turns in saturation.items()} | bars
            for kind, turns in saturation.items():
                total = together(turns)
                say(
                    photos=size, contender=kind, load="saturation", connections=contenders[kind].connections,
                    **total.row() | {"images_per_s": round(statistics.median(rates[kind]), 1)},
                    same_label=same(total, expected[size]),
                )  # fmt: skip
            for kind, values in bars.items():
                say(photos=size, contender=kind, images_per_s=round(statistics.median(values), 1))
            ratios(size, rates)

            half = {kind: statistics.median(rates[kind]) / 2 for kind in contenders}
            single: dict[str, list[Load]] = {kind: [] for kind in contenders}
            halves: dict[str, list[Load]] = {kind: [] for kind in contenders}
            for _ in range(rounds):
                for kind, (server, _) in contenders.items():
                    single[kind].append(measured(server, closed_loop(server.port, requests[kind], 1, seconds / 2)))
                for kind, (server, _) in contenders.items():
                    halves[kind].append(measured(server, open_loop(server.port, requests[kind], half[kind], seconds)))
            for kind in contenders:
                alone, at_half = together(single[kind]).row(), together(halves[kind]).row()
                say(photos=size, contender=kind, load="one connection", **alone)
                say(
                    photos=size, contender=kind, load="half, Poisson", offered_per_s=round(half[kind], 1), **at_half,
                    p99_to_single_p50=round(at_half["p99_ms"] / alone["p50_ms"], 2),
                )  # fmt: skip


def fastest(
    kind: str, ways: Sequence[Callable[[], Server]], paths: Sequence[Path], seconds: float, stack: contextlib.ExitStack
) -> Contender:
    """The best of the ways, at its best number of connections; the others are ended."""
    best: tuple[float, Contender] | None = None
    for way in ways:
        server = way()
        stack.callback(server.end)
        requests = requests_of(server, paths)
        measured(server, closed_loop(server.port, requests, CONNECTIONS[0], WARM_TURN_SECONDS))
        for connections in CONNECTIONS:
            turn = measured(server, closed_loop(server.port, requests, connections, seconds / 2))
            say(trial=kind, setting=server.name, connections=connections, images_per_s=round(turn.rate, 1))
            if best is None or turn.rate > best[0]:
                if best is not None and best[1].server is not server:
                    best[1].server.end()
                best = (turn.rate, Contender(server, connections))
        assert best is not None
        if best[1].server is not server:
            server.end()
    assert best is not None
    return best[1]


def requests_of(server: Server, paths: Sequence[Path]) -> list[bytes]:
    return [server.request(path.read_bytes()) for path in paths]


def labels_of(paths: Sequence[Path]) -> list[str]:
    classifier = opsin.load(DEFAULT_MODEL, dtype="fp32", device="cpu")
    return [record["label"] for record in classifier.stream([str(path) for path in paths])]


def same(load: Load, expected: Sequence[str]) -> str:
    """How many of the photos that were sent have the label that opsin has in fp32."""
    right = sum(json.loads(body)[0]["label"] == expected[place] for place, body in load.samples.items())
    return f"{right}/{len(load.samples)}"


def together(turns: Sequence[Load]) -> Load:
    total = Load(0.0)
    for turn in turns:
        total.add(turn)
    return total


def idle(server: Server, seconds: float = 2.0) -> float:
    """Of a core, while nobody asks."""
    server.resume()
    before = server.cpu_seconds()
    time.sleep(seconds)
    used = server.cpu_seconds() - before
    server.pause()
    return round(used / seconds, 3)


def ratios(size: str, rates: Mapping[str, Sequence[float]]) -> None:
    """Medians over the rounds."""
    peers = [kind for kind in rates if not kind.startswith(("opsin", "bulk"))]
    best = max(peers, key=lambda kind: statistics.median(rates[kind]))
    for dtype in ("auto", "fp32"):
        rate, bars = rates[f"opsin {dtype}"], (f"bulk {dtype}, memory", f"bulk {dtype}, files")
        say(
            photos=size, contender=f"opsin {dtype}",
            **{f"to_{kind}": ratio(rate, rates[kind]) for kind in (best, *bars)},
        )  # fmt: skip


def ratio(mine: Sequence[float], its: Sequence[float]) -> float:
    return round(statistics.median(np.divide(mine, its)), 3)


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


# ── capacity ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SETTINGS = (  # --workers, --max-batch, --max-wait-ms
    (1, 32, 2.0), (1, 1, 0.0), (1, 8, 2.0), (1, 128, 2.0), (1, 32, 0.0), (1, 32, 10.0), (2, 32, 2.0),
)  # fmt: skip


def capacity(seconds: float, rounds: int, photos: int) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        paths = write_sets(Path(name), photos)["640x480"]
        servers = {}
        for workers, batch, wait in SETTINGS:
            options = {"--workers": workers, "--max-batch": batch, "--max-wait-ms": wait}
            words = [str(word) for pair in options.items() for word in pair]
            server = servers[workers, batch, wait] = ours(" ".join(words), *words)
            stack.callback(server.end)
            requests = requests_of(server, paths)
            measured(server, closed_loop(server.port, requests, 64, WARM_TURN_SECONDS))
        levels = (1, 4, 16, 64, 256)
        turns: dict[Any, list[Load]] = {key: [] for key in itertools.product(servers, levels)}
        for _ in range(rounds):
            for (setting, connections), found in turns.items():
                server = servers[setting]
                found.append(measured(server, closed_loop(server.port, requests, connections, seconds)))
        for ((workers, batch, wait), connections), found in turns.items():
            memory = round(servers[workers, batch, wait].memory_bytes() / 1e6)
            say(
                workers=workers, max_batch=batch, max_wait_ms=wait, connections=connections, **together(found).row(),
                memory_mb=memory,
            )  # fmt: skip


# ── drain ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CLIENTS = 32  # of which half keep their connections


def drain(rounds: int, workers: int) -> None:
    """What became of each request that was on its way when the server was told to stop.

    answered            with its label
    refused             no connection: the server does not listen any more
    closed_between      a kept connection was closed before the next request was written, or while it was
    unread_kept         it was written to a kept connection, and the server closed that without having read it
    unread_new          likewise on a new connection, which may have been waiting for the server to accept it
    unavailable         503
    lost                it was read and not answered, or in part, or wrongly
    """
    rng = random.Random(0)
    images = [encoded(photo, "JPEG", quality=85) for photo in small_photos(PHOTOS[0].parent, CLIENTS)]
    requests = list(map(raw("/"), images))
    labels = [record["label"] for record in opsin.load(DEFAULT_MODEL, dtype="fp32", device="cpu").stream(images)]
    total: Counter[str] = Counter()
    for number in range(rounds):
        server = ours("opsin", "--dtype", "fp32", "--workers", str(workers))
        stop = threading.Event()
        counts: list[Counter[str]] = [Counter() for _ in range(CLIENTS)]
        clients = [
            threading.Thread(
                target=keep_asking, args=(server.port, requests[i], labels[i], i % 2 == 0, stop, counts[i])
            )
            for i in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        while sum(count["answered"] for count in counts) < CLIENTS and server.alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        before = sum(counts, Counter())
        server.terminate()
        began = time.perf_counter()
        code = server.wait(60)
        seconds = time.perf_counter() - began
        stop.set()
        for client in clients:
            client.join()
        outcome = sum(counts, Counter())
        total += outcome
        said = server.log()
        server.end()
        say(round=number, **outcome, answered_after=outcome["answered"] - before["answered"], exit=code,
            seconds=round(seconds, 2))  # fmt: skip
        assert code == 0 and not outcome["lost"] and before.keys() == {"answered"}, said
    say(rounds=rounds, workers=workers, **total)


def keep_asking(
    port: int, request: bytes, label: str, keeps: bool, stop: threading.Event, outcomes: "Counter[str]"
) -> None:
    while not stop.is_set():
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        except (ConnectionError, TimeoutError):
            outcomes["refused"] += 1
            return
        with connection:
            is_new, goes_on = True, True
            while goes_on and not stop.is_set():
                outcome, goes_on = exchange(connection, request, label, is_new)
                outcomes[outcome] += 1
                is_new, goes_on = False, goes_on and keeps


def exchange(connection: socket.socket, request: bytes, label: str, is_new: bool) -> tuple[str, bool]:
    """(what became of a request, whether the connection is still good)."""
    if select.select([connection], [], [], 0)[0]:  # nothing was asked: it is the end of the connection
        return "closed_between", False
    try:
        connection.sendall(request)
    except ConnectionError:
        return "closed_between", False
    received = b""
    try:
        while (whole := parsed(received)) is None:
            data = connection.recv(65536)
            if not data:
                break
            received += data
    except ConnectionError:  # a reset: closed with bytes that had not been read
        return ("lost" if received else "unread_new" if is_new else "unread_kept"), False
    except TimeoutError:
        return "lost", False
    if whole is None:
        time.sleep(0.01)
        refused = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # it was closed before the request came
        return ("closed_between" if refused and not received else "lost"), False
    goes_on = b"\r\nconnection: close" not in whole.head.lower()
    if whole.status == 503:
        return "unavailable", goes_on
    right = whole.status == 200 and json.loads(whole.body)[0]["label"] == label
    return ("answered" if right else "lost"), goes_on


def parsed(received: bytes) -> Reply | None:
    """None: it is not whole yet."""
    head, end, body = received.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    return Reply(int(head[9:12]), head, body) if end and length and len(body) >= int(length[1]) else None


# ── soak: what is asked, and what must be answered ───────────────────────────────────────────────────────────────────

MODEL = f"/models/{DEFAULT_MODEL}"
INFER = f"/v2{MODEL}/infer"
CHUNKED = "Transfer-Encoding: chunked"
V2_LENGTH = "Inference-Header-Content-Length"
NUM_CLASSES = 200
TOLERANCE = 1e-4  # of scores, and of embeddings by their largest number
LIMITS = {  # small ones, so that they are met
    "--max-body": 9 * 2**20, "--max-pixels": 5_000_000, "--max-items": 32, "--body-seconds": 2,
}  # fmt: skip


class Photo(NamedTuple):
    """An image and its answers by `opsin.load`, in fp32."""

    data: bytes
    best: list[dict[str, Any]]  # five labels
    embedding: np.ndarray
    array: np.ndarray  # uint8 (H, W, 3)
    pixels: bytes  # of float32 (3, 64, 64), normalised

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode()


def photos_of(samples: Sequence[bytes]) -> list[Photo]:
    """Without those whose two best scores are nearly equal: either label would be right."""
    classifier = opsin.load(DEFAULT_MODEL, dtype="fp32", device="cpu")
    found = []
    for data in samples:
        (best,) = classifier([data], top_k=5)
        if best[0]["score"] - best[1]["score"] > 10 * TOLERANCE:
            array, pixels = np.asarray(opsin.decode(data)), classifier.preprocess(data).numpy().astype("<f4")
            found.append(Photo(data, best, classifier.embed([data])[0], array, pixels.tobytes()))
    return found


Answers = tuple[bytes, Callable[[Any], str | None]]  # a request; its JSON, or rows of floats → what is wrong with it


def labels_are(photo: Photo, found: Sequence[Mapping[str, Any]], count: int = 5) -> str | None:
    if len(found) != count or found[0]["label"] != photo.best[0]["label"]:
        return f"{found} for {photo.best[:count]}"
    off = max(abs(row["score"] - best["score"]) for row, best in zip(found, photo.best, strict=False))
    return f"a score is off by {off:.2g}" if off > TOLERANCE else None


def probabilities_are(photo: Photo, row: Any) -> str | None:
    values = np.asarray(row)
    names = {best["index"]: best["label"] for best in photo.best}
    return labels_are(photo, [{"label": names.get(k), "score": values[k]} for k in np.argsort(-values)[:5].tolist()])


def embedding_is(photo: Photo, values: Any) -> str | None:
    off = np.abs(np.asarray(values, np.float32) - photo.embedding).max() / np.abs(photo.embedding).max()
    return f"an embedding is off by {off:.2g}" if off > TOLERANCE else None


def in_base64(values: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values), "<f4")


def floats(outputs: bytes) -> np.ndarray:
    """Of an answer's binary outputs: a row of classes for each image."""
    return np.frombuffer(outputs, "<f4").reshape(-1, NUM_CLASSES)


def all_are(
    check: Callable[[Photo, Any], str | None], photos: Sequence[Photo | None], found: Sequence[Any]
) -> str | None:
    """None among the photos is an image that cannot be read, whose answer is an error."""
    if len(found) != len(photos):
        return f"{len(found)} answers to {len(photos)} images"
    for photo, answer in zip(photos, found, strict=True):
        problem = check(photo, answer) if photo else None if "error" in answer else f"no error, but {answer}"
        if problem:
            return problem
    return None


def files(photos: Sequence[Photo | None]) -> list[tuple[str, str, str, bytes]]:
    return [("files", f"{i}.jpg", "image/jpeg", photo.data if photo else b"no") for i, photo in enumerate(photos)]


def v2(**given: Any) -> bytes:
    """A request with one input; of `outputs`, if they are given."""
    outputs = {"outputs": given.pop("outputs")} if "outputs" in given else {}
    return as_json(INFER, {"inputs": [{"name": "image", "datatype": "UINT8"} | given], **outputs})


def binary(tail: bytes, /, **given: Any) -> bytes:
    """A request with one input, whose bytes follow the JSON."""
    outputs = {"outputs": given.pop("outputs")} if "outputs" in given else {}
    tensor = {"name": "image", "datatype": "UINT8", "parameters": {"binary_data_size": len(tail)}} | given
    head = json.dumps({"inputs": [tensor], **outputs}).encode()
    return post(INFER, head + tail, f"{V2_LENGTH}: {len(head)}", "Content-Type: application/octet-stream")


def packed(images: Iterable[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


IN_BINARY = [{"name": "probabilities", "parameters": {"binary_data": True}}]
AS_CLASSES = [{"name": "probabilities", "parameters": {"classification": 1}}]
ONE: dict[str, Callable[[Photo], Answers]] = {
    "hf raw": lambda p: (raw(MODEL)(p.data), lambda a: labels_are(p, a)),
    "hf raw, %2F": lambda p: (
        raw(f"/models/{DEFAULT_MODEL.replace('/', '%2F')}?top_k=3", "")(p.data), lambda a: labels_are(p, a, 3),
    ),
    "hf json": lambda p: (
        as_json("/", {"inputs": p.base64, "parameters": {"top_k": 2, "function_to_apply": "softmax"}}),
        lambda a: labels_are(p, a, 2),
    ),
    "classify raw": lambda p: (raw("/classify")(p.data), lambda a: labels_are(p, a["results"][0]["topk"])),
    "classify form": lambda p: (
        as_file("/classify?top_k=4")(p.data), lambda a: labels_are(p, a["results"][0]["topk"], 4),
    ),
    "classify json": lambda p: (
        as_json("/classify", {"input": f"data:image/png;base64,{p.base64}"}),
        lambda a: labels_are(p, a["results"][0]["topk"]),
    ),
    "openai base64": lambda p: (
        as_json("/v1/embeddings", {"input": p.base64, "encoding_format": "base64"}),
        lambda a: embedding_is(p, in_base64(a["data"][0]["embedding"])),
    ),
    "v2 uint8 json": lambda p: (
        v2(shape=[1, *p.array.shape], data=[p.array.tolist()]), lambda a: probabilities_are(p, a["outputs"][1]["data"]),
    ),
    "v2 uint8 binary": lambda p: (
        binary(p.array.tobytes(), shape=[1, *p.array.shape], datatype="UINT8", outputs=IN_BINARY),
        lambda a: probabilities_are(p, a[0]),
    ),
    "v2 bytes json": lambda p: (
        v2(shape=[1, 1], datatype="BYTES", data=[[p.base64]]), lambda a: probabilities_are(p, a["outputs"][1]["data"]),
    ),
    "v2 classification": lambda p: (
        v2(shape=[1], datatype="BYTES", data=[p.base64], outputs=AS_CLASSES),
        lambda a: None if a["outputs"][0]["data"][0].endswith(":{index}:{label}".format_map(p.best[0])) else str(a),
    ),
    "v2 raw": lambda p: (post(INFER, p.data, f"{V2_LENGTH}: 0"), lambda a: probabilities_are(p, a[1])),
    "explain": lambda p: (raw("/explain")(p.data), lambda a: labels_are(p, a["best"])),
    "explain form": lambda p: (as_file("/explain")(p.data), lambda a: labels_are(p, a["best"])),
}  # fmt: skip
SEVERAL: dict[str, Callable[[Sequence[Photo]], Answers]] = {
    "openai": lambda ps: (
        as_json("/v1/embeddings", {"model": DEFAULT_MODEL, "input": [f"data:;base64,{p.base64}" for p in ps]}),
        lambda a: all_are(embedding_is, ps, [row["embedding"] for row in a["data"]]),
    ),
    "v2 fp32 binary": lambda ps: (
        binary(b"".join(p.pixels for p in ps), shape=[len(ps), 3, 64, 64], datatype="FP32", outputs=IN_BINARY),
        lambda a: all_are(probabilities_are, ps, a),
    ),
    "v2 bytes binary": lambda ps: (
        binary(packed(p.data for p in ps), shape=[len(ps)], datatype="BYTES", outputs=IN_BINARY),
        lambda a: all_are(probabilities_are, ps, a),
    ),
}
MIXED: dict[str, Callable[[Sequence[Photo | None]], Answers]] = {  # where a bad image is no matter of the others
    "hf json, several": lambda ps: (
        as_json(MODEL, {"inputs": [p.base64 if p else "no" for p in ps]}), lambda a: all_are(labels_are, ps, a),
    ),
    "classify form, several": lambda ps: (
        form("/classify", *files(ps)),
        lambda a: all_are(lambda p, row: labels_are(p, row["topk"]), ps, a["results"]),
    ),
    "embed form, several": lambda ps: (
        form("/embed", *files(ps)),
        lambda a: all_are(lambda p, row: embedding_is(p, row["embedding"]), ps, a["results"]),
    ),
}  # fmt: skip


def ask_of(kind: str, rng: random.Random, photos: Sequence[Photo]) -> Answers:
    """A request of a kind, with random photos."""
    if kind in ONE:
        return ONE[kind](rng.choice(photos))
    several = rng.choices(photos, k=rng.randint(2, 7))
    if kind in SEVERAL:
        return SEVERAL[kind](several)
    place = rng.randrange(len(several))
    return MIXED[kind]([*several[:place], None, *several[place:]])


class Attack(NamedTuple):
    """What a client should not send, and what it must be told."""

    kind: str
    pieces: Sequence[bytes | float]  # bytes, and seconds between them
    statuses: tuple[int, ...]  # that are right; 0: closed without an answer
    says: str  # a pattern in the message
    then: Literal["wait", "abort", "end"] = "wait"  # for the answer; or leave


Case = tuple[str, bytes, int | tuple[int, ...], str]  # name, request, statuses, pattern


def attacks(photo: Photo, image: Image.Image) -> list[Attack]:
    cases = {
        "image": bad_images(photo, image), "json": bad_json(photo), "query": bad_queries(photo),
        "form": bad_forms(photo), "tensor": bad_tensors(photo), "name": bad_names(photo), "http": bad_http(photo),
    }  # fmt: skip
    found = [
        Attack(f"{kind}: {name}", [request], statuses if isinstance(statuses, tuple) else (statuses,), says)
        for kind, of_kind in cases.items()
        for name, request, statuses, says in of_kind
    ]
    return [*found, *bad_clients(photo)]


def bad_images(photo: Photo, image: Image.Image) -> Iterator[Case]:
    told = {
        "corrupt": (422, "damaged or cut short"), "not_an_image": (422, "not an image"), "too_large": (413, "pixels"),
    }  # fmt: skip
    long = zlib.compress(bytes(80_000_000))
    others: dict[str, tuple[bytes, str]] = {
        "gif bomb": (gif_head(65_500), "too_large"),
        "webp bomb": (webp_head(16_000), "too_large"),
        "png bomb that is one": (encoded(Image.new("L", (4000, 4000)), "PNG"), "too_large"),
        "png text bomb": (png_with(b"zTXt", b"Comment\0\0" + long), "corrupt"),
        "png profile bomb": (png_with(b"iCCP", b"icc\0\0" + long), "corrupt"),
        "zip": (b"PK\x03\x04" + bytes(300), "not_an_image"),
        "gzip": (gzip.compress(photo.data), "not_an_image"),
        "mp4": (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(500), "not_an_image"),
        "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(200), "not_an_image"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///x"/></svg>', "not_an_image"),
        "program": (b"\x7fELF\x02\x01\x01" + bytes(500), "not_an_image"),
    }
    files_ = {kind: (sample.data, str(sample.error)) for kind, sample in broken(image).items() if sample.data}
    for kind, (data, error) in (files_ | others).items():
        text = base64.b64encode(data).decode()
        for where, request in {
            "raw": raw(MODEL)(data),
            "form": as_file("/classify")(data),
            "json": as_json("/", {"inputs": text}),
            "openai": as_json("/v1/embeddings", {"input": f"data:image/png;base64,{text}"}),
            "v2": v2(shape=[1], datatype="BYTES", data=[text]),
            "explain": raw("/explain")(data),
        }.items():
            yield f"{kind}, {where}", request, *told[error]
    yield "among several, v2", binary(packed([photo.data, b"no"]), shape=[2], datatype="BYTES"), 422, r"image\[1\]"
    yield "among several, openai", as_json("/v1/embeddings", {"input": [photo.base64, "bm8="]}), 422, r"image\[1\]"


def gif_head(side: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x08\x02\x4c\x01\0;"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + frame


def webp_head(side: int) -> bytes:
    chunk = b"VP8X" + struct.pack("<II", 10, 0) + 2 * struct.pack("<I", side)[:3]
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def png_with(name: bytes, data: bytes) -> bytes:
    """A PNG of 8 × 8 with one more chunk."""
    png = encoded(Image.new("RGB", (8, 8)), "PNG")
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png[:33] + chunk + png[33:]  # behind IHDR


def bad_json(photo: Photo) -> Iterator[Case]:
    texts = (
        ("cut short", b'{"inputs": "abc', 400, "not JSON"),
        ("not utf-8", b'{"inputs": "\xff\xfe"}', 400, "not JSON"),
        ("NaN", b'{"inputs": NaN}', 400, "not JSON"),
        ("deep lists", b"[" * 200_000, 400, "not JSON"),
        ("deep lists, closed", b"[" * 100_000 + b"]" * 100_000, 400, "not JSON"),
        ("deep objects", b'{"a":' * 50_000, 400, "not JSON"),
        ("very deep", b"[" * 3_000_000, 413, "values"),
        ("many values", b"[" + b"1," * 4_100_000 + b"1]", 413, "values"),
        ("many objects", b"[" + b"{}," * 1_100_000 + b"{}]", 413, "values"),
        ("too long", b" " * (LIMITS["--max-body"] + 1), 413, "at most"),
        ("null", b"null", 400, "must be an object"),
        ("large number", b"1e999", 400, "not JSON|must be an object"),
        ("list", b"[[[]]]", 400, "must be an object"),
        ("empty object", b"{}", 400, "inputs?"),
        ("nothing", b"", 400, "empty|not JSON"),
    )
    for (kind, text, status, says), path in itertools.product(texts, ("/", "/classify", "/v1/embeddings", INFER)):
        yield f"{kind}, {path}", post(path, text, "Content-Type: application/json"), status, says

    good = photo.base64
    of_inputs: tuple[tuple[Any, int | tuple[int, ...], str], ...] = (
        (5, 400, "must be a string"), ({"a": 1}, 400, "must be a string"), ([[good]], 400, "must be a string"),
        ([], 400, "list is empty"), ([good] * 33, 413, "more than the 32"), ("", 422, "empty"),
        ("?" * 5000, 422, "not base64"), (good[:-1] + "é", 422, "not base64"), (good[:-3], 422, "base64|cut short"),
        (f"data:image/png,{good}", 422, "base64"), ("data:" + "x" * 3000, 422, "base64"),
        ("file:///etc/passwd", 422, "base64|URL"),
        *((url, (400, 403, 422), "allow") for url in
          ("http://169.254.169.254/latest/meta-data", "https://localhost/x.png", "http://[::1]:1/x", "http://0x7f.1/")),
    )  # fmt: skip
    for value, statuses, says in of_inputs:
        yield f"inputs {str(value)[:20]}", as_json("/", {"inputs": value}), statuses, says
    yield "another name", as_json("/", {"imputs": good}), 400, 'mean "inputs"'
    parameters: tuple[tuple[str, tuple[Any, ...], str], ...] = (
        ("top_k", ("x", -1, 0, 1.5, True, [3], 10**30), '"top_k" is'),
        ("function_to_apply", ("nope", 3), "Known: softmax"),
        ("topk", (3,), 'mean "top_k"'),
    )
    for name, values, says in parameters:
        for value in values:
            body = {"inputs": good, "parameters": {name: value}}
            yield f"{name} {value}", as_json("/", body), 400, says
    yield "parameters", as_json("/", {"inputs": good, "parameters": 7}), 400, "must be an object"
    for path, more, status, says in (
        ("/classify", {"model": "nope"}, 404, 'no model "nope"'),
        ("/classify", {"model": ["x"]}, 400, "must be a string"),
        ("/v1/embeddings", {"model": "../../etc/passwd"}, 404, "no model"),
        ("/v1/embeddings", {"dimensions": 3}, 400, "dimensions"),
        ("/v1/embeddings", {"dimensions": "x" * 9999}, 400, "dimensions"),
        ("/v1/embeddings", {"encoding_format": "hex"}, 400, "Known: float, base64"),
        ("/v1/embeddings", {"modality": "text"}, 400, "modality"),
        ("/v1/embeddings", {"input": [1, 2, 3]}, 400, "Tokens"),
        ("/v1/embeddings", {"input": [[]]}, 400, "must be an image"),
        ("/v1/embeddings", {"input": {"image_url": {"url": {"url": 1}}}}, 400, "must be an image"),
    ):
        yield f"{path} {str(more)[:40]}", as_json(path, {"input": good} | more), status, says


def bad_queries(photo: Photo) -> Iterator[Case]:
    queries = (
        ("top_k=abc", "top_k"), ("top_k=-1", "top_k"), ("top_k=0", "top_k"), ("top_k=1" + "0" * 5000, "top_k"),
        ("top_k=%00", "top_k"), ("top_k=\xe9", "URL|HTTP"), ("topk=3", 'mean "top_k"'), ("lang=xx", "lang"),
        ("a=" + "b" * 9999, 'no query parameter "a"'), ("%ff=%fe", "no query parameter"),
    )  # fmt: skip
    for (query, says), path in itertools.product(queries, (MODEL, "/classify", "/explain")):
        yield f"{query[:12]}, {path}", raw(f"{path}?{query}")(photo.data), 400, says


def bad_forms(photo: Photo) -> Iterator[Case]:
    part = ("file", "x.png", "image/png", photo.data)
    kind = "Content-Type: multipart/form-data; boundary="
    body = form("/classify", part).partition(b"\r\n\r\n")[2]
    yield "wrong boundary", post("/classify", body, kind + "another"), 400, "cut short"
    yield "no boundary", post("/classify", body, "Content-Type: multipart/form-data"), 400, "boundary"
    yield "empty boundary", post("/classify", body, kind + '""'), 400, "boundary"
    yield "long boundary", post("/classify", body, kind + "x" * 20_000), 400, "cut short|boundary"
    yield "cut short", post("/classify", body[:-40], kind + "parts-are-parted-here"), 400, "cut short"
    yield "no parts", form("/classify"), 400, "no files"
    yield "nothing", post("/classify", b"", kind + "x"), 400, "cut short|empty"
    yield "another field", form("/classify", ("photo", *part[1:])), 400, 'no field "photo"'
    yield "empty file", form("/classify", ("file", "x.png", "image/png", b"")), 422, "empty"
    yield "many files", form("/classify", *[part] * 33), 413, "more than the 32"
    yield "many parts", form("/classify", *[("x", "", "", b"")] * 30_000), 413, "more than the 32"
    yield "long headers", form("/classify", ("file", "x" * 50_000, "image/png", photo.data)), 400, "headers"
    yield "no blank line", post("/classify", b"--x\r\nfile--x--", kind + "x"), 400, "headers|cut short"
    yield "not for this path", form(MODEL, part), 415, "reads forms"
    yield "several to explain", form("/explain", part, part), 413, "more than the 1"
    media = ("text/html", "video/mp4", "application/xml", "x" * 5000, "multipart/mixed")
    for kind, path in itertools.product(media, (MODEL, "/classify", "/explain", "/v1/embeddings")):
        yield f"{kind[:20]}, {path}", raw(path, kind)(photo.data), 415, "not read here"


def bad_tensors(photo: Photo) -> Iterator[Case]:
    height, width, _ = photo.array.shape
    shape, data = [1, height, width, 3], photo.array.ravel().tolist()
    shapes: tuple[Any, ...] = (
        [], [-1, height, width, 3], [1, 0, 4, 3], [1.0, 2, 2, 3], ["1"], "x", None, [True, 2, 2, 3], {},
        [1, height, width], [1, 3, height, width], [1] * 5000, [1, height, width, 4], [1, 1, height, width, 3],
        [1, 10**40, 3, 3],
    )  # fmt: skip
    for value in shapes:
        yield f"shape {str(value)[:20]}", v2(shape=value, data=data), 400, "shape"
    yield "shape of too much", v2(shape=[1, 60_000, 60_000, 3], data=data), 413, "pixels"
    yield "shape that overflows", v2(shape=[1, 2**62, 2**62, 3], data=data), 413, "pixels"
    yield "batch too large", v2(shape=[10**9, 2, 2, 3], data=data), 413, "more than the 32"
    datatypes: tuple[Any, ...] = ("INT8", "FP16", "uint8", None, 8, "x" * 5000)
    for value in datatypes:
        yield f"datatype {str(value)[:9]}", v2(shape=shape, datatype=value, data=data), 400, "datatype"

    yield "data short", v2(shape=shape, data=data[:-1]), 400, "values"
    yield "data long", v2(shape=shape, data=[*data, 1]), 400, "values"
    yield "data ragged", v2(shape=[1, 1, 2, 3], data=[[[[1, 2, 3], [4, 5]]]]), 400, "long at axis"
    yield "data deeper", v2(shape=[1, 1, 1, 3], data=[[[[[1, 2, 3]]]]]), 400, "long at axis|UINT8"
    yield "data text", v2(shape=shape, data="x"), 400, '"data"'
    yield "no data", v2(shape=shape), 400, '"data"'
    numbers: tuple[Any, ...] = (256, -1, 1.5, "x", None, 1e300, [], {})
    for value in numbers:
        yield f"data {value}", v2(shape=[1, 1, 1, 3], data=[1, 2, value]), 400, "UINT8"

    pixels = np.frombuffer(photo.pixels, "<f4").reshape(1, 3, 64, 64)
    nan, fp32 = pixels.copy(), {"shape": pixels.shape, "datatype": "FP32"}
    nan[0, 1, 5, 7] = np.nan
    yield "fp32 of another size", binary(bytes(420), shape=[1, 3, 5, 7], datatype="FP32"), 400, "shape"
    yield "fp32 too large", v2(**fp32, data=[1e300] * pixels.size), 400, "finite|FP32"
    yield "fp32 text", v2(**fp32, data=["1"] * pixels.size), 400, "FP32"
    yield "fp32 nan", binary(nan.tobytes(), **fp32), 400, "finite"
    yield "fp32 infinite", binary(np.full_like(pixels, np.inf).tobytes(), **fp32), 400, "finite"
    yield "fp32 short", binary(photo.pixels[:-4], **fp32), 400, "bytes"

    tiny = {"shape": [1, 1, 1, 3]}
    sizes: tuple[Any, ...] = (4, 2, -3, "3", 3.0, True, 2**70)
    for value in sizes:
        yield f"size {value}", binary(b"abc", **tiny, parameters={"binary_data_size": value}), 400, "binary_data_size"
    yield "size and data", binary(b"abc", **tiny, data=[1]), 400, "both"
    yield "bytes and no size", binary(b"abc", **tiny, parameters={}), 400, "binary_data_size|follow"
    for text in ("99", "-1", "abc", "1" * 400, "3", "1e1", "\xb2"):
        request = post(INFER, b'{"inputs": []}', f"{V2_LENGTH}: {text}")
        yield f"header length {text[:9]}", request, 400, "Header-Content-Length|not JSON"

    file = {"shape": [1], "datatype": "BYTES"}
    yield "length of a file", binary(struct.pack("<I", 2**32 - 1) + photo.data, **file), 400, "length"
    yield "bytes behind files", binary(packed([photo.data, photo.data]), **file), 400, "behind"
    yield "too few files", binary(packed([photo.data]), **file | {"shape": [3]}), 400, "ends before"
    yield "files of another shape", binary(packed([photo.data]), **file | {"shape": [1, 1, 1]}), 400, "shape"
    yield "file that is no text", v2(shape=[2], datatype="BYTES", data=[5, None]), 400, "must be a string"

    one = file | {"name": "image", "data": [photo.base64]}
    for name, inputs, says in (
        ("no inputs", [], "inputs"), ("two inputs", [one, one], "inputs"), ("inputs no list", {"image": one}, "inputs"),
        ("another input", [one | {"name": "../image"}], "no input"), ("input without a name", [{"shape": [1]}], "name"),
    ):  # fmt: skip
        yield name, as_json(INFER, {"inputs": inputs}), 400, says
    logits: dict[str, Any] = {"name": "logits"}
    for name, outputs, says in (
        ("another output", [{"name": "logit"}], 'mean "logits"'), ("output twice", [logits, logits], "twice"),
        ("output no object", [5], "object"), ("outputs no list", "logits", "list"),
        ("binary no boolean", [logits | {"parameters": {"binary_data": 1}}], "true or false"),
        ("shared memory", [logits | {"parameters": {"shared_memory_region": "x"}}], "shared memory"),
        *((f"classification {k}", [logits | {"parameters": {"classification": k}}], "classification")
          for k in (-1, "3", 1.5, True, 10**30)),
    ):  # fmt: skip
        yield name, v2(**file, data=[photo.base64], outputs=outputs), 400, says
    yield "id", as_json(INFER, {"id": 5, "inputs": [one]}), 400, '"id"'
    yield "version", as_json(f"/v2{MODEL}/versions/..%2f2/infer", {"inputs": [one]}), 404, "version"

    for name, encoding, body, status, says in (
        ("gzip damaged", "gzip", gzip.compress(b"{}")[:-9] + b"x" * 9, 400, "gzip"),
        ("gzip cut short", "gzip", gzip.compress(b" " * 9999)[:-12], 400, "cut short"),
        ("gzip bomb", "gzip", gzip.compress(bytes(300_000_000)), 413, "inflated"),
        ("deflate bomb", "deflate", zlib.compress(bytes(300_000_000)), 413, "inflated"),
        ("brotli", "br", b"x", 415, "encoding"),
    ):
        yield name, post(INFER, body, f"Content-Encoding: {encoding}", "Content-Type: application/json"), status, says


def bad_names(photo: Photo) -> Iterator[Case]:
    names = (
        "..", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2F..%2Fetc%2Fpasswd", f"{DEFAULT_MODEL}/../../x",
        f"{DEFAULT_MODEL}%00", "%00", "x" * 9000, "%2F%2F", "%E4%BD%A0%E5%A5%BD", "%", "%zz", "%ff%fe", "vit-tiny",
        DEFAULT_MODEL.upper(), "x%0d%0aX-Evil:%20y", "%20", f"{DEFAULT_MODEL}%20", "C:%5Cwindows", "~root", "%u0041",
        "file:///etc/passwd", "..;/x", "$(id)", "{{7*7}}", "%F0%9F%90%B1", "%E2%80%AE", "con",
    )  # fmt: skip
    says = "no model|control characters|Not Found"
    for name in names:
        yield f"{name[:30]}, hf", raw(f"/models/{name}")(photo.data), (400, 404), says
        yield f"{name[:30]}, v2", as_json(f"/v2/models/{name}/infer", {"inputs": []}), (400, 404), says
        yield f"{name[:30]}, v1", http("GET", f"/v1/models/{name}"), (400, 404), says
        yield f"{name[:30]}, query", raw(f"/classify?model={name}")(photo.data), (400, 404), says
    for path in ("../settings.py", "%2e%2e/%2e%2e/app.py", "..%2f..%2fapp.py", "%5c..%5capp.py", "", "x" * 9000, "%00"):
        yield f"/static/{path[:20]}", http("GET", f"/static/{path}"), (400, 404), "no file|Not Found|control"
    yield "a path", http("GET", "/../../etc/passwd"), (400, 404), "Not Found"
    yield "a path of raw bytes", http("GET", "/models/\xe9\xff"), (400, 404, 405), "URL|HTTP|Not Found"


def http(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode("latin-1") + body


def bad_http(photo: Photo) -> Iterator[Case]:
    length = f"Content-Length: {len(photo.data)}"
    strange = "HTTP/1.1 as it is read"

    def sent(*headers: str) -> bytes:
        return http("POST", MODEL, *headers, body=photo.data)

    yield "two lengths", sent(length, "Content-Length: 3"), 400, strange
    yield "length and chunks", sent(length, CHUNKED), 400, strange
    yield "length no number", sent("Content-Length: abc"), 400, strange
    yield "length negative", sent("Content-Length: -5"), 400, strange
    yield "length signed", sent(f"Content-Length: +{len(photo.data)}"), 400, strange
    yield "length beyond 64 bits", sent("Content-Length: 1" + "0" * 30), (400, 413), f"{strange}|at most"
    yield "length of a terabyte", sent("Content-Length: 1000000000000"), 413, "at most"
    yield "length too small", sent("Content-Length: 30"), (400, 422), f"{strange}|damaged|not an image"
    yield "no length", sent(), 400, f"{strange}|empty"
    yield "another encoding", sent("Transfer-Encoding: gzip, identity"), (400, 501), strange
    for name, data, statuses, says in (
        ("chunks of garbage", b"zz\r\nabc\r\n", (400,), strange),
        ("chunk of negative length", b"-5\r\nabc\r\n", (400,), strange),
        ("chunk too long", b"3\r\nabcdef\r\n0\r\n\r\n", (400,), strange),
        ("chunk of 2⁷⁰ bytes", b"4" + b"0" * 17 + b"\r\nabc", (400,), strange),
        ("chunks without end", (b"100000\r\n" + bytes(2**20) + b"\r\n") * 10, (413,), "at most"),
        ("long trailers", b"0\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", (0, 400, 431), "headers|empty"),
    ):
        yield name, http("POST", MODEL, CHUNKED, body=data), statuses, f"{says}|left|complete"
    yield "a long header", sent("X-A: " + "a" * 70_000, length), 431, "headers"
    yield "a megabyte of headers", sent("X-A: " + "a" * 2**20, length), (0, 431), "headers"
    yield "many headers", sent(*(f"X-{i}: a" for i in range(9000)), length), 431, "headers"
    yield "NUL in a header", sent("X-A: \0", length), 400, strange
    yield "folded header", sent("X-A: a\r\n b: c", "Bad Name: 1", length), 400, strange
    yield "header without a colon", sent("nonsense", length), 400, strange
    yield "a long path", http("GET", "/" + "a" * 70_000), 431, "headers"
    yield "blank in the path", http("POST", "/models/a b", length, body=photo.data), 400, strange
    yield "no HTTP", b"hello\r\n\r\n", 400, strange
    yield "TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(300), 400, strange
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30), 400, strange
    yield "HTTP/9.9", b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400, strange
    yield "empty lines", b"\r\n" * 40_000, 431, "headers"
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "GET", "BREW", "get"):
        request = http(method, MODEL, "Content-Length: 0")
        yield f"method {method}", request, (400, 404, 405), f"Not Allowed|{strange}"
    yield "method POST", post("/readyz", b""), 405, "Not Allowed"


def bad_clients(photo: Photo) -> Iterator[Attack]:
    """Slow ones, and such as leave."""
    whole, of_form = raw(MODEL)(photo.data), as_file("/classify")(photo.data)[:-9]
    head, chunks = whole[: whole.index(b"\r\n\r\n") + 4], http("POST", MODEL, CHUNKED)
    half = whole[: (len(head) + len(whole)) // 2]
    slow: list[tuple[str, Sequence[Any], str]] = [  # pieces, as an attack has them
        ("body", [head, *([0.1, b"x"] * 40)], "not complete after 2 s"),
        ("half a body", [half], "not complete after 2 s"),
        ("chunks", [chunks, *([0.2, b"1\r\nx\r\n"] * 30)], "not complete after 2 s"),
        ("form", [of_form], "not complete after 2 s"),
        ("headers", [head[:9], *([0.5, b"X"] * 60)], "headers were not complete"),
    ]  # fmt: skip
    for name, pieces, says in slow:
        yield Attack(f"slow: {name}", pieces, (408,), says)
    yield Attack("slow: nothing at all", [], (0,), "")
    leaving: list[tuple[str, list[bytes | float]]] = [
        ("at once", []), ("in the headers", [head[:30]]), ("before the body", [head]), ("in the body", [half]),
        ("in a form", [of_form]), ("in a chunk", [chunks, b"5\r\nab"]), ("before the answer", [whole]),
        ("during the answer", [whole, 0.01]),
    ]  # fmt: skip
    for name, pieces in leaving:
        yield Attack(f"leaves: {name}, aborts", pieces, (0, 200), "", "abort")
        yield Attack(f"leaves: {name}, ends", pieces, (0, 200, 400), "client left", "end")


# ── soak ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SOAK_CLIENTS = 32
ANSWER_SECONDS = 30.0


def soak(requests: int, hostile: float) -> None:
    rng = random.Random(0)
    images = small_photos(PHOTOS[0].parent, 120)
    photos = photos_of([sample.data for sample in (*good(images), *odd(images[0]).values())])
    assaults = attacks(photos[0], images[0])
    options = [str(word) for pair in LIMITS.items() for word in pair]
    server = ours("opsin", "--dtype", "fp32", *options)
    try:
        report = uvloop.run(Soak(server, photos, assaults, rng, requests, hostile).run())
        state = {path: get(server.port, path) for path in ("/livez", "/readyz", "/health")}
        say(**report, state=state)
        assert server.alive() and set(state.values()) == {200}, server.log()[-3000:]
    finally:
        server.end()
    if report["wrong"] or report["memory_ratio"] > 1.1:
        sys.exit(1)


class Soak:
    """Many clients; each keeps a connection for what is right, and opens one for each attack."""

    def __init__(
        self,
        server: Server,
        photos: list[Photo],
        assaults: list[Attack],
        rng: random.Random,
        count: int,
        hostile: float,
    ) -> None:
        self.server, self.photos = server, photos
        self.rng, self.count = rng, count
        number = round(count * hostile)
        rng.shuffle(assaults)
        attacks = [assaults[i % len(assaults)] for i in range(number)]
        self.jobs: list[Attack | None] = [*attacks, *[None] * (count - number)]
        rng.shuffle(self.jobs)
        self.left = iter(self.jobs)
        self.done = 0
        self.good: Counter[str] = Counter()
        self.hostile: dict[str, Counter[int]] = {}
        self.wrong: list[str] = []
        self.memory: list[tuple[int, int]] = []  # (requests done, bytes)

    async def run(self) -> dict[str, Any]:
        began = time.monotonic()
        watching = asyncio.create_task(self.watch())
        await asyncio.gather(*(self.client() for _ in range(SOAK_CLIENTS)))
        watching.cancel()
        highest = [
            max((memory for done, memory in self.memory if tenth <= 10 * done / self.count <= tenth + 1), default=0)
            for tenth in range(10)
        ]
        return {
            "requests": self.done, "seconds": round(time.monotonic() - began, 1),
            "good": dict(sorted(self.good.items())),
            "hostile": {kind: dict(found) for kind, found in sorted(self.hostile.items())},
            "wrong": len(self.wrong), "of_which": self.wrong[:20],
            "highest_memory_mb": [round(memory / 1e6, 1) for memory in highest],  # in each tenth of the requests
            "memory_ratio": round(max(highest[1:]) / highest[0], 3),
            "open_files": self.server.open_files(), "threads": self.server.threads(),
        }  # fmt: skip

    async def watch(self) -> None:
        while True:
            self.memory.append((self.done, self.server.memory_bytes()))
            print(f"\r{self.done} of {self.count}, {len(self.wrong)} wrong ", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)

    async def client(self) -> None:
        connection = await connect(self.server.port)
        for attack in self.left:
            if attack is not None:
                await self.attack(attack)
            else:
                if connection.closed:  # after a while, the server may
                    connection = await connect(self.server.port)
                await self.ask(connection)
            self.done += 1
        connection.transport.close()

    async def ask(self, connection: Connection) -> None:
        kind = self.rng.choice([*ONE, *SEVERAL, *MIXED])
        request, wrong = ask_of(kind, self.rng, self.photos)
        reply = await within(connection.ask(request))
        problem: str | None = f"status {reply.status}: {reply.body[:300]!r}"
        if reply.status == 200:
            length = re.search(rb"inference-header-content-length: (\d+)", reply.head)
            try:
                problem = wrong(floats(reply.body[int(length[1]) :]) if length else json.loads(reply.body))
            except (ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}: {reply.body[:300]!r}"
        self.good[kind] += 1
        if problem:
            self.wrong.append(f"{kind}: {problem}"[:600])

    async def attack(self, attack: Attack) -> None:
        connection = await connect(self.server.port)
        reply = await within(send(connection, attack))
        connection.transport.abort()
        kind = attack.kind.partition(",")[0]
        self.hostile.setdefault(kind, Counter())[reply.status] += 1
        if problem := misjudged(attack, reply):
            self.wrong.append(f"{attack.kind}: {problem}: {reply.status} {reply.body[:300]!r}")


async def send(connection: Connection, attack: Attack) -> Reply:
    reply = connection.expect()
    for piece in attack.pieces:
        if reply.done():
            break
        if isinstance(piece, bytes):
            connection.transport.write(piece)
        else:
            await asyncio.wait([reply], timeout=piece)
    if attack.then == "abort":
        connection.transport.abort()
    elif attack.then == "end":
        connection.transport.write_eof()
    return await reply


async def within(reply: Awaitable[Reply]) -> Reply:
    try:
        return await asyncio.wait_for(reply, ANSWER_SECONDS)
    except asyncio.TimeoutError:
        return Reply(-1, b"", f"no answer in {ANSWER_SECONDS:g} s".encode())


def misjudged(attack: Attack, reply: Reply) -> str | None:
    if reply.status not in attack.statuses:
        return f"a status of {attack.statuses} was right"
    if reply.status in (0, 200):
        return None
    try:
        error = json.loads(reply.body)["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        return "no error in JSON"
    if not re.search(attack.says, message, re.IGNORECASE):
        return f"it does not say {attack.says!r}"
    if len(message) > 1500 or re.search(r"Traceback|File \"|\.py\b.*line \d", message):
        return "it says too much"
    return None


def main() -> None:
    if sys.argv[1:2] == ["peer"]:
        peer(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(required=True)
    defaults: dict[Callable[..., None], dict[str, Any]] = {
        load: {"seconds": 5.0, "rounds": 5, "photos": 1000},
        soak: {"requests": 50_000, "hostile": 0.05},
        drain: {"rounds": 20, "workers": 1},
        capacity: {"seconds": 5.0, "rounds": 3, "photos": 1000},
    }
    for task, options in defaults.items():
        of_task = tasks.add_parser(task.__name__)
        of_task.set_defaults(task=task)
        for name, default in options.items():
            of_task.add_argument(f"--{name}", type=type(default), default=default, metavar=name[0].upper())
    arguments = vars(parser.parse_args())
    task = arguments.pop("task")
    about = machine(("timm",))
    about["versions"] |= {name: version(name) for name in ("fastapi", "uvicorn", "uvloop", "litserve")}
    print(json.dumps(about), flush=True)
    task(**arguments)


def peer(kind: str, *arguments: str) -> None:
    """What a process of `load` runs."""
    if kind == "bulk":
        run_bulk(*arguments)
        return
    folder, options, port = arguments
    function = run_litserve if kind == "litserve" else run_naive
    function(folder, **json.loads(options), port=int(port))


if __name__ == "__main__":
    main()
