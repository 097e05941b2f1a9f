"""Pickles of parameters: read whatever wrote them, and refused, with nothing executed, when they hold anything else."""

import collections
import contextlib
import dataclasses
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opsin import checkpoints
from opsin.checkpoints import files, haiku, rules
from opsin.errors import CheckpointError, UnknownModel, UnsafeCheckpoint
from opsin.models.perceiver_io import ImagePerceiverConfig
from opsin.models.vit import ViTConfig
from opsin.preprocess import PreprocessConfig

ARRAYS: dict[str, np.ndarray] = {
    "w": np.arange(6, dtype="<f4").reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6, dtype="<f4").reshape(2, 3)),
    "axes in another order": np.arange(30, dtype="<f4").reshape(2, 3, 5).transpose(2, 0, 1),
    "other end first": np.array([1, 2, 70000], ">i4"),
    "half": np.array([0.5, -1.25], "<f2"),
    "double": np.array([[np.pi]]),
    "single number": np.array(7, "<i4"),
    "flag": np.array([True, False]),
}


def read(content: Any, tmp_path: Path, protocol: int = 4) -> dict[str, torch.Tensor]:
    data = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    (tmp_path / "x.pystate").write_bytes(data)
    return files.read_tensors(tmp_path / "x.pystate")


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("numpy_1", [False, True], ids=["numpy 2", "numpy 1"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays(protocol: int, numpy_1: bool, tmp_path: Path) -> None:
    data = pickle.dumps({"layer": ARRAYS, "other": {"scalar": np.float32(1.5)}}, protocol)
    assert b"numpy._core" in data
    if numpy_1:  # modules were called otherwise; two bytes less in each name, which newer protocols count
        for old, new in (
            (b"numpy.core.multiarray", b"numpy._core.multiarray"),
            (b"numpy.core.numeric", b"numpy._core.numeric"),
        ):
            data = data.replace(struct.pack("B", len(new)) + new, struct.pack("B", len(old)) + old).replace(new, old)
        assert b"_core" not in data
    tensors = read(data, tmp_path)
    assert tensors.pop("other/scalar") == 1.5
    assert list(tensors) == [f"layer/{name}" for name in ARRAYS]
    for name, array in ARRAYS.items():
        tensor = tensors[f"layer/{name}"]
        assert tensor.is_contiguous() and tensor.numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(tensor.numpy(), array), name


class Reduced:
    """Pickled as a call of what is under this name, of a module that need not exist."""

    def __init__(self, name: str, *arguments: Any, state: Any = None) -> None:
        self.name, self.arguments, self.state = name, arguments, state


def pickled(value: Any) -> bytes:
    """Protocol 2 by hand, of `Reduced` and of all that NumPy and the standard library pickle."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: Any) -> bytes:
    if isinstance(value, Reduced):
        module, _, name = value.name.rpartition(".")
        call = f"c{module}\n{name}\n".encode() + _pickled(value.arguments) + b"R"
        return call if value.state is None else call + _pickled(value.state) + b"b"
    if isinstance(value, dict):
        return b"}(" + b"".join(_pickled(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_pickled, value)) + b"t"
    if isinstance(value, type) or callable(value):
        return f"c{value.__module__}\n{value.__qualname__}\n".encode()
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    return pickle.dumps(value, 2)[2:-1]  # all but what begins and ends it


PARTS: Any = ARRAYS["w"].__reduce__()
RECONSTRUCT, EMPTY, STATE = PARTS
FLAT_MAPPING = "haiku._src.data_structures.FlatMapping"


@pytest.mark.parametrize(
    "tree",
    [
        {"m": {"w": ARRAYS["w"]}},
        collections.OrderedDict(m=collections.OrderedDict(w=ARRAYS["w"])),
        Reduced(FLAT_MAPPING, {"m": Reduced(FLAT_MAPPING, {"w": ARRAYS["w"]})}),
        Reduced("haiku._src.data_structures.frozendict", {"m": {"w": ARRAYS["w"]}}),
        Reduced("collections.OrderedDict", [["m", {"w": ARRAYS["w"]}]]),
        {"params": {"m": {"w": ARRAYS["w"]}}, "state": {}},
        {"params": {}, "state": Reduced(FLAT_MAPPING, {"m": {"w": ARRAYS["w"]}})},
    ],
)
def test_mappings(tree: Any, tmp_path: Path) -> None:
    data = pickled(tree) if isinstance(tree, Reduced) or isinstance(tree.get("state"), Reduced) else tree
    tensors = read(data, tmp_path)
    assert list(tensors) == ["m/w"] and np.array_equal(tensors["m/w"].numpy(), ARRAYS["w"])


@pytest.mark.parametrize(
    "name", ["jax._src.device_array.reconstruct_device_array", "jax._src.array._reconstruct_array"]
)
def test_arrays_of_older_jax(name: str, tmp_path: Path) -> None:
    aval = {"weak_type": False, "named_shape": {}}
    array = Reduced(name, RECONSTRUCT, EMPTY, STATE, aval)
    assert np.array_equal(read(pickled({"m": {"w": array}}), tmp_path)["m/w"].numpy(), ARRAYS["w"])


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_this_jax_and_mappings_of_this_haiku(protocol: int, tmp_path: Path) -> None:
    import haiku as hk
    import jax.numpy as jnp

    tree = {"m": {"w": jnp.asarray(ARRAYS["w"]), "weak": jnp.asarray(2.5), "count": jnp.asarray(3)}}
    for form in (tree, hk.data_structures.to_immutable_dict(tree)):
        tensors = read(form, tmp_path, protocol)
        assert np.array_equal(tensors["m/w"].numpy(), ARRAYS["w"])
        assert tensors["m/weak"] == 2.5 and tensors["m/count"] == 3 and tensors["m/count"].dtype == torch.int32


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    """Pickled as NEWOBJ."""


class Kind(np.ndarray):
    pass


def attacks(canary: str) -> dict[str, tuple[Any, str]]:
    """Name → pickle, and what the refusal says."""
    touch = f"__import__('os').mkdir({canary!r})"
    array = ARRAYS["w"]
    numpy_type = ("numpy.dtype", "f4", False, True)
    return {
        "os.system": ({"m": Call(os.system, f"mkdir {canary}")}, "asks for posix.system"),
        "eval": ({"m": {"w": Call(eval, touch)}}, "asks for builtins.eval"),
        "mkdir": (Call(os.mkdir, canary), "asks for posix.mkdir"),
        "open": (Call(open, canary, "w"), "asks for _?io.open"),
        "in the state": ({"params": {}, "state": {"m": {"w": Call(exec, touch)}}}, "asks for builtins.exec"),
        "in a state of an array": (
            pickled(
                {
                    "m": Reduced(
                        "numpy.core.multiarray._reconstruct",
                        np.ndarray,
                        (0,),
                        "b",
                        state=Reduced("builtins.eval", touch),
                    )
                }
            ),
            "asks for builtins.eval",
        ),
        "as a key": (b"\x80\x02}(cbuiltins\neval\nNu.", "asks for builtins.eval"),
        "by the stack": (pickle.dumps(Call(eval, touch), 5), "asks for builtins.eval"),
        "getattr": (Call(getattr, np.ndarray, "tofile"), "asks for builtins.getattr"),
        "numpy's own": (Call(np.load, canary), "asks for numpy.load"),
        "torch": (Call(torch._utils._rebuild_tensor_v2, None), "asks for torch._utils._rebuild_tensor_v2"),
        "unbound": (b"\x80\x02cnumpy\nndarray\n(tR.", "a class where an array should be"),
        "called twice": (b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR)R.", "asks for the call of a Dtype"),
        "objects inside an array": (
            {"m": {"w": np.array([Call(eval, touch)])}},
            "builtins.eval|array of Python objects",
        ),
        "an array of objects": ({"m": {"w": np.array([None, "x"])}}, "asks for an array of Python objects"),
        "a list for bytes": (
            pickled(
                {
                    "m": Reduced(
                        "numpy.core.multiarray._reconstruct",
                        np.ndarray,
                        (0,),
                        "b",
                        state=(1, (1,), Reduced(*numpy_type), False, [1]),
                    )
                }
            ),
            "asks for an array of Python objects",
        ),
        "its own kind of array": ({"m": {"w": array.view(Kind)}}, "asks for .*test_haiku.Kind"),
        "no array at all": (
            pickled(Reduced("numpy.core.multiarray._reconstruct", Reduced("collections.OrderedDict"), (0,), "b")),
            r"a NumPy array of its own kind \(dict\)",
        ),
        "JAX with another function": (
            pickled(Reduced("jax._src.array._reconstruct_array", Reduced("numpy.dtype", "f4"), (), (), {})),
            "a JAX array made by Dtype",
        ),
        "a state for a stand-in": (b"\x80\x02cnumpy\nndarray\n}b.", "asks for a state for numpy.ndarray"),
        "a state for a mapping": (
            b"\x80\x02c" + FLAT_MAPPING.replace(".Flat", "\nFlat").encode() + b"\n}\x85R}b.",
            "asks for a state for dict",
        ),
        "a new object": (b"\x80\x02cnumpy\nndarray\n)\x81.", r"an object of some class \(numpy.ndarray\)"),
        "a new object of a class": (Plain(), "asks for .*test_haiku.Plain"),
        "an old object": (b"(ibuiltins\neval\n.", r"an object of some class \(builtins eval\)"),
        "by a number": (b"\x80\x02\x82\x01.", r"not in the file \(EXT1\)"),
        "by an outer name": (b"Pname\n.", r"not in the file \(PERSID\)"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.sort\x93.", "asks for numpy.ndarray.sort"),
    }


@pytest.mark.parametrize("attack", attacks(""))
def test_nothing_is_executed(attack: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content, reason = attacks(str(canary))[attack]
    with pytest.raises(CheckpointError, match=reason) as refusal:
        read(content, tmp_path)
    assert not canary.exists()
    if isinstance(refusal.value, UnsafeCheckpoint):
        assert "x.pystate asks for" in str(refusal.value) and "Nothing of it was executed" in str(refusal.value)
        assert "numpy.asarray" in str(refusal.value)


def test_the_attacks_are_real(tmp_path: Path) -> None:
    """Python itself executes them, or the test above would prove nothing."""
    canary = tmp_path / "canary"
    for attack in ("os.system", "eval", "mkdir", "in the state", "by the stack", "objects inside an array"):
        content, _ = attacks(str(canary))[attack]
        pickle.loads(content if isinstance(content, bytes) else pickle.dumps(content))
        assert canary.exists(), attack
        canary.rmdir()


MULTIARRAY = "numpy.core.multiarray._reconstruct"


def array(shape: Any, code: Any = "f4", data: Any = b"", **state: Any) -> Any:
    kind = Reduced("numpy.dtype", code, False, True, **state)
    return pickled({"m": {"w": Reduced(MULTIARRAY, np.ndarray, (0,), "b", state=(1, shape, kind, False, data))}})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (array((2**40, 2**40)), r"an array \(1099511627776, 1099511627776\) of float32, 4,835,.* bytes, that brings 0"),
        (array((3,), data=b"12345678"), "12 bytes, that brings 8"),
        (array((-1,)), r"an array of shape \(-1,\)"),
        (array((0, 2**70)), "an array of shape"),
        (array((2.0,), data=b"12345678"), r"an array of shape \(2.0,\)"),
        (array(3), "an array of shape 3"),
        (array((1,), data="text"), "an array .* of str and Dtype"),
        (array((1,), "S4", b"text"), "arrays of type 'S4'; parameters are numbers"),
        (array((1,), "V4", b"text"), "arrays of type 'V4'"),
        (array((1,), "f4,f4", b"12345678"), "arrays of type 'f4,f4'"),
        (array((1,), "f99", b"1234"), "arrays of type 'f99'"),
        (array((1,), "c8", b"12345678"), "complex64 for m/w, which should be real numbers"),
        (array((1,), 4, b"1234"), "arrays of type 4"),
        (
            array((1,), data=b"1234", state=(3, "?", None, None, None, -1, -1, 0)),
            "the state of the type f4 is not NumPy's",
        ),
        (array((1,), data=b"1234", state=(3, "<", None, ("x",), {}, -1, -1, 0)), "the type f4 has fields"),
        (pickled({"m": {"w": Reduced(MULTIARRAY, np.ndarray, (0,), "b")}}), "Array for m/w, which should be an array"),
        (pickled({"m": {"w": Reduced(MULTIARRAY, np.ndarray)}}), "_reconstruct with 1 arguments"),
        (pickled({"m": {"w": Reduced("_codecs.encode", "x", "rot13")}}), "bytes written as 'rot13'"),
        (pickled(Reduced(FLAT_MAPPING, 3)), "a mapping made of a int"),
        ({"m": {"w": [1.0]}}, "list for m/w, which should be an array"),
        ({"m": {"w": {"deep": ARRAYS["w"]}}}, "dict for m/w"),
        ({"m": ARRAYS["w"]}, "Array for m, which should be a mapping of names"),
        ({1: {"w": ARRAYS["w"]}}, "dict for the parameters, which should be a mapping of names"),
        ([ARRAYS["w"]], "list for the parameters"),
        (None, "NoneType for the parameters"),
        ({}, "holds no tensors"),
        ({"params": {"m": {"w": ARRAYS["w"]}}, "state": {"m": {"w": ARRAYS["w"]}}}, "m/w twice"),
        ({"a": dict.fromkeys(map(str, range(99)), np.zeros(5000))}, "more room than the file"),
        (b"\x80\x02K\x01.K\x02.", "int for the parameters"),
        (b"\x80\x02K\x01K\x02.", "truncated, damaged"),
        (b"\x80\x02K\x01", "truncated, damaged .*pickle exhausted before seeing STOP"),
        (b"\x80\x02t.", "truncated, damaged"),
        (b"\x80\x02R.", "truncated, damaged .*it takes what it never gave"),
        (b"\x80\x02h\x05.", "truncated, damaged"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "holds no tensors"),  # Python's own unpickler would take 64 GB for this
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x.", "truncated, damaged"),
        (b"\x80\x02(I1\nI2\nI3\nd.", "truncated, damaged"),
        (b"\x80\x02]}}e.", "truncated, damaged"),
        (b"\x80\x02}]K\x01s.", "a mapping with a list for a name"),
        (b"\x80\x02}K\x01a.", "items for a dict that should be a list"),
        (b"\x80\x02]\x8f.", "the opcode EMPTY_SET, which no pickle of parameters has"),
        (b"\x93NUMPY\x01\x00 not a pickle", "truncated, damaged"),
        (b"PK\x03\x04 not a pickle", "asks for something|truncated, damaged"),
        (b"", "is empty. Download it again"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-lfs pointer"),
    ],
)
def test_what_cannot_be(content: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read(content, tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_truncated_anywhere(protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps({"m": ARRAYS}, protocol)
    for length in range(1, len(data)):
        with pytest.raises(CheckpointError):
            read(data[:length], tmp_path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_flipped_bits_never_escape(protocol: int, tmp_path: Path) -> None:
    """The file reads, or it is refused: no other exception, no crash."""
    data, rng = pickle.dumps({"m": ARRAYS}, protocol), np.random.default_rng(0)
    for _ in range(1500):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[place] ^= 1 << rng.integers(0, 8)
        with contextlib.suppress(CheckpointError):
            read(bytes(damaged), tmp_path)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ATTENTION = {
    "attention/linear/w", "attention/linear/b", "attention/linear_1/w", "attention/linear_1/b",
    "attention/linear_2/w", "attention/linear_2/b", "attention/linear_3/w", "attention/linear_3/b",
    "mlp/linear/w", "mlp/linear/b", "mlp/linear_1/w", "mlp/linear_1/b",
    "layer_norm/scale", "layer_norm/offset", "layer_norm_1/scale", "layer_norm_1/offset",
}  # fmt: skip
CROSS = {*ATTENTION, "layer_norm_2/scale", "layer_norm_2/offset"}


def names_of(encoder: str, layers: int, decoder: str, *others: str) -> set[str]:
    return {
        f"{encoder}/~/trainable_position_encoding/pos_embs",
        *(f"{encoder}/~/cross_attention/{name}" for name in CROSS),
        *(f"{encoder}/~/self_attention/{name}" for name in ATTENTION),
        *(f"{encoder}/~/self_attention_{i}/{name}" for i in range(1, layers) for name in ATTENTION),
        *(f"{decoder}/cross_attention/{name}" for name in CROSS),
        *others,
    }


IMAGE: Any = (
    "perceiver_encoder",
    6,
    "classification_decoder/~/basic_decoder",
    "classification_decoder/~/basic_decoder/~/trainable_position_encoding/pos_embs",
    "classification_decoder/~/basic_decoder/output/w",
    "classification_decoder/~/basic_decoder/output/b",
)
NAMES = {
    "fourier": names_of(*IMAGE),
    "learned": names_of(
        *IMAGE,
        "image_preprocessor/~/conv2_d/w",
        "image_preprocessor/~/conv2_d/b",
        "image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs",
        "image_preprocessor/~_build_network_inputs/position_encoding_projector/linear/w",
        "image_preprocessor/~_build_network_inputs/position_encoding_projector/linear/b",
    ),
    "conv": names_of(
        *IMAGE,
        "image_preprocessor/~/conv2_d_downsample/~/conv/w",
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/scale",
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/offset",
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/mean_ema/average",
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/mean_ema/counter",
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/var_ema/average",
    ),
    "language": names_of(
        "perceiver_encoder",
        26,
        "basic_decoder",
        "basic_decoder/~/trainable_position_encoding/pos_embs",
        "embed/embeddings",
        "trainable_position_encoding/pos_embs",
        "embedding_decoder/bias",
    ),
    "flow": names_of(
        "perceiver_encoder",
        24,
        "flow_decoder/~/basic_decoder",
        "flow_decoder/~/basic_decoder/output/w",
        "flow_decoder/~/basic_decoder/output/b",
        "image_preprocessor/patches_linear/w",
        "image_preprocessor/patches_linear/b",
    ),
    "multimodal": names_of(
        "encoder",
        8,
        "multimodal_decoder/~/basic_decoder",
        "multimodal_decoder/~/basic_decoder/output/w",
        "multimodal_decoder/~/basic_decoder/output/b",
        "classification_decoder/~/basic_decoder/~/trainable_position_encoding/pos_embs",
        "multimodal_preprocessor/audio_padding/pos_embs",
        "multimodal_preprocessor/image_padding/pos_embs",
        "multimodal_preprocessor/label_padding/pos_embs",
        "multimodal_preprocessor/audio_mask_token/pos_embs",
        "multimodal_preprocessor/image_mask_token/pos_embs",
        "multimodal_preprocessor/label_mask_token/pos_embs",
        "multimodal_decoder/~decoder_query/audio_padding/pos_embs",
        "multimodal_decoder/~decoder_query/image_padding/pos_embs",
        "multimodal_decoder/~decoder_query/label_padding/pos_embs",
        "audio_postprocessor/linear/w",
        "audio_postprocessor/linear/b",
        "classification_postprocessor/linear/w",
        "classification_postprocessor/linear/b",
        "projection_postprocessor/linear/w",
        "projection_postprocessor/linear/b",
    ),
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {  # of a published file, in its own layout
    "fourier": {"perceiver_encoder/~/cross_attention/attention/linear_1/w": (261, 261)},
    "learned": {
        "image_preprocessor/~/conv2_d/w": (1, 1, 3, 256),
        "image_preprocessor/~_build_network_inputs/trainable_position_encoding/pos_embs": (50176, 256),
    },
    "conv": {
        "image_preprocessor/~/conv2_d_downsample/~/conv/w": (7, 7, 3, 64),
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/scale": (1, 1, 1, 64),
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/var_ema/average": (1, 1, 1, 64),
        "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~/mean_ema/counter": (),
        "perceiver_encoder/~/cross_attention/attention/linear/w": (1024, 322),
        "perceiver_encoder/~/cross_attention/attention/linear_3/w": (322, 1024),
    },
    "language": {
        "embed/embeddings": (262, 768),
        "perceiver_encoder/~/cross_attention/attention/linear_2/w": (768, 1280),
        "perceiver_encoder/~/self_attention_25/attention/linear/w": (1280, 256),
        "basic_decoder/cross_attention/attention/linear/w": (768, 256),
        "basic_decoder/cross_attention/attention/linear_2/w": (1280, 768),
    },
    "flow": {"image_preprocessor/patches_linear/w": (54, 64), "flow_decoder/~/basic_decoder/output/w": (322, 2)},
    "multimodal": {
        "encoder/~/trainable_position_encoding/pos_embs": (784, 512),
        "multimodal_decoder/~/basic_decoder/output/w": (1026, 512),
        "multimodal_preprocessor/image_padding/pos_embs": (1, 461),
        "multimodal_decoder/~decoder_query/audio_padding/pos_embs": (1, 641),
    },
}


def published(network: str) -> dict[str, torch.Tensor]:
    """A published file without its numbers."""
    config = haiku.PUBLISHED[network]
    native = {
        name: torch.empty(shape, device="meta", dtype=torch.long if name.endswith("tracked") else None)
        for name, shape in rules.shapes(config).items()
    }
    return rules.invert(native, haiku.rules(config), config)


@pytest.mark.parametrize("network", haiku.PUBLISHED)
def test_names_and_shapes_of_the_published_files(network: str) -> None:
    tensors = published(network)
    assert tensors.keys() == NAMES[network]
    assert {name: tuple(tensors[name].shape) for name in SHAPES[network]} == SHAPES[network]
    assert haiku.infer_config(tensors, Path("x.pystate")) == haiku.PUBLISHED[network]
    native, report = rules.convert(tensors, haiku.rules(haiku.PUBLISHED[network]), haiku.PUBLISHED[network])
    assert not report and native.keys() == rules.shapes(haiku.PUBLISHED[network]).keys()


# ── what a file does not say ─────────────────────────────────────────────────────────────────────────────────────────

TINY = ImagePerceiverConfig(
    front_end="pixels", num_latents=3, latent_dim=16, layers_per_block=2, num_bands=2, num_classes=1000
)


def tiny(**changes: Any) -> dict[str, dict[str, np.ndarray]]:
    native = {name: torch.ones(shape) for name, shape in rules.shapes(TINY).items()}
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in rules.invert(native, haiku.rules(TINY), TINY).items():
        module, _, parameter = name.rpartition("/")
        tree.setdefault(module, {})[parameter] = tensor.numpy()
    return tree | changes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.pickle"
    path.write_bytes(pickle.dumps({"params": tiny(), "state": {}}))
    return path


def test_a_classifier(path: Path) -> None:
    read = checkpoints.read(path)
    assert (read.source.format, read.source.name, read.source.revision) == ("haiku", str(path), None)
    assert len(read.source.sha256) == 64
    assert read.model.config == ImagePerceiverConfig(
        front_end="pixels",
        num_latents=3,
        latent_dim=16,
        layers_per_block=2,
        num_bands=2,
        max_resolution=(224, 224),
        num_blocks=8,
        num_heads=8,
        numerics="deepmind",
    )
    assert read.preprocess == PreprocessConfig.deepmind_perceiver((224, 224))
    assert read.labels is not None and read.labels.name(0) == "tench, Tinca tinca"


def test_a_given_config(path: Path) -> None:
    given = dataclasses.replace(TINY, num_heads=4, num_blocks=3, image_size=(9, 7))
    read = checkpoints.read(path, config=given)
    assert read.model.config == given and read.model(torch.zeros(1, 3, 9, 7)).shape == (1, 1000)
    assert read.preprocess is not None and read.preprocess.image_size == (9, 7)
    with pytest.raises(CheckpointError, match='trained in DeepMind.s arithmetic; with numerics "transformers"'):
        checkpoints.read(path, config=dataclasses.replace(given, numerics="transformers"))
    with pytest.raises(CheckpointError, match="config cannot be a ViTConfig. Known: ImagePerceiverConfig, Text"):
        checkpoints.read(path, config=ViTConfig())  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"num_heads \(3\) does not divide qk_dim \(16\).*read\(path, config"):
        checkpoints.read(path, config=dataclasses.replace(given, num_heads=3))
    with pytest.raises(CheckpointError, match="missing .*: perceiver_encoder/~/self_attention_2/layer_norm/scale"):
        checkpoints.read(path, config=dataclasses.replace(given, layers_per_block=3))
    with pytest.raises(CheckpointError, match="opsin/vit-tiny says itself what its model is; a config is for .pystate"):
        checkpoints.read("opsin/vit-tiny", config=given)


def test_files_that_do_not_fit(path: Path) -> None:
    def refused(content: Any, reason: str) -> None:
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=reason):
            checkpoints.read(path)

    three = {"w": np.ones((4, 4), "f4")}
    refused({"conv": three}, "none of DeepMind's Perceiver IO networks .*It has conv/w, …")
    refused(tiny(extra=three), r"unexpected \(1\): extra/w")
    lacking = tiny()
    del lacking["perceiver_encoder/~/cross_attention/layer_norm_2"]["offset"]
    refused(lacking, r"missing \(1\): perceiver_encoder/~/cross_attention/layer_norm_2/offset")
    del lacking["perceiver_encoder/~/cross_attention/attention/linear_2"]
    refused(lacking, "looks like the fourier network, and lacks '.*cross_attention/attention/linear_2/w'")
    flat = tiny(**{"perceiver_encoder/~/trainable_position_encoding": {"pos_embs": np.ones(3, "f4")}})
    refused(flat, "looks like the fourier network, and is not: not enough values to unpack")
    mlp = {**tiny()["perceiver_encoder/~/cross_attention/mlp/linear"], "w": np.ones(3, "f4")}
    refused(
        tiny(**{"perceiver_encoder/~/cross_attention/mlp/linear": mlp}),
        "looks like the fourier network, and is not: tuple index out of range",
    )
    for side in (2**40, 2**60):  # an empty tensor may have any shape, and costs no bytes
        endless = {
            **tiny()["perceiver_encoder/~/cross_attention/attention/linear_2"],
            "w": np.ones((2 + side, 0), "f4"),
        }
        refused(
            tiny(**{"perceiver_encoder/~/cross_attention/attention/linear_2": endless}),
            "does not fit|no width of|an array of shape",
        )
    narrow = {**tiny()["perceiver_encoder/~/cross_attention/attention/linear_2"], "w": np.ones((12, 13), "f4")}
    refused(
        tiny(**{"perceiver_encoder/~/cross_attention/attention/linear_2": narrow}),
        r"9 is no width of Fourier positions on 2 axes, 2·\(1 \+ 2·K\)",
    )


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(UnknownModel, match="no such file or folder here"):
        checkpoints.read("somebody/imagenet_conv_preprocessing.pystate")


LAUGHING = b")q\x00" + b"h\x00h\x00\x86q\x00" * 200  # a tuple of two of the same, two hundred times over


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}" + LAUGHING + b"K\x01s.",
        b"\x80\x02(" + LAUGHING + b"K\x01d.",
        b"\x80\x02" + LAUGHING + b"cnumpy\ndtype\nh\x00\x85R.",
        b"\x80\x02" + LAUGHING + b"c_codecs\nencode\nX\x01\x00\x00\x00ah\x00\x86R.",
        b"\x80\x02ccollections\nOrderedDict\n]" + LAUGHING + b"a\x85R.",
    ],
    ids=["key", "key of DICT", "dtype", "encoding", "pairs"],
)
def test_tuples_of_the_same_tuples_are_not_followed(content: bytes, tmp_path: Path) -> None:
    """To hash or to print them would take 2 to the 200th steps."""
    path = tmp_path / "laughing.pystate"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a pickle of Haiku parameters"):
        checkpoints.read(path)


def test_mappings_of_one_mapping_are_not_copies(tmp_path: Path) -> None:
    path = tmp_path / "copies.pystate"
    names = b"".join(b"X\x05\x00\x00\x00%05dN" % i for i in range(2000))
    path.write_bytes(
        b"\x80\x02ccollections\nOrderedDict\nq\x00}q\x01(" + names + b"u](" + b"h\x00h\x01\x85R" * 3000 + b"e."
    )
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        checkpoints.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # as copies 280 MB


def test_a_list_of_pairs_makes_one_mapping(tmp_path: Path) -> None:
    path = tmp_path / "pairs.pystate"
    pairs = b"".join(b"(X\x05\x00\x00\x00%05dNt" % i for i in range(2000))
    path.write_bytes(
        b"\x80\x02ccollections\nOrderedDict\nq\x00](" + pairs + b"eq\x01](" + b"h\x00h\x01\x85R" * 3000 + b"e."
    )
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        checkpoints.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # as copies 280 MB


@pytest.mark.parametrize(("width", "reason"), [(0, "more room than the file"), (600, "a name of 60[0-9] characters")])
def test_names_are_bounded_too(width: int, reason: str, tmp_path: Path) -> None:
    """One empty array under every name of every module costs no bytes; the names do."""
    leaves = {f"{i:03}": ARRAYS["w"][:0] for i in range(300)}
    path = tmp_path / "names.pystate"
    path.write_bytes(pickle.dumps({f"{i:04}{'x' * width}": leaves for i in range(3000)}))
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.read(path)
