"""Weight files that are whole, and every kind that is not: each refused with what is wrong, none executed."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from opsin.checkpoints import files
from opsin.errors import CheckpointError, UnsafeCheckpoint

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16), "scalar": torch.tensor(3.0)}


def save_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: tensor.numpy() for name, tensor in TENSORS.items()})  # type: ignore[arg-type]


SAVE: dict[str, Callable[[Path], None]] = {
    "x.safetensors": lambda path: save_file(TENSORS, path),
    "x.pth": lambda path: torch.save(TENSORS, path),
    "x.bin": lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    "x.npz": save_npz,
}


@pytest.mark.parametrize("name", SAVE)
def test_whole_files(name: str, tmp_path: Path) -> None:
    SAVE[name](tmp_path / name)
    read = files.read_tensors(tmp_path / name)
    assert read.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert read[key].dtype == tensor.dtype and torch.equal(read[key], tensor)


@pytest.mark.parametrize("name", SAVE)
def test_truncated_anywhere(name: str, tmp_path: Path) -> None:
    SAVE[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for length in range(1, len(data), max(1, len(data) // 37)):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            files.read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", SAVE)
def test_flipped_bits_never_escape(name: str, tmp_path: Path) -> None:
    """The file reads, or it is refused: no other exception, no crash."""
    SAVE[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / name).write_bytes(broken)
        try:
            files.read_tensors(tmp_path / name)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize("suffix", files.SUFFIXES)
@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty. Download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"just some text, no weights at all" * 9, "damaged|truncated"),
    ],
)
def test_something_else_under_the_name(suffix: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        files.read_tensors(path)


def test_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        files.read_tensors(tmp_path / "x.npz")
    (tmp_path / "x.h5").write_bytes(b"content")
    with pytest.raises(CheckpointError, match=r'ends in ".h5"; weights are read from .safetensors, .bin'):
        files.read_tensors(tmp_path / "x.h5")


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["OPSIN_TEST_TARGET"],)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_pickled_code_is_not_executed(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "executed"
    monkeypatch.setenv("OPSIN_TEST_TARGET", str(target))
    path = tmp_path / "x.pth"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"a": Payload()}))
    else:
        torch.save({"model": TENSORS, "extra": Payload()}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UnsafeCheckpoint, match="only be read by executing code.*torch.save"):
        files.read_tensors(path)
    assert not target.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "x.pt")
    with pytest.raises(UnsafeCheckpoint):
        files.read_tensors(tmp_path / "x.pt")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UnsafeCheckpoint, match="a holds pickled Python objects"):
        files.read_tensors(tmp_path / "x.npz")


def npy(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize(
    "content, reason",
    [
        (npy((10**6, 10**6), b"\0" * 24), "a says .1000000, 1000000. float32, which is 4,000,000,000,000 bytes"),
        (npy((2, 3), b"\0" * 20), "which is 24 bytes"),
        (npy((2, 3), b"\0" * 28), "which is 24 bytes"),
        (npy((-2, -3), b"\0" * 24), "a says"),
        (npy((6,), b"\0" * 24, "<U1"), "type <U1; weights are floating-point"),
        (b"not an array", "a is not a NumPy array"),
    ],
)
def test_npz_headers_that_lie(content: bytes, reason: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(CheckpointError, match=reason):
        files.read_tensors(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.npz", "x.pth"])
def test_zip_bombs(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl" if name == "x.pth" else "a.npy", npy((20 << 20,), bytes(80 << 20)))
    with pytest.raises(CheckpointError, match="claims to unpack to 83,886,"):
        files.read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "no such type", "shape": [2], "data_offsets": [0, 8]}},
    ],
)
def test_safetensors_headers_that_lie(header: dict, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        files.read_tensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + text)
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        files.read_tensors(tmp_path / "x.safetensors")


def test_a_tensor_larger_than_its_data(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"a \(1000000, 1000000\) is larger than its data"):
        files.read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"epoch": 3, "optimizer": {}}, "'epoch' is a int, not a tensor, and there is no state_dict, model"),
        ([torch.ones(1)], "holds a list, not named tensors"),
        ({}, "holds no tensors"),
    ],
)
def test_pytorch_files_without_weights(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=reason):
        files.read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(kind: str, tmp_path: Path) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    index = tmp_path / f"{stem}.{kind}.index.json"
    save: Callable = save_file if kind == "safetensors" else torch.save
    first, second = (f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2))
    index.write_text(json.dumps({"weight_map": {"a": first, "b": second, "scalar": second}}))
    save({"a": TENSORS["a"]}, tmp_path / first)
    with pytest.raises(CheckpointError, match=f"lacks 1 of 2 shards: {second}"):
        files.read_tensors(tmp_path)
    save({"b": TENSORS["b"]}, tmp_path / second)
    with pytest.raises(CheckpointError, match="1 tensors of its index are in no shard; one is scalar"):
        files.read_tensors(tmp_path)
    save({"b": TENSORS["b"], "scalar": TENSORS["scalar"]}, tmp_path / second)
    read = files.read_tensors(tmp_path)
    assert read.keys() == TENSORS.keys() and torch.equal(read["a"], TENSORS["a"])
    save({"a": TENSORS["a"], "scalar": TENSORS["scalar"]}, tmp_path / second)
    with pytest.raises(CheckpointError, match="a is in more than one shard"):
        files.read_tensors(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", 3, "a\\b"])
def test_an_index_names_files_beside_it(shard: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="a shard is a file beside its index"):
        files.read_tensors(tmp_path)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[1]", "holds a JSON list"),
        ('{"weight_map": {}}', 'has no "weight_map"'),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_broken_json(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        files.read_tensors(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"looked for model.safetensors, .*; found tf_model.h5"):
        files.read_tensors(tmp_path)


def test_written_weights_have_the_mode_of_any_file(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writing_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
