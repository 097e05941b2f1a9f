"""The images in tar, zip and Parquet files, in their order, however damaged: each member is exactly one item."""

import bz2
import functools
import gzip
import io
import itertools
import lzma
import os
import stat
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

from opsin.data import remote, table, tar
from opsin.data.remote import why
from opsin.data.samples import MAX_IMAGE_BYTES, check_size
from opsin.errors import ImageCorrupt, ImageError, ImageNotFound, ImageTooLarge, ImageUnreadable, MissingExtra
from opsin.preprocess import ImageSource, is_image_name

_BATCH_ROWS = 16  # of a Parquet file that are in memory at once


class Item(NamedTuple):
    """One input.

    Args:
        name: what its record calls it: the path or URL, `archive::member`, or `table.parquet::row`.
        source: what `decode` takes; or a function that gives the bytes or raises ImageError, for a thread of its own;
            or what is wrong.
    """

    name: str
    source: ImageSource | Callable[[], bytes | str] | ImageError


def read(kind: Literal["tar", "zip", "parquet"], path: str, start: int = 0) -> Iterator[Item]:
    """The images of an archive, here or on a server, from the `start`-th on.

    One that is cut or damaged gives its whole members, then one item of its own name that says so. Never raises.
    """
    parts = {"tar": _tar, "zip": _zip, "parquet": _parquet}[kind]
    found = _until_damage(path, lambda: parts(path, _open(path), start))
    return cast(Iterator[Item], itertools.islice(found, start, None))


def _until_damage(name: str, read: Callable[[], Iterator[Item | None]]) -> Iterator[Item | None]:
    """What `read` gives until it raises; then an item that says so."""
    count = 0
    try:
        for item in read():
            yield item
            count += 1
    except (ImageError, MissingExtra) as error:
        yield Item(name, error if isinstance(error, ImageError) else ImageUnreadable(f"{name}: {error}"))
    except Exception as error:  # tarfile and pyarrow raise nearly anything on damaged bytes
        reason = why(error)
        if isinstance(error, OSError) and error.errno is not None:
            yield Item(name, ImageUnreadable(f"{name}: cannot be read after {count:,} images: {reason}."))
        else:
            yield Item(name, ImageCorrupt(f"{name}: cut short or damaged after {count:,} images: {reason}."))


