"""A queue and a thread: nobody waits for a stranger's mistake."""

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import opsin
from opsin.pipeline import Classifier
from opsin.serve.batching import Answer, Batcher
from opsin.serve.refusals import NotReady, Overloaded, Refusal, TooLarge

POISON = 200  # the red of every pixel of an image that the model fails on


def picture(red: int) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (43, 37), (red, 100, 50)).save(file, "PNG")
    return file.getvalue()


class Watch:
    """Takes note of every batch."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.deaths = 0

    def batch(self, size: int, *, waited: Sequence[float], decode: float, forward: float) -> None:
        assert len(waited) == size and min(waited) >= 0 and decode >= 0 and forward >= 0
        self.sizes.append(size)

    def died(self) -> None:
        self.deaths += 1


class Gate:
    """A classifier that waits to be let through, and fails on a red of POISON."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier, self.open, self.entered = classifier, threading.Event(), threading.Event()
        self.open.set()
        self.failures: list[BaseException] = []  # raised by the next passes, whatever is in them
        self.calls: list[int] = []
        self._forward = classifier.forward
        classifier.forward = self.forward  # type: ignore[method-assign]

    def forward(self, resized: list[np.ndarray], *, embed: bool = False) -> torch.Tensor:
        self.calls.append(len(resized))
        self.entered.set()
        assert self.open.wait(10)
        if self.failures:
            raise self.failures.pop(0)
        if any(pixels[0, 0, 0] == POISON for pixels in resized):
            raise RuntimeError("a kernel of the model fails")
        return self._forward(resized, embed=embed)


@pytest.fixture
def gate(tiny: Path) -> Gate:
    return Gate(opsin.load(tiny, dtype="fp32"))


@pytest.fixture
def run() -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    return lambda test: asyncio.run(asyncio.wait_for(test(), 20))


def batcher(gate: Gate, watch: Watch | None = None, **settings: Any) -> Batcher:
    settings = {"max_batch": 8, "max_wait_ms": 0.0, "max_queue": 64} | settings
    return Batcher(
        gate.classifier,
        decoders=ThreadPoolExecutor(2),
        computer=ThreadPoolExecutor(1, "opsin-compute"),
        observer=watch or Watch(),
        **settings,
    )


async def held(gate: Gate, queue: Batcher) -> "asyncio.Task[list[Answer | Refusal]]":
    """A request that is on the model, which waits: what comes now is queued."""
    gate.open.clear()
    gate.entered.clear()
    task = asyncio.create_task(queue.infer([picture(1)], "logits"))
    assert await asyncio.to_thread(gate.entered.wait, 10)
    return task


def test_each_request_gets_the_answers_to_its_own_images(gate: Gate, tiny: Path, run: Any) -> None:
    reds = [[3, 50], [120], [7, 90, 180], [250]]
    alone = {red: opsin.load(tiny, dtype="fp32").logits(picture(red))[0].numpy() for many in reds for red in many}

    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch)
        first = await held(gate, queue)
        tasks = [asyncio.create_task(queue.infer([picture(red) for red in many], "logits")) for many in reds]
        await asyncio.sleep(0)
        gate.open.set()
        for many, task in zip(reds, tasks, strict=True):
            for red, answer in zip(many, await task, strict=True):
                assert isinstance(answer, Answer) and answer.size == (43, 37)
                np.testing.assert_allclose(answer.output, alone[red], rtol=0, atol=1e-5)
        await first
        assert watch.sizes == [1, 7]
        await queue.close()

    run(test)


