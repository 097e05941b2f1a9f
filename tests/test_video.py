"""Videos: what is read from files of every kind, what the model is given, and what is written back."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image

from opsin import checkpoints, video
from opsin.checkpoints import Checkpoint
from opsin.cli import main
from opsin.errors import (
    CheckpointError,
    MissingExtra,
    NoAudio,
    NotAVideo,
    VideoCorrupt,
    VideoError,
    VideoNotFound,
    VideoTooLarge,
    VideoUnreadable,
)
from opsin.labels import Labels
from opsin.models.perceiver_io import MultimodalPerceiver, MultimodalPerceiverConfig
from opsin.video import Clip, VideoModel, count_frames, psnr, read_clip, stream_clip, video_writer, write_video

SIZE = (30, 46)  # (H, W) of the videos made here


def picture(i: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Gradients that move with i, and a corner that is brighter than the rest."""
    y, x = np.mgrid[: size[0], : size[1]]
    planes = np.stack([(5 * x + 7 * i) % 256, (3 * y + 11 * i) % 256, (x + y + 23 * i) % 256], axis=2)
    planes[: size[0] // 3, : size[1] // 3] = 255
    return planes.astype(np.uint8)


def sine(count: int, sample_rate: int = 48_000, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / sample_rate)).astype(np.float32)


def make(
    path: Path,
    pictures: list[np.ndarray],
    sound: np.ndarray | None = None,  # (channels, S)
    *,
    fps: float = 25,
    times: list[int] | None = None,  # of the frames, in 1/1000 s
    codec: str = "",
    pix_fmt: str = "",
    sound_codec: str = "pcm_s16le",
    sample_rate: int = 48_000,
    sound_start: int = 0,  # samples
    hole: int = 0,  # samples that are missing from the middle of the sound on
    rotation: int = 0,
) -> Path:
    """A video file, lossless without a codec; pictures and sound take turns every 1/25 s."""
    if not codec:
        codec, pix_fmt = ("png", "rgb24") if path.suffix == ".mov" else ("ffv1", "bgr0")
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1000)
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        if sound is not None:
            layout = ("mono", "stereo")[len(sound) - 1]
            audio: Any = container.add_stream(sound_codec, rate=sample_rate, layout=layout)
        step = max(1, round(sample_rate / fps))
        place = 0

        def write_sound(until: int) -> None:
            nonlocal place
            while sound is not None and place < min(until, sound.shape[1]):
                piece = np.ascontiguousarray(sound[:, place : place + step])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = (
                    sample_rate,
                    sound_start + place + (hole if 2 * place >= sound.shape[1] else 0),
                    Fraction(1, sample_rate),
                )
                container.mux(audio.encode(frame))
                place += piece.shape[1]

        for i, each in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(each, format="rgb24")
            frame.pts, frame.time_base = (i, 1 / rate) if times is None else (times[i], Fraction(1, 1000))
            container.mux(stream.encode(frame))
            write_sound((i + 1) * step)
        container.mux(stream.encode(None))
        if sound is not None:
            write_sound(sound.shape[1])
            container.mux(audio.encode(None))
    return path


def whole(path: Path, image_size: tuple[int, int] = SIZE, **options: Any) -> Clip:
    return read_clip(path, num_frames=10_000, image_size=image_size, **options)


# ── reading pictures ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_frames_at_25_a_second_are_taken_as_they_are(tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(9)]
    clip = whole(make(tmp_path / "a.mkv", pictures, sine(9 * 1920)[None]))
    assert np.array_equal(clip.frames, pictures)
    assert clip.audio.dtype == np.float32
    assert len(clip.audio) == 9 * 1920
    assert (clip.fps, clip.sample_rate, clip.seconds) == (25, 48_000, 9 / 25)


