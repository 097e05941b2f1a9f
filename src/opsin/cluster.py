"""A bulk run on the machines of a Ray cluster: the same folder, row for row, as on one machine.

    run ────▶ _conduct ────▶ Ray Data: a pool of Workers ────▶ parts in the folder
     ▲        which blocks        read, compute, write            │
     └─────── counts ─────── Board ◀──────── rows done ───────────┘

No image and no row passes through Ray. A worker is told numbers of blocks, reads their paths from the folder's
_inputs.jsonl and writes their parts by itself, with `bulk.run`; so the driver's memory does not grow, and Ray's object
store holds a few bytes for each block. The Board and the conductor live on the head of the cluster and need no CPU.
"""

import itertools
import json
import logging
import math
import os
import signal
import socket
import threading
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import torch

from opsin import __version__
from opsin.bulk import Counts, Parts
from opsin.bulk import run as run_blocks
from opsin.bulk.parts import INPUTS
from opsin.data.inputs import Block
from opsin.data.tar import is_url
from opsin.errors import BulkError, MissingExtra, OpsinError
from opsin.pipeline import Classifier, load
from opsin.results import Record

log = logging.getLogger(__name__)

HEAD = {"node:__internal_head__": 0.001}  # Ray's own mark of that machine
OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster that is started here; next to nothing is kept
CONNECT_SECONDS = 5.0
POLL_SECONDS = 0.3
TELL_SECONDS = 0.5  # between two messages of a worker
WAIT_SECONDS = 60.0  # without a worker, until that is said
TASKS_PER_WORKER = 32  # blocks are handed out in so many groups: few enough for Ray, so many that no worker idles long
MAX_TASKS = 4096
MAX_LOST = 3  # workers over one block, without a part between them
_ROW = 3  # integers that say what to do: number of the block, its place in _inputs.jsonl, the first row to do


def run(
    load_options: dict[str, Any],
    parts: Parts,
    to_do: Iterable[tuple[int, Block, int]],
    *,
    address: str = "auto",
    workers: tuple[int, int] | None = None,
    gpus_per_worker: float = 0,
    cpus_per_worker: int | None = None,
    batch_size: int = 32,
    part_rows: int = 1000,
    on_error: Literal["record", "fail"] = "record",
    stop: Callable[[], bool] = lambda: False,
    on_counts: Callable[[Counts], None] = lambda counts: None,
    **answers: Any,
) -> Counts:
    """`bulk.run` on a cluster. Any worker may be lost at any time: its block is gone on with from its last whole part.

    Args:
        load_options: of `opsin.load`, with "name": each worker loads the model itself. What it then has must be what
            the folder's manifest says of sha256, preprocess_hash, dtype, engine and opsin's version.
        to_do: of `parts.to_do`.
        address: "auto": the cluster that this machine is in, else RAY_ADDRESS; "local": one of this machine alone, for
            the length of the call; "ray://head:10001" or "head:6379". A Ray that this process has joined is used as it
            is.
        workers: at least and at most; the cluster's load decides between them. None: one for each GPU, or, without
            GPUs, one for each machine.
        gpus_per_worker: 0: on CPUs. A half: two share one.
        cpus_per_worker: and threads of torch; None: an equal share for as many workers as there may be.
        stop: asked a few times a second; True lets each worker finish the batch in hand, write it, and end.
        on_counts: called as often, with the rows of this run so far.
        answers: of `Classifier.stream`, as `bulk.run` takes them.
    Raises:
        MissingExtra: Ray is not installed.
        BulkError: the cluster cannot be reached, or cannot hold one worker; a worker does not see the folder or the
            inputs, has another model, or loses its life over the same block again and again; by "fail" of `on_error`.
            What is written stays, and a run that resumes goes on from there.
        OSError: a part cannot be written.
    """
    lowest, highest = workers or (1, 1)
    if not 1 <= lowest <= highest:
        raise ValueError(f"workers is {lowest}:{highest}; right is least:most, such as 2:64.")
    if gpus_per_worker < 0 or (cpus_per_worker is not None and cpus_per_worker < 1):
        raise ValueError(
            f"a worker of {gpus_per_worker:g} GPUs and {cpus_per_worker} CPUs: give 0 or more GPUs, 1 or more CPUs."
        )
    folder = parts.folder.absolute()
    todo, seen = _listed(parts, to_do)
    if not todo:
        return Counts()
    with _connected(address) as ray, _token(folder) as token:
        pool = _pool(ray, address, workers, gpus_per_worker, cpus_per_worker)
        job = _Job(
            folder=folder,
            manifest=parts.manifest,
            load_options=load_options | ({"device": "cuda"} if gpus_per_worker else {}),
            answers=answers,
            batch_size=batch_size,
            part_rows=part_rows,
            on_error=on_error,
            threads=pool.cpus,
            token=token,
            home=Path.cwd(),
            seen=seen,
        )
        on_head = {"num_cpus": 0, "resources": HEAD}
        board = ray.remote(**on_head)(Board).remote(parts.num_blocks)
        conducting = ray.remote(**on_head, max_retries=0)(_conduct).remote(job, board, todo.tobytes(), pool)
        try:
            state = _watch(ray, board, conducting, pool, stop, on_counts)
        finally:
            with suppress(Exception):  # they have ended, or the cluster has
                ray.cancel(conducting, force=True)
                ray.kill(board)
    if isinstance(state.problem, OSError):
        raise state.problem
    if state.problem is not None:
        raise BulkError(state.problem)
    if not state.stopping and state.num_done < len(todo) // _ROW:
        raise BulkError(
            f"{len(todo) // _ROW - state.num_done} blocks came back undone, which should not be. Go on with --resume."
        )
    return state.counts


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Job:
    """What every worker is told, once."""

    folder: Path
    manifest: Record
    load_options: dict[str, Any]
    answers: dict[str, Any]
    batch_size: int
    part_rows: int
    on_error: Literal["record", "fail"]
    threads: int
    token: str  # a file in the folder
    home: Path  # where relative inputs are
    seen: str | None  # an input on a disk, which the driver sees


