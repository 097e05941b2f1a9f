"""The loop: resumes to the bit, learns, and never sees a held-out image."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from opsin.data.tiny_imagenet import TinyImageNet
from opsin.models.vit import ViTConfig
from opsin.train import loop
from opsin.train.loop import Phase, TrainConfig, batches, train

CONFIG = TrainConfig(
    model=ViTConfig(
        image_size=(16, 16), patch_size=4, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, num_classes=3,
        class_token=False, pool="mean",
    ),
    phases=(Phase(steps=3, image_size=12, keep_tokens=5), Phase(steps=4, image_size=16, keep_tokens=16)),
    batch_size=6,
    warmup_steps=2,
    save_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> TinyImageNet:
    """Three classes of noisy single colours; every fifth image is held out."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    colours = np.eye(3)[labels][:, None, None, :] * 200 + rng.integers(0, 50, (60, 16, 16, 3))
    return TinyImageNet(
        images=colours.astype(np.uint8), labels=labels, held_out=np.arange(60) % 5 == 0, wnids=("a", "b", "c")
    )


def test_resumed_run_equals_the_uninterrupted_one(
    data: TinyImageNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(CONFIG, data, tmp_path / "whole").state_dict()
    calls, cross_entropy = 0, torch.nn.functional.cross_entropy

    def power_cut(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return cross_entropy(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.F, "cross_entropy", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, data, tmp_path / "cut")
    monkeypatch.undo()
    resumed = train(CONFIG, data, tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other_seed = train(replace(CONFIG, seed=1), data, tmp_path / "seed").state_dict()
    assert not all(torch.equal(whole[name], other_seed[name]) for name in whole)


def test_it_learns_and_says_so(data: TinyImageNet, tmp_path: Path) -> None:
    config = replace(CONFIG, phases=(Phase(steps=120, image_size=16, keep_tokens=16),), save_every=60)
    model = train(config, data, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60, 80, 100, 120]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert loop.accuracy(model, data)[0] == lines[-1]["top1"] > 0.9


def test_batches_cover_an_epoch_once_and_never_touch_held_out_images(data: TinyImageNet) -> None:
    numbered = TinyImageNet(images=np.arange(60), labels=data.labels, held_out=data.held_out, wnids=data.wnids)
    rows = np.concatenate([images for images, _ in islice(batches(numbered, CONFIG, 0), 8)])
    assert sorted(rows) == [i for i in range(60) if i % 5]
    later = next(iter(batches(numbered, CONFIG, 5)))[0]
    assert np.array_equal(later, rows[30:36])


def test_phase_of_a_step() -> None:
    assert [CONFIG.phase(step).image_size for step in range(7)] == [12, 12, 12, 16, 16, 16, 16]
    with pytest.raises(ValueError, match="past the end of the 7 planned"):
        CONFIG.phase(7)
