"""Tiles without seams, motion in pixels, its pictures and files, and the `flow` command."""

import errno
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import Checkpoint, Source
from opsin.cli import main
from opsin.errors import CheckpointError, FlowError, FlowFileError, FramesDiffer, ImageCorrupt, ImageTooLarge
from opsin.flow import (
    FlowModel,
    end_point_error,
    flow_to_image,
    read_flow,
    read_frames,
    tile_starts,
    tile_weights,
    write_flow,
)
from opsin.models.perceiver_io import FlowPerceiver, FlowPerceiverConfig

CONFIG = FlowPerceiverConfig(
    num_latents=5,
    latent_dim=8,
    layers_per_block=2,
    num_heads=2,
    image_size=(22, 31),
    embed_dim=6,
    num_bands=3,
)


def flow_model(model: nn.Module, **options: Any) -> FlowModel:
    return FlowModel(Checkpoint(model, None, None, Source("test/noise", None, "", "opsin")), **options)


def noisy(config: FlowPerceiverConfig = CONFIG) -> FlowPerceiver:
    torch.manual_seed(0)
    model = FlowPerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def pictures(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    return first, second


class Stub(FlowPerceiver):
    """Sees a tile as the real one does, and gives what `answer` makes of it, in units of 20 pixels."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(CONFIG)
        self.answer, self.seen = answer, 0

    def forward(self, frames: Tensor) -> Tensor:
        assert frames.shape == (1, 2, 3, *CONFIG.image_size)
        assert frames.dtype == torch.float32
        assert frames.abs().max() <= 1
        self.seen += 1
        return self.answer(frames)


def constant(frames: Tensor) -> Tensor:
    return torch.tensor([0.15, -0.4]).expand(1, *CONFIG.image_size, 2)


def first_image(frames: Tensor) -> Tensor:
    """Red and green of the first frame, as motion: tells which tile was put where."""
    return frames[:, 0, :2].permute(0, 2, 3, 1)


# ── tiles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(22, 31), (23, 31), (57, 32), (44, 90), (9, 70), (60, 13), (1, 1)])
def test_constant_motion_has_no_seams(size: tuple[int, int]) -> None:
    motion = flow_model(Stub(constant)).flow(*pictures(*size))
    assert motion.shape == (*size, 2)
    assert motion.dtype == np.float32
    assert np.abs(motion - (3, -8)).max() <= 1e-5  # x first, 20 pixels to the unit


@pytest.mark.parametrize("size", [(57, 93), (22, 31), (11, 40), (17, 5)])
def test_every_tile_is_put_where_it_was_cut(size: tuple[int, int]) -> None:
    frames = pictures(*size)
    motion = flow_model(Stub(first_image)).flow(*frames)
    expected = (frames[0][..., :2] / 255 * 2 - 1) * 20
    np.testing.assert_allclose(motion, expected, atol=1e-5)


def test_a_small_image_is_continued_to_the_right_and_below() -> None:
    seen = []

    def look(frames: Tensor) -> Tensor:
        seen.append(frames)
        return constant(frames)

    first, second = pictures(7, 11)
    flow_model(Stub(look)).flow(first, second)
    for frame, picture in zip(seen[0][0].numpy(), (first, second), strict=True):
        values = picture.transpose(2, 0, 1) / 255 * 2 - 1
        np.testing.assert_allclose(frame[:, :7, :11], values, atol=1e-6)
        np.testing.assert_allclose(frame[:, :7, 11:], np.repeat(values[:, :, -1:], 20, axis=2), atol=1e-6)
        np.testing.assert_allclose(frame[:, 7:], np.repeat(frame[:, 6:7], 15, axis=1), atol=1e-6)


def test_blended_with_the_distance_to_the_edge() -> None:
    """Two tiles beside each other that disagree: each weighs in with its weight there, and no other does."""
    width = 31 + 9
    model = Stub(lambda frames: torch.full((1, *CONFIG.image_size, 2), float(model.seen)))
    motion = flow_model(model).flow(*pictures(22, width))[:, :, 0] / 20
    weights = tile_weights((22, 31))
    left, right = np.zeros((22, width)), np.zeros((22, width))
    left[:, :31], right[:, 9:] = weights, weights
    np.testing.assert_allclose(motion, (left + 2 * right) / (left + right), rtol=1e-6)
    assert (motion[:, :9] == 1).all()
    assert (motion[:, 31:] == 2).all()


def test_weights_are_the_distance_to_the_nearest_edge() -> None:
    assert tile_weights((3, 5)).tolist() == [[1, 1, 1, 1, 1], [1, 2, 2, 2, 1], [1, 1, 1, 1, 1]]
    assert tile_weights((4, 4)).tolist() == [[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1]]
    assert tile_weights((368, 496)).max() == 184


def notebook_starts(length: int, tile: int) -> list[int]:
    """The release's rule, for comparison; its doubled tiles are one here."""
    starts = list(range(0, length, tile - 20))
    starts[-1] = length - tile
    return sorted(set(starts))


@pytest.mark.parametrize(
    ("length", "tile"), [(436, 368), (1024, 496), (375, 368), (1242, 496), (720, 368), (1280, 496), (368, 368)]
)
def test_tiles_of_the_release(length: int, tile: int) -> None:
    """Sintel, KITTI, 720p: the sizes that the release's own rule can cut."""
    starts = notebook_starts(length, tile)
    if max(start + tile for start in starts) <= length:
        assert tile_starts(length, tile) == starts
    assert tile_starts(436, 368) == [0, 68]
    assert tile_starts(1024, 496) == [0, 476, 528]


@given(st.integers(21, 600), st.integers(0, 3000))
def test_tiles_cover_and_overlap(tile: int, more: int) -> None:
    length = tile + more
    starts = tile_starts(length, tile)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    assert all(0 < after - before <= tile - 20 for before, after in pairwise(starts))
    assert len(starts) == 1 or (len(starts) - 1) * (tile - 20) + 20 < length  # one fewer would not reach


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_tile_is_the_network_times_twenty() -> None:
    network = noisy()
    first, second = pictures(22, 31)
    pixels = torch.from_numpy(np.stack([first, second])).permute(0, 3, 1, 2)[None] / 255 * 2 - 1
    with torch.inference_mode():
        expected = network(pixels)[0] * 20
    assert expected.std(dim=(0, 1)).min() > 0.05
    motion = flow_model(network).flow(Image.fromarray(first), second)
    torch.testing.assert_close(torch.from_numpy(motion), expected, atol=1e-5, rtol=1e-5)
    backwards = flow_model(network).flow(second, first)
    assert np.abs(backwards - motion).max() > 1e-3


def test_tiles_are_counted() -> None:
    calls: list[tuple[int, int]] = []
    flow_model(Stub(constant)).flow(*pictures(23, 80), on_tile=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 12) for i in range(1, 13)]  # 2 rows; 80 columns in steps of 11 are 6


