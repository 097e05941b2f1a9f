"""What a bulk run costs: measured an image here, predicted for any number of machines and images, held against runs.

    list ─▶ read ───▶ decode, resize ─▶ model ────────────▶ rows
    once    network   every core        every core, or GPU   one core of each worker

python benchmarks/scale.py measure [PHOTOS] [--model NAME] [--dtype bf16 …] > benchmarks/scale.json
python benchmarks/scale.py predict [--costs FILE] [--cores 32 --gpus 1 --gpu-rate 2000 …]     # a table, Markdown
python benchmarks/scale.py check [PHOTOS] [--model NAME] [--all]                              # 10³, 10⁴, with --all 10⁵
python benchmarks/scale.py fill docs/scale.md                    # the commands that its comments name, run anew

Without PHOTOS: 640 × 480 JPEGs, as benchmarks/folder.py makes them. The model "random" is a ViT-B/16 of random weights.
What a GPU, a network and an hour cost is for you to say: nothing of it was measured here, and the defaults are round
examples.
"""

import argparse
import heapq
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZES = tuple(10**power for power in range(6, 11))
NAMES = {"random": "ViT-B/16 of random weights"}
# of the package, which a prediction does without
READERS = 16  # opsin.pipeline: images of a worker that are on their way at once
PIECE_BYTES = 16 * 2**20  # opsin.data.remote: of an archive on a server, in one request
GROUPS_PER_WORKER, MAX_GROUPS = 32, 4096  # opsin.cluster
LISTED = 1000  # names in an answer of S3, at most
PLAN_READS = 2  # of _inputs.jsonl, before the first image

