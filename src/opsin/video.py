"""A clip through a model that rebuilds it: pictures, sound and what is going on, from file to file.

    file ── stream_clip ──▶ chunks of frames and samples ── VideoModel ──▶ the same, rebuilt ── video_writer ──▶ file

A chunk is what the model takes at once: 16 frames and 30,720 samples in the published one, 0.64 s. One at a time is in
memory, however long the clip. A last chunk that is short is filled up with its last frame and silence, and cut to its
length again afterwards.

The published model encodes a chunk once and is asked for 802,816 pixels in 128 parts. transformers encodes again for
each part: counted in multiplications, 5 times the work.
"""

import itertools
import math
import os
import re
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.checkpoints import Checkpoint
from opsin.checkpoints.files import replacing
from opsin.device import exact_fp32
from opsin.errors import (
    CheckpointError,
    MissingExtra,
    NoAudio,
    NotAVideo,
    VideoCorrupt,
    VideoNotFound,
    VideoTooLarge,
    VideoUnreadable,
)
from opsin.labels import Labels, Prediction
from opsin.labels import top_k as top_k_labels
from opsin.models.perceiver_io import MultimodalPerceiver
from opsin.preprocess import PreprocessConfig

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FileName = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # parts done, parts in all

FPS = 25
MAX_FRAME_PIXELS = 8192 * 4320  # 8K; a decoder may hold some twenty frames
MAX_GAP_SECONDS = 60  # between two frames: a damaged time stamp could ask for years of one picture
PIXELS_PER_PART = 6272  # decoded at once: 128 parts of a chunk of the published model

# FFmpeg's names; others are playlists, devices and lists of pictures, which lead to other files
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,mxf,nut,gif"
_BEGINNINGS = re.compile(rb"....(ftyp|moov|mdat|wide|free)|\x1aE\xdf\xa3|RIFF....AVI |OggS|FLV|0&\xb2u", re.DOTALL)
_TELL_LENGTH = ("mov", "matroska", "avi")  # in their header, where others are guessed from their size


# ── clips ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Clip:
    """Pictures and sound that begin together.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        audio: (S,) float32 in [-1, 1], one channel.
        fps: frames a second.
        sample_rate: samples a second.
    Raises:
        ValueError: other shapes or types.
    """

    frames: np.ndarray
    audio: np.ndarray
    fps: int = FPS
    sample_rate: int = 48_000

    def __post_init__(self) -> None:
        frames, audio = self.frames, self.audio
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; they must be uint8 (T, H, W, 3), 0 to 255.")
        if audio.ndim != 1 or audio.dtype != np.float32 or not np.isfinite(audio).all():
            raise ValueError(f"audio is {audio.dtype} {audio.shape}; it must be finite float32 (S,), -1 to 1.")

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.fps


def read_clip(
    source: FileName,
    *,
    num_frames: int = 16,
    image_size: tuple[int, int] = (224, 224),
    samples_per_frame: int = 1920,
    max_pixels: int = MAX_FRAME_PIXELS,
    silent: bool = False,
) -> Clip:
    """The first `num_frames` frames of a video file with their sound, or all that there are; see `stream_clip`."""
    with closing(
        stream_clip(
            source,
            num_frames=num_frames,
            image_size=image_size,
            samples_per_frame=samples_per_frame,
            max_pixels=max_pixels,
            silent=silent,
        )
    ) as chunks:
        return next(chunks)