def test_frames_of_different_sizes() -> None:
    message = "the first image is 31 × 22 pixels and the second 31 × 23. Motion is between two of one size"
    with pytest.raises(FramesDiffer, match=message):
        flow_model(Stub(constant)).flow(pictures(22, 31)[0], pictures(23, 31)[0])
    with pytest.raises(FramesDiffer):
        read_frames(pictures(7, 5)[0], pictures(5, 7)[0])


def test_a_bad_frame(photos: Path) -> None:
    data = (photos / "rocket.jpg").read_bytes()
    with pytest.raises(ImageCorrupt):
        flow_model(Stub(constant)).flow(data, data[:5000])
    with pytest.raises(ImageTooLarge, match="raise max_pixels"):
        flow_model(Stub(constant), max_pixels=600).flow(*pictures(22, 31))


def test_models_that_cannot_measure_motion(noisy_checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="test/noise is no model of optical flow"):
        FlowModel(noisy_checkpoint)
    with pytest.raises(CheckpointError, match=r"tiles of \(22, 20\) pixels; each side must be over 20"):
        flow_model(FlowPerceiver(replace(CONFIG, image_size=(22, 20))))
    with pytest.raises(CheckpointError, match="not finite"):
        flow_model(Stub(lambda frames: constant(frames) * torch.nan)).flow(*pictures(22, 31))
    assert repr(flow_model(noisy())).endswith("M parameters, tiles of 22×31 pixels>")


# ── the end-point error ──────────────────────────────────────────────────────────────────────────────────────────────


