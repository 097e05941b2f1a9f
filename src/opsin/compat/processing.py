"""Images → pixel_values, text → input_ids, under transformers' names."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from opsin import checkpoints
from opsin.checkpoints import files, processors, reader
from opsin.errors import CheckpointError
from opsin.text import CLS, NUM_SPECIAL, PAD, SEP, SPECIAL_TOKENS, VOCAB_SIZE, detokenize, tokenize

I = TypeVar("I", bound="ViTImageProcessor")  # noqa: E741

FIELDS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
"""What may be set of an image processor."""


class BatchFeature(dict[str, Any]):
    """Of a processor: `inputs["pixel_values"]`, `inputs.pixel_values`, `model(**inputs)`, `inputs.to("cuda")`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here; there is {', '.join(self)}.") from None

    def to(self, *args: Any, **kwargs: Any) -> "BatchFeature":
        """Move and cast the tensors in place, as `torch.Tensor.to`."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(*args, **kwargs)
        return self


class ViTImageProcessor:
    """Images → pixel_values. `preprocess_config` is opsin's own description of it.

    Args:
        fields: those of `preprocessor_config.json`; see `FIELDS`. What is not given is as in transformers: squash to
            224 × 224, bilinear, to −1..1.
    """

    kind = "ViTImageProcessor"  # whose defaults are taken

    def __init__(self, **fields: Any) -> None:
        self.preprocess_config = processors.read_hf({"image_processor_type": self.kind} | _known(fields))

    @classmethod
    def from_pretrained(
        cls: type[I],
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        use_fast: bool | None = None,
        **fields: Any,
    ) -> I:
        """The processor of a model: hub id, local folder, or whatever `opsin.load` takes; `fields` override its own.

        `use_fast` is taken so that old calls run, and means nothing: there is one processor, equal to the slow one.

        Raises:
            UnknownModel, HubError, CheckpointError: as `opsin.load`.
        """
        described = _folder(name, revision) / "preprocessor_config.json"
        processor = cls()
        if described.is_file():
            try:
                processor.preprocess_config = processors.read_hf(files.read_json(described))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{described}: {error}") from error
        else:  # opsin's own form and timm's keep it elsewhere
            preprocess = checkpoints.read(name, revision=revision).preprocess
            if preprocess is None:
                raise CheckpointError(f"{name} says nothing of how images become its pixels.")
            processor.preprocess_config = preprocess
        return processor._with(fields) if fields else processor

    def _with(self: I, fields: dict[str, Any]) -> I:
        processor = type(self)()
        processor.preprocess_config = processors.read_hf(self.to_dict() | _known(fields))
        return processor

    def __call__(self, images: Any, return_tensors: str | None = None, **fields: Any) -> BatchFeature:
        """One image or a list: PIL, path, bytes, uint8 array or tensor with channels first or last, or a batch of them.

        Args:
            return_tensors: "pt" or "np" stacks to (B, 3, H, W) float32; None gives a list of arrays (3, H, W).
            fields: override the processor's own for this call.
        Raises:
            ImageError: one of them is not an image, or damaged.
            ValueError: images that keep different sizes cannot be stacked.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'return_tensors is "{return_tensors}". Known: "pt", "np", None.')
        config = (self._with(fields) if fields else self).preprocess_config
        pixels = [config(_channels_as_decode_takes_them(image)) for image in _images(images)]
        if return_tensors is None:
            return BatchFeature(pixel_values=[image.numpy() for image in pixels])
        if not pixels:
            raise ValueError("no images: the list is empty. Give at least one.")
        if len({image.shape for image in pixels}) > 1:
            sizes = ", ".join(f"{image.shape[1]}×{image.shape[2]}" for image in pixels[:4])
            raise ValueError(f"images of {sizes} pixels cannot be stacked. Resize them, or use return_tensors=None.")
        batch = torch.stack(pixels)
        return BatchFeature(pixel_values=batch if return_tensors == "pt" else batch.numpy())

    preprocess = __call__

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS and "preprocess_config" in self.__dict__:
            try:
                return self.to_dict().get(name)
            except ValueError as error:  # of a JAX or timm checkpoint: transformers has no words for it
                raise AttributeError(str(error)) from error
        raise AttributeError(f"{type(self).__name__} has no {name!r}. Fields: {', '.join(FIELDS)}.")

    def to_dict(self) -> dict[str, Any]:
        """As in `preprocessor_config.json`."""
        return processors.write_hf(self.preprocess_config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`."""
        files.write_json(Path(folder) / "preprocessor_config.json", self.to_dict())

    def __repr__(self) -> str:
        try:
            fields = self.to_dict()
        except ValueError:  # transformers has no words for it
            fields = self.preprocess_config.spec()
        return f"{type(self).__name__} {json.dumps(fields, indent=2)}"


ViTFeatureExtractor = ViTImageProcessor
"""Its name until transformers 4.27, and on most model cards."""


class PerceiverImageProcessor(ViTImageProcessor):
    """As `ViTImageProcessor`; what is not given: the middle square of 7/8 of the shorter side, bicubic to 224 × 224,
    ImageNet's mean and deviation."""

    kind = "PerceiverImageProcessor"


PerceiverFeatureExtractor = PerceiverImageProcessor


def _folder(name: str | os.PathLike[str], revision: str | None) -> Path:
    """Where the small files of a model are: its folder here, or a download without the weights."""
    name = os.fspath(name)
    folder = Path(os.path.expanduser(name))  # noqa: PTH111, Path.expanduser raises for an unknown user
    if not folder.exists() and reader.HUB_ID.fullmatch(name) and name not in reader.EMBEDDED:
        from opsin.checkpoints import hub  # brings huggingface_hub

        return hub.download(name, revision=revision, weights=False)
    return folder


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    for field in fields:
        if field not in FIELDS:
            raise TypeError(f"unexpected argument {field!r}. An image processor has {', '.join(FIELDS)}.")
    return fields


def _images(images: Any) -> Iterable[Any]:
    if isinstance(images, np.ndarray | Tensor):
        return images if images.ndim == 4 else [images]
    return images if isinstance(images, list | tuple) else [images]


def _channels_as_decode_takes_them(image: Any) -> Any:
    """transformers finds the channel axis by its length; `decode` wants it last in arrays and first in tensors."""
    if not isinstance(image, np.ndarray | Tensor) or image.ndim != 3:
        return image
    first, last = image.shape[0] in (1, 3), image.shape[-1] in (1, 3)
    if isinstance(image, np.ndarray):
        return np.moveaxis(image, 0, -1) if first and not last else image
    return image.movedim(-1, 0) if last and not first else image


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class PerceiverTokenizer:
    """Text → ids of its bytes, [CLS] before and [SEP] behind.

    Padding is behind. `model_max_length` is where `truncation=True` cuts, and the length of `padding="max_length"`.
    """

    pad_token, bos_token, eos_token, mask_token, cls_token, sep_token = SPECIAL_TOKENS
    pad_token_id, bos_token_id, eos_token_id, mask_token_id, cls_token_id, sep_token_id = range(NUM_SPECIAL)
    all_special_tokens, all_special_ids = list(SPECIAL_TOKENS), list(range(NUM_SPECIAL))
    model_input_names = ("input_ids", "attention_mask")
    vocab_size = VOCAB_SIZE - NUM_SPECIAL  # as in transformers: without the special tokens; len() has them

    def __init__(self, model_max_length: int = 2048) -> None:
        self.model_max_length = model_max_length

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, model_max_length: int | None = None
    ) -> "PerceiverTokenizer":
        """The tokenizer of a model: it needs no file, but for a maximum length that the model's may state.

        Raises:
            UnknownModel, HubError, CheckpointError: as `opsin.load`.
        """
        folder = _folder(name, revision)
        if not folder.exists():
            checkpoints.read(name, revision=revision)  # an embedded model, or the error that says what it is not
        described, stated = folder / "tokenizer_config.json", 2048
        if described.is_file():
            try:
                stated = min(int(files.read_json(described).get("model_max_length", 2048)), 2048)
            except (AttributeError, OverflowError, TypeError, ValueError) as error:
                raise CheckpointError(f"{described}: {error}") from error
        return cls(model_max_length or stated)

    def __len__(self) -> int:
        return VOCAB_SIZE

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """One text or a list → `input_ids` and `attention_mask`.

        Args:
            padding: True or "longest"; "max_length"; False.
            return_tensors: "pt" or "np" stacks to (B, N) int64; None gives lists.
        Raises:
            ValueError: an unknown argument value, or texts of different lengths to be stacked without padding.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'return_tensors is "{return_tensors}". Known: "pt", "np", None.')
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise ValueError(f'padding is "{padding}". Known: True, "longest", "max_length", False.')
        limit = self.model_max_length if max_length is None else max_length
        around = 2 if add_special_tokens else 0
        if limit < around:
            raise ValueError(f"max_length is {limit}; [CLS] and [SEP] alone take {around}.")
        rows = []
        for each in [text] if isinstance(text, str) else text:
            ids = tokenize(each)
            if truncation:
                ids = ids[: limit - around]
            rows.append([CLS, *ids, SEP] if add_special_tokens else ids)
        length = 0
        if padding == "max_length":
            length = limit
        elif padding in (True, "longest"):
            length = max(map(len, rows), default=0)
        masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        rows = [row + [PAD] * (length - len(row)) for row in rows]
        if return_tensors is None:
            if isinstance(text, str):
                return BatchFeature(input_ids=rows[0], attention_mask=masks[0])
            return BatchFeature(input_ids=rows, attention_mask=masks)
        if len({len(row) for row in rows}) > 1:
            raise ValueError("texts of different lengths cannot be stacked: use padding=True.")
        ids_, mask = torch.tensor(rows), torch.tensor(masks)
        if return_tensors == "np":
            return BatchFeature(input_ids=ids_.numpy(), attention_mask=mask.numpy())
        return BatchFeature(input_ids=ids_, attention_mask=mask)

    def encode(self, text: str, **arguments: Any) -> Any:
        """`input_ids` alone."""
        return self(text, **arguments)["input_ids"]

    def tokenize(self, text: str) -> list[str]:
        """A character per byte (latin-1), special tokens written out."""
        return self.convert_ids_to_tokens(tokenize(text))

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [SPECIAL_TOKENS[i] if i < NUM_SPECIAL else chr(i - NUM_SPECIAL) for i in map(int, ids)]

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        return [SPECIAL_TOKENS.index(t) if t in SPECIAL_TOKENS else ord(t) + NUM_SPECIAL for t in tokens]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Ids, of a list, array or tensor, → text; bytes that are no UTF-8 become U+FFFD."""
        ids = [ids] if isinstance(ids, int) else ids
        return detokenize(map(int, ids), special=not skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer_config.json`."""
        data = {"tokenizer_class": "PerceiverTokenizer", "model_max_length": self.model_max_length}
        files.write_json(Path(folder) / "tokenizer_config.json", data)