class Archive:
    """An open file that many threads read; closed when nobody has it any more.

    It stays the same file even when another takes its name: what was listed and what is read belong together.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, size: int, name: str) -> bytes:
        """
        Args:
            name: of the image, for errors.
        Raises:
            ImageError: too many bytes, or not all of them are there.
        """
        check_size(size, name)
        try:
            data = os.pread(self.descriptor, size, offset) if size else b""
        except OSError as error:
            raise ImageUnreadable(f"{name}: {error.strerror or error}.") from error
        if len(data) < size:
            raise ImageCorrupt(f"{name}: {len(data):,} bytes of {size:,} are there. The archive has been cut.")
        return data


def _open(path: str) -> Archive:
    """
    Raises:
        ImageError: there is no such file, or it cannot be read.
    """
    if tar.is_url(path):
        return Archive(remote.fetched(path))
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            raise ImageUnreadable(f"{path}: {'a directory' if stat.S_ISDIR(mode) else 'a device or pipe'}, not a file.")
        return Archive(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageNotFound(f"{path}: no such file.") from error
    except OSError as error:
        raise ImageUnreadable(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ImageNotFound(f"{path!r}: no such file; the name itself is impossible ({error}).") from error


class _Handle(io.RawIOBase):
    """An archive as libraries want a file."""

    def __init__(self, archive: Archive) -> None:
        super().__init__()
        self.archive, self.at, self.size = archive, 0, archive.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.size - self.at)
        data = os.pread(self.archive.descriptor, rest if size is None or size < 0 else min(size, rest), self.at)
        self.at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _is_image(name: str) -> bool:
    """Whether a member is taken for an image. What macOS puts beside each file of an archive is none."""
    base = name.rpartition("/")[2]
    return is_image_name(base) and not base.startswith("._") and "__MACOSX" not in name.split("/")


# ── tar ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

# bytes of a member, by offset, size and name
_Take = Callable[[int, int, str], bytes | Callable[[], bytes] | ImageError]

_PACKED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def _tar(path: str, archive: Archive, start: int) -> Iterator[Item]:
    handle = _Handle(archive)
    head = handle.read(512)
    handle.seek(0)
    is_plain = head[257:262] == b"ustar"  # a plain one may begin with a member that is called BZh.jpg
    unpack = next((unpack for magic, unpack in _PACKED.items() if head.startswith(magic) and not is_plain), None)
    if head.startswith(_ZSTANDARD) and not is_plain:
        raise ImageUnreadable(f"{path}: compressed by Zstandard, which is not read. Unpack it, or pack it with gzip.")
    if unpack is not None:
        stream = _Forward(unpack(cast(IO[bytes], handle)))
        return _members(f"{path}::", cast(IO[bytes], stream), 0, sys.maxsize, stream.take, True)

    def take(offset: int, size: int, name: str) -> Callable[[], bytes]:
        return functools.partial(archive.read, offset, size, name)

    file = cast(IO[bytes], _Headers(archive))
    return _members(f"{path}::", file, 0, archive.size, take, True)


def _members(prefix: str, file: IO[bytes], start: int, stop: int, take: _Take, is_outer: bool) -> Iterator[Item]:
    """The images of a tar file, as `tar.walk` reads it."""
    for member, offset in tar.walk(file, start, stop, end_mark=True):
        name = prefix + member.name
        is_plain = member.isreg() and not member.issparse()
        if is_outer and is_plain and member.name.lower().endswith(".tar"):
            inner = functools.partial(_members, f"{name}/", file, offset, offset + member.size, take, False)
            yield from cast(Iterator[Item], _until_damage(name, inner))
        elif not _is_image(member.name) or member.isdir():
            continue
        elif is_plain:
            yield Item(name, take(offset, member.size, name))
        else:
            what = f"a link to {member.linkname}" if member.issym() or member.islnk() else "no plain file"
            yield Item(name, ImageUnreadable(f"{name}: {what}, which is not followed inside an archive."))


def _check_header(size: int) -> None:
    if not 0 <= size <= MAX_IMAGE_BYTES:
        raise tarfile.ReadError(f"a header of {size:,} bytes")


class _Headers(_Handle):
    """A tar file of whose headers none may ask for any amount of memory."""

    def read(self, size: int | None = -1) -> bytes:
        _check_header(-1 if size is None else size)
        return super().read(size)


class _Forward:
    """A stream as `tar.walk` wants a file: read forward, but for the last block."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.at = 0  # of the stream
        self.last = b""  # what was read last
        self.behind = 0  # bytes of that to be read again

    def tell(self) -> int:
        return self.at - self.behind

    def seek(self, place: int) -> int:
        behind = self.at - place
        if behind > len(self.last):
            raise tarfile.ReadError(f"byte {place:,} is needed again")
        self.behind = max(behind, 0)
        while self.at < place and self.read(min(2**20, place - self.at)):
            pass
        return self.tell()

    def read(self, size: int) -> bytes:
        _check_header(size)
        data = self.last[len(self.last) - self.behind :][:size]
        self.behind -= len(data)
        pieces = [data]
        size -= len(data)
        while size and (piece := self.stream.read(size)):
            pieces.append(piece)
            size -= len(piece)
            self.at += len(piece)
            self.last = (self.last + piece if len(piece) < 512 else piece)[-512:]
        return b"".join(pieces)

    def take(self, offset: int, size: int, name: str) -> bytes | ImageError:
        try:
            check_size(size, name)
        except ImageTooLarge as error:
            return error
        self.seek(offset)
        data = self.read(size)
        if len(data) < size:
            raise tarfile.ReadError(f"of {name} {len(data):,} bytes of {size:,} are there")
        return data


# ── zip ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

# The directory is read entry by entry: as objects of zipfile a million of them would take a gigabyte. APPNOTE 6.3.10.
_END = struct.Struct("<4s4H2LH")
_END_64_PLACE = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _UTF8 = 1, 0x800
_STORED, _DEFLATED = 0, 8
_IN_EXTRA = 0xFFFFFFFF  # the number is too large for its place


class _ZipEntry(NamedTuple):
    flags: int
    method: int
    checksum: int
    packed_size: int
    size: int
    offset: int  # of the local header


def _zip(path: str, archive: Archive, start: int) -> Iterator[Item]:
    place, size, shift = _directory(archive)
    file = io.BufferedReader(_Handle(archive), 2**16)
    file.seek(place)
    while file.tell() < place + size:
        head = file.read(_ENTRY.size)
        if len(head) < _ENTRY.size or not head.startswith(b"PK\1\2"):
            raise ValueError(f"its directory is damaged at byte {file.tell() - len(head):,}")
        fields = _ENTRY.unpack(head)
        flags, method = fields[5:7]
        numbers = [*fields[10:12], fields[18]]  # packed size, size, offset
        name, extra, comment = (file.read(length) for length in fields[12:15])
        if len(comment) < fields[14]:
            raise ValueError("its directory is cut short")
        text = _text(name, flags)
        if _is_image(text):
            packed_size, whole_size, offset = _wide(numbers, extra)
            entry = _ZipEntry(flags, method, fields[9], packed_size, whole_size, offset + shift)
            key = f"{path}::{text}"
            yield Item(key, functools.partial(_unzipped, archive, entry, key))