class _Pool(NamedTuple):
    lowest: int
    highest: int
    cpus: int
    gpus: float


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows start … stop − 1 of a block, in a file that a worker was about to write."""

    start: int
    stop: int
    failed: int
    name: str


@dataclass(slots=True)
class _Open:
    """A block that a worker has begun."""

    worker: str
    parts: dict[int, _Part] = field(default_factory=dict)  # by first row
    lost: int = 0  # workers since the newest of them


@dataclass(frozen=True, slots=True)
class _State:
    counts: Counts
    num_done: int
    num_workers: int
    stopping: bool
    problem: str | OSError | None


def _listed(parts: Parts, to_do: Iterable[tuple[int, Block, int]]) -> tuple["array[int]", str | None]:
    """What is to do, three integers a block, and the first input that is on a disk of this machine."""
    todo, seen = array("q"), None
    with (parts.folder / INPUTS).open("rb") as file:
        offset = at = 0
        for number, block, row in to_do:
            while at < number:
                offset += len(file.readline())
                at += 1
            todo.extend((number, offset, row))
            if seen is None:
                seen = next((path for path in block.paths if not is_url(path) and os.path.exists(path)), None)  # noqa: PTH110
    return todo, seen


@contextmanager
def _token(folder: Path) -> Iterator[str]:
    """The name of a file in the folder, by which a worker knows that it sees the same one."""
    path = folder / f".cluster-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


# ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, joined."""
    try:
        import pyarrow  # noqa: F401, Ray Data's
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray") from None
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    elif address != "auto":
        _probe(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, **options)
    except Exception as error:  # of many types, ConnectionError among them
        raise BulkError(f'the cluster "{address}" cannot be joined: {_first_line(error)} {_known(address)}') from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)  # Ray's ends the process
    try:
        yield ray
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Knock: Ray itself would wait for minutes."""
    try:
        place = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if host is None or (port is None and place.scheme != "ray") or place.scheme not in ("ray", "tcp"):
        raise BulkError(f'"{address}" is no address of a cluster. {_known("")}')
    try:
        socket.create_connection((host, port or 10001), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise BulkError(
            f"nothing answers at {address} ({error.strerror or error}). Check the address, that the cluster is up, and "
            f"that its port can be reached from here. {_known('')}"
        ) from error


def _known(address: str) -> str:
    if address == "auto":
        return 'Start one with `ray start --head`, or give "local" or an address such as ray://head:10001.'
    token = ""
    if address.startswith("ray://"):  # Ray says nothing of it, but "timeout"
        token = "A cluster that asks for a token wants it here too: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN. "
    return f"{token}Known: auto (the cluster that this machine is in), local (this machine alone), ray://head:10001."


def _pool(ray: Any, address: str, workers: tuple[int, int] | None, gpus: float, cpus: int | None) -> _Pool:
    """How many workers, of what size."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_cpus = [int(node.get("CPU", 0)) for node in nodes]
    num_gpus = sum(node.get("GPU", 0) for node in nodes)
    if workers is None:
        most = int(num_gpus / gpus) if gpus else sum(count > 0 for count in num_cpus)
        workers = (1, max(most, 1))
    if cpus is None and gpus and num_gpus:
        cpus = max(1, min(int(node.get("CPU", 0) * gpus / node["GPU"]) for node in nodes if node.get("GPU")))
    elif cpus is None:  # no more than one machine has
        cpus = max(1, min(sum(num_cpus) // workers[1], max(num_cpus, default=1)))
    pool = _Pool(*workers, cpus, gpus)
    if address == "local" and not _fit(nodes, pool):
        raise BulkError(
            f"{_wanted(pool)} do not fit on this machine, which has {sum(num_cpus)} CPUs and {num_gpus:g} GPUs for "
            "Ray. Ask for fewer or smaller workers."
        )
    return pool


def _fit(nodes: Sequence[dict[str, float]], pool: _Pool) -> bool:
    """Whether the machines can hold the least number of workers."""
    room = 0
    for node in nodes:
        by_gpu = math.floor(node.get("GPU", 0) / pool.gpus) if pool.gpus else pool.lowest
        room += min(int(node.get("CPU", 0)) // pool.cpus, by_gpu)
    return room >= pool.lowest


def _wanted(pool: _Pool) -> str:
    gpus = f" and {pool.gpus:g} GPUs" if pool.gpus else ""
    return f"{pool.lowest} workers of {pool.cpus} CPUs{gpus}"


def _watch(
    ray: Any,
    board: Any,
    conducting: Any,
    pool: _Pool,
    stop: Callable[[], bool],
    on_counts: Callable[[Counts], None],
) -> _State:
    """Until all is done: pass on the counts, and the wish to stop."""
    asked, waiting = False, time.monotonic()
    try:
        while True:
            ended, _ = ray.wait([conducting], timeout=POLL_SECONDS)
            state: _State = ray.get(board.read.remote())
            on_counts(state.counts)
            if ended:
                if state.problem is None:
                    ray.get(conducting)
                return state
            if not asked and stop():
                asked = True
                ray.get(board.stop.remote())
            if state.num_workers == 0 and time.monotonic() - waiting > WAIT_SECONDS:
                waiting = time.monotonic()
                total = ray.cluster_resources()
                log.warning(
                    "waiting for %s; the cluster has %g CPUs and %g GPUs in all",
                    _wanted(pool), total.get("CPU", 0), total.get("GPU", 0),
                )  # fmt: skip
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise BulkError(f"the cluster gave up: {_first_line(error)} Go on with --resume.") from error


def _first_line(error: Exception) -> str:
    """What a message of Ray's says, without the traces around it."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = (lines or [type(error).__name__])[0]
    return text if text.endswith((".", "!")) else f"{text}."


class Board:
    """Where workers write what they have done and read whether to stop. It outlives each of them."""

    def __init__(self, num_blocks: int) -> None:
        self._done = bytearray(num_blocks)
        self._open: dict[int, _Open] = {}
        self._closed = Counts()  # of the blocks that are done
        self._ahead: dict[str, Counts] = {}  # of each worker, rows that are in no part yet
        self._stopping = False
        self._problem: str | OSError | None = None

    def begin(self, number: int, what: str, worker: str) -> tuple[list[_Part], bool] | None:
        """A worker begins a block: the parts that others may have written of it, and whether it has cost a worker.

        None: there is nothing to do.
        """
        self._ahead.setdefault(worker, Counts())
        if self._stopping or self._done[number]:
            return None
        before = self._open.get(number)
        if before is None:
            self._open[number] = _Open(worker)
            return [], False
        if before.worker != worker:
            self._ahead.pop(before.worker, None)
            before.worker = worker
        before.lost += 1
        if before.lost >= MAX_LOST:
            row = max((part.stop for part in before.parts.values()), default=None)
            self.fail(
                f"block {number} ({what}{f', from row {row}' if row else ''}) has cost {before.lost} workers, the last "
                f"on {worker}: most often for want of memory. Try a smaller --batch-size or --max-pixels, or fewer "
                "workers on a machine; --resume goes on from the last whole part."
            )
            return None
        return sorted(before.parts.values(), key=lambda part: part.start), True

    def write(self, number: int, part: _Part) -> None:
        """A part is about to be written; one that was to begin at the same row is not, or is the same."""
        block = self._open.get(number)
        if block is None:  # it is done: this worker was taken for lost, and writes the same rows again
            return
        if part.start not in block.parts:
            block.lost = 0
        block.parts[part.start] = part

    def done(self, number: int) -> None:
        if not self._done[number]:
            self._done[number] = 1
            for part in self._open.pop(number).parts.values():
                self._closed.images += part.stop - part.start
                self._closed.failed += part.failed

    def tell(self, worker: str, ahead: Counts) -> bool:
        """How many rows of a worker wait for their part; whether to stop."""
        self._ahead[worker] = ahead
        return self._stopping

    def stop(self) -> None:
        self._stopping = True

    def fail(self, problem: str | OSError) -> None:
        """End the run as by `stop`, and say why; the first that says so is heard."""
        self._problem = self._problem or problem
        self._stopping = True

    def read(self) -> _State:
        counts = Counts(self._closed.images, self._closed.failed)
        for part in (part for block in self._open.values() for part in block.parts.values()):
            counts.images += part.stop - part.start
            counts.failed += part.failed
        for ahead in self._ahead.values():
            counts.images += ahead.images
            counts.failed += ahead.failed
        return _State(counts, self._done.count(1), len(self._ahead), self._stopping, self._problem)


def _conduct(job: _Job, board: Any, todo: bytes, pool: _Pool) -> None:
    """Hand the blocks to the workers."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    blocks = array("q", todo)
    count = len(blocks) // _ROW
    tasks = min(count, TASKS_PER_WORKER * pool.highest, MAX_TASKS)
    edges = [count * task // tasks * _ROW for task in range(tasks + 1)]
    groups = [{"blocks": blocks[start:stop].tobytes()} for start, stop in itertools.pairwise(edges)]
    done = ray.data.from_items(groups, override_num_blocks=tasks).map(
        Worker,
        fn_constructor_args=(job, board),
        compute=ray.data.ActorPoolStrategy(min_size=pool.lowest, max_size=pool.highest),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        max_restarts=-1,
        max_task_retries=-1,  # MAX_LOST ends it
    )
    for _ in done.iter_rows():
        pass


# ── a worker ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Worker:
    """A process of the cluster that holds the model."""

    def __init__(self, job: _Job, board: Any) -> None:
        # nothing that can fail: Ray Data takes a worker that dies here for a mistake of ours
        self.job, self.board = job, board
        self.classifier: Classifier | None = None
        self.at_home = False
        self.name = f"{socket.gethostname()}, process {os.getpid()}"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Do some blocks. Never raises: what goes wrong is on the board, and ends the run for all."""
        values = array("q", row["blocks"])
        blocks = deque(zip(values[::_ROW], values[1::_ROW], values[2::_ROW], strict=True))
        try:
            if self.classifier is None:
                self.classifier = self._load()
            while blocks:
                self._run(self.classifier, blocks)
        except OSError as error:
            self._fail(error if type(error).__module__ == "builtins" else f"{self.name}: {error}")
        except OpsinError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("in a block of %s", self.job.folder)
            self._fail(f"{self.name}: {type(error).__name__}: {error}. Go on with --resume.")
        return {"blocks": len(values) // _ROW}

    def _fail(self, problem: str | OSError) -> None:
        import ray

        ray.get(self.board.fail.remote(problem))

    def _load(self) -> Classifier:
        """The model, if this machine has all that the driver has.

        Raises:
            BulkError: it does not see the folder or the inputs, or has another model or version.
            ModelError: it cannot load the model.
        """
        job = self.job
        if not (job.folder / job.token).exists():
            raise BulkError(
                f"{self.name} does not see {job.folder}: workers write their parts themselves. Name a folder on "
                "storage that all machines mount under the same path (NFS, a shared volume)."
            )
        with suppress(OSError):
            os.chdir(job.home)
            self.at_home = True
        if job.seen is not None and (self.at_home or os.path.isabs(job.seen)) and not os.path.lexists(job.seen):  # noqa: PTH117
            raise BulkError(
                f"{self.name} does not see {job.seen}, which is on a disk of the driver. Name images by URLs (s3://, "
                "https://, …), or on storage that all machines mount under the same path."
            )
        self._check("opsin", __version__, "install the same version on all machines")
        torch.set_num_threads(job.threads)
        try:
            classifier: Classifier = load(**job.load_options)
        except ValueError as error:  # a device, dtype or engine that this machine lacks
            raise BulkError(f"{self.name}: {error}") from error
        name = job.load_options.get("name", "the model")
        same = f"{name} must be the same for all: a hub id with --revision, or a folder on shared storage"
        self._check("sha256", classifier.source.sha256, same)
        self._check("preprocess_hash", classifier.preprocess.hash(), same)
        self._check("dtype", classifier.dtype, "machines differ; choose one that all have with --dtype")
        self._check("engine", classifier.engine, "choose one that all machines have with --engine")
        return classifier

    def _check(self, what: str, value: str, remedy: str) -> None:
        wanted = self.job.manifest.get(what, value)
        if wanted != value:
            raise BulkError(f"{self.name} has {what} {value}, the driver {wanted}: {remedy}.")

    def _run(self, classifier: Classifier, blocks: deque[tuple[int, int, int]]) -> None:
        """Blocks through `bulk.run`, all of them, or up to one that has cost a worker, which goes alone."""
        import ray

        job = self.job
        parts = _Written(job.folder, job.manifest, self.board)
        stopping, told = False, time.monotonic()

        def on_batch(counts: Counts) -> None:
            nonlocal stopping, told
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                ahead = Counts(counts.images - parts.counts.images, counts.failed - parts.counts.failed)
                stopping = ray.get(self.board.tell.remote(self.name, ahead))

        run_blocks(
            classifier,
            parts,
            self._begun(blocks),
            batch_size=job.batch_size,
            part_rows=job.part_rows,
            on_error=job.on_error,
            stop=lambda: stopping,
            on_batch=on_batch,
            **job.answers,
        )
        if ray.get(self.board.tell.remote(self.name, Counts())):
            blocks.clear()

    def _begun(self, blocks: deque[tuple[int, int, int]]) -> Iterator[tuple[int, Block, int]]:
        """Blocks, each when it is its turn, from the row that the folder has not."""
        import ray

        while blocks:
            number, offset, row = blocks.popleft()
            block = self._block(offset)
            begun = ray.get(self.board.begin.remote(number, _what(block), self.name))
            if begun is None:
                continue
            written, is_suspect = begun
            for part in written:
                if part.start == row and (self.job.folder / part.name).exists():
                    row = part.stop
                    if "-end." in part.name:
                        ray.get(self.board.done.remote(number))
                        break
            else:
                yield number, block, row
                if is_suspect:
                    return

    def _block(self, offset: int) -> Block:
        with (self.job.folder / INPUTS).open("rb") as file:
            file.seek(offset)
            block = Block.from_json(json.loads(file.readline()))
        if not self.at_home and any(not is_url(path) and not os.path.isabs(path) for path in block.paths):  # noqa: PTH117
            raise BulkError(
                f"{_what(block)} is relative to {self.job.home}, which {self.name} does not have. Name inputs by their "
                "whole paths."
            )
        return block


class _Written(Parts):
    """The folder for a worker: it only adds to it, since others write beside it, and tells the board first."""

    def __init__(self, folder: Path, manifest: Record, board: Any) -> None:
        self.folder, self.manifest, self.format = folder, manifest, manifest["format"]
        self._next = {}
        self.board = board
        self.counts = Counts()

    def write(self, block: int, start: int, records: Sequence[Record], *, end: bool) -> None:
        import ray

        stop, failed = start + len(records), sum(not record["ok"] for record in records)
        name = f"part-{block:06d}-{start:08d}-{stop:08d}{'-end' if end else ''}.{self.format}"
        ray.get(self.board.write.remote(block, _Part(start, stop, failed, name)))
        super().write(block, start, records, end=end)
        self.counts.images += len(records)
        self.counts.failed += failed
        if end:
            ray.get(self.board.done.remote(block))


def _what(block: Block) -> str:
    return block.paths[0] if len(block.paths) == 1 else f"{block.paths[0]} and {len(block.paths) - 1} more"
