"""Every error opsin raises on purpose.

    OpsinError
    ├── ImageError              one input is bad; its neighbours are not touched
    │   ├── ImageNotFound           no such file, or a link that leads nowhere
    │   ├── ImageUnreadable         a directory, no permission, a failed download
    │   ├── NotAnImage              the bytes are of no known image format
    │   ├── ImageCorrupt            a known format, cut short or damaged
    │   └── ImageTooLarge           more pixels or bytes than the limit
    ├── VideoError              a clip is bad
    │   ├── VideoNotFound           no such file
    │   ├── VideoUnreadable         a directory, no permission, a codec that is not there
    │   ├── NotAVideo               of no known container, without pictures, or one picture only
    │   ├── NoAudio                 without sound
    │   ├── VideoCorrupt            damaged or cut short
    │   └── VideoTooLarge           frames of more pixels than the limit
    ├── TextError               a text cannot be filled in
    │   ├── NoMask                  it has no [MASK]
    │   └── TextTooLong             more bytes than the model has places
    ├── FlowError               frames or files of motion that do not fit
    │   ├── FramesDiffer            two frames of different sizes
    │   └── FlowFileError           a file of motion that cannot be read
    ├── ModelError              the model could not be loaded; nothing was computed
    │   ├── UnknownModel            no such name here, in the catalogue or on the hub
    │   ├── HubError                the hub could not be reached, or refused
    │   ├── CheckpointError         a file that does not fit the model it claims to be
    │   └── UnsafeCheckpoint        a file that could only be read by executing code in it
    ├── DataError               a labelled set that cannot be read, divided or matched with a model's classes
    ├── TrainError              a run that cannot begin, go on or be resumed
    ├── BulkError               a folder of results that cannot be begun or gone on with
    ├── ExportError             a format that cannot hold a model, or a file that does not compute what the model does
    ├── NoHead                  labels were asked of a model that has none
    └── MissingExtra            an optional package is not installed

An `ImageError` in a batch becomes a record; everything else is raised.
"""


class OpsinError(Exception):
    """Base of all of them."""


class ImageError(OpsinError):
    """One input could not be turned into pixels."""

    kind = "image"  # the `error.type` of its record


class ImageNotFound(ImageError):
    kind = "not_found"


class ImageUnreadable(ImageError):
    kind = "unreadable"


class NotAnImage(ImageError):
    kind = "not_an_image"


class ImageCorrupt(ImageError):
    kind = "corrupt"


class ImageTooLarge(ImageError):
    kind = "too_large"


class VideoError(OpsinError):
    """A clip could not be turned into frames and samples."""

    kind = "video"  # the `error.type` of its record


class VideoNotFound(VideoError):
    kind = "not_found"


class VideoUnreadable(VideoError):
    kind = "unreadable"


class NotAVideo(VideoError):
    kind = "not_a_video"


class NoAudio(VideoError):
    kind = "no_audio"


class VideoCorrupt(VideoError):
    kind = "corrupt"


class VideoTooLarge(VideoError):
    kind = "too_large"


class TextError(OpsinError, ValueError):
    """A text that a model of text cannot take."""

    kind = "text"  # the `error.type` of its record


class NoMask(TextError):
    kind = "no_mask"


class TextTooLong(TextError):
    kind = "too_long"


class FlowError(OpsinError, ValueError):
    """Motion was asked of, or compared with, what does not fit."""


class FramesDiffer(FlowError):
    pass


class FlowFileError(FlowError):
    pass


class ModelError(OpsinError):
    """The model could not be loaded."""


class UnknownModel(ModelError):
    pass


class HubError(ModelError):
    pass


class CheckpointError(ModelError):
    pass


class UnsafeCheckpoint(CheckpointError):
    pass


class DataError(OpsinError):
    """A labelled set of images is not what it has to be."""


class TrainError(OpsinError):
    """A training run cannot begin or go on."""


class BulkError(OpsinError):
    """A run over many images cannot begin, go on or end as it was asked to."""


class ExportError(OpsinError):
    """A model that a format cannot hold, or a file that does not compute what the model does."""


class NoHead(OpsinError):
    pass


class MissingExtra(OpsinError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed. Install it with: pip install "opsin[{extra}]"')
