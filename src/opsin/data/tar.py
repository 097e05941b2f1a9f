"""Images in tar files: WebDataset shards, here or on a server, and ILSVRC 2012 as it is handed out.

The headers are read once and the members by seek; nothing is unpacked. The `webdataset` library is not used: it
streams, with a buffer to shuffle in, and a stream cannot be taken up again at an image. With random access the order
of an epoch is a function of the seed, and a resumed run sees the same images to the bit.

    OPSIN_DATA_CACHE    where shards from a server are kept, and the indices of large archives; ~/.cache/opsin/data
"""

import csv
import glob
import itertools
import json
import logging
import os
import re
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from opsin.data.samples import (
    Archive,
    Archived,
    Strings,
    choose,
    digest,
    encode,
    enumerated,
    held_out_rows,
    split_of,
)
from opsin.errors import DataError
from opsin.labels import Labels
from opsin.preprocess import is_image_name

log = logging.getLogger(__name__)

CLASSES_FILE = "classes.txt"

_BLOCK_BYTES = 512  # of the tar format
_MAX_LABEL_BYTES = 2**20  # of KEY.cls, KEY.json, KEY.txt
_MAX_TABLE_BYTES = 64 * 2**20  # of classes.txt and the files of the devkit
_KEPT_INDEX_BYTES = 64 * 2**20  # the index of a larger archive is kept on disk
_MAX_SHARDS = 1_000_000
_DOWNLOADS = 8  # at once
_DOWNLOAD_SECONDS = 60  # without a byte
# what file systems say of a file's content, each in its own words
VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "blob_id", "md5Hash", "generation")
_TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, OSError, RecursionError, zlib.error)


# ── members of a tar file ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Index:
    """N images of an archive, in its order.

    Args:
        names: of the members.
        offsets, sizes: (N,) int64, bytes.
        classes: N names, numbers or lists of them.
    """

    names: Strings
    offsets: np.ndarray
    sizes: np.ndarray
    classes: list[Any]


def walk(file: IO[bytes], start: int, stop: int, *, end_mark: bool = False) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members of a tar file that lies in `file` from `start` to `stop`, with the offsets of their bytes in `file`.

    Args:
        file: is read forward, but for one block at the end.
        end_mark: the zeros that end a tar file have to be there; without them nobody knows whether it was cut.
    Raises:
        one of those that `tarfile` raises: it is no tar file, or is damaged.
    """
    if stop - start < _BLOCK_BYTES:
        raise tarfile.ReadError("not even one header")
    file.seek(start)
    with tarfile.TarFile(fileobj=file) as tar:
        member = tar.next()
        while member is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
            plain = member.isreg() and not member.issparse()
            if plain and member.offset_data + member.size > stop:
                raise tarfile.ReadError(f"{member.name} is to end at byte {member.offset_data + member.size:,}")
            yield member, member.offset_data
            member = tar.next() if tar.offset < stop else None  # not into what follows in `file`
        end = tar.offset
    # tarfile takes a damaged header for the end; the true end is zeros, or nothing
    file.seek(end)
    block = file.read(min(_BLOCK_BYTES, max(stop - end, 0)))
    if any(block):
        raise tarfile.ReadError(f"the header at byte {end:,} is damaged")
    if end_mark and len(block) < _BLOCK_BYTES:
        raise tarfile.ReadError(f"it ends at byte {end + len(block):,} without the zeros that end a tar file")


def _members(path: str, file: IO[bytes], start: int, stop: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The plain files of a tar file, as `walk` has them.

    Raises:
        DataError: it is no tar file, is compressed, or is damaged.
    """
    try:
        for member, offset in walk(file, start, stop):
            if member.isreg() and not member.issparse():
                yield member, offset
    except _TAR_ERRORS as error:
        file.seek(start)
        packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        remedy = "It is compressed, and is read at random: unpack it to a plain .tar" if packed else "Fetch it again"
        raise DataError(f"{path} is no whole tar file of {stop - start:,} bytes: {error}. {remedy}.") from error


