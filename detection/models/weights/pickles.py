"""Pickles read as data, whoever wrote them: containers, numbers, text, arrays and tensors, and nothing else.

Python's own unpickler calls what a file names, and gives any object the state that the file holds for it. `read_pickle`
interprets the format itself. A file reaches the functions of `_Interpreter.FUNCTIONS` alone, each of which checks every
argument. What else the metadata of known packages names becomes an inert stand-in, and any other name is refused.
Work, memory and depth are bounded by `MAX_OPERATIONS`, `MAX_DEPTH` and the size of the file.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

MAX_OPERATIONS = 1_000_000
"""Of one pickle, where the state of a detector in training takes 20,000; they take at most some hundred bytes each."""
MAX_DEPTH = 100
"""Containers inside one another."""
_TOO_DEEP = f"its content is nested more than {MAX_DEPTH} levels deep"
_MAX_BITS = 2048  # of a whole number; random generators have states of 128 and more
_MAX_ARGUMENTS = 8
_MAX_NAME = 1000  # characters of a name or key
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**48  # far from what overflows in torch and numpy, which count in 64 bits


class StandIn:
    """In the place of a foreign package's metadata object: takes everything, keeps nothing, does nothing."""


@dataclass(frozen=True)
class Storage:
    """A tensor's memory, as a pickle refers to it: 1-D values, None where they are not to be read."""

    values: Tensor | None


@dataclass(frozen=True)
class _Name:
    """One of FUNCTIONS, on its way to be called."""

    function: str


@dataclass
class _DType:
    """The type of a numpy array's elements, as a code of _ELEMENTS; None for types that no weights have."""

    code: str | None
    order: str = "="


# Packages whose objects turn up in the metadata of detection checkpoints. They are never imported.
METADATA_PACKAGES = {
    *("mmengine", "mmcv", "mmdet", "mmcls", "mmpretrain", "mmseg", "mmyolo", "mmselfsup"),
    *("detectron2", "fvcore", "iopath", "omegaconf", "yacs", "addict", "yapf"),
    *("argparse", "datetime", "decimal", "pathlib", "uuid"),
}
# Other names that metadata uses; they become stand-ins too. (getattr is how a method is pickled.)
INERT_NAMES = {
    *("builtins.getattr", "builtins.object", "builtins.slice", "builtins.range", "builtins.complex"),
    *("builtins.bytearray", "builtins.frozenset", "builtins.set", "builtins.list", "builtins.dict", "builtins.tuple"),
    *("builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.bytes"),
    *("builtins.long", "builtins.unicode"),  # Python 2's, which protocol 2 writes
    *("collections.defaultdict", "collections.deque", "collections.Counter", "copyreg._reconstructor"),
    *("numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.device"),
}
# The types of tensors; others (quantized, complex, of 8 bits) occur in no detector.
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_TYPES = {name: dtype for key, dtype in _STORAGES.items() for name in (str(dtype), f"torch.{key}Storage")}
_ELEMENTS = re.compile("[<>=|]?(f[248]|[iu][1248])")  # of numpy arrays: numbers of fixed size, never references
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.cuda": "torch"}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _no_storages(saved_id: Any) -> Storage:
    raise UnpicklingError("it refers to storages, which a pickle alone has not")


def read_pickle(stream: BinaryIO, file_size: int, load_storage: Callable[[Any], Storage] = _no_storages) -> Any:
    """The object of the pickle that `stream` is at; the stream is behind it then.

    file_size: bytes of the whole file; all tensors and arrays together may have four times as many. load_storage: what
    a persistent id, of any type, refers to; it raises UnpicklingError for one that is no reference to a storage.
    Strings of Python 2 are taken for latin1.

    Returns:
        Dictionaries, lists, tuples, text, bytes, numbers, tensors, numpy arrays, and StandIns. Sets, subclasses of
        containers and dictionary keys that are neither short text or bytes nor a number become StandIns; an
        OrderedDict is a dictionary.

    Raises:
        UnpicklingError: the pickle refers to what no weight file needs, or is larger than any.
        ValueError, IndexError, KeyError, TypeError, RuntimeError: it is damaged.
    """
    return _Interpreter(file_size, load_storage).run(stream)


