"""The numbers of one process; test_run.py has those of several."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from opsin import __version__
from opsin.serve.metrics import Metrics


def numbers(text: str) -> dict[str, float]:
    """Line without its value → value."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_requests_are_counted_by_route_status_and_error() -> None:
    metrics = Metrics()
    metrics.request(route="/classify", status=200, seconds=0.003)
    metrics.request(route="/classify", status=200, seconds=0.03)
    metrics.request(route="/classify", status=422, seconds=0.001, error="corrupt")
    found = numbers(metrics.render().decode())
    assert found['opsin_requests_total{route="/classify",status="200"}'] == 2
    assert found['opsin_requests_total{route="/classify",status="422"}'] == 1
    assert found['opsin_errors_total{type="corrupt"}'] == 1
    assert found['opsin_request_seconds_bucket{le="0.005",route="/classify"}'] == 2
    assert found['opsin_request_seconds_count{route="/classify"}'] == 3
    assert found[f'opsin_info{{version="{__version__}"}}'] == 1


def test_a_batch_is_counted_in_images_and_stages() -> None:
    metrics = Metrics()
    model = metrics.of_model("org/tiny")
    model.batch(3, waited=[0.001, 0.002, 0.3], decode=0.02, forward=0.2)
    model.batch(7, waited=[0.001] * 7, decode=0.01, forward=0.1)
    model.died()
    found = numbers(metrics.render().decode())
    assert found['opsin_images_total{model="org/tiny"}'] == 10
    assert found['opsin_batch_images_bucket{le="4.0",model="org/tiny"}'] == 1
    assert found['opsin_batch_images_count{model="org/tiny"}'] == 2
    counts = {stage: found[f'opsin_stage_seconds_count{{model="org/tiny",stage="{stage}"}}'] for stage in STAGES}
    assert counts == {"queue": 10, "decode": 2, "forward": 2}
    assert found['opsin_stage_seconds_sum{model="org/tiny",stage="forward"}'] == pytest.approx(0.3)
    assert found['opsin_restarts_total{model="org/tiny"}'] == 1


STAGES = ("queue", "decode", "forward")


def test_a_model_that_is_unloaded_has_no_memory() -> None:
    metrics = Metrics()
    metrics.memory({"a": 11, "b": 13})
    metrics.memory({"b": 13})
    found = numbers(metrics.render().decode())
    assert found['opsin_model_memory_bytes{model="a"}'] == 0
    assert found['opsin_model_memory_bytes{model="b"}'] == 13


def test_a_scrape_tells_the_queue_the_memory_and_the_process(client: httpx.Client, photos: Path) -> None:
    client.get("/health").raise_for_status()
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = numbers(answer.text)
    assert found['opsin_queue_images{model="org/tiny"}'] == 0
    assert found['opsin_model_memory_bytes{model="org/tiny"}'] > 1000
    assert found['opsin_images_total{model="org/tiny"}'] == 1
    assert found["process_resident_memory_bytes"] > 1e6


def test_a_model_that_is_not_loaded_has_an_empty_queue(serve: Callable[..., str], tiny: Path) -> None:
    text = httpx.get(serve(lazy=True, models=(f"later={tiny}",)) + "/metrics").text
    assert re.search(r'opsin_queue_images\{model="later"\} 0.0', text)
