"""Blocks → parts: the one loop of a bulk run, on this machine or on a worker of a cluster."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from opsin.bulk.parts import Parts
from opsin.data.inputs import Block, Item, items
from opsin.errors import BulkError
from opsin.pipeline import Classifier
from opsin.results import Record


@dataclass(slots=True)
class Counts:
    images: int = 0
    failed: int = 0


class _Place(NamedTuple):
    """Where a batch belongs."""

    block: int
    row: int  # of its first image
    end: bool  # the block has no more


def run(
    classifier: Classifier,
    parts: Parts,
    to_do: Iterable[tuple[int, Block, int]],
    *,
    batch_size: int = 32,
    part_rows: int = 1000,
    on_error: Literal["record", "fail"] = "record",
    stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[Counts], None] = lambda counts: None,
    **answers: Any,
) -> Counts:
    """Every row of some blocks into parts, in batches that only the block decides: whoever goes on gets the same bits.

    Args:
        to_do: of `Parts.to_do`.
        batch_size: images; a batch ends with its part.
        part_rows: rows of a part, at most.
        on_error: an input that cannot be read is a row that says so; "fail" stops at the first.
        stop: asked after each batch; True writes what is done and returns.
        answers: what to compute, as `Classifier.stream` takes it: top_k, embed, unknown, kind.
    Raises:
        BulkError: by "fail"; the batches before it are written.
        OSError: a part cannot be written; the parts before it are whole.
    """
    counts = Counts()
    places: deque[_Place] = deque()  # of the batches that are out
    held: list[Record] = []  # rows of the part in hand
    batches = _batches(to_do, places, batch_size=batch_size, part_rows=part_rows)
    records = classifier.stream_batches(batches, **answers)
    try:
        for batch in records:
            block, row, end = places.popleft()
            bad = next((record for record in batch if not record["ok"]), None)
            if bad is not None and on_error == "fail":
                # none of its batch: once the image is mended, the others would be of another batch than their row
                _write(parts, block, row - len(held), held, end=False)
                raise BulkError(f"{bad['error']['message']} Stopped there, by --on-error fail.")
            held += batch
            counts.images += len(batch)
            counts.failed += sum(not record["ok"] for record in batch)
            stopping = stop()
            if end or stopping or (row + len(batch)) % part_rows == 0:
                _write(parts, block, row + len(batch) - len(held), held, end=end)
                held = []
            on_batch(counts)
            if stopping:
                break
    finally:
        records.close()
    return counts


def _batches(
    to_do: Iterable[tuple[int, Block, int]], places: deque[_Place], *, batch_size: int, part_rows: int
) -> Iterator[list[Item]]:
    for number, block, row in to_do:
        batch: list[Item] = []
        for item in items(block, row):
            if len(batch) == batch_size or (batch and (row + len(batch)) % part_rows == 0):  # and there is one more
                places.append(_Place(number, row, end=False))
                yield batch
                row, batch = row + len(batch), []
            batch.append(item)
        places.append(_Place(number, row, end=True))
        yield batch  # empty for a block without images: its part says so


def _write(parts: Parts, block: int, row: int, rows: list[Record], *, end: bool) -> None:
    if rows or end:
        parts.write(block, row, rows, end=end)
