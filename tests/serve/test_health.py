"""Alive, ready, healthy: what each of the three sees, and what it does not."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from opsin import load
from opsin.errors import ModelError
from opsin.pipeline import Classifier
from opsin.serve import batching, health
from opsin.serve.app import create_app
from opsin.serve.refusals import Overloaded
from opsin.serve.settings import Settings


@asynccontextmanager
async def running(
    folder: Path, load: Callable[..., Any] = load, *, wait: bool = True, **settings: Any
) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """The application in this event loop, without a socket."""
    settings.setdefault("models", (f"org/tiny={folder}",))
    app = create_app(Settings(dtype="fp32", **settings), load=load)
    async with app.router.lifespan_context(app):
        while wait and app.state.fleet.problems:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://opsin") as client:
            yield app, client


class Spoilt:
    """Loads a model whose pass is `spoil(outputs, number of the pass)`; the first one, of loading, is pass 0."""

    def __init__(self, spoil: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.spoil, self.passes, self.images = spoil, 0, 0

    def __call__(self, name: str, **options: Any) -> Classifier:
        classifier: Classifier = load(name, **options)
        forward = classifier.forward

        def spoilt(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.passes += 1
            self.images += len(args[0])
            return self.spoil(forward(*args, **kwargs), self.passes - 1)

        classifier.forward = spoilt  # type: ignore[method-assign]
        return classifier


def late(output: torch.Tensor, number: int) -> torch.Tensor:
    time.sleep(0.5 * (number > 1))
    return output


def in_loop(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def test_live_and_ready(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_not_ready_while_a_model_is_loading(tiny: Path) -> None:
    go = threading.Event()

    def slow(name: str, **options: Any) -> Any:
        go.wait(10)
        return load(name, **options)

    async def test() -> None:
        async with running(tiny, slow, wait=False) as (_, client):
            await asyncio.sleep(0.05)
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["models"] == {"org/tiny": "it is loading"}
            assert answer.json()["error"] == "org/tiny: it is loading"
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/livez")).status_code == 200
            go.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)

    in_loop(test())


def test_not_ready_with_a_model_that_cannot_be_loaded(tiny: Path) -> None:
    def broken(name: str, **options: Any) -> Any:
        if name == "bad":
            raise ModelError("its file is torn.")
        return load(name, **options)

    async def test() -> None:
        async with running(tiny, broken, models=(f"org/tiny={tiny}", "bad"), wait=False) as (app, client):
            while len(app.state.fleet.problems) > 1 or app.state.fleet.models["bad"].error is None:
                await asyncio.sleep(0.01)
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["models"]) == (503, {"bad": "its file is torn."})

    in_loop(test())


def test_a_lazy_model_is_ready_to_be_loaded(tiny: Path) -> None:
    async def test() -> None:
        async with running(tiny, lazy=True) as (_, client):
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/health")).json() == {"status": "healthy", "models": {}}

    in_loop(test())


def test_not_ready_while_it_drains(tiny: Path) -> None:
    async def test() -> None:
        async with running(tiny) as (app, client):
            app.state.draining = True
            answer = await client.get("/readyz")
            assert (answer.status_code, answer.json()["models"]) == (503, {"org/tiny": "the server is shutting down"})
            assert (await client.get("/health")).status_code == 200  # it computes as before

    in_loop(test())


def test_a_canary_is_shared_and_kept_for_a_while(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Spoilt(lambda output, _: output)

    async def test() -> None:
        async with running(tiny, model) as (_, client):
            before = model.images
            answers = await asyncio.gather(*(client.get("/health") for _ in range(23)))
            assert {answer.status_code for answer in answers} == {200}
            assert answers[0].json()["models"]["org/tiny"]["ms"] > 0
            assert (await client.get("/health")).json() == answers[0].json()
            assert model.images == before + 1
            monkeypatch.setattr(health, "FRESH_SECONDS", 0)
            assert (await client.get("/health")).status_code == 200
            assert model.images == before + 2

    in_loop(test())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda output, number: output * float("nan") if number > 1 else output, "not finite"),
        (lambda output, number: output + number, "its answer to one and the same image has changed, by 1"),
        (lambda output, number: 1 / 0 if number > 1 else output, "the model failed on it"),
        (late, "it has not answered in 0.1 seconds"),
    ],
    ids=["nan", "changed", "raises", "hangs"],
)  # fmt: skip
def test_a_canary_that_dies(tiny: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, why: str) -> None:
    monkeypatch.setattr(health, "CANARY_SECONDS", 0.1)
    monkeypatch.setattr(health, "FRESH_SECONDS", 0)

    async def test() -> None:
        async with running(tiny, Spoilt(spoil)) as (_, client):
            assert (await client.get("/health")).status_code == 200
            answer = await client.get("/health")
            assert answer.status_code == 503
            assert why in answer.json()["models"]["org/tiny"]

    in_loop(test())


def test_a_thread_that_dies_is_noticed_and_replaced(
    serve: Callable[..., str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "RESTART_SECONDS", 0.3)

    def once(output: torch.Tensor, number: int) -> torch.Tensor:
        if number == 1:
            raise SystemExit
        return output

    with httpx.Client(base_url=serve(load=Spoilt(once))) as client:
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(client.get("/health", timeout=20).status_code))
        asking.start()
        seen = []
        while asking.is_alive():
            seen.append(client.get("/readyz"))
        asking.join()
        why = [answer.json()["models"]["org/tiny"] for answer in seen if answer.status_code == 503]
        assert set(why) == {"its thread has died and is being restarted"}
        assert client.get("/readyz").status_code == 200
        assert answers == [200]  # what the thread had in hand is computed by the next
        assert 'opsin_restarts_total{model="org/tiny"} 1.0' in client.get("/metrics").text


def test_a_full_queue_is_no_sickness(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any) -> Any:
        raise Overloaded("the queue is full")

    url = serve()
    monkeypatch.setattr(batching.Batcher, "infer", full)
    assert httpx.get(f"{url}/health").status_code == 200


def test_no_redirect_to_a_host_that_the_client_names(client: httpx.Client) -> None:
    for path in ("/livez/", "/classify/", "/v2/"):
        answer = client.post(path, headers={"Host": "evil.example"})
        assert answer.status_code in (404, 405) and "location" not in answer.headers
