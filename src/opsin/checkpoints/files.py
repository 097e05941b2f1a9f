"""Tensors out of weight files: safely, or not at all.

A file is never trusted about its own size, and no pickle is executed: PyTorch files go through the restricted
unpickler (`weights_only`), those of JAX programs through `pickles.py`, NumPy files are read without pickles. What is
wrong with a bad file is named.
"""

import contextlib
import json
import logging
import math
import os
import pickle
import re
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opsin.checkpoints import pickles
from opsin.errors import CheckpointError, UnsafeCheckpoint

log = logging.getLogger(__name__)

PYTORCH_SUFFIXES = (".bin", ".pth", ".pt")
HAIKU_SUFFIXES = (".pystate", ".pickle")
SUFFIXES = (".safetensors", *PYTORCH_SUFFIXES, ".npz", *HAIKU_SUFFIXES)
FOLDER_FILES = (  # in the order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NESTS = ("state_dict", "model", "model_state_dict", "teacher", "student")  # where training scripts put the weights
WRAPPERS = ("module.", "_orig_mod.", "backbone.")  # DataParallel, torch.compile, DINO and segmentation code

# what the restricted unpickler says of globals and calls outside its list; of mere damage it says other things
NEEDS_CODE = re.compile(r"unsupported (global|class)|unrecognized function|can only (build|create)|TorchScript", re.I)
PLAIN_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")  # protocols that PyTorch does not write unless asked to

MAX_JSON_BYTES = 64 << 20  # a config.json with 21,843 names takes 3 MB; an index of a large model 5 MB
MAX_EXPANSION = 20  # float weights compress by a few per cent; an all-zero head of 21k classes still stays below this
FREE_BYTES = 64 << 20  # an archive that unpacks to less than this is harmless whatever it claims


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: no such file, too large, not JSON, or not an object.
    """
    _check_file(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; no configuration is that long.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}; a checkpoint's is an object.")
    return data


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: the file itself, or a folder's one file or shards.

    Raises:
        CheckpointError: a folder without weights, an index that names files outside the folder or none.
    """
    if not path.is_dir():
        return [path]
    name = next((name for name in FOLDER_FILES if (path / name).is_file()), None)
    if name is None:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:10]) or "nothing"
        raise CheckpointError(f"{path} holds no weights: looked for {', '.join(FOLDER_FILES)}; found {there}.")
    if not name.endswith(".index.json"):
        return [path / name]
    shards = sorted(set(_weight_map(path / name).values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing[:10])}.")
    return [path / shard for shard in shards]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map": it should say which shard holds which tensor.')
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", "..") or "\\" in shard:
            raise CheckpointError(f"{index} points to {shard!r}; a shard is a file beside its index.")
    return weight_map


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file, or of a folder with one file or shards, as stored: name → tensor on the CPU.

    A PyTorch file may nest its weights (`model`, `state_dict`, `teacher`, …) and prefix them (`module.`,
    `backbone.`, …): both are taken off.
    Raises:
        CheckpointError: empty, truncated or damaged; a web page or git-lfs pointer instead of weights; sizes that
            cannot be; no tensors.
        UnsafeCheckpoint: a pickle that would have to execute code.
    """
    tensors: dict[str, Tensor] = {}
    files = weight_files(path)
    for file in files:
        part = _read_file(file)
        twice = tensors.keys() & part.keys()
        if twice:
            raise CheckpointError(f"{path}: {min(twice)} is in more than one shard.")
        tensors |= part
    if path.is_dir() and len(files) > 1:
        index = next(path / name for name in FOLDER_FILES if name.endswith(".index.json") and (path / name).is_file())
        absent = [name for name in _weight_map(index) if name not in tensors]
        if absent:
            raise CheckpointError(f"{path}: {len(absent)} tensors of its index are in no shard; one is {absent[0]}.")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    _check_file(path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix == ".npz":
        return _read_npz(path)
    if suffix in HAIKU_SUFFIXES:
        return pickles.read_tensors(path)
    if suffix in PYTORCH_SUFFIXES:
        return _read_pytorch(path)
    raise CheckpointError(f'{path} ends in "{suffix}"; weights are read from {", ".join(SUFFIXES)}.')


def _check_file(path: Path) -> None:
    """What people have in place of the file they wanted."""
    try:
        head = _head(path, 512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise CheckpointError(f"{path} is empty. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself. Fetch it with: git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: most likely an error or login page was downloaded.")


def _head(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:  # the library checks every offset of the header against the length of the file
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}. Download it again.") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated or not an .npz file (a zip archive). Download it again.")
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            check_expansion(path, archive)
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as file:
                    tensors[name] = _read_array(file, member.file_size, f"{path}: {name}")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Download it again.") from error
    return tensors


def _read_array(file: Any, size: int, where: str) -> Tensor:
    """One .npy member; its header is held against the member's size before anything is allocated."""
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    except ValueError as error:
        raise CheckpointError(f"{where} is not a NumPy array: {error}.") from error
    if dtype.hasobject:
        raise UnsafeCheckpoint(f"{where} holds pickled Python objects, which could run any code. It was not read.")
    length = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or file.tell() + length != size:
        raise CheckpointError(f"{where} says {shape} {dtype}, which is {length:,} bytes; the file has {size:,}.")
    array = np.frombuffer(bytearray(file.read(length)), dtype=dtype)
    array = np.asarray(array.reshape(shape, order="F" if fortran_order else "C"), order="C")
    if dtype == np.dtype("V2"):  # how NumPy stores the bfloat16 arrays of JAX
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise CheckpointError(f"{where} has type {dtype}; weights are floating-point numbers.") from error


