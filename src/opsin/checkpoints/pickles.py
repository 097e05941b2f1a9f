"""Pickled parameters of JAX programs, as DeepMind published Perceiver IO, read without executing the pickle.

A pickle is a program for a small stack machine. This one runs the part that builds containers, numbers, strings and
bytes. Where a pickle asks for something by name it gets one of the stand-ins below, which know NumPy arrays, Haiku's
mappings and JAX arrays as data; any other name is refused. No name is ever imported, and no object has methods here
that a pickle could reach. Memory is bounded by the length of the file.
"""

import math
import mmap
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr  # cut short from within: a tuple of tuples of the same tuples has no end
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opsin.errors import CheckpointError, UnsafeCheckpoint

NUMBERS = re.compile(r"[?biufc]\d{0,2}")  # NumPy's codes of numbers; O is a Python object, U and S are strings
TORCH_KINDS = "biuf"
ADVICE = (
    "opsin never runs code that a file brings along. If you trust it, load it where it was made and pickle its "
    "parameters as NumPy arrays: jax.tree_util.tree_map(numpy.asarray, params)"
)


class Damaged(Exception):
    """What a pickle says cannot be; the caller adds the name of the file."""


class Refused(Exception):
    """What a pickle asks for is code, or could be."""


# ── what the stand-ins make ──────────────────────────────────────────────────────────────────────────────────────────


class Text(NamedTuple):
    """Bytes, as pickles older than protocol 3 write them: one character each."""

    characters: str