def _kept(archive: Archive, kind: str, build: Callable[[], Index]) -> Index:
    """`build()`, or for a large archive what an earlier process kept of it."""
    if Path(archive.path).stat().st_size < _KEPT_INDEX_BYTES:
        return build()
    path = cache_folder() / "index" / f"{digest([kind, archive.path, archive.version])}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            names = Strings(kept["packed"], kept["ends"])
            return Index(names, kept["offsets"], kept["sizes"], json.loads(kept["classes"].tobytes()))
    except FileNotFoundError:
        pass
    except Exception as error:  # numpy and zipfile raise nearly anything on a file cut short
        log.warning("The index %s cannot be read (%s) and is made again", path, error)
    log.info("Reading the headers of %s", archive.name)
    index = build()
    classes = np.frombuffer(json.dumps(index.classes).encode(), np.uint8)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            part,
            packed=index.names.packed,
            ends=index.names.ends,
            offsets=index.offsets,
            sizes=index.sizes,
            classes=classes,
        )
        part.replace(path)
    except OSError as error:
        log.warning("The index of %s is not kept (%s); set OPSIN_DATA_CACHE to a folder of yours", archive.name, error)
        part.unlink(missing_ok=True)
    return index


# ── WebDataset ───────────────────────────────────────────────────────────────────────────────────────────────────────


def open_shards(data: Sequence[str], split: str | None = None) -> Archived:
    """WebDataset shards: members KEY.jpg and KEY.cls (a name or number), KEY.json {"label": …} or KEY.txt.

    A sample without image or class is left out, and a warning says how many. `classes.txt` beside the first shard
    names the numbers, a line each from 0.

    Args:
        data: paths, URLs that fsspec knows (s3://, hf://, https://, …), patterns, and ranges as `{0000..0063}`.
        split: which to read, by a word of the shards' names or their folder's.
    Raises:
        DataError: a shard that cannot be fetched or read, or no samples in any.
    """
    shards = [shard for pattern in data for shard in expand(pattern)]
    where = enumerated(shards, 3)
    chosen = choose([split_of(shard) for shard in shards], split, where)
    for shard, status in zip(shards, chosen, strict=True):
        if status is None:
            log.info("%s is left unread: of another split", shard)
    kept = [shard for shard, status in zip(shards, chosen, strict=True) if status is not None]
    archives = _local(kept)
    indices = [_kept(archive, "webdataset 1", lambda archive=archive: _index_shard(archive)) for archive in archives]  # type: ignore[misc]
    counts = [len(index.names) for index in indices]
    if not sum(counts):
        raise DataError(
            f"{where} hold no labelled images: looked for KEY.jpg (or another image) with KEY.cls, KEY.json "
            '{"label": …} or KEY.txt. Check how the shards were written.'
        )
    targets, labels = encode(
        itertools.chain.from_iterable(index.classes for index in indices), where, names=_class_names(kept[0])
    )
    held_out = held_out_rows([value for value in chosen if value is not None], counts)
    return _joined(archives, indices, targets, labels, held_out)


def _joined(
    archives: Sequence[Archive],
    indices: Sequence[Index],
    targets: np.ndarray,
    labels: Labels,
    held_out: np.ndarray | None,
) -> Archived:
    return Archived(
        targets,
        labels,
        held_out,
        archives=archives,
        which=np.repeat(np.arange(len(indices)), [len(index.names) for index in indices]),
        names=Strings.join([index.names for index in indices]),
        offsets=np.concatenate([index.offsets for index in indices]),
        sizes=np.concatenate([index.sizes for index in indices]),
    )


