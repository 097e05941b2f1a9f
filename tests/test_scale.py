"""benchmarks/scale.py: the model of a bulk run against sums that are done by hand, and docs/scale.md against both."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin import checkpoints, cluster, pipeline
from opsin.checkpoints import Checkpoint
from opsin.data import remote

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("scale")
    sys.modules["scale"] = module  # where dataclasses look for types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scale"]
    if before is not None:
        sys.modules["scale"] = before


@pytest.fixture(scope="module")
def costs(scale: ModuleType) -> Any:
    return scale.Costs(
        image_bytes=70_000, decode_ms=1.1, resize_ms=0.7, parallel=0.9, model_ms={"bf16": 77.0, "fp32": 154.0},
        row_ms=0.03, row_bytes=61, part_ms=13.0, list_ms=0.011, plan_ms=0.0005, plan_bytes=53, part_open_ms=0.007,
        part_open_bytes=590, member_ms=0.02, start_s=1.3,
    )  # fmt: skip


@pytest.fixture
def quiet(scale: ModuleType) -> Any:
    """Nothing goes wrong."""
    return scale.Job(images=1000, retries=0.0, failures=0.0, slow_share=0.0)


# ── one machine ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_a_cpu_the_stages_take_turns(scale: ModuleType, costs: Any, quiet: Any) -> None:
    machine = scale.Machine(cores=7, read_mb_s=math.inf)
    expected_ms = 1.8 / (7 * 0.9) + 77 / 7 + 0.03 + 13 / 1000
    assert scale.seconds_per_image(costs, machine, quiet) * 1e3 == pytest.approx(expected_ms)


def test_a_gpu_has_images_decoded_beside_it(scale: ModuleType, costs: Any, quiet: Any) -> None:
    machine = scale.Machine(cores=11, gpus=2, gpu_rate=500, read_mb_s=math.inf)
    rows_ms = (0.03 + 0.013) / 2  # two workers
    assert scale.seconds_per_image(costs, machine, quiet) * 1e3 == pytest.approx(1.0 + rows_ms)
    large = replace(costs, decode_ms=48.3)
    decode_ms = 49 / (11 * 0.9) + rows_ms * 2 / 11
    assert scale.seconds_per_image(large, machine, quiet) * 1e3 == pytest.approx(decode_ms)


@pytest.mark.parametrize(
    ("machine", "change", "bound"),
    [
        ({"cores": 5}, {}, "model"),
        ({"gpus": 1, "gpu_rate": 2000.0, "cores": 13}, {"decode_ms": 48.0}, "decode"),
        ({"gpus": 1, "gpu_rate": 2000.0, "read_mb_s": 17.0}, {}, "bandwidth"),
        ({"gpus": 1, "gpu_rate": 2000.0, "latency_ms": 31.0}, {}, "latency"),
        ({"gpus": 8, "gpu_rate": 1e6, "cores": 999}, {"row_ms": 3.0}, "rows"),
    ],
)
def test_what_bounds_it(
    scale: ModuleType, costs: Any, quiet: Any, machine: dict[str, Any], change: dict[str, Any], bound: str
) -> None:
    assert scale.predict(replace(costs, **change), scale.Machine(**machine), quiet).bound == bound


def test_a_worker_waits_for_sixteen_answers_at_once(scale: ModuleType, costs: Any, quiet: Any) -> None:
    for workers in (1, 3):
        machine = scale.Machine(gpus=1, gpu_rate=1e5, read_mb_s=math.inf, latency_ms=320, workers=workers)
        assert scale.seconds_per_image(costs, machine, quiet) == pytest.approx(0.32 / 16 / workers)


def test_a_tar_on_a_server_is_fetched_before_its_first_image(scale: ModuleType, costs: Any, quiet: Any) -> None:
    """By one worker in turn with the computing; several overlap, until the network is the bound."""
    costs = replace(costs, image_bytes=2**20, decode_ms=2.9)  # 16 in a piece
    job = replace(quiet, per_tar=1000)

    def step(workers: int) -> float:
        machine = scale.Machine(gpus=1, gpu_rate=1e5, cores=4, read_mb_s=1048.576, latency_ms=16, workers=workers)
        return float(scale.seconds_per_image(costs, machine, job)) * 1e3

    rows_ms = 0.03 + 0.013 + 0.02
    decode_ms = 3.6 / (4 * 0.9) + rows_ms / 4
    assert step(1) == pytest.approx(1.0 + 1.0 + decode_ms)
    assert step(2) == pytest.approx((1.0 + 1.0) / 2 + decode_ms)
    assert step(10**6) == pytest.approx(decode_ms, rel=0.01)


def test_a_machine_that_cannot_be_computed_with(scale: ModuleType, costs: Any, quiet: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gpu_rate is 0: measure images/s of one GPU .*gpu.py"):
        scale.Machine(gpus=1)
    with pytest.raises(ValueError, match=r"a machine of 0 cores that reads 1250 MB/s does nothing"):
        scale.Machine(cores=0)
    with pytest.raises(ValueError, match=r'no cost of dtype "int8"\. Measured: bf16, fp32\.'):
        scale.predict(costs, scale.Machine(), replace(quiet, dtype="int8"))
    (tmp_path / "c.json").write_text('{"image_bytes": 1}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"c\.json has no decode_ms, .*Make it anew: scale\.py measure > "):
        scale.Costs.read(tmp_path / "c.json")


def test_its_constants_are_the_packages(scale: ModuleType) -> None:
    assert scale.READERS == pipeline.READERS
    assert scale.PIECE_BYTES == remote._PIECE_BYTES
    assert (scale.GROUPS_PER_WORKER, scale.MAX_GROUPS) == (cluster.TASKS_PER_WORKER, cluster.MAX_TASKS)


# ── many machines ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [True, False])
def test_equal_groups_make_rounds(scale: ModuleType, shards: bool) -> None:
    done = scale.simulate(np.full(23, 7.0), 5, part_s=1.0, shards=shards)
    assert done == (math.ceil(23 / 5) * 7.0, 23 * 7.0, 0.0, 0)


@given(
    groups=st.lists(st.floats(0.1, 50), min_size=1, max_size=60),
    workers=st.integers(1, 11),
    slow=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_who_is_free_takes_the_next(scale: ModuleType, groups: list[float], workers: int, slow: float) -> None:
    """Graham's bound for lists: all are busy until the last group is handed out."""
    factor = 3.0
    done = scale.simulate(groups, workers, part_s=1.0, slow_share=slow, slow_factor=factor)
    num_slow = round(slow * workers)
    speed = workers - num_slow + num_slow / factor
    assert sum(groups) / speed <= done.wall_s * (1 + 1e-9)
    assert done.wall_s <= sum(groups) / speed + max(groups) * (factor if num_slow else 1) + 1e-9


