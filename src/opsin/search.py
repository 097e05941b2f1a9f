"""Embeddings on disk → the images nearest to one, and those that are nearly the same.

    features/ ── open ──▶ Features ── nearest, duplicates ──▶ rows, similarities ──▶ records, gallery
    photos, a class ── like, prototype ──▶ query (D,) ──┘

Similarity is the cosine of two embeddings, -1 to 1. Every vector is compared, block by block as the Parquet files are
read, with NumPy's matrix product: exact, nothing to build, in the memory of a block. Beyond a million images a graph
(HNSW; Malkov & Yashunin 2018) can be kept beside the features, by usearch. Three libraries were weighed for it:

                          usearch 2.26      faiss-cpu 1.15            LanceDB 0.40
    installed beside NumPy  58 MB             68 MB                     373 MB, with pyarrow's 170
    licence               Apache-2.0        MIT                       Apache-2.0
    index on disk         memory-mapped     memory-mapped in part     its own columnar files
    half precision, int8  both              both, by quantisers       both, by quantisers
    exact as well         yes               yes                       yes
    import                0.04 s, 15 MB     0.03 s, 15 MB             0.9 s, 107 MB

All three are maintained. LanceDB is a database, which copies the vectors into files of its own. faiss has more kinds of
index than are needed here, and its wheel brings an OpenMP and an OpenBLAS that stand beside torch's in one process.
usearch is one index file, opened without being read, in half precision: D · 2 + 150 bytes an image.

The features are plain Parquet. In one line each, for a folder that `opsin embed PHOTOS --out features/` wrote:

    pandas.read_parquet(sorted(glob.glob("features/*.parquet")))
    polars.read_parquet("features/*.parquet")
    duckdb.sql("from 'features/*.parquet'")
    lancedb.connect("db").create_table("features", polars.read_parquet("features/*.parquet").filter("ok").to_arrow())
"""

import base64
import csv
import difflib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from opsin.checkpoints.files import replacing
from opsin.errors import DataError, ImageError, MissingExtra, ModelError, NoHead
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource, decode
from opsin.results import FORMATS, Record, json_line
from opsin.sheets import Block, plain

log = logging.getLogger(__name__)

BLOCK = 2**22  # numbers in memory at once: 16 MiB of float32
EXACT = 1_000_000  # rows: up to here every vector is compared with a query,
EXACT_PAIRS = 100_000  # and up to here with every other
NEIGHBOURS = 32  # of an image that the index is first asked for
ROUNDING, INDEX_ROUNDING = 1e-6, 1e-4  # of a cosine in float32, and of the half precision in the index
THUMB_SIDE = 240  # pixels
MOST_PICTURES = 1000  # on a page: some 10 MB

Step = Callable[[int, int], None]  # called with (rows done, of how many)


class _Part(NamedTuple):
    """A Parquet file of features."""

    path: Path
    start: int  # number of its first row among those of all parts
    rows: int
    scaled: bool  # int8 numbers with the column `scale`


class Group(NamedTuple):
    """Images that are nearly the same as the first of them."""

    rows: np.ndarray  # (m,) int64, ascending, two or more
    similarities: np.ndarray  # (m,) float32, to the first; its own is 1


# ── features on disk ─────────────────────────────────────────────────────────────────────────────────────────────────


