"""Reading weight files from anywhere without executing anything that they contain.

A pickle can name any function and have it called. Plain torch files go through torch's own weights-only
reader. Files that also hold other objects (MMDetection's training history, Detectron2's .pkl) go through
`RestrictedUnpickler`, which knows tensors, numpy arrays and plain containers, puts inert stand-ins in place
of metadata classes of a few known packages, and refuses every other name.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch._utils

from detection.models.config import ModelError


class WeightsError(ModelError):
    """A weight file or name that cannot be used; the message says why and what to do."""


class StandIn:
    """In the place of a foreign package's metadata object: takes everything, keeps nothing, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        """Whatever an unpickler does to an object that it builds."""

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return self


# Packages whose objects turn up in the metadata of detection checkpoints. They are never imported.
METADATA_PACKAGES = {
    *("mmengine", "mmcv", "mmdet", "mmcls", "mmpretrain", "mmseg", "mmyolo", "mmselfsup"),
    *("detectron2", "fvcore", "iopath", "omegaconf", "yacs", "addict", "yapf"),
    *("argparse", "datetime", "decimal", "pathlib", "uuid"),
}
# Components-in names that metadata uses; they become stand-ins too. (getattr is how a method is pickled.)
INERT_NAMES = {
    *("builtins.getattr", "builtins.object", "builtins.slice", "builtins.range", "builtins.complex"),
    *("builtins.bytearray", "builtins.frozenset", "builtins.list", "builtins.dict", "builtins.tuple"),
    *("builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.bytes"),
    *("builtins.long", "builtins.unicode"),  # Python 2's, which protocol 2 writes
    *("collections.defaultdict", "collections.deque", "collections.Counter", "copyreg._reconstructor"),
}
TENSOR_FUNCTIONS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, with which protocol 2 writes bytes, for the one codec that it needs."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _empty_array(kind: type, shape: tuple[int, ...], type_code: bytes | str) -> np.ndarray:
    """The first half of how numpy pickles an array; the second fills in shape, type and data."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of the class {kind!r}")
    return np.ndarray((0,), dtype="b")


def _numpy_scalar(dtype: np.dtype, data: bytes | str = b"") -> Any:
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise pickle.UnpicklingError("a numpy scalar that holds an object")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


_NUMPY: dict[str, Callable[..., Any] | type] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}


class RestrictedUnpickler(pickle.Unpickler):
    """Rebuilds tensors, numpy arrays and containers; everything else is a stand-in or an UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        package = module.partition(".")[0]
        if full in _NUMPY:
            return _NUMPY[full]
        if full == "_codecs.encode":
            return _latin1_bytes
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "builtins.set":
            return set
        if module == "torch._utils" and name in TENSOR_FUNCTIONS:
            return getattr(torch._utils, name)
        if full in ("torch.Size", "torch.device"):
            return getattr(torch, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if package in METADATA_PACKAGES or full in INERT_NAMES or module == "numpy.dtypes":
            return StandIn
        raise pickle.UnpicklingError(f"it refers to {full}, which no weight file needs")


class _RestrictedPickle:
    """What torch.load expects of the pickle module."""

    Unpickler = RestrictedUnpickler

    @staticmethod
    def load(file: IO[bytes], **kwargs: Any) -> Any:
        return RestrictedUnpickler(file, **kwargs).load()


_ZIP = b"PK"
_PICKLE = b"\x80"
# First bytes of the files that torch.save wrote before version 1.6 (its magic number, pickled).
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# What the readers raise, besides UnpicklingError, over bytes that are not what they should be.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
)


def read_weight_file(path: Path, map_location: str | torch.device = "cpu") -> Any:
    """Whatever object the file holds, its tensors on `map_location`, its metadata replaced by stand-ins.

    Raises WeightsError where the file does not exist, is damaged, or refers to anything but data.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}")
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_TORCH))
    try:
        if start.startswith(_ZIP) or start == _LEGACY_TORCH:
            return _read_torch(path, map_location)
        if start.startswith(_PICKLE):
            with path.open("rb") as file:
                # Detectron2's model zoo was written by Python 2, whose strings are latin1 to numpy.
                return RestrictedUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was not read, and nothing in it was executed: {error}. If you trust it, load it "
            "where it was made and save its state_dict() alone"
        ) from error
    except _DAMAGE as error:
        if "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript program; save its state_dict() instead") from error
        raise WeightsError(f"{path} is damaged or cut short ({error}); fetch or copy it again") from error
    raise WeightsError(f"{path} is neither a torch file (.pt, .pth) nor a pickle of numpy arrays (.pkl)")


def _read_torch(path: Path, map_location: str | torch.device) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickle protocols and TorchScript; what fails is an error here
        try:
            return torch.load(path, map_location, weights_only=True)
        except pickle.UnpicklingError:
            # Metadata that torch does not know. Its general reader then runs on top of our unpickler, which decides
            # about every name in the file. (torch accepts another unpickler only without weights_only.)
            return torch.load(path, map_location, pickle_module=_RestrictedPickle, weights_only=False)