def test_a_slow_machine_delays_shards_and_hardly_those_who_ask(scale: ModuleType) -> None:
    options: dict[str, Any] = {"part_s": 1.0, "slow_share": 0.1, "slow_factor": 4.0}
    shards = scale.simulate(np.full(10, 320.0), 10, shards=True, **options)
    asked = scale.simulate(np.full(320, 10.0), 10, **options)
    assert shards.wall_s == 4 * 320
    assert 3200 / 9.25 <= asked.wall_s <= 3200 / 9.25 + 4 * 10


def test_failures_cost_what_the_closed_form_says(scale: ModuleType) -> None:
    """A part of τ is tried until it succeeds, e^λτ − 1 times in vain: its mean is (e^λτ − 1)(1/λ + R)."""
    part_s, rate, restart_s, parts, groups = 13.0, 1 / 40, 7.0, 3, 20_000
    done = scale.simulate(np.full(groups, parts * part_s), 1, part_s=part_s, failures_per_s=rate, restart_s=restart_s)
    tries = math.exp(rate * part_s) - 1
    expected = groups * parts * tries * (1 / rate + restart_s)
    assert done.wall_s == pytest.approx(expected, rel=0.01)
    assert done.failures == pytest.approx(groups * parts * tries, rel=0.03)
    assert done.wall_s == pytest.approx(groups * parts * part_s + done.lost_s + done.failures * restart_s)


def test_parts_that_are_never_finished(scale: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"a part of 200 s, where a worker lives 10 s, .*Take fewer rows"):
        scale.simulate([1000.0], 1, part_s=100.0, failures_per_s=0.1, slow_factor=2.0)