def open(path: str | Path) -> "Features":
    """Open the features that `opsin embed --out` wrote: a folder of Parquet parts, or one .parquet file.

    Only the ends of the files are read, where Parquet keeps what is in them.

    Raises:
        DataError: no such folder; labels instead of embeddings; parts of different lengths or different models; no
            rows; damaged files.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None

    path = Path(path)
    manifest: Record = {}
    if (path / "_manifest.json").is_file():
        manifest = _json(path / "_manifest.json")
        _check_task(path, manifest)
    parts: list[_Part] = []
    dims: dict[int, Path] = {}
    start = 0
    for file in _files(path):
        with _reading(file), pq.ParquetFile(file) as opened:
            schema, rows = opened.schema_arrow, opened.metadata.num_rows
            made_by = json.loads((schema.metadata or {}).get(b"opsin", b"{}"))
        sidecar = file.with_name(f"{file.name}.run.json")
        if not made_by and sidecar.is_file():
            made_by = _json(sidecar)
        _check_task(file, made_by)
        manifest = manifest or made_by
        for key in ("sha256", "preprocess_hash"):
            if made_by.get(key, manifest.get(key)) != manifest.get(key):
                raise DataError(
                    f"{file} has {key} {made_by[key]}, and what is beside it {manifest.get(key)}: vectors of two "
                    "models cannot be compared. Keep them in folders of their own."
                )
        dims.setdefault(_dim(file, schema), file)
        if len(dims) > 1:
            (dim, first), (other, second) = dims.items()
            raise DataError(
                f"{first} has embeddings of {dim} numbers, {second} of {other}. Features of one folder are of one "
                "model: keep the others in a folder of their own."
            )
        parts.append(_Part(file, start, rows, "scale" in schema.names))
        start += rows
    if not start:
        raise DataError(
            f"{path} has no rows: there is nothing to search. Fill it with: opsin embed PHOTOS --out {path}"
        )
    return Features(path, parts, manifest, dim=next(iter(dims)))


def _files(path: Path) -> list[Path]:
    """The Parquet files of a path, in the order of their rows."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f'"{path}" is not .parquet, which search reads. Make it with: opsin embed PHOTOS --out DIR')
        return [path]
    if not path.is_dir():
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 1)
        hint = f'Did you mean "{path.parent / near[0]}"? ' if near else ""
        raise DataError(f'"{path}" does not exist. {hint}Features are made with: opsin embed PHOTOS --out DIR')
    found = sorted(each for each in path.glob("*.parquet") if not each.name.startswith("."))
    if not found:
        others = {each.suffix for each in path.glob("part-*")} & set(FORMATS)
        has = f"{' and '.join(sorted(others))} parts" if others else "no Parquet parts"
        raise DataError(f"{path} has {has}; search reads Parquet. Make it with: opsin embed PHOTOS --out DIR")
    return found


def _json(path: Path) -> Record:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it is not an object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise DataError(f"{path} does not say what made the features: {reason}.")


def _check_task(path: Path, made_by: Record) -> None:
    if made_by.get("task", "embed") != "embed":
        raise DataError(f"{path} is of `opsin {made_by['task']}` and holds no embeddings. Make them with: opsin embed")


