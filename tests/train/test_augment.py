from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.train.augment import drop_tokens, random_resized_crop
from opsin.train.optim import warmup_cosine


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crop_is_a_box_of_the_image_and_half_are_flipped() -> None:
    """On a picture of its own coordinates every crop shows a rectangle: rows share y, columns share x."""
    side = 64
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    coordinates = torch.stack([x, y, x * 0]).expand(200, -1, -1, -1)
    crops = random_resized_crop(coordinates, 16, min_area=0.25, generator=generator(0))
    assert crops.shape == (200, 3, 16, 16)
    assert crops.min() >= 0
    assert crops.max() <= side - 1
    xs, ys = crops[:, 0], crops[:, 1]
    assert torch.allclose(xs, xs[:, :1].expand_as(xs), atol=1e-3)
    assert torch.allclose(ys, ys[:, :, :1].expand_as(ys), atol=1e-3)
    width, height = (xs[:, 0, -1] - xs[:, 0, 0]) / 15 * 16 / side, (ys[:, -1, 0] - ys[:, 0, 0]) / 15 * 16 / side
    assert 70 < int((width < 0).sum()) < 130
    area = width.abs() * height
    assert area.min() > 0.2
    assert area.max() <= 1.01
    again = random_resized_crop(coordinates, 16, min_area=0.25, generator=generator(0))
    assert torch.equal(crops, again)


@given(keep=st.integers(1, 12), seed=st.integers(0, 9))
def test_kept_tokens_are_distinct_tokens_of_their_own_image(keep: int, seed: int) -> None:
    tokens = torch.arange(3 * 11).float().view(3, 11, 1)
    kept = drop_tokens(tokens, keep, generator=generator(seed))
    assert kept.shape == (3, min(keep, 11), 1)
    for image, row in enumerate(kept[:, :, 0]):
        assert len(set(row.tolist())) == len(row)
        assert ((row >= image * 11) & (row < image * 11 + 11)).all()


def test_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [warmup_cosine(step, steps=100, warmup_steps=10) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == 0.5
    assert factors[100] < 1e-12
    assert all(a > b for a, b in pairwise(factors[10:]))