# ── what is given ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one image costs, of one kind and through one model; ms are of one core, if nothing else is said."""

    image_bytes: float
    decode_ms: float  # from a file in the system's cache to pixels
    resize_ms: float
    parallel: float  # decoding by all cores, as a share of as many times one core
    model_ms: dict[str, float]  # by dtype, in batches on all cores: wall time × cores
    row_ms: float  # answer to row, and its share of writing the part
    row_bytes: float
    part_ms: float  # of a part, whatever its rows: create, force to the disk, rename
    list_ms: float  # of a path: find it, and write it into the plan
    plan_ms: float  # of a path: read it from the plan
    plan_bytes: float  # of a path, in the plan
    part_open_ms: float  # of a part that is there, when a run goes on
    part_open_bytes: float  # memory, of the same
    member_ms: float  # of an image in a tar: its header, and its bytes from the system's cache
    start_s: float  # of a process: imports, the model

    @classmethod
    def read(cls, path: Path) -> "Costs":
        """What `measure` printed.

        Raises:
            ValueError: it is something else.
        """
        values = json.loads(path.read_text(encoding="utf-8"))
        missing = [field.name for field in fields(cls) if field.name not in values]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}. Make it anew: scale.py measure > {path}")
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    cores: int = 32
    gpus: int = 0
    gpu_rate: float = 0.0  # images/s of one GPU
    read_mb_s: float = 1250.0  # of disk or network, all workers together
    latency_ms: float = 0.0  # until the first byte of an answer; 0: a disk
    workers: int = 0  # processes; 0: one for each GPU, or one
    price: float = 1.0  # of an hour

    def __post_init__(self) -> None:
        if self.gpus and not self.gpu_rate > 0:
            raise ValueError("gpu_rate is 0: measure images/s of one GPU (benchmarks/gpu.py), and give it.")
        if self.cores < 1 or not self.read_mb_s > 0:
            raise ValueError(f"a machine of {self.cores} cores that reads {self.read_mb_s:g} MB/s does nothing.")

    @property
    def num_workers(self) -> int:
        return self.workers or max(self.gpus, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    images: float
    dtype: str = "bf16"
    per_tar: int = 0  # images in a tar; 0: single files
    part_rows: int = 1000
    machines: int = 0  # 0: as many as it takes
    within_hours: float = 24.0  # where machines are not given
    shards: bool = False  # each worker has a fixed share (--shard i/n), and does not ask for more (--cluster)
    retries: float = 0.01  # share of requests that are made twice
    failures: float = 0.01  # of a machine, in an hour; each of its workers is lost with that rate, by itself
    restart_s: float = 300.0  # until there is another
    slow_share: float = 0.05  # of the machines …
    slow_factor: float = 2.0  # … that take so many times as long
    request_price: float = 0.4  # of a million


# ── one machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stages(costs: Costs, machine: Machine, job: Job) -> dict[str, float]:
    """Seconds that each stage of a machine takes for an image, were the others free."""
    if job.dtype not in costs.model_ms and not machine.gpus:
        raise ValueError(f'no cost of dtype "{job.dtype}". Measured: {", ".join(costs.model_ms)}.')
    workers = machine.num_workers
    rows = costs.row_ms + costs.part_ms / _part_rows(job) + (costs.member_ms if job.per_tar else 0)
    at_once = READERS if not job.per_tar else PIECE_BYTES / costs.image_bytes  # images that wait for an answer together
    model = costs.model_ms.get(job.dtype, 0.0) / machine.cores / 1e3
    return {
        "bandwidth": costs.image_bytes * (1 + job.retries) / machine.read_mb_s / 1e6,
        "latency": machine.latency_ms * (1 + job.retries) / 1e3 / (at_once * workers),
        "decode": (costs.decode_ms + costs.resize_ms) / (machine.cores * costs.parallel) / 1e3,
        "model": 1 / (machine.gpus * machine.gpu_rate) if machine.gpus else model,
        "rows": rows / workers / 1e3,
    }


def seconds_per_image(costs: Costs, machine: Machine, job: Job) -> float:
    """Of a machine that always has images.

    On a CPU, decoding, model and rows take turns, since each wants the cores. With a GPU, decoding goes on beside the
    other two. Reading goes on beside all of it, but for a tar on a server: a worker fetches that whole before its first
    image, so that only another worker can compute meanwhile.
    """
    stage = stages(costs, machine, job)
    workers = machine.num_workers
    in_turn = stage["model"] + stage["rows"]
    if machine.gpus:  # the rows' threads take cores from the decoders
        compute = max(stage["decode"] + stage["rows"] * workers / machine.cores, in_turn)
    else:
        compute = stage["decode"] + in_turn
    if job.per_tar and machine.latency_ms:
        return max(stage["bandwidth"], stage["bandwidth"] / workers + stage["latency"] + compute)
    return max(stage["bandwidth"], stage["latency"], compute)


def _part_rows(job: Job) -> int:
    return min(job.part_rows, job.per_tar or job.part_rows)


# ── many machines ────────────────────────────────────────────────────────────────────────────────────────────────────


class Simulated(NamedTuple):
    wall_s: float  # until the last worker is done
    busy_s: float  # of all workers together, what was lost and waited for included
    lost_s: float  # work that was done twice
    failures: int


def simulate(
    groups: Sequence[float] | np.ndarray,
    workers: int,
    *,
    part_s: float,
    failures_per_s: float = 0.0,
    restart_s: float = 0.0,
    slow_share: float = 0.0,
    slow_factor: float = 1.0,
    shards: bool = False,
    seed: int = 0,
) -> Simulated:
    """Workers that each take the next group of blocks when they are done with one.

    Args:
        groups: seconds of work, in order.
        part_s: work between two parts; a failure loses what is done since the last.
        failures_per_s: of a worker while it works; they come as a Poisson process does.
        shards: group k is for worker k mod n, whoever is free.
    Raises:
        ValueError: a worker would practically never finish a part.
    """
    if part_s * slow_factor * failures_per_s > 10:
        raise ValueError(
            f"a part of {part_s * slow_factor:,.0f} s, where a worker lives {1 / failures_per_s:,.0f} s, is never "
            "finished. Take fewer rows for a part."
        )
    rng = np.random.default_rng(seed)
    factors = np.where(rng.permutation(workers) < round(slow_share * workers), slow_factor, 1.0)
    free = [(0.0, worker) for worker in range(workers)]  # when, who: a heap
    lost = busy = 0.0
    failures = 0
    ends = [0.0] * workers
    for number, group in enumerate(groups):
        now, worker = (ends[number % workers], number % workers) if shards else heapq.heappop(free)
        left, part, begun = group * factors[worker], part_s * factors[worker], now
        while failures_per_s and (until := rng.exponential(1 / failures_per_s)) < left:
            kept = until // part * part
            failures, lost = failures + 1, lost + until - kept
            left, now = left - kept, now + until + restart_s
        ends[worker] = float(now + left)
        busy += ends[worker] - begun
        heapq.heappush(free, (ends[worker], worker))
    return Simulated(max(ends), busy, lost, failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    images: float
    machines: int
    images_per_s: float  # of all, while they work
    bound: str  # the stage of which a machine has least
    list_s: float  # by one machine, before the others begin
    wall_s: float
    core_hours: float
    gpu_hours: float
    parts: float
    plan_bytes: float
    out_bytes: float
    requests: float
    money: float
    failures: int  # workers lost
    kill_s: float  # what kill -9 of a worker costs: its rows, half a part on average, and the start of another


def predict(costs: Costs, machine: Machine, job: Job, *, seed: int = 0) -> Prediction:
    """
    Raises:
        ValueError: a dtype that was not measured; parts that take longer than machines live.
    """
    step = seconds_per_image(costs, machine, job)
    inputs = math.ceil(job.images / job.per_tar) if job.per_tar else job.images
    blocks = inputs if job.per_tar else math.ceil(job.images / job.part_rows)
    list_s = inputs * (costs.list_ms / 1e3 + machine.latency_ms / 1e3 / LISTED)
    open_s = costs.start_s + inputs * costs.plan_ms / 1e3 * PLAN_READS
    serial_s = list_s + open_s
    part_s = _part_rows(job) * step * machine.num_workers

    def run(machines: int) -> Simulated:
        workers = machines * machine.num_workers
        groups = workers if job.shards else min(blocks, GROUPS_PER_WORKER * workers, MAX_GROUPS)
        if workers == 1:
            groups = 1
        return simulate(
            np.full(int(min(groups, blocks)), job.images * step * machine.num_workers / min(groups, blocks)),
            workers,
            part_s=part_s,
            failures_per_s=job.failures / 3600,
            restart_s=job.restart_s + open_s,
            slow_share=job.slow_share,
            slow_factor=job.slow_factor,
            shards=job.shards,
            seed=seed,
        )

    machines = job.machines or 1
    if not job.machines:
        goal = job.within_hours * 3600
        goal -= serial_s if serial_s < goal / 2 else 0  # else it cannot be met: as many as the work alone takes
        machines = fewest = max(1, math.ceil(job.images * step / goal))
        while run(machines).wall_s > goal:
            machines += math.ceil(machines / 20)
            if machines > 2 * fewest:  # more do not help
                machines = fewest
                break
    done = run(machines)
    wall_s = serial_s + done.wall_s
    machine_hours = (list_s + machines * (wall_s - list_s)) / 3600
    parts = math.ceil(job.images / _part_rows(job))
    requests = _requests(costs, machine, job, inputs)
    stage = stages(costs, machine, job)
    return Prediction(
        images=job.images,
        machines=machines,
        images_per_s=machines / step,
        bound=max(stage, key=lambda name: stage[name]),
        list_s=list_s,
        wall_s=wall_s,
        core_hours=machine_hours * machine.cores,
        gpu_hours=machine_hours * machine.gpus,
        parts=parts,
        plan_bytes=inputs * costs.plan_bytes,
        out_bytes=job.images * costs.row_bytes,
        requests=requests,
        money=machine_hours * machine.price + requests / 1e6 * job.request_price,
        failures=done.failures,
        kill_s=part_s / 2 + open_s + parts * costs.part_open_ms / 1e3,
    )


def _requests(costs: Costs, machine: Machine, job: Job, inputs: float) -> float:
    """To a server; a tar is asked for in pieces, and before and after for its size."""
    if not machine.latency_ms:
        return 0.0
    pieces = math.ceil(job.per_tar * costs.image_bytes / PIECE_BYTES) + 2 if job.per_tar else 1
    return inputs * pieces * (1 + job.retries) + inputs / LISTED


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(
    paths: Sequence[str],
    model: str,
    dtypes: Sequence[str],
    *,
    rounds: int = 3,
    batch_size: int = 32,
    names: int = 10_000,
) -> dict[str, Any]:
    """`Costs` of these images on this machine, and what they have to be read with. Medians over rounds.

    Args:
        paths: of images that can be read; they are read from the system's cache.
        dtypes: of `opsin.load`; one that the machine lacks is an error.
        names: empty files that are listed.
    """
    import torch

    import opsin
    from opsin.bench import machine as here

    classifier = opsin.load(model, dtype=dtypes[0])
    cores = torch.get_num_threads()
    config = classifier.preprocess
    whole = replace(config, size=None, crop_size=None, source_crop=None)
    exact = dtypes[0] == "fp32"

    def each(load: Callable[[str], Any]) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(1)
            for path in paths:
                load(path)
            torch.set_num_threads(cores)

        return run

    decode = _ms(each(whole.load), rounds) / len(paths)
    both = _ms(each(lambda path: config.load(path, exact_resize=exact)), rounds) / len(paths)

    def by_all() -> None:
        for _ in classifier.load_batches(_batches(paths, batch_size)):
            pass

    wall = _ms(by_all, rounds) / len(paths)
    pixels = [item.pixels for item in next(classifier.load_batches(_batches(paths, batch_size)))]
    model_ms = {}
    for dtype in dtypes:
        classifier.use(dtype)
        for _ in range(2):
            classifier.forward(pixels)
        model_ms[classifier.dtype] = _ms(lambda: classifier.forward(pixels), rounds) / len(pixels) * cores
    return {
        "image_bytes": sum(Path(path).stat().st_size for path in paths) / len(paths),
        "decode_ms": decode,
        "resize_ms": max(both - decode, 0.0),
        "parallel": both / (wall * cores),
        "model_ms": model_ms,
        **_measure_rows(classifier, paths, rounds),
        **_measure_folder(rounds, names),
        "member_ms": _measure_tar(paths, rounds),
        "start_s": _measure_start(paths[0], model, dtypes[0]),
        "images": len(paths),
        "model": classifier.source.name,
        "load": os.getloadavg()[0],
        "machine": here(),
    }


def _batches(paths: Sequence[str], batch_size: int) -> Iterator[list[Any]]:
    from opsin.data.inputs import Item

    items = (Item(path, path) for path in paths)
    return iter(lambda: list(islice(items, batch_size)), [])


def _ms(call: Callable[[], object], rounds: int) -> float:
    """Median of some calls, after one that does not count."""
    call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(found)


def _measure_rows(classifier: Any, paths: Sequence[str], rounds: int) -> dict[str, float]:
    """Logits to rows, and parts of two lengths, whose difference is what a row costs."""
    import torch

    from opsin.bulk import Parts
    from opsin.labels import top_k

    logits = classifier.logits(list(paths[:32]))
    answer = _ms(lambda: top_k(logits, classifier.labels, 5, "en"), rounds) / len(logits)
    few, many = 100, 4000
    noise = np.random.default_rng(0).normal(size=(many, len(logits[0]))).astype(np.float32)  # equal rows would shrink
    facts = {"ok": True, "width": 640, "height": 480}
    rows = [
        {"path": f"photos/{i:08}.jpg", "label": best[0]["label"], "index": best[0]["index"], "score": best[0]["score"]}
        | {"topk": best, **facts}
        for i, best in enumerate(top_k(torch.from_numpy(noise), classifier.labels, 5, "en"))
    ]
    with tempfile.TemporaryDirectory() as name:
        parts = Parts(Path(name, "out"), {"format": "parquet", "task": "classify"}, [], resume=False)
        short = _ms(lambda: parts.write(0, 0, rows[:few], end=False), rounds)
        long = _ms(lambda: parts.write(0, 0, rows, end=False), rounds)
        size = next(parts.folder.glob(f"*{many}.parquet")).stat().st_size
    row = max(long - short, 0.0) / (many - few)
    return {"row_ms": answer + row, "row_bytes": size / many, "part_ms": max(short - few * row, 0.0)}


def _measure_folder(rounds: int, names: int) -> dict[str, float]:
    """A plan of empty files, and parts that are there already."""
    from opsin.bulk import Parts
    from opsin.data.inputs import plan

    manifest = {"format": "parquet", "task": "classify"}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for i in range(names):
            folder = root / "photos" / f"{i // 1000:04}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"photo-{i:08}.jpg").touch()
        made = iter(range(10**6))
        listing = _ms(
            lambda: Parts(root / str(next(made)), manifest, plan([str(root / "photos")]), resume=False), rounds
        )
        out = root / "0"
        reading = _ms(lambda: Parts(out, manifest, [], resume=True), rounds)
        plan_bytes = (out / "_inputs.jsonl").stat().st_size / names
        for i in range(names):
            (out / f"part-{i:06d}-00000000-00001000-end.parquet").touch()
        opening = _ms(lambda: Parts(out, manifest, [], resume=True), rounds)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        Parts(out, manifest, [], resume=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return {
        "list_ms": listing / names, "plan_ms": reading / names, "plan_bytes": plan_bytes,
        "part_open_ms": max(opening - reading, 0.0) / names, "part_open_bytes": (peak - before) / names,
    }  # fmt: skip


def _measure_tar(paths: Sequence[str], rounds: int) -> float:
    """ms of an image."""
    from opsin.data.inputs import Block, items

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "photos.tar")
        with tarfile.open(path, "w") as tar:
            for i, photo in enumerate(paths):
                tar.add(photo, f"{i:08}{Path(photo).suffix}")

        def read() -> None:
            for item in items(Block("tar", (str(path),))):
                assert callable(item.source), item.source
                item.source()

        return _ms(read, rounds) / len(paths)


def _measure_start(photo: str, model: str, dtype: str) -> float:
    """Seconds of `opsin classify` with one image; the second time counts."""
    with tempfile.TemporaryDirectory() as name:
        return [classify([photo], Path(name, str(i)), model, dtype)[0] for i in range(2)][1]


def classify(arguments: Sequence[str], out: Path, model: str, dtype: str) -> tuple[float, float, float]:
    """`opsin classify` into a folder, in a process of its own: seconds, those of its cores, and its peak in MB."""
    command = ["-m", "opsin", "classify", *arguments, "--out", str(out), "--model", model, "--dtype", dtype]
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak / 1e6


def check(
    costs: Costs, paths: Sequence[str], model: str, dtype: str, sizes: Sequence[int], cores: int
) -> Iterator[dict[str, float]]:
    """Runs of the command over these files, again and again, beside what is predicted of them."""
    from opsin.bulk import files

    machine = Machine(cores=cores, read_mb_s=math.inf)
    dtype = next(iter(costs.model_ms)) if dtype == "auto" else dtype
    for size in sizes:
        job = Job(images=size, dtype=dtype, machines=1, failures=0.0, slow_share=0.0, retries=0.0)
        with tempfile.TemporaryDirectory() as name:
            listed = Path(name, "list.txt")
            listed.write_text("".join(f"{paths[i % len(paths)]}\n" for i in range(size)), encoding="utf-8")
            out = Path(name, "out")
            seconds, core_s, peak_mb = classify([f"@{listed}"], out, model, dtype)
            parts = len(files(out))
        predicted = predict(costs, machine, job).wall_s
        yield {
            "images": size, "predicted_s": predicted, "measured_s": seconds, "ratio": seconds / predicted,
            "measured_core_s": core_s, "images_per_s": size / seconds, "peak_mb": peak_mb, "parts": parts,
        }  # fmt: skip


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def costs_table(costs: Costs, about: dict[str, Any]) -> list[str]:
    """What was measured, a line each."""
    model = about.get("model", "model")
    here = about.get("machine", {})
    rows = [
        ("read from a tar in the system's cache, its header included", "ms·core", costs.member_ms),
        ("decode", "ms·core", costs.decode_ms),
        ("resize", "ms·core", costs.resize_ms),
        ("decoding by all cores, of as many times one", "", costs.parallel),
        *((f"{model}, {dtype}", "ms·core", ms) for dtype, ms in costs.model_ms.items()),
        ("answer, row and its share of the part", "ms·core", costs.row_ms),
        ("row in Parquet", "bytes", costs.row_bytes),
        ("part, whatever its rows", "ms", costs.part_ms),
        ("path: found, and written into the plan", "ms", costs.list_ms),
        ("path: read from the plan", "ms", costs.plan_ms),
        ("path in the plan", "bytes", costs.plan_bytes),
        ("part that is there, when a run goes on", "ms", costs.part_open_ms),
        ("the same, memory meanwhile", "bytes", costs.part_open_bytes),
        ("start of a process", "s", costs.start_s),
    ]
    head = [
        f"{here.get('cpu', 'an unknown CPU')}, threads: {here.get('threads', '?')}, {here.get('date', '?')[:10]}, "
        f"load {about.get('load', math.nan):.1f}, "
        f"{about.get('images', '?')} images of {costs.image_bytes / 1e3:,.0f} kB." + about.get("note", ""),
        "",
        "| an image, or what is named | | |",
        "|---|---:|---|",
    ]
    return head + [f"| {what} | {value:.3g} | {unit} |" for what, unit, value in rows]


def prediction_table(costs: Costs, machine: Machine, job: Job, sizes: Sequence[float] = SIZES) -> list[str]:
    stage = stages(costs, machine, job)
    step = seconds_per_image(costs, machine, job)
    first = predict(costs, machine, replace(job, images=sizes[0]))
    each = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in stage.items())
    head = [
        "images",
        "machines",
        "images/s",
        "listing",
        "all",
        "core-hours",
        "GPU-hours",
        "workers lost",
        "plan",
        "parts",
    ]
    head = [*head, "requests", "a kill costs", "money"]
    if not machine.gpus:
        head.remove("GPU-hours")
    lines = [
        f"One machine, ms an image: {each}; in all {step * 1e3:.3g}, so {1 / step:,.0f} images/s, bound by "
        f"**{first.bound}**.",
        "",
        f"| {' | '.join(head)} |",
        "|---:" * len(head) + "|",
    ]
    for size in sizes:
        found = predict(costs, machine, replace(job, images=size))
        cells = [
            f"10{_raised(round(math.log10(size)))}", f"{found.machines:,}", f"{found.images_per_s:,.0f}",
            _duration(found.list_s), _duration(found.wall_s), _short(found.core_hours),
            *([_short(found.gpu_hours)] if machine.gpus else []), f"{found.failures:,}", _size(found.plan_bytes),
            _short(found.parts), _short(found.requests), _duration(found.kill_s), _short(found.money),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def check_table(rows: Sequence[dict[str, float]]) -> list[str]:
    return [
        "| images | predicted | measured | measured / predicted | seconds of cores | images/s | peak memory | parts |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            "| {images:,} | {predicted_s:.1f} s | {measured_s:.1f} s | {ratio:.2f} | {measured_core_s:.1f} s | "
            "{images_per_s:,.1f} | {peak_mb:,.0f} MB | {parts:,} |".format(**row)
            for row in rows
        ),
    ]


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400 * 2), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / min(length, 86400):.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.0f} s"


