"""text with gaps → text: every [MASK] is one missing byte.

    text ── tokenize ──▶ ids ── model ──▶ logits of every byte ── the best of each gap ──▶ text

The vocabulary is the 256 bytes of UTF-8 behind six special tokens. Equal to `PerceiverTokenizer` of transformers;
`tests/test_text.py` holds it to that.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from opsin.checkpoints import Checkpoint
from opsin.device import exact_fp32
from opsin.errors import CheckpointError, NoMask, TextError, TextTooLong
from opsin.models.perceiver_io import TextPerceiver

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")  # ids 0 to 5
PAD, MASK, CLS, SEP = (SPECIAL_TOKENS.index(f"[{name}]") for name in ("PAD", "MASK", "CLS", "SEP"))
NUM_SPECIAL = len(SPECIAL_TOKENS)
VOCAB_SIZE = NUM_SPECIAL + 256
BATCH_SIZE = 8  # texts at once; at 2048 places each, about 0.5 GB

_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_SEVERAL = re.compile(r"\[MASK:([1-9][0-9]{0,3})\]")

Result = dict[str, Any]


def tokenize(text: str) -> list[int]:
    """Token ids of a text: a byte of its UTF-8 is 6 + byte; a special token written out, as [MASK], is that token.

    Nothing is added around the text: transformers puts CLS before and SEP behind.

    Raises:
        TextError: the text holds half of a surrogate pair, which has no UTF-8.
    """
    ids: list[int] = []
    try:
        for part in _SPECIAL.split(text):
            if part in SPECIAL_TOKENS:
                ids.append(SPECIAL_TOKENS.index(part))
            else:
                ids += (NUM_SPECIAL + byte for byte in part.encode())
    except UnicodeEncodeError as error:
        odd = error.object[error.start]
        raise TextError(
            f"the text has {odd!r}, half of a character, which has no UTF-8. Read it again as the encoding it is in."
        ) from error
    return ids


def detokenize(ids: Iterable[int], *, special: bool = True) -> str:
    """The text of token ids; bytes that are no UTF-8 become U+FFFD.

    Args:
        special: write special tokens out, as [MASK]; False leaves them out.
    Raises:
        ValueError: an id that is not in the vocabulary.
    """
    text = bytearray()
    for token in ids:
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"no token {token}: ids are 0 to {VOCAB_SIZE - 1}.")
        if token >= NUM_SPECIAL:
            text.append(token - NUM_SPECIAL)
        elif special:
            text += SPECIAL_TOKENS[token].encode()
    return text.decode(errors="replace")


class TextModel:
    """A language model on bytes with its tokenizer. `model` is the plain fp32 `torch.nn.Module`."""

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu") -> None:
        if not isinstance(checkpoint.model, TextPerceiver):
            raise CheckpointError(f"{checkpoint.source.name} is no model of text.")
        config = checkpoint.model.config
        if config.vocab_size != VOCAB_SIZE:
            raise CheckpointError(
                f"{checkpoint.source.name} has {config.vocab_size} tokens; text of bytes has {VOCAB_SIZE}."
            )
        self.model = checkpoint.model.eval().to(device)
        self.source = checkpoint.source
        self.device = torch.device(device)
        # DeepMind's release is shown without special tokens around the text, and transformers' port of it with them:
        # each file is asked as its own documentation asks it. Positions differ by one between the two.
        self._around = ([CLS], [SEP]) if config.numerics == "transformers" else ([], [])

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"<opsin {self.source.name}: {count / 1e6:.1f}M parameters, {self.max_length} bytes of text>"

    @property
    def max_length(self) -> int:
        """How many bytes and special tokens a text may have."""
        return self.model.config.max_length - sum(map(len, self._around))

    def fill_mask(self, text: str | Sequence[str], *, top_k: int = 5) -> Any:
        """Fill the gaps of a text; of a list of texts, a list of results.

        One [MASK] stands for one byte, a letter of English: "[MASK:7]", short for seven of them, makes room for a
        word. All bytes are guessed at once, each by itself. Begin a gap with the space before the word: the model does
        better so.

        Returns:
            `{"text": as given, "filled": with the best bytes, "gaps": [{"text", "bytes"}, …]}`. A gap is a run of
            masks; its `bytes` are, for each mask, the `top_k` best `{"byte", "token", "score"}`, where `byte` is 0 to
            255, `token` shows it and `score` is its probability among the whole vocabulary. Best bytes that together
            are no UTF-8 are shown as U+FFFD.
        Raises:
            NoMask, TextTooLong, TextError: all are `opsin.errors.TextError`, and ValueErrors.
            TypeError: something else than text.
        """
        if not 1 <= top_k <= 256:
            raise ValueError(f"top_k is {top_k}; there are 256 bytes to choose from.")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(each, str) for each in texts):
            raise TypeError(f"text is {_kind(text)}; give a str, or a list of them.")
        rows = [self._ids(each) for each in texts]  # all of them, before any is computed
        results: list[Result] = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            for each, ids, logits in zip(texts[start : start + BATCH_SIZE], batch, self.logits(batch), strict=True):
                results.append(self._result(each, ids, logits, top_k))
        return results[0] if isinstance(text, str) else results

    def logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each row of token ids, logits (N, V) float32 on the CPU; N is its own length.

        The rows are padded to the longest of them, not to what the model can take: padding is masked, and costs.
        """
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows])
        real = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
        mask = None if real.all() else real.to(self.device)
        with torch.inference_mode(), exact_fp32(self.device):
            logits = self.model(ids.to(self.device), mask).float().cpu()
        return [logits[i, : len(row)] for i, row in enumerate(rows)]

    def _ids(self, text: str) -> list[int]:
        """What the model is given for a text."""
        text = _SEVERAL.sub(lambda found: SPECIAL_TOKENS[MASK] * int(found[1]), text)
        ids = tokenize(text)
        if MASK not in ids:
            raise NoMask(
                f"{_shorten(text)} has no [MASK]. Put one in place of each missing byte, or [MASK:7] for seven."
            )
        if len(ids) > self.max_length:
            raise TextTooLong(
                f"{_shorten(text)} has {len(ids)} bytes and special tokens; this model takes up to {self.max_length}. "
                "Give the part around the gap."
            )
        before, behind = self._around
        return [*before, *ids, *behind]

    def _result(self, text: str, ids: list[int], logits: Tensor, top_k: int) -> Result:
        scores = logits.double().softmax(dim=1)[:, NUM_SPECIAL:]  # N 256
        if not scores.isfinite().all():
            raise CheckpointError(f"{self.source.name} gives numbers that are not finite. Check its file.")
        best = scores.sort(dim=1, descending=True, stable=True)
        filled, gaps = list(ids), []
        for is_gap, run in groupby(range(len(ids)), key=lambda place: ids[place] == MASK):
            if not is_gap:
                continue
            places = list(run)
            choices = [
                [
                    {"byte": byte, "token": show_byte(byte), "score": score}
                    for byte, score in zip(
                        best.indices[place, :top_k].tolist(), best.values[place, :top_k].tolist(), strict=True
                    )
                ]
                for place in places
            ]
            for place, choice in zip(places, choices, strict=True):
                filled[place] = NUM_SPECIAL + choice[0]["byte"]
            gaps.append({"text": detokenize(filled[places[0] : places[-1] + 1]), "bytes": choices})
        before, behind = map(len, self._around)
        return {"text": text, "filled": detokenize(filled[before : len(filled) - behind]), "gaps": gaps}


def show_byte(byte: int) -> str:
    """A printable ASCII character as itself, another byte as <0xE4>."""
    return chr(byte) if 32 <= byte < 127 else f"<0x{byte:02X}>"


def _shorten(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}…"


def _kind(value: object) -> str:
    if isinstance(value, list | tuple):
        value = next(each for each in value if not isinstance(each, str))
        return f"a list with {type(value).__name__}"
    return type(value).__name__