def _index_shard(archive: Archive) -> Index:
    images: dict[str, tuple[str, int, int]] = {}  # key → name, offset, size
    classes: dict[str, dict[str, Any]] = {}  # key → what each kind of member says
    keys: dict[str, None] = {}
    with Path(archive.path).open("rb") as file, Path(archive.path).open("rb") as contents:
        stop = os.fstat(file.fileno()).st_size
        for member, offset in _members(archive.name, file, 0, stop):
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            suffix = suffix.lower()
            if not stem:  # hidden
                continue
            key = f"{folder}/{stem}"
            if is_image_name(f"a.{suffix}") and "." not in suffix:
                images[key] = (member.name, offset, member.size)
                keys[key] = None
            elif suffix in ("cls", "json", "txt"):
                keys[key] = None
                if member.size <= _MAX_LABEL_BYTES:
                    contents.seek(offset)
                    classes.setdefault(key, {})[suffix] = _class_in(contents.read(member.size), suffix)
    found = [(images.get(key), _first(classes.get(key, {}))) for key in keys]
    whole = [(image, value) for image, value in found if image is not None and value is not None]
    if len(whole) < len(found):
        log.warning(
            "%s: %d of %d samples have no image or no class and are left out",
            archive.name,
            len(found) - len(whole),
            len(found),
        )
    return Index(
        Strings.pack(image[0] for image, _ in whole),
        np.array([image[1] for image, _ in whole], np.int64),
        np.array([image[2] for image, _ in whole], np.int64),
        [value for _, value in whole],
    )


def _first(values: dict[str, Any]) -> Any:
    return next((values[kind] for kind in ("cls", "json", "txt") if values.get(kind) is not None), None)


def _class_in(data: bytes, kind: str) -> Any:
    """The class that a member states: a name, a number or a list of them; None where it states none."""
    try:
        if kind != "json":
            text = data.decode("utf-8").strip()
            return text or None
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    value = record
    if isinstance(record, dict):
        value = next((record[name] for name in ("label", "class", "cls", "target") if name in record), None)
    items = value if isinstance(value, list) else [value]
    return value if all(isinstance(item, str | int) and item != "" for item in items) else None


def _class_names(first_shard: str) -> list[str] | None:
    """The lines of `classes.txt` beside a shard; None where there is none."""
    place = f"{first_shard.rpartition('/')[0]}/{CLASSES_FILE}" if "/" in first_shard else CLASSES_FILE
    if is_url(place):
        try:
            path = Path(_fetch(place).path)
        except FileNotFoundError:
            return None
    else:
        path = Path(place)
        if not path.is_file():
            return None
    return _lines(_small(path), place)


def _small(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_TABLE_BYTES:,} are read.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _lines(data: bytes, where: str) -> list[str]:
    try:
        return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not text in UTF-8: {error}.") from error


# ── where shards lie ─────────────────────────────────────────────────────────────────────────────────────────────────

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*(?:\.\.|,)[^{}]*)\}")


def expand(pattern: str) -> list[str]:
    """The shards that a path, a URL, a pattern or a range stands for: ranges in their order, matches sorted.

    `{0000..0003}` counts with as many digits as its first number has; `{a,b}` lists.

    Raises:
        DataError: no file, no match, or too many.
    """
    return [path for shard in ranges(pattern) for path in _matches(shard)]


def ranges(pattern: str) -> Iterator[str]:
    """A pattern with each of its ranges and lists in braces written out; without any, itself.

    Raises:
        DataError: too many.
    """
    if sum(1 for _ in itertools.islice(_ranges(pattern), _MAX_SHARDS + 1)) > _MAX_SHARDS:
        raise DataError(f"{pattern} stands for more than {_MAX_SHARDS:,} shards. Give a shorter range.")
    return _ranges(pattern)