def _short(value: float) -> str:
    """Three digits."""
    for unit, size in ((" G", 1e9), (" M", 1e6), (" k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _size(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def filled(text: str) -> str:
    """Markdown with what each `<!-- python benchmarks/scale.py … -->` prints, from there to its `<!-- end -->`."""

    def run(found: re.Match[str]) -> str:
        lines = printed(shlex.split(found[2]))
        return "\n".join([found[1], *lines, "<!-- end -->"])

    pattern = r"(<!-- python benchmarks/scale\.py ((?:predict|costs)\b.*?) -->)\n.*?<!-- end -->"
    return re.sub(pattern, run, text, flags=re.DOTALL)


# ── command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name in ("measure", "check"):
        command = commands.add_parser(name)
        command.add_argument("photos", nargs="*", help="as `opsin classify` takes them")
        command.add_argument("--model", default="opsin/vit-tiny")
        command.add_argument("--images", type=int, default=128, help="that are measured, at most")
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--dtype", nargs="+", default=["auto"])
        if name == "check":
            command.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
            command.add_argument("--all", action="store_true", help="100,000 too")
    for name in ("predict", "costs"):
        command = commands.add_parser(name)
        command.add_argument("--costs", type=Path, default=ROOT / "benchmarks" / "scale.json")
        for field in ("image_bytes", "decode_ms", "resize_ms"):
            command.add_argument(f"--{field.replace('_', '-')}", type=float, help="in place of what was measured")
    for kind in (Machine, Job):
        for option in fields(kind):
            if option.name != "images":
                flag = f"--{option.name.replace('_', '-')}"
                value: Any = option.default
                if isinstance(value, bool):
                    commands.choices["predict"].add_argument(flag, action="store_true")
                else:
                    commands.choices["predict"].add_argument(flag, type=type(value), default=value)
    commands.add_parser("fill").add_argument("file", type=Path)
    return top


def printed(arguments: Sequence[str]) -> list[str]:
    """What `predict` and `costs` print."""
    options = vars(parser().parse_args(arguments))
    costs = Costs.read(options["costs"])
    given = {name: options[name] for name in ("image_bytes", "decode_ms", "resize_ms") if options[name] is not None}
    costs = replace(costs, **given)
    if options["command"] == "costs":
        return costs_table(costs, json.loads(options["costs"].read_text(encoding="utf-8")))
    machine = Machine(**{field.name: options[field.name] for field in fields(Machine)})
    job = Job(images=0, **{field.name: options[field.name] for field in fields(Job) if field.name != "images"})
    return prediction_table(costs, machine, job)


def main() -> None:
    options = parser().parse_args()
    if options.command in ("predict", "costs"):
        print("\n".join(printed(sys.argv[1:])))
        return
    if options.command == "fill":
        options.file.write_text(filled(options.file.read_text(encoding="utf-8")), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        paths = _photos(options.photos, Path(name), options.images)
        model = _random_vit(Path(name, "vit")) if options.model == "random" else options.model
        found = measure(paths, model, options.dtype, rounds=options.rounds) | {"model": NAMES.get(options.model, model)}
        print(json.dumps(found, indent=2), flush=True)
        if options.command == "check":
            costs = Costs(**{field.name: found[field.name] for field in fields(Costs)})
            sizes = [*options.sizes, *([100_000] if options.all else [])]
            rows = []
            for row in check(costs, paths, model, options.dtype[0], sizes, found["machine"]["threads"]):
                print(json.dumps(row), flush=True)
                rows.append(row)
            print("\n".join(check_table(rows)))


def _photos(arguments: Sequence[str], folder: Path, count: int) -> list[str]:
    """Images that can be read, evenly from those named."""
    if not arguments:
        from folder import write_photos  # type: ignore[import-not-found]  # beside this script

        photos = folder / "photos"
        photos.mkdir()
        return list(write_photos(photos, count))
    from opsin.data.inputs import plan

    paths = [str(Path(path).absolute()) for block in plan(arguments) if block.kind == "files" for path in block.paths]
    chosen = paths[:: math.ceil(len(paths) / count)] if paths else []
    if not all(Path(path).is_file() for path in chosen) or not chosen:
        raise SystemExit(f"{' '.join(arguments)}: no files of images. Give a folder of photos that can be read.")
    return chosen


def _random_vit(folder: Path) -> str:
    """ViT-B/16 of random weights, as fast as a trained one."""
    import torch

    from opsin import checkpoints
    from opsin.labels import Labels
    from opsin.models.vit import ViT, ViTConfig
    from opsin.preprocess import PreprocessConfig

    torch.manual_seed(0)
    labels = Labels.from_names([f"class {i}" for i in range(1000)])
    checkpoints.write(folder, ViT(ViTConfig()).eval(), PreprocessConfig(size=(224, 224)), labels)
    return str(folder)


if __name__ == "__main__":
    main()