def stream_clip(
    source: FileName,
    *,
    num_frames: int = 16,
    image_size: tuple[int, int] = (224, 224),
    samples_per_frame: int = 1920,
    max_pixels: int = MAX_FRAME_PIXELS,
    silent: bool = False,
) -> Generator[Clip]:
    """A video file in chunks of `num_frames` frames; the last one may be shorter, never empty.

    Pictures: 25 a second, whatever the file has: each is the file's frame that is nearest in time, of two as near the
    earlier. Turned upright where the file says so. The largest centred rectangle of the shape of `image_size` is cut
    out and resized, bilinear without antialiasing, rounded. Pixels are taken for square.

    Sound: the first channel, 25 · `samples_per_frame` samples a second, beginning with the first frame whatever the
    file begins with. Integer samples are divided by 2 to the power of their bits less one, floats clipped to [-1, 1].
    Where there is a hole in the sound there is silence; what is longer than the pictures is left out.

    A file cut short is an error where it says how long it is, as MP4, MOV, MKV, WebM and AVI do.

    The file's first video and audio stream are taken. Streams, playlists and URLs are not: only files.

    Args:
        source: path of a file.
        num_frames: of a chunk, at least 1.
        image_size: (H, W) in pixels.
        samples_per_frame: at least 1.
        max_pixels: larger frames are refused before they are decoded.
        silent: a clip without sound is taken for a silent one.
    Raises:
        VideoError: its subclass, and `kind`, say what is wrong; on reading, so chunks before the damage may have come.
        MissingExtra: PyAV is not installed.
        ValueError: num_frames or samples_per_frame below 1.
    Source: deepmind-research `perceiver/colabs/video_autoencoding.ipynb`, which takes frames and samples as they are.
    """
    if num_frames < 1 or samples_per_frame < 1:
        raise ValueError(f"num_frames is {num_frames}, samples_per_frame {samples_per_frame}; both must be 1 or more.")
    sample_rate = FPS * samples_per_frame
    name = _check_file(source)
    with closing(_timed_frames(name, max_pixels)) as timed:
        first = next(timed)
        sound = _Sound(name, first.time, sample_rate, silent=silent)
        with closing(sound):
            pictures = _fitted(_at_25(itertools.chain([first], timed), name), image_size)
            while chunk := list(itertools.islice(pictures, num_frames)):
                audio = sound.take(len(chunk) * samples_per_frame)
                yield Clip(np.stack(chunk), audio, FPS, sample_rate)


def count_frames(source: FileName, *, max_pixels: int = MAX_FRAME_PIXELS, silent: bool = False) -> int:
    """How many frames `stream_clip` gives of a file.

    All of it is decoded, so all damage that can be told is found.

    Raises:
        VideoError, MissingExtra: as `stream_clip`.
    """
    name = _check_file(source)
    with closing(_timed_frames(name, max_pixels)) as timed:
        first = next(timed)
        num_frames = sum(1 for _ in _at_25(itertools.chain([first], timed), name))
    with closing(_Sound(name, first.time, FPS, silent=silent)) as sound:
        sound.end()
    return num_frames


# ── files: pictures ──────────────────────────────────────────────────────────────────────────────────────────────────