def _dim(path: Path, schema: Any) -> int:
    """D of a part.

    Raises:
        DataError: it holds something else.
    """
    import pyarrow as pa

    for name in ("path", "embedding"):
        if name not in schema.names:
            holds = "labels" if "label" in schema.names else f"the columns {', '.join(schema.names[:8]) or '(none)'}"
            raise DataError(f'{path} holds {holds} and no "{name}". Make embeddings with: opsin embed PHOTOS --out DIR')
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or not (
        pa.types.is_floating(kind.value_type) or pa.types.is_int8(kind.value_type)
    ):
        raise DataError(f"{path}: an embedding is {kind}; it has to be a list of a fixed size, of floats or int8.")
    return kind.list_size


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What is wrong with a file of features is no matter of what is written."""
    import pyarrow as pa

    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} cannot be read: {reason} Take its part away, or make it again.") from error


class Features:
    """Embeddings in Parquet files, read a block at a time.

    A row is the number of an image in the parts, one after the other by name, those without an embedding included:
    that of the table which the libraries above read.
    """

    def __init__(self, path: Path, parts: Sequence[_Part], manifest: Record, *, dim: int) -> None:
        self.path, self.parts, self.manifest, self.dim = path, parts, manifest, dim

    def __len__(self) -> int:
        return self.parts[-1].start + self.parts[-1].rows

    def blocks(self, size: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (n,) int64, ascending, and their vectors (n, D) float32, of length 1; without images that have none.

        A vector of zeros stays as it is: it is similar to nothing.

        Args:
            size: rows at once, at most.
        Raises:
            DataError: a vector that is not finite, or a damaged file.
        """
        import pyarrow.parquet as pq

        size = size or max(1, BLOCK // self.dim)
        for part in self.parts:
            start = part.start
            columns = ["embedding", "scale"] if part.scaled else ["embedding"]
            with _reading(part.path), pq.ParquetFile(part.path, memory_map=True) as file:
                for batch in file.iter_batches(size, columns=columns):
                    column = batch.column("embedding")
                    there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, self.dim)
                    if part.scaled:
                        vectors *= batch.column("scale").to_numpy(zero_copy_only=False)[there, None]
                    rows = start + there
                    start += len(batch)
                    if not (finite := np.isfinite(vectors).all(1)).all():
                        [key] = self.paths(rows[~finite][:1])
                        raise DataError(
                            f"{part.path}: the embedding of {key} is not finite. Take its part away, and run `opsin "
                            "embed` again."
                        )
                    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
                    if len(rows):
                        yield rows, vectors

    def paths(self, rows: Iterable[int] | np.ndarray) -> list[str]:
        """What the images of rows are called; of the files only the row groups that have them are read."""
        import pyarrow.parquet as pq

        wanted = np.fromiter(rows, np.int64)
        order = np.unique(wanted)
        found: dict[int, str] = {}
        for part in self.parts:
            mine = order[(order >= part.start) & (order < part.start + part.rows)]
            if not len(mine):
                continue
            start = part.start
            with _reading(part.path), pq.ParquetFile(part.path) as file:
                for number in range(file.num_row_groups):
                    rows_here = file.metadata.row_group(number).num_rows
                    here = mine[(mine >= start) & (mine < start + rows_here)]
                    if len(here):
                        names = file.read_row_group(number, columns=["path"]).column("path").take(here - start)
                        found |= zip(here.tolist(), names.to_pylist(), strict=True)
                    start += rows_here
        return [found[row] for row in wanted.tolist()]

    # ── nearest ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def nearest(
        self, queries: np.ndarray, k: int = 10, *, index: bool | None = None, on_rows: Step | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images most similar to each query.

        Args:
            queries: (Q, D), of any length, or one (D,).
            k: how many.
            index: True: ask the index, which is built where it is not kept yet. False: compare every vector. None: ask
                an index that is kept, of more than `EXACT` rows; else compare.
            on_rows: called with (rows compared or indexed, of how many).
        Returns:
            Rows (Q, k) int64 and similarities (Q, k) float32, the most similar first, of equal ones the lower row;
            fewer than k where there are fewer. An index may miss some (of ten nearest among 3,000 Tiny-ImageNet
            images 0.2 % were), and gives row -1 where it finds no more.
        Raises:
            ValueError: k below 1, queries of another length, not finite or zero.
            DataError: no image has an embedding, or one that is not finite; the index cannot be kept there.
            MissingExtra: usearch is not installed.
        """
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1.")
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(
                f"queries are {queries.shape}; these features have {self.dim} numbers, so (Q, {self.dim})."
            )
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise ValueError("a query is not finite, or is zero: it has no direction to look in.")
        queries = queries / lengths
        if index or (index is None and len(self) > EXACT and self._index_path().is_file()):
            return self._ask(self.index(on_rows), queries, k)
        rows = np.zeros((len(queries), 0), np.int64)
        similarities = np.zeros((len(queries), 0), np.float32)
        for new_rows, vectors in self.blocks(max(1, BLOCK // max(self.dim, len(queries)))):
            rows, similarities = _best(rows, similarities, new_rows, queries @ vectors.T, k)
            if on_rows is not None:
                on_rows(int(new_rows[-1]) + 1, len(self))
        if not rows.size:
            raise self._nothing()
        return rows, similarities.clip(-1, 1)

    def _nothing(self) -> DataError:
        return DataError(f"none of the {len(self):,} images of {self.path} has an embedding: nothing to search.")

    # ── index ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _index_path(self) -> Path:
        """Named for the parts that it is of, so that it is another one when they change."""
        stats = []
        for part in self.parts:
            with _reading(part.path):
                stat = part.path.stat()
            stats.append((part.path.name, stat.st_size, stat.st_mtime_ns))
        digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:12]
        return self._index_stem().with_name(f"{self._index_stem().name}-{digest}.usearch")

    def _index_stem(self) -> Path:
        # hidden, so that what reads the whole folder as Parquet does not see it
        return self.path / ".search" if self.path.is_dir() else self.path.with_name(f".{self.path.name}")

    def index(self, on_rows: Step | None = None) -> Any:
        """The usearch index that is kept beside the features, built where there is none or the parts have changed.

        Raises:
            MissingExtra: usearch is not installed.
            DataError: it cannot be written there.
        """
        try:
            from usearch.index import Index
        except ImportError:
            raise MissingExtra("usearch", "search") from None
        path = self._index_path()
        if not path.is_file():
            index = Index(ndim=self.dim, metric="cos", dtype="f16")
            for rows, vectors in self.blocks():
                index.add(rows.astype(np.uint64), vectors)
                if on_rows is not None:
                    on_rows(int(rows[-1]) + 1, len(self))
            if not len(index):
                raise self._nothing()
            try:
                old = list(path.parent.glob(f"{self._index_stem().name}-*.usearch"))
                with replacing(path) as part:
                    index.save(str(part))
                for each in old:
                    each.unlink(missing_ok=True)
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{path} cannot be written: {error}. Without an index all vectors are compared."
                ) from error
        found = Index.restore(str(path), view=True)
        if found is None or found.ndim != self.dim:
            raise DataError(f"{path} is damaged. Delete it: it is built again from the features.")
        return found

    def _ask(self, index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(Q, D) → (Q, k) rows and similarities; where fewer are found, -1 and -inf."""
        k = min(k, len(index))
        matches = index.search(queries, k)
        rows = np.asarray(matches.keys).reshape(len(queries), k).astype(np.int64)
        distances = np.asarray(matches.distances).reshape(len(queries), k)
        counts = np.reshape(getattr(matches, "counts", len(matches)), (-1, 1))
        beyond = np.arange(k) >= counts  # where nothing was written, not even numbers
        similarities = (1 - np.where(beyond, 0, distances)).clip(-1, 1)
        return np.where(beyond, -1, rows), np.where(beyond, -np.inf, similarities).astype(np.float32)

    # ── duplicates ───────────────────────────────────────────────────────────────────────────────────────────────────

    def duplicates(
        self, threshold: float = 0.97, *, index: bool | None = None, on_rows: Step | None = None
    ) -> list[Group]:
        """Images that are nearly the same, by groups.

        Each image of a group is that similar to the first of it, the one of the lowest row. So those that are in no
        group, with the first of each, are a set without near-duplicates. Two that are alike can be in two groups, or
        one of them in none, where the other belongs to a first that is not like both.

        Args:
            threshold: the least similarity, to `ROUNDING`, with an index to `INDEX_ROUNDING`.
            index: True: look for neighbours in the index. False: compare every vector with every other, all in memory.
                None: the index beyond `EXACT_PAIRS` rows.
            on_rows: called with (rows compared or indexed, of how many).
        Raises:
            ValueError: a threshold that is not above 0 and at most 1.
            DataError, MissingExtra: as `nearest`.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold is {threshold}; it is a cosine above 0 and at most 1, such as 0.97.")
        taken = np.zeros(len(self), bool)
        groups = []
        close = self._close_indexed if index or (index is None and len(self) > EXACT_PAIRS) else self._close
        for first, rows, similarities in close(threshold, taken, on_rows):
            free = ~taken[rows]
            if taken[first] or not free.any():
                continue
            rows, similarities = rows[free], similarities[free]
            taken[rows] = True
            ones = np.ones(1, np.float32)
            groups.append(Group(np.insert(rows, 0, first), np.concatenate([ones, similarities.clip(-1, 1)])))
        return groups

    def _close(
        self, threshold: float, taken: np.ndarray, on_rows: Step | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Ascending rows, each with the later ones that are close to it, and how close; not all that are `taken`."""
        rows, vectors = np.empty(len(self), np.int64), np.empty((len(self), self.dim), np.float32)
        count = 0
        for some, block in self.blocks():
            rows[count : count + len(some)], vectors[count : count + len(some)] = some, block
            count += len(some)
        if not count:
            raise self._nothing()
        rows, vectors = rows[:count], vectors[:count]
        step = max(1, 4 * BLOCK // len(rows))
        for start in range(0, len(rows), step):
            mine = start + np.flatnonzero(~taken[rows[start : start + step]])
            similarities = vectors[mine] @ vectors[start:].T
            i, j = np.nonzero(similarities >= threshold - ROUNDING)
            later = (start + j > mine[i]) & ~taken[rows[start + j]]
            i, j = i[later], j[later]
            firsts, begins = np.unique(i, return_index=True)
            for first, others in zip(firsts, np.split(j, begins)[1:], strict=True):
                yield int(rows[mine[first]]), rows[start + others], similarities[first, others]
            if on_rows is not None:
                on_rows(min(start + step, len(rows)), len(rows))

    def _close_indexed(
        self, threshold: float, taken: np.ndarray, on_rows: Step | None
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """As `_close`, from the neighbours that the index finds of each row."""
        index, least = self.index(on_rows), threshold - INDEX_ROUNDING
        pairs, nearness = [], []  # lower row · rows of all + higher row; similarity
        full: set[int] = set()  # rows that may have more than NEIGHBOURS
        for rows, vectors in self.blocks():
            found, similarities = self._ask(index, vectors, NEIGHBOURS)
            close = similarities >= least
            if found.shape[1] == NEIGHBOURS:
                full |= set(rows[close.all(1)].tolist())
            i, j = np.nonzero(close & (found != rows[:, None]))
            lower, higher = np.sort([rows[i], found[i, j]], axis=0)
            pairs.append(lower * len(self) + higher)
            nearness.append(similarities[i, j])
            if on_rows is not None:
                on_rows(int(rows[-1]) + 1, len(self))
        pair, places = np.unique(np.concatenate(pairs), return_index=True)  # most are found from both sides
        lower, higher = np.divmod(pair, len(self))
        near = np.concatenate(nearness)[places]
        for first in sorted(full.union(lower.tolist())):
            if taken[first]:
                continue
            span = slice(*np.searchsorted(lower, [first, first + 1]))
            others, similarities = higher[span], near[span]
            if first in full:  # and still what found it, which it may not find itself
                more, how_near = self._all_close(index, first, least)
                others, places = np.unique(np.concatenate([others, more]), return_index=True)
                similarities = np.concatenate([similarities, how_near])[places]
            yield first, others, similarities

    def _all_close(self, index: Any, row: int, least: float) -> tuple[np.ndarray, np.ndarray]:
        """Later rows that are close to one, asking for twice as many until they no longer are."""
        query = np.asarray(index.get(row), np.float32).reshape(1, -1)
        k = NEIGHBOURS
        while True:
            k = min(2 * k, len(index))
            [rows], [similarities] = self._ask(index, query, k)
            if k == len(index) or similarities[-1] < least:
                later = (rows > row) & (similarities >= least)
                return rows[later], similarities[later]


def _best(
    rows: np.ndarray, similarities: np.ndarray, new_rows: np.ndarray, new_similarities: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of (Q, m) and (Q, n) together, the best first; of equal ones the lower row."""
    every = np.concatenate([similarities, new_similarities], axis=1)
    row_of = np.concatenate([rows, np.broadcast_to(new_rows, new_similarities.shape)], axis=1)
    k = min(k, every.shape[1])
    kept = np.empty((len(every), k), np.int64)
    for query, values in enumerate(every):
        least = np.partition(values, -k)[-k]
        places = np.flatnonzero(values >= least)
        kept[query] = places[np.lexsort((row_of[query, places], -values[places]))][:k]
    return np.take_along_axis(row_of, kept, 1), np.take_along_axis(every, kept, 1)


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_model(features: Features, classifier: Classifier) -> None:
    """Refuse a model whose vectors have nothing to do with those of the features.

    Raises:
        DataError: the features do not say what made them.
        ModelError: other weights or another preprocessing; the message has both.
    """
    made_by = features.manifest
    ours = {"sha256": classifier.source.sha256, "preprocess_hash": classifier.preprocess.hash()}
    for key, value in ours.items():
        if key not in made_by:
            raise DataError(
                f"{features.path} does not say which model made it: there is no {key} in a _manifest.json or in the "
                "Parquet schema. Make it again with: opsin embed PHOTOS --out DIR"
            )
        if made_by[key] != value:
            raise ModelError(
                f"{features.path} was made by {made_by.get('model')} with {key} {made_by[key]}; "
                f"{classifier.source.name} has {value}. Vectors of two models cannot be compared: give the one that "
                "made the features, or make them again with this one."
            )


def like(classifier: Classifier, images: Sequence[ImageSource]) -> np.ndarray:
    """The query of one image or several: the mean of their embeddings, each of length 1. (D,) float32.

    Raises:
        ImageError: one cannot be read, or the model's output for it is not finite.
        ValueError: there is none.
    """
    vectors = classifier.embed(list(images))
    if not (finite := np.isfinite(vectors).all(1)).all():
        place = int(finite.argmin())
        name = images[place] if isinstance(images[place], str) else f"image[{place}]"
        raise ImageError(f"{name!s}: the model's output for it is not finite.")
    mean: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    return mean


def prototype(classifier: Classifier, index: int) -> np.ndarray:
    """The query of a class: where in feature space its logit grows, compared with those of the others. (D,) float32.

    That is the class's row of the head's weights less the mean row, which all logits share and softmax does not see.
    Of the ten images nearest to it, among 3,000 held-out ones of Tiny-ImageNet, 50 % are of the class, in the mean
    over its 200 classes; of the ten with the highest probability of it 53 %, of those nearest to the mean of the images
    predicted as it 44 % (opsin/vit-tiny, right about 41 % of all). So it is a way to search by name, and not better
    than the model. Of a model with two heads (DeiT) it is of the first, which reads the features.

    Args:
        index: of the class; `opsin.explain.find_class` has it by name.
    Raises:
        NoHead: the model has no classes.
        ModelError: its head is not linear in the features (ViTs with a hidden layer there), or has the same weights for
            all classes: use images instead.
    """
    import torch

    if classifier.labels is None:
        raise NoHead(f"{classifier.source.name} has no classification head, so it knows no labels. Search by an image.")
    dim, classify = classifier.feature_dim, classifier.model.classify
    assert callable(classify)
    with torch.inference_mode():

        def logits(features: Any) -> Any:
            return classify(features.to(classifier.device)).double().cpu()

        zero = logits(torch.zeros(1, dim))
        pieces = [logits(piece) - zero for piece in torch.eye(dim).split(64)]  # of 21,843 classes: 11 MB each
        rows = torch.cat([piece[:, index] - piece.mean(1) for piece in pieces])  # D
        whole = torch.cat([piece[:, index] for piece in pieces])
        probe = torch.linspace(-1, 2, dim)[None]
        if not torch.allclose(logits(probe)[:, index], zero[:, index] + probe.double() @ whole, rtol=1e-3, atol=1e-3):
            raise ModelError(
                f"the head of {classifier.source.name} is not linear: a label has no direction among its embeddings. "
                "Search by an image of it."
            )
    direction: np.ndarray = rows.float().numpy()
    if rows.norm() <= 1e-4 * whole.norm():  # rounding
        raise ModelError(
            f"the head of {classifier.source.name} has the same weights for all classes: it was not trained."
        )
    return direction


# ── records and pages ────────────────────────────────────────────────────────────────────────────────────────────────


def hits(features: Features, rows: np.ndarray, similarities: np.ndarray) -> list[Record]:
    """Of one query, (k,) each: `{"rank", "similarity", "path", "row"}`, the nearest first."""
    there = rows >= 0
    rows, similarities = rows[there], similarities[there]
    return [
        {"rank": rank, "similarity": round(float(similarity), 6), "path": path, "row": int(row)}
        for rank, (path, row, similarity) in enumerate(
            zip(features.paths(rows), rows, similarities, strict=True), start=1
        )
    ]


def members(features: Features, groups: Sequence[Group]) -> list[Record]:
    """An image a record, `{"group", "similarity", "path", "row"}`; the first of each group is that to keep."""
    rows = np.concatenate([np.empty(0, np.int64), *(group.rows for group in groups)])
    paths = iter(features.paths(rows))
    return [
        {"group": number, "similarity": round(float(similarity), 6), "path": next(paths), "row": int(row)}
        for number, group in enumerate(groups, start=1)
        for row, similarity in zip(group.rows, group.similarities, strict=True)
    ]


def check_format(path: Path) -> None:
    """
    Raises:
        ValueError: no format of a table.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f'"{path.name}" ends in "{path.suffix}". Known: {", ".join(FORMATS)}.')


def write(path: Path, records: Sequence[Record], columns: Sequence[str]) -> None:
    """Records as JSON lines, CSV or Parquet, by the suffix.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    check_format(path)
    with replacing(path) as part:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            types = {"path": pa.string(), "similarity": pa.float32()}
            schema = pa.schema([(name, types.get(name, pa.int64())) for name in columns])
            pq.write_table(pa.Table.from_pylist(list(records), schema), part)
        elif path.suffix == ".csv":
            with part.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, columns)
                table.writeheader()
                table.writerows(records)
        else:
            part.write_text("".join(json_line(record) + "\n" for record in records), encoding="utf-8")


def gallery(
    path: Path,
    title: str,
    facts: Mapping[str, Any],
    blocks: Sequence[Block],
    *,
    load: Callable[[str], Image.Image] = decode,
) -> int:
    """Write one self-contained HTML page of thumbnails, for light and dark; nothing is loaded from elsewhere.

    Args:
        facts: name → value, at the foot.
        blocks: as of a contact sheet; only the first `MOST_PICTURES` pictures are on the page, which then says so.
        load: path → upright RGB image; an ImageError leaves a frame that says what is wrong.
    Returns:
        Pictures on the page, those that could not be read among them.
    Raises:
        OSError: it cannot be written.
    """
    from opsin import __version__

    parts, left = [], MOST_PICTURES
    for block in blocks:
        figures = []
        for cell in block.cells[:left]:
            notes = "".join(f"<b>{_text(text)}</b>" for text, _ in cell.notes)
            for key in cell.keys:
                figures.append(f"<figure>{_thumb(key, load)}<figcaption>{notes}{_name(key)}</figcaption></figure>")
        left -= len(figures)
        if figures:
            head = f"<h2>{_text(block.title)}</h2><p>{_text(block.meaning)}</p>"
            parts.append(f"<section>{head}<div>{''.join(figures)}</div></section>")
    missing = sum(len(block.cells) for block in blocks) - (MOST_PICTURES - left)
    note = f"{missing:,} more pictures are not on this page." if missing else ""
    page = Template((files("opsin") / "gallery.html").read_text(encoding="utf-8"))
    text = page.substitute(
        version=__version__,
        title=_text(title),
        body="\n".join(parts),
        note=note,
        facts="".join(f"<dt>{_text(name)}</dt><dd>{_text(str(value))}</dd>" for name, value in facts.items()),
    )
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return MOST_PICTURES - left


def _text(text: str) -> str:
    return escape(plain(text))


def _name(path: str) -> str:
    """The name, before it, small, its folder."""
    folder, slash, name = path.rpartition("/")
    return f'<span title="{_text(path)}"><small>{_text(folder + slash)}</small>{_text(name)}</span>'


def _thumb(path: str, load: Callable[[str], Image.Image]) -> str:
    try:
        image = load(path)
    except ImageError as error:
        return f'<div class="gone" title="{_text(str(error))}">{_text(error.kind.replace("_", " "))}</div>'
    image.thumbnail((THUMB_SIDE, THUMB_SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    data = io.BytesIO()
    image.save(data, "jpeg", quality=82)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" width="{image.width}" height="{image.height}" src="data:image/jpeg;base64,{source}">'