def _ranges(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    if numbers := _RANGE.fullmatch(found[1]):
        first, last = int(numbers[1]), int(numbers[2])
        steps = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        items: Iterator[str] = (f"{number:0{len(numbers[1])}}" for number in steps)
    else:
        items = iter(found[1].split(","))
    for item in items:
        yield from _ranges(pattern[: found.start()] + item + pattern[found.end() :])


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def _matches(shard: str) -> list[str]:
    if is_url(shard):
        if not glob.has_magic(shard) or shard.startswith(("http://", "https://")):  # there "?" begins a query
            return [shard]
        found = remote(shard, lambda fs, path: [fs.unstrip_protocol(match) for match in fs.glob(path)])
    elif Path(shard).is_file():
        return [shard]
    else:
        found = glob.glob(shard, recursive=True)
    if not found:
        raise DataError(f"there is no {shard}. Check the path, or the range of numbers.")
    return sorted(found)


def cache_folder() -> Path:
    return Path(os.environ.get("OPSIN_DATA_CACHE") or "~/.cache/opsin/data").expanduser()


def _local(shards: Sequence[str]) -> list[Archive]:
    """The shards as files of this machine; those on a server are fetched, unless they are here."""
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return list(pool.map(_local_one, shards))


def _local_one(shard: str) -> Archive:
    if not is_url(shard):
        return Archive.at(shard)
    try:
        return _fetch(shard)
    except FileNotFoundError as error:
        raise DataError(f"{shard} does not exist. Check the address, or the range of numbers.") from error


def remote(url: str, act: Callable[[Any, str], Any]) -> Any:
    """`act(file system, path in it)`, of which everything that goes wrong becomes a DataError, but FileNotFoundError.

    File systems keep no listings: those of millions of files would not fit.
    """
    import fsspec  # type: ignore[import-untyped]

    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return act(fs, path)
    except FileNotFoundError:
        raise
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(scheme, "")
        hint = f"pip install {package}" if package else str(error)
        raise DataError(f"{url}: a package that reads {scheme}:// is not installed: {hint}.") from error
    except Exception as error:  # each file system has its own
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{url} cannot be fetched: {type(error).__name__}: {error}. Check the address and your access, or fetch it "
            "by other means and give its path."
        ) from error


def _fetch(url: str) -> Archive:
    """A file of a server as a file of this machine, fetched whole once for each of its versions.

    Fetched beside its place and then moved, under a lock: a process that is killed leaves nothing that looks whole,
    and of several on a machine one fetches. fsspec's own caches do neither.

    Raises:
        FileNotFoundError: the server has no such file.
        DataError: it cannot be fetched, or there is no room.
    """
    if url.startswith(("http://", "https://")):
        return _fetch_http(url)
    info = remote(url, lambda fs, path: fs.info(path))
    state = [str(info.get(kind)) for kind in VERSIONS]
    return _keep(url, info.get("size"), state, lambda part: remote(url, lambda fs, path: fs.get_file(path, str(part))))