def test_labels_features_and_pixels_do_not_share_a_batch(gate: Gate, tiny: Path, run: Any) -> None:
    plain = opsin.load(tiny, dtype="fp32")

    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch)
        first = await held(gate, queue)
        pixels = plain.preprocess(picture(9))
        tasks = [
            asyncio.create_task(request)
            for request in (
                queue.infer([picture(9)], "logits"),
                queue.infer([picture(9)], "features"),
                queue.infer([pixels, pixels], "logits"),
                queue.infer([picture(9)], "logits"),
            )
        ]
        await asyncio.sleep(0)
        gate.open.set()
        labels, features, as_pixels, again = [await task for task in tasks]
        assert isinstance(labels[0], Answer) and isinstance(features[0], Answer) and isinstance(as_pixels[1], Answer)
        np.testing.assert_allclose(features[0].output, plain.embed(picture(9))[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(as_pixels[1].output, labels[0].output, rtol=0, atol=1e-5)
        assert isinstance(again[0], Answer) and as_pixels[0].size == (32, 32)  # type: ignore[union-attr]
        await first
        assert watch.sizes == [1, 2, 1, 2]
        await queue.close()

    run(test)


def test_a_broken_image_fails_alone_and_is_named(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate)
        good, bad, other = await queue.infer([picture(3), picture(3)[:60], picture(4)], "logits")
        assert isinstance(good, Answer) and isinstance(other, Answer)
        assert isinstance(bad, Refusal) and (bad.status, bad.kind) == (422, "corrupt")
        assert str(bad).startswith("image[1]")
        assert isinstance(alone := (await queue.infer([b"<html>"], "logits"))[0], Refusal)
        assert (alone.status, alone.kind) == (422, "not_an_image") and str(alone).startswith("the image")
        await queue.close()

    run(test)


def test_a_batch_that_raises_is_halved_until_the_culprit_is_alone(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate)
        first = await held(gate, queue)
        tasks = [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in (1, 2, 3, 4, POISON, 6, 7)]
        await asyncio.sleep(0)
        gate.open.set()
        answers = [(await task)[0] for task in tasks]
        await first
        assert [type(answer).__name__ for answer in answers] == ["Answer"] * 4 + ["Failed"] + ["Answer"] * 2
        assert "kernel" not in str(answers[4])
        assert gate.calls == [1, 7, 3, 4, 2, 1, 1, 2]
        await queue.close()

    run(test)


def test_an_output_that_is_not_finite_is_no_answer(gate: Gate, run: Any) -> None:
    plain = gate._forward

    def forward(resized: list[np.ndarray], **options: Any) -> torch.Tensor:
        output = plain(resized, **options).clone()
        output[1, 2] = torch.nan
        return output

    async def test() -> None:
        gate.classifier.forward = forward  # type: ignore[method-assign]
        queue = batcher(gate)
        good, bad = await queue.infer([picture(3), picture(4)], "features")
        assert isinstance(good, Answer) and isinstance(bad, Refusal)
        assert (bad.kind, str(bad)) == ("not_finite", "image[1]: the model's output for it is not finite.")
        await queue.close()

    run(test)


def test_a_full_queue_refuses_and_says_when_to_come_back(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate, max_queue=3)
        with pytest.raises(TooLarge, match="4 images are more than the queue's 3 places. Send fewer."):
            await queue.infer([picture(1)] * 4, "logits")
        first = await held(gate, queue)
        waiting = asyncio.create_task(queue.infer([picture(2)] * 2, "logits"))
        await asyncio.sleep(0)
        assert queue.queued == 2
        with pytest.raises(Overloaded, match="2 of 3 places are taken, 2 more are wanted. Try again in 1 s") as caught:
            await queue.infer([picture(3)] * 2, "logits")
        assert caught.value.headers["Retry-After"] == "1"
        gate.open.set()
        assert len(await waiting) == 2 and len(await first) == 1
        await queue.close()

    run(test)


def test_small_requests_pass_a_large_one_which_is_not_starved(gate: Gate, run: Any) -> None:
    async def test() -> None:
        order = []
        queue = batcher(gate, max_batch=2)
        first = await held(gate, queue)

        async def ask(name: str, count: int) -> None:
            await queue.infer([picture(5)] * count, "logits")
            order.append(name)

        large = asyncio.create_task(ask("large", 6))
        await asyncio.sleep(0.001)
        small = [asyncio.create_task(ask(f"small {number}", 1)) for number in range(2)]
        await asyncio.sleep(0.08)  # longer than the last image of the large one is put off
        late = asyncio.create_task(ask("late", 1))
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, large, *small, late)
        assert order == ["small 0", "small 1", "large", "late"]
        await queue.close()

    run(test)


def test_who_leaves_gives_up_his_places(gate: Gate, run: Any) -> None:
    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch)
        first = await held(gate, queue)
        leaving = asyncio.create_task(queue.infer([picture(2)] * 5, "logits"))
        staying = asyncio.create_task(queue.infer([picture(3)], "logits"))
        await asyncio.sleep(0)
        assert queue.queued == 6
        leaving.cancel()
        await asyncio.sleep(0)
        assert queue.queued == 1
        gate.open.set()
        assert isinstance((await staying)[0], Answer)
        await first
        assert watch.sizes == [1, 1] and leaving.cancelled()
        await queue.close()

    run(test)