@pytest.mark.parametrize("fps", [10, 12.5, 24, 30, 50])
def test_other_rates_give_the_frame_nearest_in_time(fps: float, tmp_path: Path) -> None:
    pictures = [np.full((*SIZE, 3), 9 * i, np.uint8) for i in range(20)]
    path = make(tmp_path / "a.avi", pictures, sine(48_000)[None], fps=fps)
    clip = whole(path)
    count = round(20 / fps * 25)
    wanted = [min(range(20), key=lambda i: (abs(i / Fraction(fps) - Fraction(k, 25)), i)) for k in range(count)]
    assert (clip.frames[:, 0, 0, 0] // 9).tolist() == wanted
    assert count_frames(path) == count


def test_a_variable_rate(tmp_path: Path) -> None:
    times = [0, 40, 200, 1000, 1020, 1100]
    pictures = [np.full((*SIZE, 3), 40 * i, np.uint8) for i in range(6)]
    clip = whole(make(tmp_path / "a.mkv", pictures, sine(60_000)[None], times=times, fps=25))
    shown = (clip.frames[:, 0, 0, 0] // 40).tolist()
    wanted = [min(range(6), key=lambda i: (abs(times[i] - 40 * k), i)) for k in range(len(shown))]
    assert shown == wanted
    assert len(shown) == 28  # the last begins at 1,100 ms


@pytest.mark.parametrize(("height", "width", "out"), [(31, 46, (16, 16)), (47, 31, (16, 16)), (45, 45, (60, 36))])
def test_the_middle_is_cut_out_and_resized_without_antialiasing(
    height: int, width: int, out: tuple[int, int], tmp_path: Path
) -> None:
    pictures = [picture(i, (height, width)) for i in range(3)]
    frames = whole(make(tmp_path / "a.mkv", pictures, sine(9000)[None]), out).frames
    crop = {(31, 46): (0, 8, 31, 31), (47, 31): (8, 0, 31, 31), (45, 45): (0, 9, 45, 27)}[height, width]
    top, left, rows, columns = crop
    for got, source in zip(frames, pictures, strict=True):
        cut = torch.from_numpy(source[top : top + rows, left : left + columns]).permute(2, 0, 1)[None].float()
        wanted = F.interpolate(cut, out, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
        assert np.abs(got - wanted).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_clip_is_turned_upright(rotation: int, tmp_path: Path) -> None:
    path = make(tmp_path / "a.mov", [picture(i) for i in range(3)], sine(9000)[None],
                rotation=rotation)  # fmt: skip
    upright = np.rot90(picture(1), rotation // 90)
    assert np.array_equal(whole(path, upright.shape[:2]).frames[1], upright)


# ── reading sound ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "pcm_s16le"), ("a.mov", "pcm_s16le"), ("a.avi", "pcm_s16le"), ("a.mkv", "pcm_f32le"),
                        ("a.mov", "pcm_s24le"), ("a.avi", "pcm_u8")]
)  # fmt: skip
def test_an_impulse_stays_where_it_is_in_the_first_channel(name: str, codec: str, tmp_path: Path) -> None:
    sound = np.zeros((2, 5 * 1920), np.float32)
    sound[0, 4321], sound[1, 1234] = 0.5, -0.75
    path = make(tmp_path / name, [picture(i) for i in range(5)], sound, sound_codec=codec)
    audio = whole(path).audio
    assert audio.tolist() == sound[0].tolist()


@pytest.mark.parametrize("sample_rate", [44_100, 32_000, 8_000])
def test_other_sample_rates_keep_the_time(sample_rate: int, tmp_path: Path) -> None:
    sound = np.zeros((1, sample_rate), np.float32)
    sound[0, sample_rate // 2] = 1
    pictures = [np.zeros((*SIZE, 3), np.uint8)] * 25
    clip = whole(make(tmp_path / "a.mov", pictures, sound, sample_rate=sample_rate))
    assert len(clip.audio) == 48_000
    assert int(np.abs(clip.audio).argmax()) == 24_000


def test_a_sine_stays_a_sine_at_another_rate(tmp_path: Path) -> None:
    sound = sine(44_100, 44_100)[None]
    clip = whole(make(tmp_path / "a.mkv", [picture(0)] * 25, sound, sample_rate=44_100))
    assert np.abs(clip.audio - sine(48_000))[100:-100].max() < 2e-3


@pytest.mark.parametrize("start", [-3000, 3000])
def test_sound_that_begins_at_another_time(start: int, tmp_path: Path) -> None:
    """Matroska rounds time stamps to 1/1000 s, 48 samples; 3,000 are not a whole number of those."""
    sound = sine(9600 + 6000)[None]
    frames = [picture(i) for i in range(5)]
    begin = max(-start, 0)
    times = [(40 * i + begin * 1000 // 48_000 + (begin > 0)) for i in range(5)]  # 63 ms for 3,000 samples
    audio = whole(make(tmp_path / "a.mkv", frames, sound, times=times, sound_start=max(start, 0))).audio
    shift = 63 * 48
    wanted = sound[0, shift:] if start < 0 else np.concatenate([np.zeros(shift, np.float32), sound[0]])
    assert np.abs(audio - wanted[: len(audio)]).max() < 1e-4


def test_a_hole_in_the_sound_is_silence(tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(15)]
    path = make(tmp_path / "a.mkv", pictures, sine(8 * 1920)[None], hole=7 * 1920)
    audio = whole(path).audio
    wanted = np.concatenate([sine(8 * 1920)[: 4 * 1920], np.zeros(7 * 1920, np.float32), sine(8 * 1920)[4 * 1920 :]])
    assert np.abs(audio - wanted).max() < 1e-4


def test_sound_that_ends_early_is_followed_by_silence(tmp_path: Path) -> None:
    audio = whole(make(tmp_path / "a.mkv", [picture(i) for i in range(5)], sine(3000)[None])).audio
    assert len(audio) == 5 * 1920
    assert np.abs(audio[:3000] - sine(3000)).max() < 1e-4
    assert not audio[3000:].any()


# ── long clips ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chunks_are_the_parts_of_the_whole(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", [picture(i) for i in range(18)], sine(18 * 1920)[None])
    chunks = list(stream_clip(path, num_frames=7, image_size=SIZE))
    assert [len(chunk.frames) for chunk in chunks] == [7, 7, 4]
    assert [len(chunk.audio) for chunk in chunks] == [7 * 1920, 7 * 1920, 4 * 1920]
    clip = whole(path)
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), clip.frames)
    assert np.array_equal(np.concatenate([chunk.audio for chunk in chunks]), clip.audio)
    assert count_frames(path) == 18


def test_no_more_is_read_than_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.mkv", [picture(i) for i in range(60)], sine(60 * 1920)[None])
    seen = 0
    decoded = video._decoded

    def counted(container: Any, stream: Any, name: str) -> Any:
        nonlocal seen
        for frame in decoded(container, stream, name):
            seen += stream.type == "video"
            yield frame

    monkeypatch.setattr(video, "_decoded", counted)
    with closing(stream_clip(path, num_frames=7, image_size=SIZE)) as chunks:
        for i in range(1, 4):
            next(chunks)
            assert seen == 7 * i + 1  # whether the next is nearer has to be known


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 and AAC, as phones make them, with the index in front."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    write_video(path, frames, sine(40 * 1920))
    return path


def no_video(folder: Path, good: Path) -> dict[str, tuple[Path, type[VideoError], str]]:
    """name → path, what is raised, and what it says."""
    data = good.read_bytes()
    files = {
        "empty.mp4": b"",
        "text.mp4": b"a shopping list\n" * 99,
        "cut.mp4": data[: len(data) * 6 // 10],
        "damaged.mp4": data[: len(data) // 2] + np.random.default_rng(1).bytes(2000) + data[len(data) // 2 + 2000 :],
        "begins.mp4": data[:2000],
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{good}\n#EXT-X-ENDLIST\n".encode(),
        "list.mp4": f"ffconcat version 1.0\nfile '{good}'\n".encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (30, 20)).save(folder / "photo.jpg")
    Image.new("RGB", (30, 20)).save(folder / "photo.gif")
    frames, sound = [picture(i) for i in range(3)], sine(5760)[None]
    make(folder / "one.mkv", frames[:1], sound)
    make(folder / "two.mkv", frames[:2], sound, fps=50)
    make(folder / "mute.mkv", frames)
    make(folder / "gap.mkv", frames, sound, times=[0, 40, 90_000])
    avi = make(folder / "whole.avi", frames * 9, sound, codec="mjpeg", pix_fmt="yuvj444p").read_bytes()
    (folder / "cut.avi").write_bytes(avi[: len(avi) * 3 // 4])
    mkv = make(folder / "whole.mkv", frames * 9, sine(27 * 1920)[None]).read_bytes()
    (folder / "cut.mkv").write_bytes(mkv[: len(mkv) // 2])
    with av.open(str(folder / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(sine(9600)[None], format="fltp", layout="mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cases: dict[str, tuple[type[VideoError], str]] = {
        "nowhere.mp4": (VideoNotFound, "nowhere.mp4: no such file"),
        "": (VideoUnreadable, "a directory, not a file"),
        "empty.mp4": (NotAVideo, "it is empty"),
        "text.mp4": (NotAVideo, "not a video, or not one of MP4"),
        "list.m3u8": (NotAVideo, "not a video"),
        "list.mp4": (NotAVideo, "not a video"),
        "photo.jpg": (NotAVideo, "not a video"),
        "photo.gif": (NotAVideo, "one frame, a picture and not a clip"),
        "one.mkv": (NotAVideo, "one frame, a picture and not a clip"),
        "two.mkv": (NotAVideo, "0.040 s are one frame at 25 a second"),
        "song.mp4": (NotAVideo, "no pictures in it; it has audio"),
        "mute.mkv": (NoAudio, r"without sound; .* silent=True \(--silent\)"),
        "begins.mp4": (VideoCorrupt, "damaged or cut short: no frame"),
        "cut.mp4": (VideoCorrupt, "damaged at|cut short: it says"),
        "damaged.mp4": (VideoCorrupt, "damaged at [01]"),
        "cut.avi": (VideoCorrupt, "cut short: it says that it has [0-9,]+ bytes"),
        "cut.mkv": (VideoCorrupt, "cut short: it says that it has 1.1 s"),
        "gap.mkv": (VideoCorrupt, "no frame for 90 s at 0.0 s"),
    }
    return {name: (folder / name, *case) for name, case in cases.items()}


def test_bad_input_is_an_error_that_says_what_is_wrong(good: Path, tmp_path: Path) -> None:
    assert count_frames(good) == 40
    for name, (path, error, message) in no_video(tmp_path, good).items():
        with pytest.raises(error, match=message) as caught:
            count_frames(path)
        assert name in str(caught.value)
        assert type(caught.value) is error
    for odd, error in (
        ("http://example.org/a.mp4", VideoNotFound),
        ("a\0b", VideoNotFound),
        ("/dev/null", VideoUnreadable),
    ):
        with pytest.raises(error):
            read_clip(odd)
    with pytest.raises(VideoUnreadable, match="list is not a video"):
        read_clip([good])  # type: ignore[arg-type]


def test_chunks_before_the_damage_come(good: Path, tmp_path: Path) -> None:
    path, error, message = no_video(tmp_path, good)["cut.mp4"]
    chunks = stream_clip(path, num_frames=8, image_size=(16, 16))
    assert len(next(chunks).frames) == 8
    with pytest.raises(error, match=message):
        list(chunks)


def test_silence_is_taken_only_where_it_is_asked_for(good: Path, tmp_path: Path) -> None:
    path = make(tmp_path / "mute.mkv", [picture(i) for i in range(4)])
    clip = whole(path, silent=True)
    assert clip.audio.shape == (4 * 1920,)
    assert not clip.audio.any()
    assert count_frames(path, silent=True) == 4
    assert whole(good, silent=True).audio.any()


def test_large_frames_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [np.zeros((1000, 1201, 3), np.uint8)] * 2
    path = make(tmp_path / "a.avi", frames, sine(3840)[None], codec="mjpeg", pix_fmt="yuvj444p")
    assert whole(path, max_pixels=1_201_000).frames.shape == (2, *SIZE, 3)
    monkeypatch.setattr(video, "_decoded", None)
    with pytest.raises(VideoTooLarge, match=r"1201 × 1000 = 1,201,000 pixels; the limit is 1,200,999"):
        whole(path, max_pixels=1_200_999)


def test_a_size_that_only_the_frames_tell_is_refused_by_the_decoder(tmp_path: Path) -> None:
    """The header says 8 × 8, the JPEGs inside 2400 × 2600."""
    frames = [np.zeros((2400, 2600, 3), np.uint8)] * 2
    path = make(tmp_path / "a.avi", frames, sine(3840)[None], codec="mjpeg", pix_fmt="yuvj444p")
    data = path.read_bytes()
    width, height, small = (n.to_bytes(4, "little") for n in (2600, 2400, 8))
    assert data.count(width + height) == 2
    path.write_bytes(data.replace(width + height, small + small))
    with pytest.raises(VideoError):
        whole(path, max_pixels=100_000)


def test_pyav_is_an_extra(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r'PyAV is not installed. Install it with: pip install "opsin\[video\]"'):
        read_clip(good)
    with pytest.raises(MissingExtra):
        write_video("a.mp4", np.zeros((2, 4, 4, 3), np.uint8), sine(3840))


@pytest.mark.parametrize(
    ("frames", "audio", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), sine(10), "frames are float32"),
        (np.zeros((2, 4, 4), np.uint8), sine(10), r"frames are uint8 \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(10), "audio is float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.full(10, np.nan, np.float32), "finite"),
    ],
)
def test_clips_that_are_none(frames: np.ndarray, audio: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(frames, audio)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIG = MultimodalPerceiverConfig(
    num_latents=7, latent_dim=24, layers_per_block=2, num_heads=3, num_frames=5, image_size=(12, 20), patch_size=4,
    image_bands=3, samples_per_frame=42, samples_per_patch=6, audio_bands=5, num_classes=11, label_dim=29,
    output_dim=13)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model: Any = MultimodalPerceiver(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for part in (model.encoder.latents, model.decoder.cross.attn.q.weight):
            part.mul_(10)  # attention sharp enough that pixels differ
        for part in (model.outputs["image"].weight, model.outputs["audio"].weight):
            part.mul_(0.1)  # most values in the range of pixels and samples
        model.outputs["image"].bias.fill_(0.5)
    labels = Labels.from_names([f"class {i}" for i in range(11)])
    source = checkpoints.Source("test/video", None, "", "opsin")
    return Checkpoint(model=model.eval(), preprocess=None, labels=labels, source=source)


@pytest.fixture
def model(checkpoint: Checkpoint) -> VideoModel:
    return VideoModel(checkpoint)


def clip_of(num_frames: int, size: tuple[int, int] = CONFIG.image_size) -> Clip:
    frames = np.stack([picture(i, size) for i in range(num_frames)])
    return Clip(frames, sine(42 * num_frames, 1050, 50), 25, 1050)


def test_parts_give_what_one_decoding_of_everything_gives(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = clip_of(5)
    with torch.inference_mode():
        pixels = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)[None] / 255
        latents = model.model.encode(pixels, torch.from_numpy(clip.audio)[None])
        wanted = model.model.decode(latents, image_points=torch.arange(5 * 12 * 20), audio_points=torch.arange(35))
    images = wanted["image"][0].reshape(5, 12, 20, 3).numpy() * 255
    assert ((images > 1) & (images < 254)).mean() > 0.9
    assert images.std(axis=(0, 1, 2)).min() > 5
    for pixels_per_part, parts in ((6272, 1), (173, 7), (16, 75)):  # 75: more than there are audio patches
        monkeypatch.setattr(video, "PIXELS_PER_PART", pixels_per_part)
        seen: list[tuple[int, int]] = []
        rebuilt = model.autoencode(clip, progress=lambda *at, seen=seen: seen.append(at))
        assert seen == [(i + 1, parts) for i in range(parts)]
        assert np.abs(rebuilt.frames - images.clip(0, 255)).max() <= 0.5 + 1e-2
        assert np.allclose(rebuilt.audio, wanted["audio"][0].clamp(-1, 1).numpy(), atol=1e-5)
        assert np.allclose(rebuilt.probs, wanted["label"][0].double().softmax(0).numpy(), atol=1e-6)


def test_the_published_model_has_128_parts(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> None:
    model = VideoModel(checkpoint)
    monkeypatch.setattr(model.model, "config", MultimodalPerceiverConfig())
    parts = list(model._parts())
    assert {(len(image), len(audio)) for image, audio in parts} == {(6272, 15)}
    assert len(parts) == 128
    assert model.sample_rate == 48_000


def test_every_pixel_and_sample_comes_to_its_place(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers with the coordinates it is asked for."""

    def decode(latents: torch.Tensor, *, image_points: torch.Tensor, audio_points: torch.Tensor) -> dict[str, Any]:
        coordinates = torch.stack(torch.unravel_index(image_points, (5, 12, 20)), dim=1)
        samples = audio_points[:, None] * 6 + torch.arange(6)
        return {
            "image": coordinates[None] / 255,
            "audio": samples.flatten()[None] / 1000,
            "label": torch.arange(11.0)[None],
        }

    monkeypatch.setattr(model.model, "decode", decode)
    monkeypatch.setattr(video, "PIXELS_PER_PART", 173)
    rebuilt = model.autoencode(clip_of(8))
    place = np.stack(np.meshgrid(np.arange(5), np.arange(12), np.arange(20), indexing="ij"), axis=3)
    assert np.array_equal(rebuilt.frames, np.concatenate([place, place[:3]]))
    samples = np.arange(5 * 42) / 1000
    assert np.allclose(rebuilt.audio, np.concatenate([samples, samples[: 3 * 42]]))
    assert [best["index"] for best in rebuilt.top_k(3)] == [10, 9, 8]
    assert rebuilt.top_k(1)[0]["label"] == "class 10"
    assert rebuilt.top_k(11)[-1]["score"] == pytest.approx(float(torch.arange(11.0).softmax(0)[0]), rel=1e-5)


def test_a_long_clip_is_its_chunks(model: VideoModel) -> None:
    clip = clip_of(13)
    rebuilt = model.autoencode(clip)
    padded = [
        (slice(0, 5), clip.frames[:5], clip.audio[:210]),
        (slice(5, 10), clip.frames[5:10], clip.audio[210:420]),
        (slice(10, 13), clip.frames[[10, 11, 12, 12, 12]], np.pad(clip.audio[420:], (0, 84))),
    ]
    probs = np.zeros(11)
    for place, frames, audio in padded:
        alone = model.autoencode(Clip(frames, audio, 25, 1050))
        count = place.stop - place.start
        assert np.array_equal(rebuilt.frames[place], alone.frames[:count])
        assert np.array_equal(rebuilt.audio[place.start * 42 : place.stop * 42], alone.audio[: count * 42])
        probs += alone.probs * count / 13
    assert rebuilt.frames.shape == (13, 12, 20, 3)
    assert np.allclose(rebuilt.probs, probs)
    assert rebuilt.probs.sum() == pytest.approx(1)
    assert rebuilt.psnr_frames == pytest.approx(psnr(clip.frames, rebuilt.frames, peak=255), rel=1e-6)
    assert rebuilt.psnr_audio == pytest.approx(psnr(clip.audio, rebuilt.audio, peak=1), rel=1e-6)


def test_a_file_is_the_clip_in_it(model: VideoModel, tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(7)]
    path = make(tmp_path / "a.mkv", pictures, sine(7 * 1920, hertz=50)[None])
    clip = whole(path, samples_per_frame=42)
    assert clip.sample_rate == model.sample_rate == 1050
    from_file, from_clip = model.autoencode(path), model.autoencode(clip)
    assert np.array_equal(from_file.frames, from_clip.frames)
    assert np.array_equal(from_file.audio, from_clip.audio)
    assert from_file.psnr_audio == from_clip.psnr_audio


def test_values_are_clipped(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(latents: torch.Tensor, *, image_points: torch.Tensor, audio_points: torch.Tensor) -> dict[str, Any]:
        image = torch.tensor([-3.0, 0.5, 3.0]).expand(1, len(image_points), 3)
        audio = torch.tensor([-3.0, -1, -0.25, 0.25, 1, 3]).repeat(len(audio_points))[None]
        return {"image": image, "audio": audio, "label": torch.zeros(1, 11)}

    monkeypatch.setattr(model.model, "decode", decode)
    rebuilt = model.autoencode(clip_of(5))
    assert rebuilt.frames[4, 11, 19].tolist() == [0, 128, 255]
    assert rebuilt.audio[-6:].tolist() == [-1, -1, -0.25, 0.25, 1, 1]


def test_what_the_model_cannot_take(model: VideoModel, noisy_checkpoint: Checkpoint, checkpoint: Checkpoint) -> None:
    clip = clip_of(4)
    for wrong, message in (
        (replace(clip, fps=30), r"30 frames and 1,050 samples a second; this model takes 25 and 1,050"),
        (replace(clip, sample_rate=48_000), "25 frames and 48,000 samples"),
        (replace(clip, audio=clip.audio[:-1]), "audio has 167 samples; 4 frames need 168"),
        (clip_of(1), "one frame is a picture"),
    ):
        with pytest.raises(ValueError, match=message):
            model.autoencode(wrong)
    with pytest.raises(CheckpointError, match="test/noise is a ViT, which does not rebuild videos"):
        VideoModel(noisy_checkpoint)


def test_a_model_whose_output_is_not_finite(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VideoModel(checkpoint)
    monkeypatch.setattr(model.model, "encode", lambda video, audio: torch.full((1, 7, 24), torch.nan))
    with pytest.raises(CheckpointError, match="not finite"):
        model.autoencode(clip_of(5))


def test_psnr() -> None:
    a = np.zeros((2, 3), np.uint8)
    assert psnr(a, a + 51, peak=255) == pytest.approx(20 * np.log10(5))
    assert psnr(a, a, peak=255) == np.inf
    assert psnr(np.zeros(9, np.float32), np.full(9, 0.1, np.float32), peak=1) == pytest.approx(20)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(3, 2\)"):
        psnr(a, a.T, peak=255)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_what_is_written_is_read_again(size: tuple[int, int], tmp_path: Path) -> None:
    frames = np.stack([np.asarray(Image.fromarray(picture(i)).resize(size[::-1])) for i in range(30)])
    path = tmp_path / "a.mp4"
    write_video(path, frames, sine(30 * 1920))
    clip = whole(path, size)
    assert clip.frames.shape == frames.shape
    assert psnr(frames, clip.frames, peak=255) > 30
    assert psnr(sine(30 * 1920), clip.audio, peak=1) > 30
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 25
        assert container.streams.video[0].codec_context.name in ("h264", "mpeg4")
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.streams.audio[0].rate == 48_000


def test_a_sample_rate_that_aac_does_not_know_is_converted(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.stack([picture(i) for i in range(25)]), sine(1050, 1050, 50), sample_rate=1050)
    audio = whole(tmp_path / "a.mp4", SIZE).audio
    assert psnr(sine(48_000, hertz=50), audio, peak=1) > 25


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), video_writer(path) as write:
        write(np.zeros((3, 16, 16, 3), np.uint8), sine(3 * 1920))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no frames were written"), video_writer(path):
        pass
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ValueError, match='"a.avi" ends in ".avi". Known: .mp4'):
        write_video("a.avi", np.zeros((3, 16, 16, 3), np.uint8), sine(3 * 1920))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def opsin(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "model", checkpoint.model, None, checkpoint.labels)
    make(tmp_path / "clip.mkv", [picture(i) for i in range(7)], sine(7 * 1920, hertz=50)[None])
    return tmp_path


def test_the_command_rebuilds_a_clip(folder: Path, model: VideoModel) -> None:
    clip, out = folder / "clip.mkv", folder / "rebuilt.mp4"
    result = opsin("autoencode", clip, "--out", out, "--model", folder / "model")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    wanted = model.autoencode(clip)
    assert record["path"] == str(clip)
    assert record["out"] == str(out)
    assert (record["frames"], record["seconds"]) == (7, 7 / 25)
    assert record["psnr_video"] == pytest.approx(wanted.psnr_frames, abs=1e-3)
    assert record["psnr_audio"] == pytest.approx(wanted.psnr_audio, abs=1e-3)
    assert record["topk"][0] == {name: record[name] for name in ("label", "score", "index")}
    assert [best["label"] for best in record["topk"]] == [best["label"] for best in wanted.top_k(5)]
    assert whole(out, (12, 20)).frames.shape == (7, 12, 20, 3)
    assert psnr(wanted.frames, whole(out, (12, 20)).frames, peak=255) > 20


def test_the_command_on_a_terminal(folder: Path, on_a_terminal: Callable[..., str]) -> None:
    shown = on_a_terminal(
        "autoencode", str(folder / "clip.mkv"), "--out", str(folder / "r.mp4"), "--model", str(folder / "model")
    )
    assert re.search(r"clip.mkv\n +[0-9.]+% +[█▏]* +class \d+\n", shown)
    assert re.search(r"frames +7\n +seconds +0.28\n +psnr_video +[0-9.]+\n +psnr_audio +-?[0-9.]+\n", shown)


def test_the_command_and_what_is_wrong(folder: Path, noisy_checkpoint: Checkpoint) -> None:
    clip, out = folder / "clip.mkv", folder / "r.mp4"
    make(folder / "mute.mkv", [picture(i) for i in range(7)])
    checkpoints.write(folder / "vit", noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)

    for path, kind in ((folder / "gone.mp4", "not_found"), (folder / "mute.mkv", "no_audio"), (folder, "unreadable")):
        result = opsin("autoencode", path, "--out", out, "--model", folder / "model")
        assert result.exit_code == 3
        record = json.loads(result.stdout)
        assert (record["path"], record["ok"], record["error"]["type"]) == (str(path), False, kind)
    assert opsin("autoencode", clip, "--out", out, "--model", folder / "model", "--max-pixels", 1379).exit_code == 3
    assert not out.exists()

    result = opsin("autoencode", folder / "mute.mkv", "--out", out, "--model", folder / "model", "--silent")
    assert result.exit_code == 0
    assert out.exists()

    result = opsin("autoencode", clip, "--out", out, "--model", folder / "vit")
    assert result.exit_code == 4
    assert "classifies images" in result.stderr
    for arguments, message in (
        (["--out", folder / "r.avi"], 'ends in ".avi". Known: .mp4'),
        (["--out", folder / "no" / "r.mp4"], "does not exist"),
        ([], "Missing option '--out'"),
    ):
        result = opsin("autoencode", clip, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    result = opsin("autoencode", out, "--out", folder / "." / "r.mp4")
    assert result.exit_code == 2
    assert "is the clip itself" in result.stderr