# ── a prediction ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_machine_adds_up(scale: ModuleType, costs: Any, quiet: Any) -> None:
    machine = scale.Machine(cores=7, read_mb_s=math.inf, price=2.5)
    found = scale.predict(costs, machine, replace(quiet, images=30_000, machines=1))
    step = scale.seconds_per_image(costs, machine, quiet)
    assert found.list_s == pytest.approx(30_000 * 0.011e-3)
    assert found.wall_s == pytest.approx(found.list_s + 1.3 + 2 * 30_000 * 0.0005e-3 + 30_000 * step)
    assert found.core_hours == pytest.approx(found.wall_s * 7 / 3600)
    assert (found.gpu_hours, found.parts, found.requests, found.failures) == (0, 30, 0, 0)
    assert found.money == pytest.approx(found.wall_s / 3600 * 2.5)
    assert found.kill_s == pytest.approx(500 * step + 1.3 + 2 * 30_000 * 0.0005e-3 + 30 * 0.007e-3)


def test_tars_spare_listing_requests_and_parts(scale: ModuleType, costs: Any, quiet: Any) -> None:
    machine = scale.Machine(gpus=1, gpu_rate=2000, latency_ms=30, workers=4)
    job = replace(quiet, images=10**8, machines=20, part_rows=10_000)
    files, tars = (scale.predict(costs, machine, replace(job, per_tar=count)) for count in (0, 10_000))
    assert files.requests == 10**8 + 10**8 / 1000
    assert tars.requests == 10**4 * (math.ceil(7e8 / 2**24) + 2) + 10
    assert files.list_s / tars.list_s == pytest.approx(10_000)
    assert files.plan_bytes / tars.plan_bytes == pytest.approx(10_000)
    assert files.parts == tars.parts == 10_000


def test_as_many_machines_as_a_day_takes(scale: ModuleType, costs: Any) -> None:
    machine = scale.Machine(cores=32)
    for images in (10**6, 10**8, 10**9):
        found = scale.predict(costs, machine, scale.Job(images=images, per_tar=10_000))
        assert found.wall_s <= 24 * 3600
        fewer = scale.predict(
            costs, machine, scale.Job(images=images, per_tar=10_000, machines=found.machines // 2 or 1)
        )
        assert found.machines == 1 or fewer.wall_s > 24 * 3600


# ── measuring, and the command ───────────────────────────────────────────────────────────────────────────────────────


def test_measured_and_checked_on_a_tiny_model(
    scale: ModuleType, noisy_checkpoint: Checkpoint, photos: Path, tmp_path: Path
) -> None:
    checkpoints.write(tmp_path / "m", noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    paths = [str(photos / name) for name in ("chelsea.png", "rocket.jpg")]
    threads = torch.get_num_threads()
    found = scale.measure(paths, str(tmp_path / "m"), ["fp32"], rounds=1, batch_size=2, names=50)
    assert torch.get_num_threads() == threads
    costs = scale.Costs(**{name: found[name] for name in scale.Costs.__dataclass_fields__})
    assert costs.image_bytes == sum(Path(path).stat().st_size for path in paths) / 2
    assert list(costs.model_ms) == ["fp32"]
    values = asdict(costs) | costs.model_ms
    assert [name for name, value in values.items() if name not in ("model_ms", "resize_ms") and not value > 0] == []
    [row] = scale.check(costs, paths, str(tmp_path / "m"), "fp32", [70], threads)
    assert (row["images"], row["parts"]) == (70, 1)
    assert row["measured_s"] > 0 < row["predicted_s"]
    assert f"| {row['measured_s']:.1f} s | {row['ratio']:.2f} |" in scale.check_table([row])[-1]
    assert any("ms·core" in line and "| m, fp32 |" in line for line in scale.costs_table(costs, found | {"model": "m"}))


def test_the_document_says_what_the_script_says(scale: ModuleType) -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert text.count("<!-- end -->") >= 5
    assert scale.filled(text) == text, "run: python benchmarks/scale.py fill docs/scale.md"


def test_numbers_are_short(scale: ModuleType) -> None:
    assert [scale._short(value) for value in (0.1234, 12, 1234, 999.9, 1e6, 2.5e9)] == [
        "0.123", "12", "1.23 k", "1 k", "1 M", "2.5 G",
    ]  # fmt: skip
    assert [scale._duration(value) for value in (0.25, 7, 90, 5400, 3 * 86400)] == [
        "0.25 s", "7 s", "1.5 min", "1.5 h", "3.0 d",
    ]  # fmt: skip
