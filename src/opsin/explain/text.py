"""text with gaps → which bytes each filled byte rests on."""

from dataclasses import dataclass

import numpy as np
import torch

from opsin.device import exact_fp32
from opsin.explain.attention import mean_weights
from opsin.models.layers import Trace
from opsin.text import MASK, NUM_SPECIAL, SPECIAL_TOKENS, TextModel, show_byte


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextExplanation:
    """For each missing byte, how much of it comes from each token that the model was given."""

    tokens: tuple[str, ...]  # (n,) the input: characters, <0xE4> for other bytes, special tokens as [MASK]
    places: tuple[int, ...]  # (m,) the masks among them
    gaps: tuple[tuple[int, ...], ...]  # rows of `weights` that belong to one gap, gap by gap
    answers: tuple[str, ...]  # of each gap
    filled: str
    weights: np.ndarray  # (m, n) float32, rows sum to one

    def by_gap(self) -> np.ndarray:
        """(gaps, n) the mean of each gap's rows."""
        return np.stack([self.weights[list(rows)].mean(axis=0) for rows in self.gaps])


def explain_text(model: TextModel, text: str) -> TextExplanation:
    """Attention from each gap back to the text: decoder's query → latents → layers → input, as in rollout.

    The weights of the decoder's query in a gap, mean over heads, times half attention and half identity of each layer
    of the latents, times the latents' attention to the input.

    Raises:
        TextError: as `TextModel.fill_mask`.
    Source: Abnar & Zuidema 2020, §3 "Attention rollout"; Jaegle et al. 2021 (Perceiver IO), §3 for the path.
    """
    result = model.fill_mask(text, top_k=1)
    ids = model._ids(text)
    places = tuple(place for place, token in enumerate(ids) if token == MASK)
    trace = Trace()
    with torch.inference_mode(), exact_fp32(model.device):
        model.model(torch.tensor([ids], device=model.device), None, trace)
        read, *layers, answer = trace.attended
        rows = mean_weights(answer)[list(places)]  # m M
        for use in reversed(layers):
            rows = (rows + rows @ mean_weights(use)) / 2
        weights = (rows @ mean_weights(read)).cpu().numpy()
    starts = [row for row, place in enumerate(places) if row == 0 or place > places[row - 1] + 1]
    gaps = tuple(tuple(range(*ends)) for ends in zip(starts, [*starts[1:], len(places)], strict=True))
    return TextExplanation(
        tokens=tuple(_show(token) for token in ids),
        places=places,
        gaps=gaps,
        answers=tuple(gap["text"] for gap in result["gaps"]),
        filled=result["filled"],
        weights=weights,
    )


def _show(token: int) -> str:
    return SPECIAL_TOKENS[token] if token < NUM_SPECIAL else show_byte(token - NUM_SPECIAL)