class Dtype:
    """A NumPy type; a pickle names it first and gives its byte order after."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def set(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise Damaged(f"the state of the type {self.code} is not NumPy's")
        if state[2:5] != (None, None, None):
            raise Damaged(f"the type {self.code} has fields")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class Array:
    """A NumPy array; a pickle makes an empty one first and gives its contents after.

    Its bytes stay where they are until `numpy` is called: a pickle may mention the same ones a thousand times.
    """

    data: bytes | bytearray | Text | None = None
    axes: tuple[int, ...] | None = None

    def set(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Damaged("an array whose state is not NumPy's")
        _, shape, dtype, fortran_order, data = state
        if isinstance(data, list):
            raise Refused("an array of Python objects")
        self.fill(data, dtype, shape, "F" if fortran_order else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        if not isinstance(dtype, Dtype) or not isinstance(data, bytes | bytearray | Text) or order not in ("C", "F"):
            raise Damaged(f"an array {repr(shape)} of {_described(data)} and {_described(dtype)}")
        if not _is_shape(shape):
            raise Damaged(f"an array of shape {repr(shape)}")
        self.data, self.dtype, self.shape, self.order = data, dtype.numpy(), shape, order
        length, brought = self.nbytes, len(data.characters if isinstance(data, Text) else data)
        if length != brought:
            raise Damaged(f"an array {shape!s:.60} of {self.dtype}, {length:,} bytes, that brings {brought:,}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """A new array, in the byte order of this machine."""
        assert self.data is not None
        data = self.data.characters.encode("latin1") if isinstance(self.data, Text) else self.data
        array = np.frombuffer(data, self.dtype).reshape(self.shape, order=self.order)
        if self.axes is not None:
            array = array.transpose(self.axes)
        return np.array(array, self.dtype.newbyteorder("="), order="C")


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, tuple) and len(shape) <= 64 and all(type(side) is int and 0 <= side < 2**48 for side in shape)
    )


# ── the stand-ins ────────────────────────────────────────────────────────────────────────────────────────────────────


def _mapping(items: Any = None) -> dict[Any, Any]:
    """A mapping of a mapping is that one itself, and a list of pairs is used up: copies would outgrow the file."""
    if items is None:
        return {}
    if isinstance(items, dict):
        return items
    if not isinstance(items, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in items):
        raise Damaged(f"a mapping made of a {type(items).__name__}")
    mapping = _mapping_of([key for key, _ in items], [value for _, value in items])
    items.clear()
    return mapping


def _mapping_of(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    """Of names and numbers only: to hash a tuple of tuples of the same tuples takes for ever."""
    for key in keys:
        if not isinstance(key, str | int):
            raise Damaged(f"a mapping with a {type(key).__name__} for a name")
    return dict(zip(keys, values, strict=True))


def _type(code: Any, align: Any = False, copy: Any = True) -> Dtype:
    if isinstance(code, str) and code.startswith("O"):
        raise Refused("an array of Python objects")
    try:
        if isinstance(code, str) and NUMBERS.fullmatch(code) and np.dtype(code):
            return Dtype(code)
    except TypeError:  # a number of bytes that no type has
        pass
    raise Damaged(f"arrays of type {repr(code)}; parameters are numbers")


def _empty_array(kind: Any, shape: Any, typecode: Any) -> Array:
    if kind is not GLOBALS["numpy", "ndarray"]:
        raise Refused(f"a NumPy array of its own kind ({_described(kind)})")
    return Array()


def _array_of_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    array = Array()
    array.fill(data, dtype, shape, "C" if order == "K" else order)
    if order == "K" and axes is not None:
        if not _is_shape(axes) or sorted(axes) != list(range(len(shape))):
            raise Damaged(f"an array with axes in the order {repr(axes)}")
        array.axes = axes
    return array


def _scalar(dtype: Any, data: Any) -> Array:
    array = Array()
    array.fill(data, dtype, (), "C")
    return array


def _jax_array(function: Any, arguments: Any, state: Any, aval: Any) -> Array:
    """JAX keeps how NumPy would rebuild the array, and beside it whether its type is weak, which changes no number."""
    if function not in (GLOBALS["numpy.core.multiarray", "_reconstruct"], GLOBALS[MULTIARRAY, "_reconstruct"]):
        raise Refused(f"a JAX array made by {_described(function)}")
    array = _empty_array(*arguments)
    array.set(state)
    return array


def _bytes(text: Any, encoding: Any) -> Text:
    if not isinstance(text, str) or encoding != "latin1":
        raise Damaged(f"bytes written as {repr(encoding)}")
    return Text(text)


def _not_called(*arguments: Any) -> Any:
    raise Damaged("a class where an array should be")


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """What a pickle gets for an admitted name."""

    name: str
    make: Callable[..., Any]


MULTIARRAY = "numpy._core.multiarray"  # NumPy 2; numpy.core before
HAIKU = "haiku._src.data_structures"
STAND_INS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    *((core, "_reconstruct", _empty_array) for core in ("numpy.core.multiarray", MULTIARRAY)),
    *((core, "scalar", _scalar) for core in ("numpy.core.multiarray", MULTIARRAY)),
    *((core, "_frombuffer", _array_of_buffer) for core in ("numpy.core.numeric", "numpy._core.numeric")),
    ("numpy", "ndarray", _not_called),
    ("numpy", "dtype", _type),
    ("_codecs", "encode", _bytes),
    ("collections", "OrderedDict", _mapping),
    (HAIKU, "FlatMapping", _mapping),  # 0.0.3 and later, whatever the class is called inside
    (HAIKU, "frozendict", _mapping),  # 0.0.1 and 0.0.2
    ("jax._src.device_array", "reconstruct_device_array", _jax_array),  # 0.3; a plain NumPy array before
    ("jax._src.array", "_reconstruct_array", _jax_array),  # 0.4 and later
)
GLOBALS = {(module, name): Global(f"{module}.{name}", make) for module, name, make in STAND_INS}


def _described(value: Any) -> str:
    return value.name if isinstance(value, Global) else type(value).__name__


# ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────

MARK = object()
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "MARK": lambda: MARK,
}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
CODE = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}  # make an object of any class
OUTSIDE = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}


class Machine:
    """The stack, and what the pickle remembers by number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Any) -> Any:
        """What the pickle in `file` describes: containers, numbers, strings, and `Array`.

        Raises:
            Damaged, Refused; of a broken pickle anything in `BROKEN`.
        """
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        (result,) = self.stack
        return result

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in LITERALS:
            stack.append(argument)
        elif name in TUPLES:
            stack.append(tuple(self.pop(TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name == "LIST":
            stack.append(self.since_mark())
        elif name == "DICT":
            items = self.since_mark()
            stack.append(_mapping_of(items[::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = self.since_mark() if name == "APPENDS" else self.pop(1)
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.since_mark() if name == "SETITEMS" else self.pop(2)
            self.top(dict).update(_mapping_of(items[::2], items[1::2]))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = self.pop(2) if name == "STACK_GLOBAL" else argument.split(" ", 1)
            stack.append(self.find(module, attribute))
        elif name == "REDUCE":
            function, arguments = self.pop(2)
            if not isinstance(function, Global) or not isinstance(arguments, tuple):
                raise Refused(f"the call of a {_described(function)}")
            stack.append(self.call(function, arguments))
        elif name == "BUILD":
            (state,) = self.pop(1)
            if not isinstance(stack[-1], Array | Dtype):
                raise Refused(f"a state for {_described(stack[-1])}")
            stack[-1].set(state)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in CODE:
            raise Refused(f"an object of some class ({argument or _described(next(iter(stack[-2:]), None))})")
        elif name in OUTSIDE:
            raise Refused(f"something that is not in the file ({name})")
        elif name not in ("PROTO", "FRAME"):
            raise Damaged(f"the opcode {name}, which no pickle of parameters has")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("it takes what it never gave")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise Damaged(f"items for a {_described(self.stack[-1])} that should be a {kind.__name__}")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        count = 0
        while self.stack[-1 - count] is not MARK:
            count += 1
        items = self.pop(count) if count else []
        self.stack.pop()
        return items

    def find(self, module: Any, attribute: Any) -> Global:
        found = GLOBALS.get((module, attribute)) if isinstance(module, str) and isinstance(attribute, str) else None
        if found is None:
            raise Refused(f"{module!s:.100}.{attribute!s:.100}")
        return found

    def call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        try:
            return function.make(*arguments)
        except TypeError as error:  # another number of arguments
            raise Damaged(f"{function.name} with {len(arguments)} arguments") from error


# what `pickletools` and the stack say of bytes that are no pickle, or a part of one
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError)


# ── from containers to names ─────────────────────────────────────────────────────────────────────────────────────────


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a Haiku checkpoint: {params, state}, or parameters alone, as "module/parameter" → tensor.

    Raises:
        CheckpointError: not a pickle, damaged, or one that holds something else.
        UnsafeCheckpoint: it asks for code, which is named; none is executed.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            tree = Machine().run(data)
            return _tensors(tree, len(data))
        except Refused as refused:
            raise UnsafeCheckpoint(f"{path} asks for {refused}. Nothing of it was executed: {ADVICE}") from refused
        except Damaged as damaged:
            raise CheckpointError(f"{path} is not a pickle of Haiku parameters: it has {damaged}.") from damaged
        except BROKEN as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            raise CheckpointError(
                f"{path} is truncated, damaged or not a pickle ({detail}). Download it again."
            ) from error


def _tensors(tree: Any, length: int) -> dict[str, Tensor]:
    parts = [tree["params"], tree["state"]] if isinstance(tree, dict) and set(tree) == {"params", "state"} else [tree]
    tensors: dict[str, Tensor] = {}
    room = length  # no array is longer than what it is written with, so all of them fit into the file
    for part in parts:
        for module, leaves in _items(part, "the parameters"):
            for parameter, leaf in _items(leaves, module):
                name = f"{module}/{parameter}"
                if not isinstance(leaf, Array) or leaf.data is None:
                    raise Damaged(f"{_described(leaf)} for {name:.200}, which should be an array")
                if leaf.dtype.kind not in TORCH_KINDS:
                    raise Damaged(f"{leaf.dtype} for {name:.200}, which should be real numbers")
                if name in tensors or len(name) > 500:
                    raise Damaged(f"{name:.200} twice, or a name of {len(name)} characters")
                room -= leaf.nbytes + 16  # less than it takes to write the emptiest array
                if room < 0:
                    raise Damaged("one array under so many names that they would take more room than the file")
                tensors[name] = torch.from_numpy(leaf.numpy())
    return tensors


def _items(mapping: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise Damaged(f"{_described(mapping)} for {name:.200}, which should be a mapping of names")
    return list(mapping.items())
