"""Arguments → blocks → items: any amount of images for `classify` and `embed`, wherever they lie.

    photos/                         a folder: its images, recursively; if there are none, its archives
    'photos/**/*.jpg'               a pattern; `**` is any number of folders
    a.jpg  https://x/a.jpg          one image
    s3://bucket/photos/             a folder on a server that fsspec knows (s3, gs, hf, …); patterns too
    @list.txt                       a path on each line, or NULs between them (`find -print0`)
    list.csv .tsv .jsonl .parquet   a table with a column of paths; relative ones are relative to it
    shards/{00000..00999}.tar       tar: each image member, also those of a tar inside (ILSVRC); .tar.gz, .bz2, .xz
    photos.zip  train-*.parquet     zip; Parquet with the bytes of images

`plan` only lists, `items` only reads. An archive on a server is copied to a file without a name in OPSIN_DATA_CACHE,
which the system frees when it has been read or the process dies.
"""

import contextlib
import fnmatch
import glob
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from opsin.data import archives, remote, table, tar
from opsin.data.archives import Item
from opsin.data.remote import beside, is_http, join
from opsin.data.tar import is_url
from opsin.errors import DataError, ImageError, ImageNotFound
from opsin.preprocess import is_image_name

log = logging.getLogger(__name__)

Kind = Literal["files", "tar", "zip", "parquet"]