def test_end_point_error_is_the_mean_distance() -> None:
    truth = np.zeros((2, 3, 2), np.float32)
    flow = truth + np.array([3, -4], np.float32)
    assert end_point_error(flow, truth) == 5
    flow[0] = 0
    assert end_point_error(flow, truth) == 2.5
    truth[1, 0], truth[1, 1, 1] = np.nan, 1.5e9
    assert end_point_error(flow, truth) == 5 / 4
    assert end_point_error(flow, truth, np.array([[0, 0, 0], [1, 1, 1]])) == 5


def test_end_point_errors_that_do_not_exist() -> None:
    zeros = np.zeros((2, 3, 2), np.float32)
    with pytest.raises(FlowError, match=r"the motion is \(2, 3, 2\) and the truth \(3, 2, 2\)"):
        end_point_error(zeros, zeros.transpose(1, 0, 2))
    with pytest.raises(FlowError, match=r"valid is \(3, 2\); the motion has \(2, 3\)"):
        end_point_error(zeros, zeros, np.ones((3, 2)))
    for truth, valid in ((zeros + np.nan, None), (zeros, np.zeros((2, 3)))):
        with pytest.raises(FlowError, match="known of no pixel"):
            end_point_error(zeros, truth, valid)


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def one(x: float, y: float, max_motion: float | None = 1.0) -> list[int]:
    return flow_to_image(np.array([[[x, y]]], np.float32), max_motion)[0, 0].tolist()


def test_colours_of_the_wheel() -> None:
    assert one(0, 0) == [255, 255, 255]
    assert one(0, 0, None) == [255, 255, 255]
    assert one(1, 0) == [255, 0, 0]  # right: where the wheel begins
    assert one(0, 1) == [255, int(255 * 13.5 / 15), 0]  # down: a quarter of 54 hues is 13.5, nearly yellow at 15
    assert one(-1, 0) == [0, int(255 * (1 - 2 / 11)), 255]  # left: 27, two of the eleven from cyan at 25 to blue
    assert one(0, -1) == [int(255 * 4.5 / 13), 0, 255]  # up: 40.5, 4.5 of the thirteen from blue at 36 to magenta
    assert one(0.5, 0) == [255, 127, 127]  # half as fast, half as full
    assert one(2, 0) == [int(255 * 0.75), 0, 0]  # faster than the fullest: darker
    assert one(7, 0, None) == [255, 0, 0]
    for unknown in (math.nan, math.inf, -2e9):
        assert one(unknown, 0) == [0, 0, 0]


def test_unknown_motion_does_not_dim_the_rest() -> None:
    flow = np.array([[[2, 0], [1e10, 0], [0, np.nan]]], np.float32)
    assert flow_to_image(flow).tolist() == [[[255, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert flow_to_image(np.zeros((0, 3, 2))).shape == (0, 3, 3)


@given(st.floats(0, 2 * math.pi), st.floats(0, 1))
def test_hue_is_direction_and_saturation_speed(angle: float, speed: float) -> None:
    x, y = math.cos(angle), math.sin(angle)
    full, part = np.array(one(x, y, 1.001), float), np.array(one(speed * x, speed * y, 1.001), float)
    assert full.min() <= 1  # nothing of white in it
    assert full.max() == 255
    np.testing.assert_allclose(part, 255 - speed * (255 - full), atol=2)


def test_what_cannot_be_a_picture() -> None:
    with pytest.raises(ValueError, match=r"flow has shape \(2, 4, 4\); it must be \(H, W, 2\)"):
        flow_to_image(np.zeros((2, 4, 4)))
    for max_motion in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_motion is"):
            flow_to_image(np.zeros((1, 1, 2)), max_motion)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".flo", ".npy"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    flow = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    flow[1, 2] = 2e9, np.nan
    write_flow(tmp_path / f"f{suffix}", flow)
    read = read_flow(tmp_path / f"f{suffix}")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, flow)
    assert [path.name for path in tmp_path.iterdir()] == [f"f{suffix}"]


def test_the_bytes_of_a_flo_file(tmp_path: Path) -> None:
    write_flow(tmp_path / "f.flo", np.array([[[1, 2], [3, 4], [5, -6]]], np.float64))
    data = (tmp_path / "f.flo").read_bytes()
    assert np.frombuffer(data[:4], "<f4") == 202021.25
    assert np.frombuffer(data[4:12], "<i4").tolist() == [3, 1]  # width first
    assert np.frombuffer(data[12:], "<f4").tolist() == [1, 2, 3, 4, 5, -6]


def test_a_png_is_the_picture(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(size=(3, 5, 2))
    write_flow(tmp_path / "f.png", flow)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "f.png")), flow_to_image(flow))


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'"f.gif" ends in ".gif". Known: .png, .flo, .npy'):
        write_flow(tmp_path / "f.gif", np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match=r"must be \(H, W, 2\)"):
        write_flow(tmp_path / "f.flo", np.zeros((1, 1, 3)))
    assert not list(tmp_path.iterdir())


