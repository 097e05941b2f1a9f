"""Images and archives on servers: http(s) with the standard library, the rest (s3, gs, hf, …) with fsspec.

Every request ends within `preprocess.DOWNLOAD_SECONDS`, with bytes or an ImageError.
"""

import errno
import functools
import http.client
import os
import queue
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, Any, cast

from opsin import preprocess
from opsin.data import tar
from opsin.data.tar import is_url
from opsin.errors import ImageError, ImageNotFound, ImageTooLarge, ImageUnreadable

_PIECE_BYTES = 16 * 2**20  # of an archive that one request asks for
_TRIES = 3  # for a piece of an archive; an image is asked for once, and fsspec's file systems try again themselves


def is_http(path: str) -> bool:
    return path[:8].lower().startswith(("http://", "https://"))


def source(path: str) -> str | Callable[[], bytes]:
    """What `decode` takes for a path or URL, or a function that gives the bytes."""
    if is_url(path) and not is_http(path):
        return functools.partial(read_address, path)
    return path


def join(folder: str, name: str) -> str:
    """The path or URL of what is in a folder."""
    return f"{folder}{'' if not folder or folder.endswith('/') else '/'}{name}"


def beside(path: str, named: str) -> str:
    """A path as a list or table names it, relative to that."""
    return named if is_url(named) or not named or named.startswith("/") else join(_parent(path), named)


def _parent(path: str) -> str:
    folder, slash, _ = path.rpartition("/")
    return folder or slash


def read_address(url: str) -> bytes:
    """The bytes of an image on a server that fsspec knows. Safe to call from many threads.

    Raises:
        ImageNotFound: the server has no such file.
        ImageTooLarge: more than `preprocess.MAX_DOWNLOAD_BYTES`.
        ImageUnreadable: it refuses, fails or takes longer than `preprocess.DOWNLOAD_SECONDS`.
    """
    most = preprocess.MAX_DOWNLOAD_BYTES
    try:
        fs, path = _file_system(url)
        data = _piece(fs, path, 0, most + 1)
    except Exception as error:  # each file system has its own
        raise _image_error(url, error) from error
    if len(data) > most:
        raise ImageTooLarge(
            f"{url}: more than {most:,} bytes, the limit for a download. Download the file and give its path."
        )
    return data


def _file_system(url: str) -> tuple[Any, str]:
    """What reads a URL, which fsspec keeps for the next, and the path in it."""
    import fsspec  # type: ignore[import-untyped]

    return cast(tuple[Any, str], fsspec.core.url_to_fs(url, use_listings_cache=False))


def _piece(fs: Any, path: str, start: int, stop: int) -> bytes:
    try:
        return bytes(_timed(fs, "cat_file", path, start=start, end=stop))
    except FileNotFoundError:
        raise
    except Exception:
        # of nothing no range can be had: S3 answers 416
        if start == 0 and _timed(fs, "info", path).get("size") == 0:
            return b""
        raise


def _timed(fs: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """A method of a file system, for `preprocess.DOWNLOAD_SECONDS` at most.

    Raises:
        TimeoutError: it takes longer.
        Exception: what the method raises.
    """
    seconds = preprocess.DOWNLOAD_SECONDS
    if getattr(fs, "async_impl", False):
        from fsspec.asyn import sync  # type: ignore[import-untyped]
        from fsspec.exceptions import FSTimeoutError  # type: ignore[import-untyped]

        try:
            return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=seconds, **options)
        except FSTimeoutError as error:
            raise TimeoutError(f"no answer within {seconds} seconds") from error
    answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put((getattr(fs, method)(*arguments, **options), None))
        except Exception as error:
            answers.put((None, error))

    # of its own, and not waited for: what hangs in a library cannot be stopped
    threading.Thread(target=call, daemon=True).start()
    try:
        value, failure = answers.get(timeout=seconds)
    except queue.Empty as empty:
        raise TimeoutError(f"no answer within {seconds} seconds") from empty
    if failure is not None:
        raise failure
    return value