_TABLES = (".csv", ".tsv", ".jsonl")
_TAR = re.compile(r".*\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """What one worker reads alone and in order.

    Args:
        paths: of "files", several images; else the one archive.
    """

    kind: Kind
    paths: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps` as it is by default: names that are not UTF-8 become escapes and come back as they were."""
        return {"kind": self.kind, "paths": list(self.paths)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Block":
        """
        Raises:
            DataError: it is not what `to_json` gave.
        """
        kind, paths = values.get("kind"), values.get("paths")
        if kind not in get_args(Kind) or not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
            raise DataError(
                f"{str(values)[:80]} is no block of inputs: right is a kind of {', '.join(get_args(Kind))}, and a list "
                "of paths. The plan is damaged; make it again."
            )
        return cls(cast(Kind, kind), tuple(paths))


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def plan(arguments: Iterable[str], *, rows: int = 1000) -> Iterator[Block]:
    """The blocks that arguments stand for, as the module says, lazily and in a fixed order.

    What is not there, or matches nothing, is an input like another: its one item says so. No more is in memory than the
    names in one folder.

    Args:
        rows: images in a block of files, at most.
    Raises:
        ValueError: rows below 1.
        DataError: a folder on a server that cannot be listed, a list or table that cannot be read, or a package for
            such addresses that is not installed.
        MissingExtra: pyarrow is needed for Parquet.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1.")
    return _blocks((path for argument in arguments for path in _named(argument)), rows)


def _blocks(paths: Iterable[str], rows: int) -> Iterator[Block]:
    files: list[str] = []
    schemes: set[str] = set()
    for path in paths:
        if is_url(path) and (scheme := path.partition("://")[0]) not in schemes and not is_http(path):
            schemes.add(scheme)
            _check_package(path)
        kind = _archive_kind(path)
        if kind is None:
            files.append(path)
        if files and (kind is not None or len(files) == rows):
            yield Block("files", tuple(files))
            files = []
        if kind is not None:
            if kind == "parquet":
                table.require_pyarrow()
            yield Block(kind, (path,))
    if files:
        yield Block("files", tuple(files))


def _check_package(url: str) -> None:
    try:
        tar.remote(url, lambda fs, path: None)
    except DataError as error:
        if isinstance(error.__cause__, ImportError):
            raise  # anything else is said by the items themselves


def _file_name(path: str) -> str:
    """The end of a path or URL, in lower case."""
    return (path.partition("?")[0] if is_http(path) else path).rpartition("/")[2].lower()


def _archive_kind(path: str) -> Literal["tar", "zip", "parquet"] | None:
    name = _file_name(path)
    if name.endswith(".zip"):
        return "zip"
    if name.endswith(".parquet"):
        return "parquet"
    return "tar" if _TAR.fullmatch(name) else None


def _named(argument: str) -> Iterator[str]:
    """The images and archives that an argument stands for."""
    if is_url(argument):
        yield from _at_address(argument)
    elif os.path.isdir(argument):  # noqa: PTH112, Path.is_dir raises on a name that is too long
        yield from _in_folder(argument, _disk)
    elif os.path.lexists(argument):
        yield from _in_file(argument)
    elif argument.startswith("@"):
        yield from _in_list(argument)
    else:
        for path in tar.ranges(argument):
            if glob.has_magic(path) and not os.path.lexists(path):
                yield from _matches(path, _disk)
            elif path != argument:
                yield from _named(path)
            else:
                yield path


def _at_address(url: str) -> Iterator[str]:
    for address in tar.ranges(url):
        is_pattern = glob.has_magic(address) and not is_http(address)  # there "?" begins a query
        if is_pattern and "::" not in address:
            yield from _matches(address, _server)
        elif _file_name(address).endswith(_TABLES):
            yield from _in_table(address)
        elif is_http(address) or "::" in address or is_image_name(address) or _archive_kind(address):
            yield address
        else:
            yield from _in_folder(address, _server)


# What is in a folder: names, and what they are; sorted. FileNotFoundError: there is no folder.
_Entry = tuple[str, Literal["file", "folder", "link to a folder"]]
_List = Callable[[str], list[_Entry]]


def _disk(folder: str) -> list[_Entry]:
    def kind(entry: os.DirEntry[str]) -> Literal["file", "folder", "link to a folder"]:
        try:
            if not entry.is_dir():
                return "file"
        except OSError:  # a link to itself
            return "file"
        return "link to a folder" if entry.is_symlink() else "folder"

    with os.scandir(folder or ".") as entries:
        return sorted((entry.name, kind(entry)) for entry in entries)


def _server(url: str) -> list[_Entry]:
    found: list[_Entry] = []

    def add(fs: Any, path: str) -> None:
        here = path.rstrip("/")
        for entry in fs.ls(path, detail=True):
            name = str(entry["name"])
            is_folder = entry["type"] == "directory"
            if is_folder and name == f"{here}/" and entry.get("StorageClass") == "DIRECTORY":
                found.append(("", "file"))  # S3 has keys with "//", which s3fs cannot list: a record says so
            elif name.rstrip("/") == here:
                if not is_folder and name == here:
                    raise FileNotFoundError(url)  # a file, or the mark of an empty folder
            elif is_folder:
                found.append((name.rstrip("/").rpartition("/")[2], "folder"))
            else:
                found.append((name.rpartition("/")[2], "file"))

    tar.remote(url, add)
    return sorted(found)


def _in_folder(folder: str, entries: _List) -> Iterator[str]:
    """The images of a folder, in and below it; of one without images, the archives. What is no folder is itself."""
    archives: list[str] = []
    images = False
    for path in _walk(folder, entries, folder):
        if is_image_name(path):
            images = True
            yield path
        elif _archive_kind(path) is not None:
            archives.append(path)
        else:
            yield path  # a folder that cannot be listed
    if not images:
        yield from archives
    elif archives:
        log.warning(
            "%s: %d archives beside the images are left unread; name them to have them read", folder, len(archives)
        )


def _walk(folder: str, entries: _List, top: str) -> Iterator[str]:
    try:
        found = entries(folder)
    except FileNotFoundError:
        if folder == top or entries is _disk:
            yield folder
        return
    except OSError:
        yield folder  # one record that says so
        return
    for name, kind in found:
        path = join(folder, name)
        if kind == "folder":
            yield from _walk(path, entries, top)
        elif is_image_name(name) or _archive_kind(name) is not None or not name:
            yield path


def _matches(pattern: str, entries: _List) -> Iterator[str]:
    """What matches a pattern, folder by folder; if nothing does, the pattern itself.

    As `glob` has it: `*` and `?` stay within a name, and match no name with a dot in front. A folder that matches
    gives its images.
    """
    parts = pattern.split("/")
    folders_only = parts[-1] in ("", "**")
    while parts and parts[-1] in ("", "**"):
        parts.pop()
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "")
    wanted = tuple(parts[fixed:])
    if not wanted:
        yield from _in_folder(root or ".", entries)
        return

    def below(folder: str, names: tuple[str, ...]) -> Iterator[str]:
        try:
            found = entries(folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError:
            yield folder
            return
        for name, kind in found:
            here, path = (*names, name), join(folder, name)
            if _fits(here, wanted):
                if kind != "file":
                    yield from _in_folder(path, entries)
                    continue
                if not folders_only:
                    yield path
            # a link is followed where the pattern names its place; below "**" it may lead in circles
            enters = kind == "folder" or (kind == "link to a folder" and "**" not in wanted[: len(here)])
            if enters and _leads(here, wanted):
                yield from below(path, here)

    matched = below(root, ())
    first = next(matched, None)
    yield pattern if first is None else first
    yield from matched


def _fits(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern, both cut at "/"."""
    if not parts:
        return not names
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (bool(names) and names[0][:1] != "." and _fits(names[1:], parts))
    return bool(names) and _fit(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _leads(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether something in the folder `names` may match."""
    for i, name in enumerate(names):
        if i == len(parts):
            return False
        if parts[i] == "**":
            hidden = any(name.startswith(".") for name in names[i:])
            return not hidden or any(part.startswith(".") for part in parts[i:])
        if not _fit(name, parts[i]):
            return False
    return len(names) < len(parts)


def _fit(name: str, part: str) -> bool:
    return (not name.startswith(".") or part.startswith(".")) and fnmatch.fnmatchcase(name, part)


def _in_file(path: str) -> Iterator[str]:
    name = _file_name(path)
    if name.endswith(_TABLES):
        yield from _in_table(path)
    elif name.endswith(".parquet"):
        try:
            is_archive = table.has_image_bytes(path)
        except DataError:
            is_archive = True  # its item says what is wrong
        yield from [path] if is_archive else _in_table(path)
    else:
        yield path


def _in_table(path: str) -> Iterator[str]:
    """The paths in a table."""
    with _here(path) as file:
        if file is None:
            yield path
            return
        try:
            for cell in table.read_paths(file):
                yield beside(path, cell) if cell else ""
        except DataError as error:
            raise DataError(str(error).replace(file, path)) from error


def _in_list(argument: str) -> Iterator[str]:
    """The paths in the list `@argument`."""
    path = argument[1:]
    if _file_name(path).endswith(_TABLES) or _archive_kind(path) is not None:
        yield from _named(path)
        return
    with _here(path) as file:
        if file is None:
            yield argument
            return
        try:
            for line in _lines(file):
                yield beside(path, os.fsdecode(line))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no list that can be read: {error}. Give one path on each line.") from error


def _lines(path: str) -> Iterator[bytes]:
    with Path(path).open("rb") as file:
        head = file.read(4096)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("it is UTF-16; save it as UTF-8")
        file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        if b"\0" not in head:
            for line in file:
                if line := line.rstrip(b"\r\n"):
                    yield line
            return
        rest = b""
        while piece := file.read(2**16):
            *whole, rest = (rest + piece).split(b"\0")
            yield from filter(None, whole)
        if rest:
            yield rest


@contextlib.contextmanager
def _here(path: str) -> Iterator[str | None]:
    """A list or table as a file of this machine; None: there is none."""
    if not is_url(path):
        yield path if os.path.lexists(path) else None
        return
    with tempfile.NamedTemporaryFile(suffix=Path(_file_name(path)).suffix) as file:
        try:
            remote.copy(path, cast(IO[bytes], file))
        except ImageNotFound:
            yield None
            return
        except ImageError as error:
            raise DataError(f"{error} It is a list of images; check the address and your access.") from error
        file.flush()
        yield file.name


# ── items ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def items(block: Block, start: int = 0) -> Iterator[Item]:
    """The images of a block from the `start`-th on, in order, each once. Never raises: what is wrong is an item.

    An archive that is cut or damaged gives its whole members, then one item of its own name that says so. What comes
    before `start` is not read, but in compressed tar files, and never decoded.
    """
    if block.kind == "files":
        return (Item(path, remote.source(path)) for path in itertools.islice(block.paths, start, None))
    return archives.read(block.kind, block.paths[0], start)
