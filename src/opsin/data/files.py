"""Path arguments → image files, lazily and in a fixed order."""

import glob
import os
from collections.abc import Iterable, Iterator

from opsin.preprocess import is_image_name


def find_images(arguments: Iterable[str]) -> Iterator[str]:
    """The inputs that path arguments stand for, in order.

    A folder gives its image files, recursively and sorted; a pattern with `*`, `?` or `[` that is no file gives its
    matches, sorted; anything else, found or not, gives itself, so that it ends in exactly one record. So does a
    pattern without matches.
    """
    for argument in arguments:
        if os.path.isdir(argument):  # noqa: PTH112, Path.is_dir raises on a name that is too long
            yield from _walk(argument)
        elif glob.has_magic(argument) and not os.path.lexists(argument) and "://" not in argument:
            matches = sorted(glob.glob(argument, recursive=True))
            for match in matches:
                yield from _walk(match) if os.path.isdir(match) else [match]  # noqa: PTH112
            if not matches:
                yield argument
        else:
            yield argument


def _walk(folder: str) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder  # cannot be listed: one record that says so
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif is_image_name(entry.name):
            yield entry.path