def _directory(archive: Archive) -> tuple[int, int, int]:
    """Where a zip file's directory begins, its bytes, and how many bytes stand before the zip file itself."""
    most = min(archive.size, _END.size + 2**16)
    tail = os.pread(archive.descriptor, most, archive.size - most)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) < found + _END.size:
        raise ValueError("no directory at its end: cut short, or no zip file")
    end = archive.size - most + found
    fields = _END.unpack_from(tail, found)
    size, offset = fields[5:7]
    place_64 = end - _END_64_PLACE.size
    if place_64 >= 0 and (head := os.pread(archive.descriptor, _END_64_PLACE.size, place_64)).startswith(b"PK\6\7"):
        # what stands before the zip file shifts it, so it is looked for where it ends
        wide = os.pread(archive.descriptor, _END_64.size, place_64 - _END_64.size)
        if not wide.startswith(b"PK\6\6"):
            wide = os.pread(archive.descriptor, _END_64.size, _END_64_PLACE.unpack(head)[2])
        if len(wide) < _END_64.size or not wide.startswith(b"PK\6\6"):
            raise ValueError("its directory is damaged")
        size, offset = _END_64.unpack(wide)[8:10]
        end = place_64 - _END_64.size
    shift = end - size - offset
    if shift < 0:
        raise ValueError(f"its directory is to have {size:,} bytes from {offset:,} on, and ends at {end:,}")
    return offset + shift, size, shift


def _text(name: bytes, flags: int) -> str:
    """The name of a member: UTF-8, where it says so or is (macOS does not say it); else as DOS had it."""
    if flags & _UTF8:
        return name.decode("utf-8", "surrogateescape")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437")


def _wide(numbers: Sequence[int], extra: bytes) -> tuple[int, int, int]:
    """Packed size, size and offset, from the extra field where they do not fit into 32 bits."""
    values = list(numbers)
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            for place in (1, 0, 2):
                if values[place] == _IN_EXTRA and len(field) >= 8:
                    values[place], field = int.from_bytes(field[:8], "little"), field[8:]
        at += 4 + length
    return values[0], values[1], values[2]


def _unzipped(archive: Archive, entry: _ZipEntry, name: str) -> bytes:
    """
    Raises:
        ImageError: it is encrypted, too large, compressed in a rare way or damaged.
    """
    if entry.flags & _ENCRYPTED:
        raise ImageUnreadable(f"{name}: it is encrypted. Make the zip file without a password.")
    if entry.method not in (_STORED, _DEFLATED):
        raise ImageUnreadable(f"{name}: compressed by method {entry.method}; stored (0) and deflated (8) can be read.")
    check_size(entry.size, name)
    head = archive.read(entry.offset, _LOCAL.size, name)
    if not head.startswith(b"PK\3\4"):
        raise ImageCorrupt(f"{name}: no member begins at byte {entry.offset:,} of the zip file, as its directory says.")
    # the lengths of name and extra field may differ from those in the directory
    begin = entry.offset + _LOCAL.size + sum(_LOCAL.unpack(head)[9:])
    data = archive.read(begin, entry.packed_size, name)
    if entry.method == _DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1)  # one more shows the lie
        except zlib.error as error:
            raise ImageCorrupt(f"{name}: its compressed bytes are damaged: {error}.") from error
    if len(data) != entry.size or zlib.crc32(data) != entry.checksum:
        raise ImageCorrupt(
            f"{name}: {len(data):,} bytes with checksum {zlib.crc32(data):08x}; the zip file's directory says "
            f"{entry.size:,} and {entry.checksum:08x}."
        )
    return data


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parquet(path: str, archive: Archive, start: int) -> Iterator[Item | None]:
    pq = table.require_pyarrow()
    with pq.ParquetFile(_Handle(archive), pre_buffer=False, buffer_size=2**20) as file:
        column = table.image_column(file.schema_arrow)
        if column is None:
            raise ImageUnreadable(
                f"{path}: no column of image bytes; there are {', '.join(file.schema_arrow.names)[:200]}. A table of "
                "paths has to be on this machine, and given by its own name."
            )
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if first + count <= start:
                yield from itertools.repeat(None, count)
            else:
                yield from _group_items(path, file, group, column, first, count)
            first += count


def _group_items(path: str, file: Any, group: int, column: str, first: int, count: int) -> Iterator[Item]:
    """The images of a row group, `count` from row `first` on, whatever happens."""
    done = 0
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
            for cell in itertools.islice(batch.column(0), count - done):
                name = f"{path}::{first + done}"
                yield Item(name, _of_cell(cell, path, name))
                done += 1
        reason = "fewer rows than it is to have"
    except Exception as error:  # damaged pages raise nearly anything
        reason = why(error)
    for row in range(first + done, first + count):
        yield Item(f"{path}::{row}", ImageCorrupt(f"{path}::{row}: row group {group} cannot be read: {reason}."))


def _of_cell(cell: Any, path: str, name: str) -> ImageSource | Callable[[], bytes] | ImageError:
    try:
        image = table.in_cell(cell, name)
    except ImageError as error:
        return error
    return image if isinstance(image, bytes) else remote.source(remote.beside(path, image))
