"""image → labels: `load()` gives the object a user holds.

Classifier    images → labels, features      here
TextModel     text with gaps → text          text.py
FlowModel     two images → motion            flow.py
VideoModel    a clip → a clip, labels        video.py
"""

import contextlib
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from opsin import checkpoints, hierarchy
from opsin import engine as engines
from opsin import unknown as detectors
from opsin.checkpoints import Checkpoint
from opsin.data.archives import Item
from opsin.device import cache_folder, exact_fp32, find_device, has_bf16, has_int8
from opsin.errors import CheckpointError, ImageError, ImageTooLarge, ModelError, NoHead
from opsin.labels import Labels
from opsin.labels import top_k as top_k_labels
from opsin.models.perceiver_io import FlowPerceiver, MultimodalPerceiver, TextPerceiver
from opsin.preprocess import MAX_PIXELS, Decode, ImageSource, download

DEFAULT_MODEL = "opsin/vit-tiny"
Record = dict[str, Any]
DTYPES = ("auto", "fp32", "bf16", "int8", "fp16", "fp8")
ENGINES = ("auto", "torch", "openvino")
READERS = 16  # images that are on their way from servers at once

OPTIMISE = "`opsin optimize` makes a folder that has them; `--budget` finds what is fast and close enough on images."

log = logging.getLogger(__name__)


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    engine: str = "auto",
    decode: Decode = "exact",
    device: str = "auto",
    lang: str = "en",
    max_pixels: int | None = None,
) -> Any:
    """Load a model with all that belongs to it: a `Classifier`; by its task a `TextModel`, `FlowModel`, `VideoModel`.

    Args:
        name: hub id (`google/vit-large-patch16-224`), local folder, .safetensors / .npz / .pth / .pystate file, or a
            name of `opsin models`; without it, the embedded model.
        revision: branch, tag or commit on the hub.
        dtype: of the arithmetic, for images; text, flow and video run in "fp32".

            "fp32"  the exact reference, and pixels equal to Pillow's to the bit
            "auto"  what an optimised folder was made for; else bf16 on a CPU that multiplies it by itself; else fp32,
                    on a CPU with the sums in another order
            "bf16"  scores equal to about two digits
            "int8"  on a CPU, for a folder of `opsin optimize`: faster again
            "fp16", "fp8"  on CUDA

        engine: "torch"; or "openvino", on a CPU with that extra. "auto" is torch.
        decode: "fast" reads large JPEG photos at a half, a quarter or an eighth of their size, at least twice that of
            the pixels: a byte in a hundred differs by 2 and more.
        device: "cpu", "cuda", "cuda:1", …; "auto" takes a CUDA device where torch sees one.
        lang: language of the label names, "en" or "zh"; a name without translation stays English.
        max_pixels: larger images, or frames of a video, are refused before they are decoded; without it 179 million,
            of a video 35 million (8K).
    Raises:
        UnknownModel, HubError, CheckpointError: all are `opsin.errors.ModelError`; so is bf16 asked of text or video.
        MissingExtra: OpenVINO is not installed.
        ValueError: an unknown dtype, engine, decode or language, a dtype that this processor lacks, or a device that is
            not there.
    """
    for what, value, known in (
        ("dtype", dtype, DTYPES),
        ("engine", engine, ENGINES),
        ("decode", decode, get_args(Decode)),
        ("lang", lang, ("en", "zh")),
    ):
        if value not in known:
            raise ValueError(f'{what} is "{value}". Known: {", ".join(known)}.')
    device = str(find_device(device))  # before a model is downloaded for it
    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    checkpoint = checkpoints.read(name, revision=revision)
    if dtype not in ("auto", "fp32") and isinstance(
        checkpoint.model, TextPerceiver | FlowPerceiver | MultimodalPerceiver
    ):
        raise ModelError(f'dtype "{dtype}" is for models of images; {checkpoint.source.name} runs in "fp32".')
    if isinstance(checkpoint.model, TextPerceiver):
        from opsin.text import TextModel

        return TextModel(checkpoint, device=device)
    if isinstance(checkpoint.model, FlowPerceiver):
        from opsin.flow import FlowModel

        return FlowModel(checkpoint, device=device, **limit)
    if isinstance(checkpoint.model, MultimodalPerceiver):
        from opsin.video import VideoModel

        return VideoModel(checkpoint, device=device, **limit)
    return Classifier(checkpoint, device=device, dtype=dtype, engine=engine, decode=decode, lang=lang, **limit)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One input after decode and resize: pixels as `PreprocessConfig.load` gives them, or an error."""

    name: str
    pixels: np.ndarray = field(default_factory=lambda: np.empty(0))
    size: tuple[int, int] = (0, 0)  # (width, height) of the upright original
    error: ImageError | None = None
    ms: float = 0.0


class Classifier:
    """A model with its preprocessing and labels.

    `model` is the plain fp32 `torch.nn.Module` (what runs may be a faster twin: `dtype` and `engine` say which),
    `preprocess` and `labels` are plain frozen objects, `source` says where the weights came from. A checkpoint without
    a head embeds and cannot classify (`NoHead`).
    """

    dtype: str  # of the arithmetic
    engine: str

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        engine: str = "auto",
        decode: Decode = "exact",
        lang: str = "en",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model: nn.Module = checkpoint.model.eval().to(device)
        if checkpoint.preprocess is None:
            raise CheckpointError(f"{checkpoint.source.name} says nothing of how images become its pixels.")
        self.preprocess = checkpoint.preprocess
        try:
            self.image_size = self.preprocess.image_size
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.source.name} cannot take images in batches: {error}") from error
        shape: Any = checkpoint.model.config
        if shape.num_channels != 3 or any(side % shape.stride for side in self.image_size):
            raise CheckpointError(
                f"{checkpoint.source.name} takes {shape.num_channels} channels and sides that {shape.stride} divides; "
                f"its preprocessing gives 3 channels of {self.image_size[0]}×{self.image_size[1]} pixels."
            )
        self.labels = checkpoint.labels
        self.source = checkpoint.source
        self.device = torch.device(device)
        self.ranges = checkpoint.ranges
        self.use(dtype, engine=engine)
        self.decode = decode
        self.lang = lang
        self.max_pixels = max_pixels

    def use(
        self,
        dtype: str,
        *,
        engine: str = "auto",
        exact: bool = True,
        ranges: engines.Ranges | None = None,
        calibration: Sequence[Tensor] | None = None,
    ) -> None:
        """Run in another precision or engine from now on; as `load` takes them.

        Args:
            exact: with "fp32": the plain model, and not its twin with the sums in another order.
            ranges: for torch's int8, of `opsin.engine.calibrate`; those of the checkpoint without it.
            calibration: for OpenVINO's int8: pixels (1, 3, H, W) of a hundred images like those to come.
        Raises:
            ModelError: int8 without ranges or calibration.
            MissingExtra: OpenVINO is not installed.
            ValueError: a dtype that this device or engine lacks.
        """
        exact = exact and dtype == "fp32" and engine != "openvino"
        self._net, self.dtype, self.engine = self._build(dtype, engine, exact, ranges or self.ranges, calibration)
        self._exact = exact
        self._upload: Callable[[list[np.ndarray]], Tensor] = self.preprocess.normalise_batch
        if self.device.type == "cuda":
            from opsin.engine import cuda

            self._upload = cuda.Uploader(self.preprocess, self.device, cuda.DTYPES.get(self.dtype, torch.float32))

    def _build(
        self,
        dtype: Any,  # engines check it
        engine: str,
        exact: bool,
        ranges: engines.Ranges | None,
        calibration: Sequence[Tensor] | None,
    ) -> tuple[Any, str, str]:
        """What runs, its dtype and its engine."""
        on_cpu = self.device.type == "cpu"
        if dtype in (("fp16", "fp8") if on_cpu else ("int8",)):
            raise ValueError(f'dtype "{dtype}" is for {"CUDA" if on_cpu else "CPUs"}; the model is on {self.device}.')
        if dtype == "bf16" and on_cpu and not has_bf16():
            log.warning("this CPU does not multiply bf16 by itself: it will be slower than fp32")
        if engine == "openvino":
            if not on_cpu:
                raise ValueError(f'engine "openvino" is for CPUs; the model is on {self.device}.')
            from opsin.engine import openvino

            if dtype == "auto":
                dtype = "bf16" if has_bf16() else "fp32"
            if dtype == "int8" and calibration is None:
                raise ModelError(f"{self.source.name}: OpenVINO's int8 needs images to calibrate with: {OPTIMISE}")
            net = openvino.compile(
                self.model, dtype, image_size=self.image_size, calibration=calibration, cache=cache_folder()
            )
            return net, dtype, "openvino"
        if not on_cpu:
            if dtype in ("auto", "fp32"):
                return self.model, "fp32", "torch"
            from opsin.engine import cuda

            return cuda.pack(self.model, dtype, self.device), dtype, "torch"
        if exact or not engines.can_pack():
            if dtype not in ("auto", "fp32"):
                raise ValueError(f'dtype "{dtype}" needs a torch with oneDNN, which this one lacks. Take "fp32".')
            return self.model, "fp32", "torch"
        if dtype == "auto":
            dtype = "int8" if ranges is not None and has_int8() else "bf16" if has_bf16() else "fp32"
        if dtype == "int8" and ranges is None:
            raise ModelError(f"{self.source.name} has no ranges for int8. {OPTIMISE}")
        return engines.pack(self.model, dtype, ranges), dtype, "torch"

    @property
    def feature_dim(self) -> int:
        """D, the length of what `embed` gives."""
        return self.model.config.feature_dim  # type: ignore[union-attr, return-value]

    @property
    def memory_bytes(self) -> int:
        """Of its weights, about: the plain ones, and their packed copies where a faster twin runs."""
        plain = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        share = {"fp32": 1.0, "bf16": 0.5, "fp16": 0.5, "int8": 0.25, "fp8": 0.25}[self.dtype]
        return plain if self._net is self.model else plain + round(plain * share)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        head = f"{len(self.labels)} classes" if self.labels else "no head"
        height, width = self.image_size
        return f"<opsin {self.source.name}: {count / 1e6:.1f}M parameters, {height}×{width} pixels, {head}>"

    @cached_property
    def unknown(self) -> detectors.Unknown:
        """What tells images of none of the classes, as `opsin evaluate --unknown-from` stored it with the model.

        Raises:
            ModelError: nothing is stored with this model.
            CheckpointError: it is damaged, or was made for other weights.
        """
        path = Path(self.source.path)
        found = detectors.read(path if path.is_dir() else path.parent, self.model) if self.source.path else None
        if found is None:
            raise ModelError(
                f"{self.source.name} has never been shown images of other things, so it cannot say what is none of its "
                "classes. Show it some: opsin evaluate DATA --model FOLDER --unknown-from PHOTOS"
            )
        return found

    def __call__(
        self, images: ImageSource | Sequence[ImageSource], *, top_k: int = 5, unknown: float | None = None
    ) -> list[Any]:
        """The `top_k` best labels of an image, `[{"label", "score", "index"}, …]`; of a list, a list of those.

        Args:
            unknown: an image that is none of the classes gets an empty list; as `stream` takes it.
        Raises:
            ImageError: an image cannot be read; `stream` gives a record instead.
            NoHead: the checkpoint has no classifier.
            ModelError: nothing tells what is unknown to this model.
        """
        labels = self._require_labels()
        if unknown is None:
            results = top_k_labels(self.logits(images), labels, top_k, self.lang)
        else:
            logits, ranks = self._ranked(self._run(self._logits_and_features, images))
            known = self.unknown.accepts(ranks, unknown)
            best = top_k_labels(logits, labels, top_k, self.lang)
            results = [row if is_known else [] for row, is_known in zip(best, known, strict=True)]
        return results if _is_batch(images) else results[0]

    def logits(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Logits (B, K), float32, on the CPU; B is 1 for a single image."""
        self._require_labels()
        return self._run(self._net, images)

    def embed(self, images: ImageSource | Sequence[ImageSource]) -> np.ndarray:
        """Features (B, D), float32: the final-norm class token, or the pooling that the checkpoint was trained with."""
        return self._run(self._features, images).numpy()

    def forward(self, resized: list[np.ndarray], *, embed: bool = False) -> Tensor:
        """Logits (B, K), with `embed` features (B, D), float32, on the CPU; not checked for being finite.

        Args:
            resized: B images as `preprocess.resize` gives them: for a caller that decodes by its own means.
        Raises:
            NoHead: logits are asked of a checkpoint without a classifier.
        """
        if not embed:
            self._require_labels()
        return self._forward(self._features if embed else self._net, resized)

    def forward_pixels(self, pixels: Tensor, *, embed: bool = False) -> Tensor:
        """`forward` of pixels that are normalised already, (B, 3, H, W) float32, of the model's size."""
        if not embed:
            self._require_labels()
        dtype = getattr(self._upload, "dtype", torch.float32)  # of a GPU's twin
        with torch.inference_mode(), exact_fp32(self.device):
            function = self._features if embed else self._logits
            return function(pixels.to(self.device, dtype)).float().cpu()

    def stream(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int = 32,
        top_k: int = 5,
        embed: bool = False,
        unknown: float | None = None,
        kind: float | None = None,
    ) -> Generator[Record]:
        """Exactly one record per input, in order, in constant memory; threads decode, and download beside the model.

        A record is `{"path", "ok": True, "label", "index", "score", "topk", "width", "height", "ms"}`, with `embed`
        `{"path", "ok": True, "embedding", "width", "height", "ms"}`, and for an input that cannot be read
        `{"path", "ok": False, "error": {"type", "message"}}`. An input that is not a path or URL is named by its
        place, `image[3]`. `ms` is its own decode time plus its share of the batch. At most two batches are read
        ahead: for a source slower than the model, take a small `batch_size`.

        Args:
            unknown: the share of images of other things that may be taken for one of the classes, 0.05 say. A record
                gets "known", and "known_score": the share of other things that look less like the classes, so that it
                is known from 1 − unknown on.
            kind: a record gets "kind", `{"label", "wnid", "score"}`: the narrowest kind of thing that has this
                probability, or None (`opsin.hierarchy.narrowest`).
        Raises:
            ValueError: batch_size or top_k below 1, unknown or kind out of range, or together with `embed`.
            NoHead: labels are asked of a checkpoint without a classifier.
            ModelError: nothing tells what is unknown to this model, or its classes have no kinds.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        named = (Item(_name(image, place), image) for place, image in enumerate(images))
        batches = iter(lambda: list(itertools.islice(named, batch_size)), [])
        return _flat(self.stream_batches(batches, top_k=top_k, embed=embed, unknown=unknown, kind=kind))

    def stream_batches(
        self,
        batches: Iterable[Sequence[Item]],
        *,
        top_k: int = 5,
        embed: bool = False,
        unknown: float | None = None,
        kind: float | None = None,
    ) -> Generator[list[Record]]:
        """`stream`, for a caller that says which images are computed together and what they are called.

        What is not an answer is equal to the bit for equal batches: the sums of a product may depend on its size.
        Arguments and errors are those of `stream`. An empty batch gives an empty list.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1.")
        if embed and (unknown is not None or kind is not None):
            raise ValueError("unknown and kind are of labels; with embed there are none.")
        if not embed:
            labels = self._require_labels()
        if unknown is not None:
            detectors.check(unknown)
            self.unknown  # noqa: B018, read now: what is wrong with it is no matter of an image
        if kind is not None:
            try:
                hierarchy.check(labels, kind)
            except hierarchy.NoKinds as error:
                raise ModelError(f"{self.source.name}: {error}") from error
        answers = partial(self._answers, top_k=top_k, embed=embed, unknown=unknown, kind=kind)
        function = self._features if embed else self._logits if unknown is None else self._logits_and_features
        return self._stream(batches, function, answers)

    def _stream(
        self,
        batches: Iterable[Sequence[Item]],
        function: Callable[[Tensor], Tensor],
        answers: Callable[[Tensor], Iterator[Record]],
    ) -> Generator[list[Record]]:
        with contextlib.closing(self.load_batches(batches)) as loaded:
            for batch in loaded:
                yield list(self._records(batch, function, answers))

    def load_batches(self, batches: Iterable[Sequence[Item]]) -> Generator[list[Loaded]]:
        """Items → pixels, batch by batch, in order; what cannot be read is a `Loaded` with an error.

        The next batch is on its way while the caller has one: read by threads of its own, from a server or a disk; on
        a CPU decoded only when it is its turn, by all cores, since the model wants them too: what is decoded meanwhile
        slows both, by a quarter in all.
        """
        beside = self.device.type != "cpu"
        source = iter(batches)
        with (
            ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="opsin-decode") as decoders,
            ThreadPoolExecutor(READERS, thread_name_prefix="opsin-read") as readers,
        ):

            def send(items: Sequence[Item]) -> list[Any]:
                """Each with its bytes on their way, or all of it."""
                fetches = map(_fetch, items)
                sent = [
                    (readers.submit(fetch) if fetch else item.source, item.name)
                    for item, fetch in zip(items, fetches, strict=True)
                ]
                return [decoders.submit(self.load_image, *item) for item in sent] if beside else sent

            ahead: deque[list[Any]] = deque()
            try:
                for items in source:
                    ahead.append(send(items))
                    if len(ahead) == 2:
                        yield self._decoded(ahead.popleft(), decoders, ahead[0])
                while ahead:
                    yield self._decoded(ahead.popleft(), decoders, [])
            finally:
                for pool in (decoders, readers):
                    pool.shutdown(wait=True, cancel_futures=True)

    def _decoded(self, batch: list[Any], decoders: ThreadPoolExecutor, following: list[Any]) -> list[Loaded]:
        futures = [item if isinstance(item, Future) else decoders.submit(self.load_image, *item) for item in batch]
        for item in following:
            if not isinstance(item, Future):
                _read_ahead(item[0])
        return [future.result() for future in futures]

    def load_image(self, source: Any, name: str) -> Loaded:
        """One input → what `forward` takes, under a name of its own; what cannot be read has an error, and none raises.

        Args:
            source: as `preprocess.load` takes it; or a future of that, or an `ImageError` that was met on the way.
        """
        start = time.perf_counter()
        try:
            if isinstance(source, Future):
                source = source.result()
            if isinstance(source, ImageError):
                raise source
            pixels, size = self._pixels(source, name)
        except ImageError as error:
            return Loaded(name, error=error)
        except MemoryError:
            return Loaded(name, error=ImageTooLarge(f"{name}: not enough memory to resize it."))
        return Loaded(name, pixels, size, ms=(time.perf_counter() - start) * 1e3)

    def _pixels(self, image: ImageSource, name: str | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        return self.preprocess.load(
            image, name=name, max_pixels=self.max_pixels, decode=self.decode, exact_resize=self._exact
        )

    def _records(
        self,
        batch: list[Loaded],
        function: Callable[[Tensor], Tensor],
        answers: Callable[[Tensor], Iterator[Record]],
    ) -> Iterator[Record]:
        good = [item for item in batch if item.error is None]
        found: dict[int, Record] = {}  # id of the item → its own answer
        start = time.perf_counter()
        if good:
            output = self._forward(function, [item.pixels for item in good])
            finite = output.isfinite().all(dim=1)
            sound = [item for item, is_finite in zip(good, finite.tolist(), strict=True) if is_finite]
            for item, answer in zip(sound, answers(output[finite]), strict=True):
                found[id(item)] = answer
        share = (time.perf_counter() - start) * 1e3 / max(len(good), 1)
        for item in batch:
            if item.error is not None:
                error = {"type": item.error.kind, "message": str(item.error)}
                yield {"path": item.name, "ok": False, "error": error}
            elif id(item) not in found:
                error = {"type": "not_finite", "message": f"{item.name}: the model's output for it is not finite."}
                yield {"path": item.name, "ok": False, "error": error}
            else:
                width, height = item.size
                facts = {"width": width, "height": height, "ms": round(item.ms + share, 2)}
                yield {"path": item.name, "ok": True, **found[id(item)], **facts}

    def _answers(
        self, output: Tensor, *, top_k: int, embed: bool, unknown: float | None, kind: float | None
    ) -> Iterator[Record]:
        if embed:
            yield from ({"embedding": row} for row in output.numpy())
            return
        if not len(output):
            return
        labels = self._require_labels()
        more: list[Record] = [{} for _ in output]
        if unknown is not None:
            output, ranks = self._ranked(output)
            for record, rank, known in zip(more, ranks, self.unknown.accepts(ranks, unknown), strict=True):
                record |= {"known": bool(known), "known_score": float(rank)}
        if kind is not None:
            for record, probs in zip(more, output.double().softmax(1).numpy(), strict=True):
                record["kind"] = hierarchy.narrowest(probs, labels, kind, self.lang)
        for record, best in zip(more, top_k_labels(output, labels, top_k, self.lang), strict=True):
            first = {"label": best[0]["label"], "index": best[0]["index"], "score": best[0]["score"], "topk": best}
            yield first | record

    def _ranked(self, output: Tensor) -> tuple[Tensor, np.ndarray]:
        """(B, K + D) → logits (B, K), and how known each image is (`Unknown.ranks`)."""
        logits, features = output.split([len(self._require_labels()), self.feature_dim], dim=1)
        detector = self.unknown
        return logits, detector.ranks(detector.scores(logits.numpy(), features.numpy()))

    def _run(self, function: Callable[[Tensor], Tensor], images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Any number of images through `function`, 32 at a time, so that memory does not grow with a long list."""
        sources: Sequence[Any] = images if _is_batch(images) else [images]  # type: ignore[assignment]
        if len(sources) == 0:
            raise ValueError("no images: the list is empty. Give at least one.")
        parts = []
        for start in range(0, len(sources), 32):
            resized = [self._pixels(source)[0] for source in sources[start : start + 32]]
            parts.append(self._forward(function, resized))
        return torch.cat(parts)

    def _forward(self, function: Callable[[Tensor], Tensor], resized: list[np.ndarray]) -> Tensor:
        with torch.inference_mode(), exact_fp32(self.device):
            return function(self._upload(resized).to(self.device)).float().cpu()

    def _logits(self, pixels: Tensor) -> Tensor:
        return self._net(pixels)

    def _features(self, pixels: Tensor) -> Tensor:
        return self._net.features(pixels)

    def _logits_and_features(self, pixels: Tensor) -> Tensor:
        """(B, K + D), of one pass; of two where a second head reads another token (DeiT)."""
        model: Any = self.model
        features = self._features(pixels).float()
        logits = self._net(pixels) if getattr(model, "head_dist", None) is not None else model.classify(features)
        return torch.cat([logits, features], dim=1)

    def _require_labels(self) -> Labels:
        if self.labels is None:
            raise NoHead(
                f"{self.source.name} has no classification head: it gives features, not labels. "
                "Use embed(), or load a fine-tuned checkpoint: `opsin models` lists some."
            )
        return self.labels


def _name(image: ImageSource, place: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image[{place}]"


def _fetch(item: Item) -> Callable[[], bytes | str] | None:
    """What gets the bytes of an item that waits for them; None where they are here."""
    if isinstance(item.source, str) and item.source.lower().startswith(("http://", "https://")):
        return partial(download, item.source)
    return item.source if callable(item.source) else None


def _flat(batches: Generator[list[Record]]) -> Generator[Record]:
    with contextlib.closing(batches):
        for batch in batches:
            yield from batch


def _read_ahead(image: Any) -> None:
    """Ask the system to have a file in memory by the time that it is decoded; what is wrong with it is found then."""
    if isinstance(image, str | os.PathLike) and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError, ValueError):
            if not Path(image).is_file():  # to open a pipe would wait for its writer
                return
            with Path(image).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _is_batch(images: object) -> bool:
    return isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