def flo(width: int, height: int, numbers: int) -> bytes:
    return b"PIEH" + np.array([width, height], "<i4").tobytes() + bytes(4 * numbers)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a .flo file: it begins with b''"),
        (b"\x89PNG\r\n", r"it begins with b'\\x89PNG', not b'PIEH'"),
        (b"PIEH", "damaged or cut short: it says 0 × 0 pixels"),
        (flo(3, 2, 11), "it says 3 × 2 pixels, which take 60 bytes, and has 56"),
        (flo(3, 2, 13), "which take 60 bytes, and has 64"),
        (flo(-3, -2, 12), "-3 × -2 pixels"),
        (flo(2**31 - 1, 2**31 - 1, 4), "2147483647 × 2147483647 pixels"),
    ],
)
def test_damaged_flo_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "f.flo").write_bytes(data)
    with pytest.raises(FlowFileError, match=message):
        read_flow(tmp_path / "f.flo")


def npy(shape: str, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a .npy file"),
        (b"\x93NUMPY\x09\x00rest", "is not a .npy file"),
        (npy("(2, 3, 2)") + bytes(47), "is not a .npy file of numbers: mmap length is greater"),
        (npy("(999999, 999999, 2)") + bytes(48), "is not a .npy file of numbers"),
        (npy("(2, 3, 2)", "|O") + bytes(48), "is not a .npy file of numbers: .*[Oo]bject"),
        (npy("(2, 3, 4)") + bytes(96), r"holds float32 of shape \(2, 3, 4\); motion is floats \(H, W, 2\)"),
        (npy("(2, 3, 2)", "<i4") + bytes(48), "holds int32"),
        (npy("(12,)") + bytes(48), r"of shape \(12,\)"),
    ],
)
def test_damaged_npy_files(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "f.npy").write_bytes(data)
    with pytest.raises(FlowFileError, match=message):
        read_flow(tmp_path / "f.npy")


def test_any_damage_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in (".flo", ".npy"):
        path = tmp_path / f"f{suffix}"
        write_flow(path, rng.normal(size=(3, 5, 2)))
        good = path.read_bytes()
        outcomes = []
        for _ in range(200):
            data = bytearray(good[: rng.integers(len(good) + 1)] if rng.random() < 0.3 else good)
            for place in rng.integers(0, 128 if suffix == ".npy" else 16, 2):
                if place < len(data):
                    data[place] = rng.integers(256)
            path.write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy on headers of Python 2
                try:
                    outcomes.append(read_flow(path).shape[2] == 2)
                except FlowFileError:
                    outcomes.append(False)
        assert not all(outcomes)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("f.flo", "f.npy"):
        with pytest.raises(FlowFileError, match=f"{name} cannot be read: No such file"):
            read_flow(tmp_path / name)
    with pytest.raises(FlowFileError, match=r'ends in ".png". Motion is read from .flo and .npy'):
        read_flow(tmp_path / "f.png")