def _image_error(url: str, error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, FileNotFoundError):
        return ImageNotFound(f"{url}: no such file.")
    if isinstance(error, MemoryError):
        return ImageTooLarge(f"{url}: not enough memory to read it.")
    return ImageUnreadable(f"{url}: cannot be read: {why(error)}.")


def fetched(url: str) -> int:
    """A file of a server as one of this machine without a name, which the system frees when its descriptor is closed.

    Raises:
        ImageError: it cannot be fetched, or there is no room.
    """
    folder = tar.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            copy(url, cast(IO[bytes], file))
            return os.dup(file.fileno())
    except OSError as error:
        raise ImageUnreadable(
            f"{url}: cannot be copied to {folder}: {error.strerror or error}. Set OPSIN_DATA_CACHE to a folder of "
            "yours on a larger disk."
        ) from error


def copy(url: str, file: IO[bytes]) -> None:
    """
    Raises:
        ImageError: it cannot be fetched.
        OSError: it cannot be written.
    """
    if is_http(url):
        _copy_http(url, file)
        return
    try:
        fs, path = _file_system(url)
        before = _timed(fs, "info", path)
        size = before["size"]
    except Exception as error:
        raise _image_error(url, error) from error
    if not isinstance(size, int):
        raise ImageUnreadable(f"{url}: the server does not say how large it is. Fetch it by other means.")
    _check_room(url, size, file)
    for at in range(0, size, _PIECE_BYTES):
        file.write(_whole_piece(url, fs, path, at, min(_PIECE_BYTES, size - at)))
    try:
        after = _timed(fs, "info", path)
    except Exception as error:
        raise _image_error(url, error) from error
    if any(before.get(kind) != after.get(kind) for kind in ("size", *tar.VERSIONS)):
        raise ImageUnreadable(f"{url}: it has changed while it was fetched. Run again.")


def _whole_piece(url: str, fs: Any, path: str, start: int, size: int) -> bytes:
    for left in reversed(range(_TRIES)):
        try:
            data = _piece(fs, path, start, start + size)
            if len(data) == size:
                return data
            raise ConnectionError(f"{len(data):,} bytes of {size:,} arrived")
        except Exception as error:
            if not left or isinstance(error, FileNotFoundError | PermissionError):
                raise _image_error(url, error) from error
    raise AssertionError


def _copy_http(url: str, file: IO[bytes]) -> None:
    """With the standard library: fsspec needs another package for it."""
    for left in reversed(range(_TRIES)):
        file.seek(0)
        file.truncate()
        try:
            _copy_http_once(url, file)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise ImageNotFound(f"{url}: no such file.") from error
            if not left or error.code < 500:
                raise ImageUnreadable(f"{url}: cannot be read: status {error.code}, {error.reason}.") from error
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            if not left or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                raise ImageUnreadable(f"{url}: cannot be read: {why(error)}.") from error


def _copy_http_once(url: str, file: IO[bytes]) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "opsin", "Accept-Encoding": "identity"})
    with urllib.request.urlopen(request, timeout=preprocess.DOWNLOAD_SECONDS) as response:
        size = response.length
        _check_room(url, size or 0, file)
        while piece := response.read1(2**20):
            file.write(piece)
    if size is not None and file.tell() != size:
        raise ConnectionError(f"{file.tell():,} bytes of {size:,} arrived")


def _check_room(url: str, size: int, file: IO[bytes]) -> None:
    found = os.fstatvfs(file.fileno())
    free = found.f_bavail * found.f_frsize
    if size > free:
        raise ImageUnreadable(
            f"{url}: {size:,} bytes, and {free:,} are free. Set OPSIN_DATA_CACHE to a folder on a larger disk."
        )


def why(error: Exception) -> str:
    """What an error of another library says, on one line."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