def test_a_call_has_the_model_for_itself(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate)
        assert await queue.call(lambda model: (threading.current_thread().name, len(model.labels or ()))) == (
            "opsin-compute_0",
            7,
        )
        assert await queue.call(lambda model: None) is None
        with pytest.raises(KeyError, match="of the function"):
            await queue.call(lambda model: vars()["of the function"])
        assert isinstance((await queue.infer([picture(2)], "logits"))[0], Answer)
        await queue.close()

    run(test)


def test_a_thread_that_dies_is_noticed_and_what_it_had_is_answered_by_the_next(gate: Gate, run: Any) -> None:
    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch)
        gate.failures = [SystemExit("killed")]
        task = asyncio.create_task(queue.infer([picture(2), picture(3)[:60]], "logits"))
        while queue.problem is None:
            await asyncio.sleep(0.005)
        assert queue.problem == "its thread has died and is being restarted"
        good, bad = await task
        assert isinstance(good, Answer) and isinstance(bad, Refusal) and bad.kind == "corrupt"
        assert queue.problem is None and watch.deaths == 1
        await queue.close()

    run(test)


def test_what_kills_the_thread_twice_is_refused(gate: Gate, run: Any) -> None:
    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch)
        gate.failures = [SystemExit("killed"), SystemExit("killed")]
        (answer,) = await queue.infer([picture(2)], "logits")
        assert isinstance(answer, Refusal) and (answer.status, str(answer)) == (500, "the model failed on it, twice.")
        assert isinstance((await queue.infer([picture(3)], "logits"))[0], Answer) and watch.deaths == 2
        await queue.close()

    run(test)


def test_closing_answers_all_that_was_taken_and_takes_no_more(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate, max_batch=2)
        first = await held(gate, queue)
        tasks = [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in range(5)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReady, match="being unloaded"):
            await queue.infer([picture(1)], "logits")
        assert queue.problem == "it is being unloaded"
        gate.open.set()
        await closing
        assert all(task.done() and isinstance(task.result()[0], Answer) for task in (first, *tasks))

    run(test)


def test_a_batch_waits_for_more_only_while_requests_are_arriving(gate: Gate, run: Any) -> None:
    async def test() -> None:
        watch, arriving = Watch(), [0]
        queue = batcher(gate, watch, max_wait_ms=5_000, arriving=lambda: arriving[0])
        began = time.monotonic()
        await queue.infer([picture(1)], "logits")  # no one else: now
        assert time.monotonic() - began < 4
        arriving[0] = 1
        tasks = [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in range(3)]
        await asyncio.sleep(0.05)
        assert queue.queued == 3 and watch.sizes == [1]
        tasks += [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in range(5)]  # max_batch is 8
        await asyncio.gather(*tasks)
        assert watch.sizes == [1, 8]
        arriving[0] = 0
        await queue.close()

    run(test)


def test_an_empty_request_has_an_empty_answer(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate)
        assert await queue.infer([], "logits") == []
        await queue.close()

    run(test)