class _Interpreter:
    def __init__(self, file_size: int, load_storage: Callable[[Any], Storage]) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[Any, Any] = {}
        self._budget = MAX_OPERATIONS + 4 * file_size
        self._load_storage = load_storage

    def run(self, stream: BinaryIO) -> Any:
        # genops decodes an operation and its argument, and checks the lengths that the pickle gives against the stream.
        for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if number == MAX_OPERATIONS:
                raise UnpicklingError(f"its pickle has more than {MAX_OPERATIONS:,} operations")
            if operation.name != "STOP":
                self._step(operation.name, argument)
        result = self._stack.pop()
        items, depth = _extent(result, {})
        if depth > MAX_DEPTH:
            raise UnpicklingError(_TOO_DEEP)
        self._spend(items)
        return result

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > _MAX_BITS:
                raise UnpicklingError(f"it has a number of more than {_MAX_BITS} bits")
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif name in (
            "TUPLE",
            "LIST",
            "DICT",
            "FROZENSET",
            "POP_MARK",
            "APPENDS",
            "SETITEMS",
            "ADDITEMS",
            "OBJ",
            "INST",
        ):
            self._close_mark(name, argument)
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append([] if name == "EMPTY_LIST" else {} if name == "EMPTY_DICT" else StandIn())
        elif name == "APPEND":
            (item,) = self._pop(1)
            self._extend(stack[-1], [item])
        elif name == "SETITEM":
            items = self._pop(2)
            self._set_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(self._find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._find(*self._pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(*self._pop(2)))
        elif name == "NEWOBJ_EX":
            stack.append(self._call(*self._pop(3)[:2]))
        elif name == "BUILD":
            (state,) = self._pop(1)
            self._build(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(self._load_storage(*self._pop(1)))
        elif name == "POP" and not stack:
            self._stack = self._marked.pop()
        elif name == "POP":
            stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise UnpicklingError(f"it has the operation {name}, which no weight file needs")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise ValueError("an operation of its pickle lacks operands")
        first = len(self._stack) - count
        items = self._stack[first:]
        del self._stack[first:]
        return items

    def _close_mark(self, name: str, argument: Any) -> None:
        items, self._stack = self._stack, self._marked.pop()
        if name == "TUPLE":
            self._stack.append(tuple(items))
        elif name == "LIST":
            self._stack.append(items)
        elif name == "DICT":
            self._stack.append({})
            self._set_items(self._stack[-1], items)
        elif name == "FROZENSET":
            self._stack.append(StandIn())
        elif name == "APPENDS":
            self._extend(self._stack[-1], items)
        elif name == "SETITEMS":
            self._set_items(self._stack[-1], items)
        elif name == "OBJ":
            self._stack.append(self._call(items[0], tuple(items[1:])))
        elif name == "INST":
            self._stack.append(self._call(self._find(*argument.split(" ", 1)), tuple(items)))

    def _extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target += items
        elif type(target) is not StandIn:
            raise UnpicklingError(f"it appends to a {type(target).__name__}")

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is dict:
            # Comparing or hashing other keys takes a time, or a depth of recursion, of the file's choosing.
            keys = [key if _is_plain(key) else StandIn() for key in items[::2]]
            target.update(zip(keys, items[1::2], strict=True))
        elif type(target) is not StandIn:
            raise UnpicklingError(f"it sets items of a {type(target).__name__}")

    def _build(self, target: Any, state: Any) -> None:
        """What a pickle says of an object that it has built; of a dictionary, or a stand-in, it counts for nothing."""
        if type(target) is np.ndarray and type(state) is tuple and len(state) == 5:
            self._fill(target, *state)
        elif type(target) is _DType:
            if type(state) is tuple and len(state) > 1 and type(state[1]) is str and state[1] in "<>=|":
                target.order = state[1] or "="
        elif type(target) not in (StandIn, dict):
            raise UnpicklingError(f"it sets the state of a {type(target).__name__}")

    def _fill(self, array: np.ndarray, _version: Any, shape: Any, dtype: Any, is_fortran: Any, data: Any) -> None:
        """The second half of how numpy pickles an array: in the place of its __setstate__, to which nothing comes but a
        tuple of sizes, a type of `_ELEMENTS`, and just as many bytes.

        Arrays of other types, which no weights have, stay empty.
        """
        if type(dtype) is not _DType or dtype.code is None:
            return
        elements = np.dtype(dtype.order + dtype.code)
        data = self._bytes(data)
        if _volume(shape) * elements.itemsize != len(data):
            raise UnpicklingError(f"it has an array of {len(data)} bytes that do not fill its shape")
        self._spend(len(data))
        array.__setstate__((1, shape, elements, is_fortran is True, data))  # type: ignore[arg-type]

    def _find(self, module: Any, name: Any) -> Any:
        """What stands for a function or class, by its module and name."""
        if not type(module) is type(name) is str or len(module) + len(name) > _MAX_NAME:
            raise UnpicklingError("it refers to what is not a name")
        full = f"{_OLD_MODULES.get(module, module)}.{name}"
        if full in _TYPES:
            return _TYPES[full]
        if full in self.FUNCTIONS:
            return _Name(full)
        if full in INERT_NAMES or full.startswith("numpy.dtypes.") or full.partition(".")[0] in METADATA_PACKAGES:
            return StandIn()
        raise UnpicklingError(f"it refers to {full[:100]!r}, which no weight file needs")

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(function) is StandIn:
            return StandIn()
        if type(function) is not _Name or type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
            raise UnpicklingError(f"it calls a {type(function).__name__} with what are no arguments of it")
        return self.FUNCTIONS[function.function](self, *arguments)

    def _spend(self, amount: int) -> None:
        """Account for bytes, or items, that operations on what the memo holds could otherwise multiply."""
        self._budget -= amount
        if self._budget < 0:
            raise UnpicklingError("its content is many times larger than the file")

    def _bytes(self, data: Any) -> bytes:
        """Data of an array; Python 2's are text."""
        if type(data) is str:
            return self._encode(data)
        if type(data) is not bytes:
            raise UnpicklingError(f"it has an array of the data type {type(data).__name__}")
        return data

    # The functions that a pickle may call. Every argument may be of any type.

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """`_codecs.encode`, with which protocol 2 writes bytes: cannot harm, for it takes text, knows one codec, and
        all its results together are within the budget."""
        if type(text) is not str or encoding not in ("latin1", "latin-1"):
            raise UnpicklingError("it encodes what is not text of latin1")
        self._spend(len(text))
        return text.encode("latin1")

    def _make_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        """OrderedDict: cannot harm, for it is a dictionary with plain keys, and pairs are within the budget."""
        if type(pairs) not in (list, tuple):
            raise UnpicklingError("it makes a dictionary of what is not a list of pairs")
        self._spend(len(pairs))
        result: dict[Any, Any] = {}
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise UnpicklingError("it makes a dictionary of what is not a list of pairs")
            self._set_items(result, list(pair))
        return result

    def _make_size(self, sizes: Any) -> tuple[int, ...]:
        """torch.Size: cannot harm, for it makes nothing; what are no sizes are refused."""
        _volume(sizes)
        return tuple(sizes)

    def _make_array(self, *ignored: Any) -> np.ndarray:
        """The first half of how numpy pickles an array: cannot harm, for it takes nothing and the array is empty."""
        return np.ndarray((0,), dtype="b")

    def _make_dtype(self, code: Any, *ignored: Any) -> _DType:
        """numpy.dtype: cannot harm, for no dtype is made here, and what _fill makes is a number's of fixed size."""
        text = code.decode("latin1") if type(code) is bytes and len(code) < 8 else code
        known = _ELEMENTS.fullmatch(text) if type(text) is str else None
        return _DType(known[1] if known else None)

    def _make_scalar(self, dtype: Any, data: Any = b"") -> Any:
        """numpy's scalars: cannot harm, for the number is made of exactly its bytes. Other than numbers are inert."""
        if type(dtype) is not _DType or dtype.code is None:
            return StandIn()
        elements, data = np.dtype(dtype.order + dtype.code), self._bytes(data)
        if len(data) != elements.itemsize:
            raise UnpicklingError(f"it has a number of {len(data)} bytes, which has {elements.itemsize}")
        return np.frombuffer(data, elements)[0]

    def _make_tensor(
        self, storage: Any, offset: Any, sizes: Any, strides: Any, _requires_grad: Any = False, _hooks: Any = None
    ) -> Any:
        """torch's _rebuild_tensor and _v2: cannot harm, for the tensor is a view that lies within its storage (torch
        itself would enlarge the storage), and all tensors together are within the budget."""
        if type(storage) is not Storage:
            raise UnpicklingError(f"it makes a tensor of a {type(storage).__name__}")
        if storage.values is None:
            return StandIn()
        values = storage.values
        volume = _volume(sizes)
        _require_sizes((*strides, offset))
        if len(sizes) != len(strides):
            raise UnpicklingError("it has a tensor with other strides than sizes")
        reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1 if volume else 0
        if offset + reach > len(values):
            raise UnpicklingError(f"it has a tensor that reaches beyond its storage of {len(values)} values")
        self._spend(volume * values.itemsize)
        return values.as_strided(sizes, strides, values.storage_offset() + offset)

    def _make_parameter(self, data: Any, *ignored: Any) -> Any:
        """torch's _rebuild_parameter: cannot harm, for it is the tensor itself."""
        if not isinstance(data, (Tensor, StandIn)):
            raise UnpicklingError(f"it makes a parameter of a {type(data).__name__}")
        return data

    def _make_from_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """torch's _rebuild_from_type_v2, for tensors with attributes: cannot harm more than the function that it calls,
        which is one of these. The attributes are dropped."""
        return self._call(function, arguments)

    FUNCTIONS: Mapping[str, Callable[..., Any]] = {
        "_codecs.encode": _encode,
        "collections.OrderedDict": _make_dict,
        "torch.Size": _make_size,
        "numpy.dtype": _make_dtype,
        **dict.fromkeys((f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")), _make_array),
        **dict.fromkeys((f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")), _make_scalar),
        **dict.fromkeys((f"torch._utils._rebuild_tensor{v}" for v in ("", "_v2")), _make_tensor),
        **dict.fromkeys((f"torch._utils._rebuild_parameter{v}" for v in ("", "_with_state")), _make_parameter),
        "torch._tensor._rebuild_from_type_v2": _make_from_type,
    }


def _is_plain(key: Any) -> bool:
    if type(key) in (str, bytes):
        return len(key) <= _MAX_NAME
    # Larger numbers can be chosen so that the hashes of all are equal.
    return key is None or type(key) in (float, bool) or (type(key) is int and -(2**63) <= key < 2**63)


def _volume(sizes: Any) -> int:
    """The number of elements of a shape. Raises UnpicklingError for what is none, or one larger than any."""
    _require_sizes(sizes)
    if math.prod(filter(None, sizes)) > _MAX_ELEMENTS:
        raise UnpicklingError("it has a tensor or array with sizes that cannot be")
    return math.prod(sizes)


def _require_sizes(numbers: Any) -> None:
    if type(numbers) not in (tuple, list) or len(numbers) > _MAX_DIMENSIONS:
        raise UnpicklingError("it has a tensor or array without a shape")
    if not all(type(number) is int and 0 <= number <= _MAX_ELEMENTS for number in numbers):
        raise UnpicklingError("it has a tensor or array with sizes that cannot be")


def _extent(value: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """Items that a container has if each of those inside is counted wherever it occurs, and levels of containers.

    Few shared containers can spell out billions of items, and one that holds itself has no end: UnpicklingError.
    """
    if type(value) in (str, bytes):
        return 1 + len(value), 0
    if type(value) not in (dict, list, tuple):
        return 1, 0
    if id(value) not in known:
        if depth > MAX_DEPTH:
            raise UnpicklingError(_TOO_DEEP)
        inner = [_extent(each, known, depth + 1) for each in (value.values() if type(value) is dict else value)]
        known[id(value)] = 1 + sum(items for items, _ in inner), 1 + max((levels for _, levels in inner), default=0)
    return known[id(value)]