def _fetch_http(url: str) -> Archive:
    """With the standard library: fsspec needs another package for it."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "opsin", "Accept-Encoding": "identity"})
        with urllib.request.urlopen(request, timeout=_DOWNLOAD_SECONDS) as response:

            def copy(part: Path) -> None:
                with part.open("wb") as file:
                    shutil.copyfileobj(response, file, 2**20)

            state = [response.headers.get(name) for name in ("ETag", "Last-Modified")]
            return _keep(url, response.length, state, copy)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(url) from error
        raise DataError(f"{url} cannot be fetched: status {error.code}, {error.reason}. Check your access.") from error
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        raise DataError(f"{url} cannot be fetched: {error or type(error).__name__}. Check the connection.") from error


def _keep(url: str, size: int | None, state: Sequence[str | None], get: Callable[[Path], None]) -> Archive:
    from huggingface_hub.utils import WeakFileLock

    version = digest([url, size, *state])
    path = cache_folder() / "files" / version[:2] / version
    archive = Archive(url, str(path), version)
    if path.exists():
        return archive
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_suffix(".lock")):
            if path.exists():
                return archive
            free = shutil.disk_usage(path.parent).free
            if size is not None and size > free:
                raise DataError(
                    f"no room for {url} in {cache_folder()}: {size:,} bytes, {free:,} free. Set OPSIN_DATA_CACHE to a "
                    "larger disk."
                )
            part = path.with_suffix(".part")
            try:
                get(part)
                arrived = part.stat().st_size
                if size is not None and arrived != size:
                    raise DataError(f"{url}: {arrived:,} bytes of {size:,} arrived. Run again.")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except PermissionError as error:
        raise DataError(
            f"cannot write to {cache_folder()}: {error}. Set OPSIN_DATA_CACHE to a folder of yours."
        ) from error
    return archive


# ── ILSVRC 2012 ──────────────────────────────────────────────────────────────────────────────────────────────────────

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
KAGGLE_TRUTH = "LOC_val_solution.csv"
_VAL_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
_SYNSET_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")


def is_ilsvrc(folder: Path) -> bool:
    return (folder / TRAIN_TAR).is_file() or (folder / VAL_TAR).is_file()


def open_ilsvrc(folder: Path, split: str | None = None) -> Archived:
    """ILSVRC 2012 in its tar files: the training set, a tar file of tar files, and the validation set, held out.

    The classes of the validation images are those of the devkit, packed or not, or of Kaggle's `LOC_val_solution.csv`.

    Raises:
        DataError: an archive that cannot be read, or one without classes.
    """
    there = [name for name, file in (("train", TRAIN_TAR), ("val", VAL_TAR)) if (folder / file).is_file()]
    chosen = choose(there, split, str(folder))
    labels = Labels.imagenet_1k()
    index_of = {wnid: i for i, wnid in enumerate(labels.wnids or ())}
    archives, indices, targets = [], [], []
    for name, held_out in zip(there, chosen, strict=True):
        if held_out is None:
            continue
        archive = Archive.at(folder / (TRAIN_TAR if name == "train" else VAL_TAR))
        if name == "train":
            index = _kept(archive, "ilsvrc train 1", lambda archive=archive: _index_train(archive))  # type: ignore[misc]
            wnids = index.classes
        else:
            truth = _truth(folder)
            index = _kept(archive, "ilsvrc val 1", lambda archive=archive: _index_val(archive))  # type: ignore[misc]
            if missing := [number for number in index.classes if number not in truth]:
                raise DataError(
                    f"{archive.name} has {len(missing)} images without a class in {folder}, the first is number "
                    f"{missing[0]}; {len(truth):,} have one. Fetch the devkit again."
                )
            wnids = [truth[number] for number in index.classes]
        if unknown := sorted(set(wnids) - set(index_of)):
            raise DataError(f"{archive.name} has classes that are not of ILSVRC 2012: {enumerated(unknown)}.")
        if not wnids:
            raise DataError(f"{archive.name} holds no images of the names that ILSVRC 2012 has. Fetch it again.")
        archives.append(archive)
        indices.append(index)
        targets.append(np.array([index_of[wnid] for wnid in wnids], np.int64))
    counts = [len(values) for values in targets]
    held = held_out_rows([value for value in chosen if value is not None], counts)
    return _joined(archives, indices, np.concatenate(targets), labels, held)


def _index_train(archive: Archive) -> Index:
    names: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    classes: list[str] = []
    with Path(archive.path).open("rb") as outer, Path(archive.path).open("rb") as inner:
        stop = os.fstat(outer.fileno()).st_size
        for synset, start in _members(archive.name, outer, 0, stop):
            if not (found := _SYNSET_TAR.fullmatch(synset.name)):
                continue
            where = f"{archive.name}::{synset.name}"
            for member, offset in _members(where, inner, start, start + synset.size):
                if is_image_name(member.name):
                    names.append(f"{synset.name}/{member.name}")
                    offsets.append(offset)
                    sizes.append(member.size)
                    classes.append(found[1])
    return Index(Strings.pack(names), np.array(offsets, np.int64), np.array(sizes, np.int64), classes)


def _index_val(archive: Archive) -> Index:
    with Path(archive.path).open("rb") as file:
        stop = os.fstat(file.fileno()).st_size
        found = [
            (member.name, offset, member.size, int(match[1]))
            for member, offset in _members(archive.name, file, 0, stop)
            if (match := _VAL_NAME.fullmatch(member.name))
        ]
    names, offsets, sizes, numbers = zip(*found, strict=True) if found else ((), (), (), ())
    return Index(Strings.pack(names), np.array(offsets, np.int64), np.array(sizes, np.int64), list(numbers))


def _truth(folder: Path) -> dict[int, str]:
    """Number of a validation image, from 1 → WordNet id."""
    kaggle = folder / KAGGLE_TRUTH
    packed = folder / f"{DEVKIT}.tar.gz"
    unpacked = folder / DEVKIT / "data"
    if packed.is_file():
        files = _from_devkit(packed)
        where = str(packed)
    elif (unpacked / TRUTH).is_file():
        files = {name: _small(unpacked / name) for name in (TRUTH, META)}
        where = str(unpacked)
    elif kaggle.is_file():
        rows = csv.reader(_lines(_small(kaggle), str(kaggle)))
        found = [(_VAL_NAME.fullmatch(f"{row[0]}.JPEG"), row[1]) for row in rows if len(row) > 1]
        return {int(name[1]): boxes.split(" ")[0] for name, boxes in found if name}
    else:
        raise DataError(
            f"{folder} has {VAL_TAR} and nothing that gives its images classes: looked for {packed.name}, {DEVKIT}/ "
            f'and {KAGGLE_TRUTH}. Put the devkit beside it, or read the split "train" alone.'
        )
    wnids = synsets(files[META], where)
    try:
        return {number: wnids[int(line)] for number, line in enumerate(_lines(files[TRUTH], where), 1)}
    except (KeyError, ValueError) as error:
        raise DataError(f"{where}: {TRUTH} has a line that is no ILSVRC2012_ID of {META}: {error}.") from error


def _from_devkit(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in (TRUTH, META) and member.isreg() and member.size <= _MAX_TABLE_BYTES:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    files[name] = stream.read()
    except _TAR_ERRORS as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it again.") from error
    if missing := [name for name in (TRUTH, META) if name not in files]:
        raise DataError(f"{path} lacks {' and '.join(missing)}. Fetch it again.")
    return files


# The devkit's numbers are not in the order of WordNet ids, and only meta.mat says which is which. Of its format (MATLAB
# level 5) just so much is read: elements of (type, size, data), compressed or not, of which a matrix nests some.
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHARS = 2, 4  # classes of a matrix
_NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}


def synsets(data: bytes, where: str) -> dict[int, str]:
    """ILSVRC2012_ID → WordNet id, from the bytes of the devkit's `meta.mat`.

    Raises:
        DataError: they are not what a devkit holds.
    Source: MathWorks, "MAT-File Format", level 5.
    """
    try:
        if data[126:128] != b"IM":
            raise ValueError("it is no little-endian MATLAB file of level 5")
        found: dict[int, str] = {}
        for kind, body in _elements(memoryview(data)[128:]):
            if kind == _MATRIX:
                for record in _records(body):
                    if {"ILSVRC2012_ID", "WNID"} <= record.keys():
                        found[int(record["ILSVRC2012_ID"])] = record["WNID"]
        if not found:
            raise ValueError("it has no synsets with ILSVRC2012_ID and WNID")
    except (ValueError, KeyError, IndexError, TypeError, struct.error, zlib.error) as error:
        raise DataError(f"{where}: {META} cannot be read: {error}. Fetch the devkit again.") from error
    return found


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # up to four bytes are in the place of padding
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start, end = at + 8, at + 8 + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError("it is cut short")
        if kind == _COMPRESSED:
            inflated = zlib.decompressobj().decompress(data[start : start + size], _MAX_TABLE_BYTES)
            yield from _elements(memoryview(inflated))
        else:
            yield kind, data[start : start + size]
        at = end


def _records(matrix: memoryview) -> Iterator[dict[str, Any]]:
    """The cells of an array of structs that are text or single numbers, struct by struct."""
    parts = [body for _, body in _elements(matrix)]
    if len(parts) < 5 or parts[0][0] != _STRUCT:
        return
    length = int.from_bytes(parts[3], "little")
    fields = [bytes(parts[4][i : i + length]).split(b"\0")[0].decode() for i in range(0, len(parts[4]), length)]
    for start in range(5, len(parts), len(fields)):
        cells = map(_cell, parts[start : start + len(fields)])
        yield {field: cell for field, cell in zip(fields, cells, strict=True) if cell is not None}


def _cell(matrix: memoryview) -> Any:
    parts = list(_elements(matrix))
    if len(parts) < 4:
        return None  # empty
    kind, body = parts[3]
    values = np.frombuffer(body, "<u1" if kind == 16 else _NUMBERS[kind])
    if parts[0][1][0] == _CHARS:
        return bytes(body).decode() if kind == 16 else "".join(map(chr, values.tolist()))
    return values[0] if len(values) == 1 else None