def _check_file(source: FileName) -> str:
    if not isinstance(source, str | os.PathLike):
        raise VideoUnreadable(f"{type(source).__name__} is not a video. Give the path of a file.")
    name = os.fsdecode(source)
    require_av()
    try:
        status = Path(name).stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise VideoUnreadable(f"{name}: {kind}, not a file.")
        with Path(name).open("rb") as file:
            head = file.read(12)
        if not head:
            raise NotAVideo(f"{name}: not a video: it is empty.")
        promised = int.from_bytes(head[4:8], "little") + 8  # of an AVI, for whose end FFmpeg does not look
        if head[:4] == b"RIFF" and head[8:] == b"AVI " and promised > status.st_size:
            raise VideoCorrupt(
                f"{name}: cut short: it says that it has {promised:,} bytes, and has {status.st_size:,}."
            )
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = " Download it and give its path." if "://" in name else ""
        raise VideoNotFound(f"{name or 'the path is empty'}: no such file.{hint}") from error
    except OSError as error:
        raise VideoUnreadable(f"{name}: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL or a lone surrogate: no file can have this name
        raise VideoNotFound(f"{name!r}: no such file; the name itself is impossible ({error}).") from error
    return name


def require_av() -> None:
    """
    Raises:
        MissingExtra: PyAV, which reads and writes videos, is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingExtra("PyAV", "video") from error


@contextmanager
def _opened(name: str, max_pixels: int) -> Iterator["InputContainer"]:
    """A container, and everything that FFmpeg can raise about it as a VideoError."""
    import av

    limits = {"protocol_whitelist": "file", "format_whitelist": _CONTAINERS, **_decoder_limit(max_pixels)}
    try:
        try:
            # a name such as "concat:a" would be a protocol
            container = av.open(f"file:{os.path.abspath(name)}", options=limits)  # noqa: PTH100
        except (av.error.InvalidDataError, av.error.ArgumentError, ValueError) as error:
            with Path(name).open("rb") as file:
                begins_well = _BEGINNINGS.match(file.read(16))
            if begins_well:
                raise VideoCorrupt(
                    f"{name}: a video that begins well, and is damaged or cut short: {_reason(error)}. Get it anew."
                ) from error
            raise NotAVideo(
                f"{name}: not a video, or not one of MP4, MOV, MKV, WebM, AVI, MPEG, OGG, FLV, WMV, MXF and GIF."
            ) from error
        with container:
            yield container
    except av.error.MemoryError as error:
        raise VideoTooLarge(f"{name}: not enough memory to decode it.") from error
    except av.error.FFmpegError as error:
        if isinstance(error, OSError) and error.errno and error.errno > 0 and not isinstance(error, EOFError):
            raise VideoUnreadable(f"{name}: {_reason(error)}.") from error
        raise VideoCorrupt(f"{name}: damaged or cut short: {_reason(error)}.") from error


def _decoder_limit(max_pixels: int) -> dict[str, str]:
    # FFmpeg counts what it allocates, sides rounded up to as much as 64: twice the limit is never too little
    return {"max_pixels": str(min(2 * max_pixels + 2**16, 2**31))}


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise VideoTooLarge(
            f"{name}: frames of {width} × {height} = {width * height:,} pixels; the limit is {max_pixels:,}. "
            "If the clip is to be trusted, raise max_pixels (--max-pixels)."
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).split("\n")[0][:200]


@dataclass(frozen=True, slots=True)
class _Timed:
    time: Fraction  # seconds, on the file's clock
    duration: Fraction
    frame: "VideoFrame"


def _timed_frames(name: str, max_pixels: int) -> Generator[_Timed]:
    """Every frame of the file, in order, at least one; times rise."""
    with _opened(name, max_pixels) as container:
        stream = _video_stream(container, name, max_pixels)
        usual = 1 / (stream.average_rate or Fraction(FPS))
        previous: _Timed | None = None
        for frame in _decoded(container, stream, name):
            _check_pixels(frame.width, frame.height, name, max_pixels)  # may not be what the header says
            stamp = frame.pts if frame.pts is not None else frame.dts
            time = None if stamp is None else Fraction(stamp) * _time_base(frame, stream)
            if previous is not None and (time is None or time <= previous.time):  # unknown, or a jump back
                time = previous.time + previous.duration
            elif time is None:
                time = Fraction(0)
            if previous is not None and time - previous.time > MAX_GAP_SECONDS:
                raise VideoCorrupt(
                    f"{name}: no frame for {float(time - previous.time):.0f} s at {float(previous.time):.1f} s; one "
                    f"picture may stand for {MAX_GAP_SECONDS}. If it is meant: ffmpeg -i IN -r 25 OUT.mp4"
                )
            duration = frame.duration * _time_base(frame, stream) if frame.duration > 0 else usual
            previous = _Timed(time, min(duration, Fraction(MAX_GAP_SECONDS)), frame)
            yield previous
        if previous is None:
            raise VideoCorrupt(f"{name}: damaged or cut short: no frame of its pictures can be decoded.")


def _time_base(frame: Any, stream: Any) -> Fraction:
    return frame.time_base or stream.time_base or Fraction(0)


def _video_stream(container: "InputContainer", name: str, max_pixels: int) -> "VideoStream":
    from av.stream import Disposition

    # a cover is a stream of one picture
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        raise NotAVideo(f"{name}: no pictures in it; it has {kinds or 'nothing'}.")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoUnreadable(f"{name}: its pictures are coded in a way that this FFmpeg does not know.")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not width * height:
        raise VideoCorrupt(f"{name}: the size of its frames cannot be found, or is beyond the limit of {max_pixels:,}.")
    _check_pixels(width, height, name, max_pixels)
    stream.codec_context.options = _decoder_limit(max_pixels)
    return stream


def _packets(container: "InputContainer", stream: Any, name: str) -> Iterator[Any]:
    try:
        yield from container.demux(stream)
    except IndexError as error:  # PyAV looks it up among the streams that there were when the file was opened
        raise VideoUnreadable(
            f"{name}: a stream begins in the middle of it, which PyAV cannot read. Rewrap it: ffmpeg -i IN OUT.mp4"
        ) from error


def _decoded(container: "InputContainer", stream: Any, name: str) -> Iterator[Any]:
    """Frames of a stream. What cannot be decoded is left out before the first frame, as where a recording begins in the
    middle; sound may have such a packet as its last, too. Anywhere else it is damage."""
    import av

    damage: VideoCorrupt | None = None
    time = 0.0
    begun = False
    for packet in _packets(container, stream, name):
        try:
            frames = packet.decode()
            harm = "a part of it is missing" if packet.is_corrupt else ""
        except (av.error.InvalidDataError, av.error.ArgumentError, av.error.PatchWelcomeError) as error:
            frames, harm = [], _reason(error)
        if damage is not None and frames:
            raise damage
        for frame in frames:
            if frame.is_corrupt:
                harm = harm or "a part of it cannot be decoded"
                if not begun:
                    continue
            time = frame.time if frame.time is not None else time
            begun = True
            if not harm:
                yield frame
        if harm and begun:
            damage = VideoCorrupt(
                f"{name}: its {stream.type} is damaged at {time:.2f} s: {harm}. "
                "FFmpeg makes a whole one of what is left: ffmpeg -i IN OUT.mp4"
            )
            if stream.type == "video":
                raise damage


def _at_25(timed: Iterable[_Timed], name: str) -> Iterator["VideoFrame"]:
    """25 frames a second: for each of those times the frame that is nearest, the same one twice where there are few."""
    count = place = 0  # frames taken in and given out
    start = Fraction(0)
    previous: _Timed | None = None
    for current in timed:
        if previous is None:
            start = current.time
        else:
            middle = (previous.time + current.time) / 2 - start
            while Fraction(place, FPS) <= middle:
                yield previous.frame
                place += 1
        previous = current
        count += 1
    assert previous is not None
    end = previous.time + previous.duration - start
    _check_length(name, start, start + end)
    if count == 1:
        raise NotAVideo(f"{name}: one frame, a picture and not a clip. `opsin classify` takes pictures.")
    while place < FPS * end - Fraction(1, 2):
        yield previous.frame
        place += 1
    if place == 1:
        raise NotAVideo(f"{name}: {float(end):.3f} s are one frame at {FPS} a second, a picture and not a clip.")


def _check_length(name: str, start: Fraction, end: Fraction) -> None:
    """Whether pictures from `start` to `end`, or the sound, reach as far as the file says."""
    with _opened(name, MAX_FRAME_PIXELS) as container:
        if not container.duration or not container.format.name.startswith(_TELL_LENGTH):
            return
        promised = Fraction(container.duration + (container.start_time or 0), 10**6)
    enough = promised - max(Fraction(1, 4), promised / 100)
    if end < enough:
        with closing(_Sound(name, start, FPS, silent=True)) as sound:
            end = max(end, sound.end())
    if end < enough:
        raise VideoCorrupt(
            f"{name}: cut short: it says that it has {float(promised):.1f} s, and ends after {float(end):.1f}. "
            "Get the whole file, or rewrap what there is: ffmpeg -i IN -c copy OUT.mp4"
        )


def _fitted(frames: Iterable["VideoFrame"], image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 each; a frame that comes again is not worked out again."""
    before: VideoFrame | None = None
    picture = np.empty(0)
    for frame in frames:
        if frame is not before:
            upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            picture, before = _fit(upright, image_size), frame
        yield picture


def _fit(picture: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """The largest centred rectangle of that shape, resized: (H, W, 3) uint8 → (*image_size, 3) uint8.

    Source: the colab's `crop_center_square` (whose middle is h // 2) and `cv2.resize`, which rounds in fixed point:
        at most 1 of 255 away.
    """
    (height, width), (out_height, out_width) = picture.shape[:2], image_size
    crop_height = max(1, min(height, width * out_height // out_width))
    crop_width = max(1, min(width, height * out_width // out_height))
    top, left = height // 2 - crop_height // 2, width // 2 - crop_width // 2
    picture = np.ascontiguousarray(picture[top : top + crop_height, left : left + crop_width])
    if picture.shape[:2] == image_size:
        return picture
    resized = PreprocessConfig(size=image_size, antialias=False).resize(Image.fromarray(picture))
    return (resized + 0.5).astype(np.uint8)


# ── files: sound ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Sound:
    """The first channel of a file from a time on, as many samples as are taken, silence after its end.

    The file is opened a second time for it: where all pictures come first, and then the sound, reading both at once
    would have to keep one.
    """

    HOLE = Fraction(1, 10)  # seconds; time stamps are rounded, and a smaller difference is not a hole

    def __init__(self, name: str, start: Fraction, sample_rate: int, *, silent: bool) -> None:
        self._name, self._start, self._sample_rate = name, start, sample_rate
        self._silent = silent
        self._given = 0
        self._pieces = self._read()
        self._rest = np.empty(0, np.float32)

    def close(self) -> None:
        self._pieces.close()

    def take(self, count: int) -> np.ndarray:
        """The next `count` samples, float32."""
        parts, missing = [], count
        while missing:
            if not len(self._rest):
                piece = next(self._pieces, None)
                if piece is None:
                    parts.append(np.zeros(missing, np.float32))
                    break
                self._rest = piece
            part, self._rest = self._rest[:missing], self._rest[missing:]
            parts.append(part)
            missing -= len(part)
        return np.concatenate(parts)

    def end(self) -> Fraction:
        """When it ends, on the file's clock; reads all of it, and nothing can be taken any more."""
        end = self._start
        with closing(self._timed()) as timed:
            for time, _, frame in timed:
                end = self._start + time + Fraction(frame.samples, frame.sample_rate)
        return end

    def _timed(self) -> Generator[tuple[Fraction, bool, Any]]:
        """(time from the start on, whether samples are missing before it, frame); frames are never empty."""
        with _opened(self._name, MAX_FRAME_PIXELS) as container:
            if self._silent and not container.streams.audio:
                return
            stream = _audio_stream(container, self._name)
            end: Fraction | None = None
            for frame in _decoded(container, stream, self._name):
                if not frame.samples:
                    continue
                stamp = None if frame.pts is None else frame.pts * _time_base(frame, stream) - self._start
                hole = end is None or (stamp is not None and stamp - end > self.HOLE)
                time = (stamp or Fraction(0)) if hole else end
                assert time is not None
                yield time, hole, frame
                end = time + Fraction(frame.samples, frame.sample_rate)
            if end is None:
                raise NoAudio(f"{self._name}: it has an audio stream, and no sound in it. {_SILENCE}")

    def _read(self) -> Generator[np.ndarray]:
        resampler = _Resampler(self._sample_rate)
        with closing(self._timed()) as timed:
            for time, hole, frame in timed:
                if hole:
                    yield from self._cut(resampler.flush())
                    yield from self._silence(round(time * self._sample_rate) - self._given)
                yield from self._cut(resampler(_first_channel(frame), frame.sample_rate))
        yield from self._cut(resampler.flush())

    def _cut(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Without what is before the start."""
        for piece in pieces:
            early = min(max(-self._given, 0), len(piece))
            self._given += len(piece)
            if early < len(piece):
                yield piece[early:]

    def _silence(self, count: int) -> Iterator[np.ndarray]:
        if count < 0 and not self._given:  # sound that begins before the pictures
            self._given = count
        while count > 0:  # a second at a time: a damaged time stamp could ask for years
            piece = np.zeros(min(count, self._sample_rate), np.float32)
            count -= len(piece)
            yield from self._cut([piece])


_SILENCE = "To take silence for it: silent=True (--silent)."


def _audio_stream(container: "InputContainer", name: str) -> "AudioStream":
    if not container.streams.audio:
        raise NoAudio(f"{name}: a video without sound; the model takes both. {_SILENCE}")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise VideoUnreadable(f"{name}: its sound is coded in a way that this FFmpeg does not know.")
    return stream


def _first_channel(frame: Any) -> np.ndarray:
    """An audio frame → (n,) float32 in [-1, 1]."""
    samples = frame.to_ndarray()
    samples = samples[0] if frame.format.is_planar else samples[0, :: frame.layout.nb_channels]
    if samples.dtype.kind == "f":
        return np.nan_to_num(samples.astype(np.float32)).clip(-1, 1)
    middle = 128 if samples.dtype == np.uint8 else 0
    return ((samples.astype(np.float64) - middle) / 2 ** (8 * samples.dtype.itemsize - 1)).astype(np.float32)


class _Resampler:
    """(n,) float32 at any rate → pieces at one rate; the first sample stays the first."""

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._resampler: Any = None
        self._source_rate = 0

    def __call__(self, samples: np.ndarray, sample_rate: int) -> Iterator[np.ndarray]:
        import av

        if sample_rate != self._source_rate:
            yield from self.flush()
            self._resampler = av.AudioResampler("fltp", "mono", self._sample_rate)
            self._source_rate = sample_rate
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = sample_rate
        for piece in self._resampler.resample(frame):
            yield piece.to_ndarray()[0].clip(-1, 1)

    def flush(self) -> Iterator[np.ndarray]:
        """What is still inside; the next samples begin anew."""
        if self._resampler is not None and self._source_rate != self._sample_rate:
            for piece in self._resampler.resample(None):
                yield piece.to_ndarray()[0].clip(-1, 1)
        self._resampler, self._source_rate = None, 0


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A chunk beside what the model made of it."""

    source: Clip
    frames: np.ndarray  # (T, H, W, 3) uint8
    audio: np.ndarray  # (S,) float32 in [-1, 1]
    probs: np.ndarray  # (K,) float64


@dataclass(slots=True)
class Score:
    """How well a clip was rebuilt and what it shows, from its chunks one by one."""

    num_frames: int = 0
    num_samples: int = 0
    _frame_error: float = 0.0
    _audio_error: float = 0.0
    _probs: Any = 0.0
    _num_values: int = 0

    def add(self, chunk: Rebuilt) -> None:
        self._frame_error += _squared_error(chunk.source.frames, chunk.frames)
        self._audio_error += _squared_error(chunk.source.audio, chunk.audio)
        self._num_values += chunk.frames.size
        self._probs = self._probs + chunk.probs * len(chunk.frames)
        self.num_frames += len(chunk.frames)
        self.num_samples += len(chunk.audio)

    @property
    def probs(self) -> np.ndarray:
        """(K,) float64: the mean over the chunks, each as heavy as it has frames."""
        return self._probs / self.num_frames

    @property
    def seconds(self) -> float:
        return self.num_frames / FPS

    @property
    def psnr_frames(self) -> float:
        """Decibels, of the peak 255; inf where nothing differs."""
        return _decibels(self._frame_error / self._num_values, 255)

    @property
    def psnr_audio(self) -> float:
        """Decibels, of the peak 1; inf where nothing differs."""
        return _decibels(self._audio_error / self.num_samples, 1)


@dataclass(frozen=True, slots=True)
class Autoencoded:
    """A clip, rebuilt.

    Args:
        frames: (T, H, W, 3) uint8, 25 a second.
        audio: (S,) float32 in [-1, 1], `sample_rate` a second.
        probs: (K,) float64 of the labels, the mean over the chunks, each as heavy as it has frames.
        labels: their names.
        psnr_frames, psnr_audio: decibels, as `psnr` gives them with the peaks 255 and 1; inf where nothing differs.
    """

    frames: np.ndarray
    audio: np.ndarray
    probs: np.ndarray
    labels: Labels = field(repr=False)
    psnr_frames: float
    psnr_audio: float
    sample_rate: int

    def top_k(self, k: int = 5) -> list[Prediction]:
        """The `k` best labels, `[{"label", "score", "index"}, …]`."""
        return best_labels(self.probs, self.labels, k)

    def save(self, path: FileName) -> None:
        """Write an .mp4 file: see `video_writer`."""
        write_video(path, self.frames, self.audio, sample_rate=self.sample_rate)


def best_labels(probs: np.ndarray, labels: Labels, k: int) -> list[Prediction]:
    """The `k` most probable of (K,) probabilities, best first."""
    logits = torch.from_numpy(probs).clamp_min(1e-300).log()  # softmax of these is `probs` again
    return top_k_labels(logits[None], labels, k)[0]


def psnr(reference: np.ndarray, rebuilt: np.ndarray, *, peak: float) -> float:
    """Peak signal-to-noise ratio in decibels; inf where nothing differs.

    Args:
        reference, rebuilt: of one shape.
        peak: 255 for frames of bytes, 1 for sound.
    Raises:
        ValueError: shapes differ, or are empty.
    """
    if reference.shape != rebuilt.shape or not reference.size:
        raise ValueError(f"shapes {reference.shape} and {rebuilt.shape} cannot be compared; they must be equal.")
    return _decibels(_squared_error(reference, rebuilt) / reference.size, peak)


def _squared_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float32) - b.astype(np.float32)).sum(dtype=np.float64))


def _decibels(mean_squared_error: float, peak: float) -> float:
    return math.inf if mean_squared_error == 0 else 10 * math.log10(peak**2 / mean_squared_error)


class VideoModel:
    """A multimodal autoencoder with its labels.

    `model` is the plain fp32 `torch.nn.Module`, `source` says where the weights came from.

    Raises:
        CheckpointError: the checkpoint is of another kind of model.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu", max_pixels: int = MAX_FRAME_PIXELS) -> None:
        if not isinstance(checkpoint.model, MultimodalPerceiver):
            kind = type(checkpoint.model).__name__
            raise CheckpointError(f"{checkpoint.source.name} is a {kind}, which does not rebuild videos.")
        self.model = checkpoint.model.eval().to(device)
        self.labels = checkpoint.labels or Labels.numbered(self.model.config.num_classes)
        self.source = checkpoint.source
        self.device = torch.device(device)
        self.max_pixels = max_pixels

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        c = self.model.config
        height, width = c.image_size
        return (
            f"<opsin {self.source.name}: {count / 1e6:.1f}M parameters, chunks of {c.num_frames} frames of "
            f"{height}×{width} pixels and {c.num_samples} samples, {len(self.labels)} classes>"
        )

    @property
    def sample_rate(self) -> int:
        """Samples a second that the model takes and gives."""
        return FPS * self.model.config.samples_per_frame

    def autoencode(
        self, video: FileName | Clip, *, silent: bool = False, progress: Progress | None = None
    ) -> Autoencoded:
        """Rebuild a clip. All of the result is in memory, 9 MB for each second; `stream` gives it in chunks.

        Args:
            video: path of a file, or a `Clip`: 25 frames a second, of any size, and `sample_rate` samples.
            silent: a file without sound is taken for a silent one.
            progress: called with parts done, and parts in all, after each of a chunk's 128.
        Raises:
            VideoError, MissingExtra: as `stream_clip`, before anything is computed.
            ValueError: a clip of one frame, of other rates, or whose sound has another length than its frames.
        """
        score, frames, audio = Score(), [], []
        for chunk in self.stream(video, silent=silent, progress=progress):
            score.add(chunk)
            frames.append(chunk.frames)
            audio.append(chunk.audio)
        return Autoencoded(
            frames=np.concatenate(frames),
            audio=np.concatenate(audio),
            probs=score.probs,
            labels=self.labels,
            psnr_frames=score.psnr_frames,
            psnr_audio=score.psnr_audio,
            sample_rate=self.sample_rate,
        )

    def stream(
        self, video: FileName | Clip, *, silent: bool = False, progress: Progress | None = None
    ) -> Generator[Rebuilt]:
        """As `autoencode`, chunk after chunk in constant memory. A file is decoded twice: first all of it, to find
        damage and to count the parts."""
        c = self.model.config
        if isinstance(video, Clip):
            num_frames, chunks = self._check_clip(video), self._chunks(video)
        else:
            num_frames = count_frames(video, max_pixels=self.max_pixels, silent=silent)
            chunks = stream_clip(
                video,
                num_frames=c.num_frames,
                image_size=c.image_size,
                samples_per_frame=c.samples_per_frame,
                max_pixels=self.max_pixels,
                silent=silent,
            )
        parts = self._num_parts * math.ceil(num_frames / c.num_frames)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, parts)

        with closing(chunks):
            for chunk in chunks:
                yield self._rebuild(chunk, advance)

    def _check_clip(self, clip: Clip) -> int:
        samples = len(clip.frames) * self.model.config.samples_per_frame
        if len(clip.frames) == 1:
            raise ValueError("a clip of one frame is a picture; give two or more.")
        if (clip.fps, clip.sample_rate) != (FPS, self.sample_rate):
            raise ValueError(
                f"the clip has {clip.fps} frames and {clip.sample_rate:,} samples a second; this model takes {FPS} and "
                f"{self.sample_rate:,}. read_clip and stream_clip make such of a file."
            )
        if len(clip.audio) != samples:
            raise ValueError(f"audio has {len(clip.audio):,} samples; {len(clip.frames)} frames need {samples:,}.")
        return len(clip.frames)

    def _chunks(self, clip: Clip) -> Generator[Clip]:
        c = self.model.config
        for start in range(0, len(clip.frames), c.num_frames):
            frames = np.stack([_fit(frame, c.image_size) for frame in clip.frames[start : start + c.num_frames]])
            first = start * c.samples_per_frame
            audio = clip.audio[first : first + len(frames) * c.samples_per_frame].clip(-1, 1)
            yield Clip(frames, audio, FPS, clip.sample_rate)

    @property
    def _num_parts(self) -> int:
        c = self.model.config
        return math.ceil(c.num_frames * math.prod(c.image_size) / PIXELS_PER_PART)

    def _rebuild(self, clip: Clip, advance: Callable[[], None]) -> Rebuilt:
        c = self.model.config
        short = c.num_frames - len(clip.frames)
        pixels = np.pad(clip.frames, ((0, short), (0, 0), (0, 0), (0, 0)), mode="edge")
        samples = np.pad(clip.audio, (0, short * c.samples_per_frame))
        frames, audio = [], []
        with torch.inference_mode(), exact_fp32(self.device):
            video = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)[None] / 255  # 1 T 3 H W
            latents = self.model.encode(video, torch.from_numpy(samples).to(self.device)[None])
            for image_points, audio_points in self._parts():
                output = self.model.decode(latents, image_points=image_points, audio_points=audio_points)
                if not all(values.isfinite().all() for values in output.values()):
                    raise CheckpointError(f"{self.source.name}: its output is not finite. The weights may be damaged.")
                frames.append((output["image"][0].clamp(0, 1) * 255).round().byte().cpu())
                audio.append(output["audio"][0].clamp(-1, 1).float().cpu())
                advance()
            probs = output["label"][0].double().softmax(0).cpu()
        shape = (c.num_frames, *c.image_size, 3)
        return Rebuilt(
            source=clip,
            frames=torch.cat(frames).reshape(shape).numpy()[: len(clip.frames)],
            audio=torch.cat(audio).numpy()[: len(clip.audio)],
            probs=probs.numpy(),
        )

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Flat indices of the pixels and of the audio patches, in order, in as many parts of either."""
        c = self.model.config
        image = torch.arange(c.num_frames * math.prod(c.image_size), device=self.device)
        audio = torch.arange(c.num_samples // c.samples_per_patch, device=self.device)
        count = self._num_parts
        return zip(image.tensor_split(count), audio.tensor_split(count), strict=True)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def video_writer(
    path: FileName, *, fps: int = FPS, sample_rate: int = 48_000
) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
    """Open an .mp4 file: H.264 (MPEG-4 part 2 where this PyAV has no libx264) and AAC.

        with video_writer(path) as write:
            write(frames, audio)  # (T, H, W, 3) uint8 of one size, and the (S,) float32 that sound with them

    The file appears under its name when the block ends well; until then an older one of that name stays.

    Raises:
        ValueError: a name that does not end in .mp4, or nothing was written.
        MissingExtra: PyAV is not installed.
        OSError: the file cannot be written.
    """
    check_format(path)
    import av

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"movflags": "+faststart"}
    with (
        replacing(Path(path)) as part,
        av.open(f"file:{part.absolute()}", "w", format="mp4", options=options) as container,
    ):
        video: Any = container.add_stream(codec, rate=fps)
        video.options = {"crf": "18"} if codec == "libx264" else {"qscale": "2"}
        # AAC knows a few rates only; PyAV converts to the stream's
        known = sample_rate in (av.Codec("aac", "w").audio_rates or ())
        audio: Any = container.add_stream("aac", rate=sample_rate if known else 48_000, layout="mono")
        audio.bit_rate = 128_000
        num_frames = num_samples = 0

        def write(frames: np.ndarray, samples: np.ndarray) -> None:
            nonlocal num_frames, num_samples
            if not num_frames:
                video.height, video.width = frames.shape[1:3]
                halves = video.height % 2 == 0 and video.width % 2 == 0  # where 2 × 2 pixels share a colour
                video.pix_fmt = "yuv420p" if halves or codec == "mpeg4" else "yuv444p"
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = num_frames, Fraction(1, fps)
                container.mux(video.encode(frame))
                num_frames += 1
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = sample_rate, num_samples, Fraction(1, sample_rate)
            container.mux(audio.encode(sound))
            num_samples += len(samples)

        yield write
        if not num_frames:
            raise ValueError(f"{path}: no frames were written to it.")
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


def write_video(
    path: FileName, frames: np.ndarray, audio: np.ndarray, *, fps: int = FPS, sample_rate: int = 48_000
) -> None:
    """Write (T, H, W, 3) uint8 and (S,) float32 in [-1, 1] as an .mp4 file: see `video_writer`, and for its errors."""
    clip = Clip(frames, audio, fps, sample_rate)
    with video_writer(path, fps=fps, sample_rate=sample_rate) as write:
        for start in range(0, len(frames), fps):  # a second of both in turn, as players read them
            stop = min(start + fps, len(frames))
            end = len(audio) if stop == len(frames) else stop * sample_rate // fps
            write(clip.frames[start:stop], clip.audio[start * sample_rate // fps : end])


def check_format(path: FileName) -> None:
    """Raise before any work is done if `path` could not be written.

    Raises:
        ValueError: a name that does not end in .mp4.
        MissingExtra: PyAV is not installed.
    """
    if Path(path).suffix.lower() != ".mp4":
        raise ValueError(f'"{Path(path).name}" ends in "{Path(path).suffix}". Known: .mp4.')
    require_av()
