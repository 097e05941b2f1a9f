"""Every error opsin raises on purpose.

    OpsinError
    ├── ImageError              one input is bad; its neighbours are not touched
    │   ├── ImageNotFound           no such file, or a link that leads nowhere
    │   ├── ImageUnreadable         a directory, no permission, a failed download
    │   ├── NotAnImage              the bytes are of no known image format
    │   ├── ImageCorrupt            a known format, cut short or damaged
    │   └── ImageTooLarge           more pixels or bytes than the limit
    ├── ModelError              the model could not be loaded; nothing was computed
    │   ├── UnknownModel            no such name here, in the catalogue or on the hub
    │   ├── HubError                the hub could not be reached, or refused
    │   ├── CheckpointError         a file that does not fit the model it claims to be
    │   └── UnsafeCheckpoint        a file that could only be read by executing code in it
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


class NoHead(OpsinError):
    pass


class MissingExtra(OpsinError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed. Install it with: pip install "opsin[{extra}]"')