def check_expansion(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive that would unpack to much more than it is; `zipfile` reads no more than is declared."""
    declared, size = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if declared > max(MAX_EXPANSION * size, FREE_BYTES):
        raise CheckpointError(
            f"{path} ({size:,} bytes) claims to unpack to {declared:,} bytes, "
            f"more than {MAX_EXPANSION} times its size. Weights do not compress like that; it was not read."
        )


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    is_zip = zipfile.is_zipfile(path)  # since PyTorch 1.6; a bare pickle before
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                check_expansion(path, archive)
        # training scripts keep their arguments beside the weights; a Namespace is only a bag of values
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols: it reads or it does not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle fails in torch in any way it likes
        if NEEDS_CODE.search(str(error)) or _head(path, 2) in PLAIN_PICKLES:
            raise UnsafeCheckpoint(
                f"{path} can only be read by executing code that it brings along, which opsin never does. If you trust "
                "it, load it with PyTorch where it was made and save the weights alone: "
                'torch.save(model.state_dict(), "weights.pth")'
            ) from error
        # the unpickler's own message would tell the user to execute the file
        detail = "" if isinstance(error, pickle.UnpicklingError) else str(error).split("\n", 1)[0][:200]
        raise CheckpointError(
            f"{path} is truncated, damaged or not a PyTorch file ({detail or type(error).__name__}). Download it again."
        ) from error
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what `torch.save` was given, without the prefixes of wrappers."""
    while isinstance(content, dict):
        nest = next((name for name in NESTS if isinstance(content.get(name), dict)), None)
        if nest is None:
            break
        content = content[nest]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors (a state dict).")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor, "
                f"and there is no {', '.join(NESTS)} to look into."
            )
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} {tuple(tensor.shape)} is larger than its data.")
    tensors = {name: tensor.detach() for name, tensor in content.items()}
    prefix = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in tensors)), None)
    while prefix is not None:  # they nest: DINO's teacher is "module.backbone."
        outside = [name for name in tensors if not name.startswith(prefix)]
        if outside:  # heads of the training task
            log.warning(
                '%s: of tensors inside and outside of "%s", only the inside is read, not %s', path, prefix, outside
            )
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        prefix = next((prefix for prefix in WRAPPERS if any(name.startswith(prefix) for name in tensors)), None)
    return tensors


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Names without `prefix`, where they have it."""
    stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise CheckpointError(f'a name is there both with and without "{prefix}".')
    return stripped


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, moved over `path` when all went well: readers see the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A .safetensors file. The metadata is what transformers asks for."""
    with replacing(path) as part:
        part.touch()
        mode = part.stat().st_mode  # that of any new file; safetensors would keep it from everybody else
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
        part.chmod(mode)
