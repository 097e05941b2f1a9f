"""The examples' parts, without espeak-ng and without their data: a stub speaks."""

import importlib.util
import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RATE = 22050  # espeak-ng's


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("audio_digits", ROOT / "examples" / "audio_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "audio_digits", module)  # where `inspect` looks for the source of a class
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps so small wait for each other: ten times slower with two on a busy machine
    yield module
    torch.set_num_threads(threads)


def tones(count: int, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit k is a tone of 300 + 200·k Hz with noise."""
    labels = torch.arange(count) % 10
    time = torch.arange(num_samples) / 8000
    samples = torch.sin(2 * math.pi * (300 + 200 * labels[:, None]) * time)
    return samples + 0.1 * torch.randn(count, num_samples, generator=torch.Generator().manual_seed(3)), labels


def test_one_step_lowers_the_loss(digits: ModuleType) -> None:
    torch.manual_seed(0)
    model, (samples, labels) = digits.build(), tones(11, digits.NUM_SAMPLES)
    before = digits.train_step(model, digits.optimizers_of(model), samples, labels, factor=0.1)
    with torch.no_grad():
        after = F.cross_entropy(digits.logits_of(model, samples), labels).item()
    assert after < before - 0.02


def test_the_model_takes_some_twenty_lines(digits: ModuleType) -> None:
    lines = (inspect.getsource(digits.Filters) + inspect.getsource(digits.build)).splitlines()
    assert len([line for line in lines if line.strip() and '"""' not in line]) <= 26


def test_without_espeak_it_says_how_to_install_it(digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="apt install espeak-ng, or brew install espeak-ng"):
        digits.list_voices()


def test_voices_are_those_that_espeak_lists_and_can_be_used(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(*names: str) -> None:
        rows = "".join(f" 5  variant         --/M      Name!v             !v/{name:<18}(en-us 5)\n" for name in names)
        monkeypatch.setattr(digits.shutil, "which", lambda _: "espeak-ng")
        monkeypatch.setattr(digits.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=rows))

    listing("zac", "Mr serious", "RicishayMax3", *digits.HELD_OUT)
    assert digits.list_voices() == sorted(["zac", "Mr serious", *digits.HELD_OUT], key=str.lower)
    listing("zac", *digits.HELD_OUT[1:])
    with pytest.raises(SystemExit, match="has no voice f1, which the measurement needs"):
        digits.list_voices()


def test_resampling_keeps_a_tone(digits: ModuleType) -> None:
    at = {rate: np.sin(2 * np.pi * 437 * np.arange(rate) / rate) for rate in (RATE, 8000)}
    np.testing.assert_allclose(digits.resample(at[RATE], RATE), at[8000], atol=1e-9)
    assert np.abs(digits.resample(np.sin(2 * np.pi * 4500 * np.arange(RATE) / RATE), RATE)).max() < 1e-9


def stub_espeak(command: list[str], **_: Any) -> SimpleNamespace:
    """Bursts of 0.20, 0.22 … seconds, one per word of the text, half a second apart, as the wav that it would write."""
    parts = []
    for word in range(command[-1].count("<break")):
        burst = 9000 * np.sin(2 * np.pi * (300 + 150 * word) * np.arange(int((0.2 + 0.02 * word) * RATE)) / RATE)
        parts += [burst, np.zeros(RATE // 2)]
    header = b"\0" * 24 + RATE.to_bytes(4, "little") + b"\0" * 16
    return SimpleNamespace(stdout=header + np.concatenate(parts).astype("<i2").tobytes())


def test_a_reading_is_cut_into_its_words(digits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.subprocess, "run", stub_espeak)
    for tape in (1.0, 1.25):
        spoken = digits.speak(digits.Reading("f1", "en-us", 150, 50, tape))
        seconds = [len(word) / 8000 for word in spoken]
        assert seconds == pytest.approx([(0.2 + 0.02 * word) / tape for word in range(10)], abs=0.01)
        loudest = torch.fft.rfft(spoken[4], n=8000).abs().argmax().item()  # 1 Hz a bin
        assert loudest == pytest.approx(900 * tape, abs=5)


def test_disturbed_words_stay_whole_and_move(digits: ModuleType) -> None:
    lengths = torch.tensor([2003, 1009, digits.NUM_SAMPLES])
    samples = torch.zeros(3, digits.NUM_SAMPLES)
    for row, length in zip(samples, lengths, strict=True):
        row[:length] = torch.randn(length, generator=torch.Generator().manual_seed(5))
    out = digits.disturb(digits.Words(samples, lengths, torch.arange(3)), torch.Generator().manual_seed(0))
    for row, length, word in zip(out, lengths, samples, strict=True):
        match = F.conv1d(row[None, None], word[None, None, :length])[0, 0] / word.square().sum()
        gain = match.abs().max().item()
        assert 0.45 < gain < 1.55
        start = int(match.abs().argmax())
        expected = torch.zeros_like(row)
        expected[start : start + length] = match[start] * word[:length]
        assert (row - expected).std() < 0.05  # noise alone is left
    again = digits.disturb(digits.Words(samples, lengths, torch.arange(3)), torch.Generator().manual_seed(1))
    assert (out - again).std() > 0.1


def test_confusion_counts_said_by_heard(digits: ModuleType) -> None:
    counts = digits.confusion(torch.tensor([2, 2, 2, 9]), torch.tensor([2, 5, 5, 0]))
    assert counts.shape == (10, 10)
    assert (counts[2, 2], counts[2, 5], counts[9, 0], counts.sum()) == (1, 2, 1, 4)


def test_the_whole_of_it(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"HELD_OUT": ("f1", "f2"), "ACCENTS": ("en-us",), "STEPS": 2, "EVALUATE_EVERY": 1}.items():
        monkeypatch.setattr(digits, name, value)
    monkeypatch.setattr(digits, "list_voices", lambda: ["f1", "f2", "zac"])
    monkeypatch.setattr(digits.subprocess, "run", stub_espeak)
    digits.main(tmp_path / "plot.png")
    printed = capsys.readouterr()
    assert "of 20 words, seed 0" in printed.out
    rows = {
        line.split()[0]: line.split()[1:11] for line in printed.out.splitlines() if line[:5].strip() in digits.DIGITS
    }
    assert [sum(map(int, rows[digit])) for digit in digits.DIGITS] == [2] * 10
    assert "step 2 of 2" in printed.err and "ETA 0.0 min" in printed.err
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (1000, 460)


def test_a_held_out_voice_that_is_not_understood_ends_it(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(digits, "list_voices", lambda: ["zac", *digits.HELD_OUT])
    monkeypatch.setattr(digits, "ACCENTS", ("en-us",))
    words = [torch.ones(9)] * 10
    monkeypatch.setattr(digits, "speak", lambda reading: words[reading.voice == "f3" :])
    with pytest.raises(SystemExit, match="held-out voices gave 110 words, not 120"):
        digits.main(tmp_path / "plot.png")


def test_the_published_plot_is_small() -> None:
    path = ROOT / "examples" / "audio_digits.png"
    with Image.open(path) as image:
        assert image.size == (1000, 460)
    assert path.stat().st_size < 150_000