def test_what_kills_the_thread_is_alone_the_second_time(gate: Gate, run: Any) -> None:
    def forward(resized: list[np.ndarray], **options: Any) -> torch.Tensor:
        if any(pixels[0, 0, 0] == POISON for pixels in resized):
            raise SystemExit("killed")
        return gate._forward(resized, **options)

    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch)
        first = await held(gate, queue)
        tasks = [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in (2, 3, POISON, 5)]
        await asyncio.sleep(0)
        gate.classifier.forward = forward  # type: ignore[method-assign]
        gate.open.set()
        answers = [(await task)[0] for task in tasks]
        await first
        assert [type(answer).__name__ for answer in answers] == ["Answer", "Answer", "Failed", "Answer"]
        assert watch.deaths == 2
        await queue.close()

    run(test)


def test_calls_take_places_of_the_queue(gate: Gate, run: Any) -> None:
    async def test() -> None:
        queue = batcher(gate, max_queue=2)
        first = await held(gate, queue)
        waiting = [asyncio.create_task(queue.call(lambda model: 7)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 of 2 places are taken, 1 more are wanted"):
            await queue.call(lambda model: 8)
        gate.open.set()
        assert await asyncio.gather(*waiting) == [7, 7] and len(await first) == 1
        await queue.close()

    run(test)


def test_lanes_compute_side_by_side_and_share_what_waits(gate: Gate, tiny: Path, run: Any) -> None:
    plain = opsin.load(tiny, dtype="fp32")

    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch, lanes=2)
        gate.open.clear()
        first = [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in (1, 2)]
        while len(gate.calls) < 2:  # both are on the model at once
            await asyncio.sleep(0.005)
        several = asyncio.create_task(queue.infer([picture(red) for red in (3, 4, 5, 6)], "logits"))
        await asyncio.sleep(0)
        gate.open.set()
        answers = [(await task)[0] for task in first] + await several
        for red, answer in enumerate(answers, 1):
            assert isinstance(answer, Answer)
            np.testing.assert_allclose(answer.output, plain.logits(picture(red))[0].numpy(), rtol=0, atol=1e-5)
        assert sorted(watch.sizes)[:2] == [1, 1] and sum(watch.sizes) == 6 and max(watch.sizes) == 2
        await queue.close()

    threads = torch.get_num_threads()
    run(test)
    torch.set_num_threads(threads)


def test_a_lane_that_dies_costs_the_other_nothing(gate: Gate, run: Any) -> None:
    async def test() -> None:
        watch = Watch()
        queue = batcher(gate, watch, lanes=2)
        gate.failures = [SystemExit("killed")]
        tasks = [asyncio.create_task(queue.infer([picture(red)], "logits")) for red in range(6)]
        while queue.problem is None:
            await asyncio.sleep(0.002)
        assert queue.problem == "its thread has died and is being restarted"
        answers = [(await task)[0] for task in tasks]
        assert all(isinstance(answer, Answer) for answer in answers)
        while queue.problem is not None:
            await asyncio.sleep(0.01)
        assert watch.deaths == 1
        await queue.close()

    threads = torch.get_num_threads()
    run(test)
    torch.set_num_threads(threads)


def test_a_decoder_that_raises_costs_only_its_image(gate: Gate, run: Any) -> None:
    load = gate.classifier.load_image

    def broken(source: Any, name: str) -> Any:
        if source == picture(9):
            raise RuntimeError("a codec of ours")
        return load(source, name)

    async def test() -> None:
        watch = Watch()
        gate.classifier.load_image = broken  # type: ignore[method-assign]
        queue = batcher(gate, watch)
        good, bad = await queue.infer([picture(2), picture(9)], "logits")
        assert isinstance(good, Answer) and isinstance(bad, Refusal) and watch.deaths == 0
        assert (bad.status, str(bad)) == (422, "image[1] could not be decoded: RuntimeError.")
        await queue.close()

    run(test)
