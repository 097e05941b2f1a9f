"""Models: found by name, loaded once, unloaded when memory is short."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from opsin.errors import CheckpointError, ModelError
from opsin.serve import fleet as fleets
from opsin.serve.batching import Answer
from opsin.serve.fleet import Fleet
from opsin.serve.metrics import Metrics
from opsin.serve.refusals import NotFound, NotReady
from opsin.serve.settings import Settings


class Loads:
    """`opsin.load`, counted."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, source: str, **options: Any) -> Any:
        self.names.append(source)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return opsin.load(source, **options)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def three(tiny: Path) -> tuple[str, ...]:
    """Three names for copies of the tiny model."""
    return tuple(f"{name}={tiny}" for name in ("a/one", "two", "three"))


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_names_and_sources() -> None:
    settings = Settings(models=("opsin/vit-tiny", "cats=runs/1", "/data/m/"))
    assert settings.sources == {"opsin/vit-tiny": "opsin/vit-tiny", "cats": "runs/1", "data/m": "/data/m/"}
    with pytest.raises(ValueError, match='two models are called "a". Name one of them otherwise: OTHER=y'):
        Settings(models=("a=x", "a=y"))
    with pytest.raises(ValueError, match='"a=" is not a model. Write NAME=SOURCE'):
        Settings(models=("a=",))
    with pytest.raises(ValueError, match="max_batch is 0; it must be at least 1"):
        Settings(max_batch=0)
    with pytest.raises(ValueError, match="max_wait_ms is -1"):
        Settings(max_wait_ms=-1)
    with pytest.raises(ValueError, match="no model. Name at least one"):
        Settings(models=())


def test_all_are_loaded_at_the_start_once(three: tuple[str, ...], tiny: Path, loads: Loads) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three, dtype="fp32"), Metrics(), loads)
        assert fleet.problems == dict.fromkeys(("a/one", "two", "three"), "it is not loaded")
        await fleet.load_all()
        assert fleet.problems == {} and loads.names == [str(tiny)] * 3
        assert fleet.get(None).name == fleet.default == "a/one"
        assert fleet.get("two").classifier is not fleet.get("three").classifier
        with pytest.raises(NotFound, match='no model "a/on". Did you mean "a/one"\\? `GET /v1/models` lists'):
            fleet.get("a/on")
        await fleet.close()

    run(test)


def test_a_lazy_model_is_loaded_when_it_is_asked_for_and_the_request_told_when_to_come_back(
    three: tuple[str, ...], loads: Loads
) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three, dtype="fp32", lazy=True), Metrics(), loads)
        assert fleet.problems == {}
        loads.gate.clear()
        for _ in range(2):
            with pytest.raises(NotReady, match="two is loading. Try again in 5 s") as caught:
                fleet.get("two")
            assert caught.value.headers == {"Retry-After": "5"}
            await asyncio.sleep(0.01)
        loads.gate.set()
        await fleet.start(fleet.find("two"))
        assert len(loads.names) == 1 and fleet.find("three").batcher is None
        batcher = fleet.get("two").batcher
        assert batcher is not None
        assert isinstance((await batcher.infer([Path("examples/photos/rocket.jpg").read_bytes()], "logits"))[0], Answer)
        await fleet.close()

    run(test)


def test_what_was_not_used_for_longest_makes_room(three: tuple[str, ...], loads: Loads) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three, dtype="fp32", lazy=True), Metrics(), loads)
        await fleet.start(fleet.find("a/one"))
        size = fleet.find("a/one").memory_bytes
        assert size == fleet.get("a/one").classifier.memory_bytes > 10_000
        await fleet.close()

        fleet = Fleet(Settings(models=three, dtype="fp32", max_memory_bytes=2 * size + 1), Metrics(), loads)
        await fleet.load_all()
        there = [model.name for model in fleet.models.values() if model.batcher is not None]
        assert there == ["two", "three"] and fleet.problems == {}
        fleet.get("two")
        with pytest.raises(NotReady, match="a/one is loading"):
            fleet.get("a/one")
        await fleet.start(fleet.find("a/one"))
        there = [model.name for model in fleet.models.values() if model.batcher is not None]
        assert there == ["a/one", "two"]
        await fleet.close()

    run(test)