def test_a_wild_npy_is_unknown_motion(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.full((1, 2, 2), 1e300))
    assert np.isinf(read_flow(tmp_path / "f.npy")).all()


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two frames and the true motion between them."""
    folder = tmp_path_factory.mktemp("flow")
    checkpoints.write(folder / "model", noisy(), None, None)
    for name, picture in zip(("1.png", "2.png"), pictures(23, 35), strict=True):
        Image.fromarray(picture).save(folder / name)
    Image.fromarray(pictures(35, 23)[0]).save(folder / "turned.png")
    write_flow(folder / "truth.flo", np.full((23, 35, 2), (3, -4)))
    write_flow(folder / "small.flo", np.zeros((2, 3, 2)))
    return folder


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["flow", *(str(a) for a in arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("suffix", [".png", ".flo", ".npy"])
def test_motion_of_two_files(here: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    result = command(here / "1.png", here / "2.png", "--model", here / "model", "--out", out)
    assert result.exit_code == 0, result.stderr
    expected = flow_model(noisy()).flow(here / "1.png", here / "2.png")
    summary = json.loads(result.stdout)
    assert set(summary) == {"width", "height", "mean_x", "mean_y", "mean_motion", "max_motion"}
    assert (summary["width"], summary["height"]) == (35, 23)
    assert summary["mean_x"] == pytest.approx(expected[..., 0].mean(), rel=1e-4)
    assert summary["mean_y"] == pytest.approx(expected[..., 1].mean(), rel=1e-4)
    assert summary["mean_motion"] == pytest.approx(np.linalg.norm(expected, axis=2).mean(), rel=1e-4)
    assert summary["max_motion"] == pytest.approx(np.linalg.norm(expected, axis=2).max(), rel=1e-4)
    if suffix == ".png":
        np.testing.assert_allclose(np.asarray(Image.open(out)), flow_to_image(expected), atol=1)
    else:
        np.testing.assert_allclose(read_flow(out), expected, atol=1e-4)


def test_the_end_point_error_is_printed(here: Path) -> None:
    result = command(here / "1.png", here / "2.png", "--model", here / "model", "--truth", here / "truth.flo")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    expected = flow_model(noisy()).flow(here / "1.png", here / "2.png")
    assert summary["epe"] == pytest.approx(np.hypot(expected[..., 0] - 3, expected[..., 1] + 4).mean(), rel=1e-4)
    assert summary["epe_still"] == 5


def test_a_terminal_gets_lines(here: Path, on_a_terminal: Callable[..., str]) -> None:
    seen = on_a_terminal("flow", str(here / "1.png"), str(here / "2.png"), "--model", str(here / "model"))
    assert "width        35\n" in seen
    assert "mean_motion" in seen
    assert "{" not in seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1.png", "turned.png"], "the first image is 35 × 23 pixels and the second 23 × 35"),
        (["1.png", "gone.png"], "no such file"),
        (["truth.flo", "1.png"], "not an image"),
        (["1.png", "2.png", "--truth", "gone.flo"], "gone.flo cannot be read"),
        (["1.png", "2.png", "--truth", "1.png"], "Motion is read from .flo and .npy files"),
        (["1.png", "2.png", "--truth", "small.flo"], "the truth (2, 3, 2)"),
        (["1.png", "2.png", "--max-pixels", "99"], "raise max_pixels"),
    ],
)
def test_bad_inputs(here: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    result = command(*arguments, "--model", "no/such-model-is-asked-for")
    assert result.exit_code == 3
    assert result.stderr.startswith("opsin: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1.png"], "Missing argument 'IMAGE2'"),
        (["1.png", "2.png", "--out", "f.gif"], 'ends in ".gif". Known: .png, .flo, .npy'),
        (["1.png", "2.png", "--out", "no/such/f.png"], "does not exist"),
        (["1.png", "2.png", "--device", "quantum"], 'device "quantum" cannot be used'),
    ],
)
def test_usage_errors(here: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_of_another_task(here: Path) -> None:
    result = command(here / "1.png", here / "2.png", "--model", "opsin/vit-tiny")
    assert result.exit_code == 4
    assert (
        "opsin/vit-tiny classifies images; `opsin classify`, `opsin embed`, `opsin explain` can use it."
        in result.stderr
    )


def test_a_result_that_cannot_be_written_is_said(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("opsin.flow.np.save", full)
    out = tmp_path / "f.npy"
    result = command(here / "1.png", here / "2.png", "--model", here / "model", "--out", out)
    assert result.exit_code == 1
    assert f"opsin: {out} cannot be written: No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    motion = np.arange(24, dtype=np.float32).reshape(3, 4, 2)
    for suffix in (".FLO", ".NPY"):
        write_flow(tmp_path / f"x{suffix}", motion)
        assert np.array_equal(read_flow(tmp_path / f"x{suffix}"), motion)
    write_flow(tmp_path / "x.PNG", motion)
    assert (tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")