def test_a_model_larger_than_the_memory_is_served_alone_and_said(
    three: tuple[str, ...], loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three[:1], dtype="fp32", max_memory_bytes=1), Metrics(), loads)
        await fleet.load_all()
        assert fleet.get(None).batcher is not None
        await fleet.close()

    run(test)
    assert "a/one alone takes 0 MB of memory, over the limit" in caplog.text


def test_a_model_that_cannot_be_loaded_is_said_and_tried_again_later(
    three: tuple[str, ...], loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three[:1], dtype="fp32"), Metrics(), loads)
        loads.error = CheckpointError("its head has 3 rows.")
        with pytest.raises(ModelError, match="a/one: its head has 3 rows."):
            await fleet.load_all()
        assert fleet.problems == {"a/one": "its head has 3 rows."}
        lazy = Fleet(Settings(models=three[:1], dtype="fp32", lazy=True), Metrics(), loads)
        await lazy.start(lazy.find(None))
        assert lazy.find(None).error and lazy.problems == {}  # it is no trouble of those that serve
        await lazy.close()
        with pytest.raises(NotReady, match="a/one could not be loaded: its head has 3 rows. Try again in 60 s."):
            fleet.get(None)
        assert len(loads.names) == 2
        monkeypatch.setattr(fleets, "RETRY_SECONDS", 0.0)
        loads.error = None
        with pytest.raises(NotReady, match="a/one is loading"):
            fleet.get(None)
        await fleet.start(fleet.find(None))
        assert fleet.get(None).batcher is not None and fleet.problems == {}
        await fleet.close()

    run(test)


def test_a_model_that_is_not_of_images_is_refused() -> None:
    async def test() -> None:
        fleet = Fleet(Settings(), Metrics(), lambda source, **options: object())
        with pytest.raises(ModelError, match="opsin/vit-tiny is a object; the server is for models of images"):
            await fleet.load_all()
        await fleet.close()

    run(test)


def test_what_a_request_has_had_loaded_is_not_loaded_again_at_the_start(three: tuple[str, ...], loads: Loads) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three, dtype="fp32"), Metrics(), loads)
        loads.gate.clear()
        starting = asyncio.create_task(fleet.load_all())
        await asyncio.sleep(0.01)  # the first is being loaded
        with pytest.raises(NotReady, match="three is loading"):
            fleet.get("three")
        loads.gate.set()
        await starting
        assert len(loads.names) == 3 and fleet.problems == {}
        await fleet.close()

    run(test)


def test_closing_ends_what_is_being_loaded(
    three: tuple[str, ...], loads: Loads, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=three, dtype="fp32", lazy=True), Metrics(), loads)
        loads.gate.clear()
        loading = fleet.start(fleet.find("two"))
        await asyncio.sleep(0.01)
        await fleet.close()
        loads.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert fleet.find("two").batcher is None and fleet.find("two").loading is None

    run(test)
    assert not caplog.records


def test_of_a_name_of_megabytes_only_the_beginning_is_compared() -> None:
    async def test() -> None:
        compared: list[str] = []

        def close(name: str, *_: Any) -> list[str]:
            compared.append(name)
            return []

        fleet = Fleet(Settings(), Metrics(), object)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("opsin.serve.refusals.get_close_matches", close)
            with pytest.raises(NotFound, match='no model "xyxy'):
                fleet.find("xy" * 1_000_000)
        assert [len(name) for name in compared] == [100]
        await fleet.close()

    run(test)


@pytest.mark.parametrize(("seconds", "dtype", "lanes"), [(60.0, "auto", 2), (0.0, "auto", 1), (60.0, "fp32", 1)])
def test_a_quick_model_has_a_thread_on_each_core(
    seconds: float, dtype: str, lanes: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        fleet = Fleet(Settings(models=(str(tiny),), dtype=dtype), Metrics())
        await fleet.load_all()
        batcher = fleet.get(None).batcher
        assert batcher is not None and len(batcher._lanes) == lanes
        await fleet.close()

    threads = torch.get_num_threads()
    monkeypatch.setattr(fleets, "LANE_SECONDS", seconds)
    torch.set_num_threads(2)
    try:
        run(test)
    finally:
        torch.set_num_threads(threads)
