"""Files of the safetensors format (https://github.com/huggingface/safetensors), read and written without its package.

A file is the length of its header (8 bytes, little-endian), the header (JSON), and the tensors' bytes one behind the
other. The header says for each name the type, the shape and the place of its bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

METADATA = "__metadata__"
_MAX_HEADER = 2**22  # bytes; Python takes some ten times as many to hold it, and a detector's header has 100,000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins with these bytes (9 or more) is of the format."""
    return start[8:9] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and its metadata.

    What the header says is compared with the file's size before memory is taken: the tensors take as much as the file.

    Raises:
        UnpicklingError: the header is too large, or says what cannot be.
        OSError, EOFError, ValueError: the file cannot be read, or is damaged.
    """
    if sys.byteorder != "little":
        raise UnpicklingError("this machine's byte order is not that of the format")
    with path.open("rb") as file:
        header, metadata = _read_header(file, path.stat().st_size)
        places = sorted((_place(name, entry), name) for name, entry in header.items())
        end = 0
        for (first, last), name in places:
            if first != end:
                raise UnpicklingError(f"the bytes of {name[:100]!r} overlap others, or leave a gap")
            end = last
        if end != (room := path.stat().st_size - file.tell()):
            raise EOFError(f"its tensors have {end:,} bytes and the file has {room:,} for them")
        tensors = {}
        for (first, last), name in places:
            content = torch.empty(last - first, dtype=torch.uint8)
            if file.readinto(content.numpy().data) != len(content):  # type: ignore[attr-defined]
                raise EOFError("it is cut short")
            dtype = _DTYPES[header[name]["dtype"]]
            if dtype == torch.bool and (content > 1).any():
                raise UnpicklingError("it has truth values other than 0 and 1")
            tensors[name] = content.view(dtype).reshape(header[name]["shape"])
    return {name: tensors[name] for name in header}, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file alone; raises as read_safetensors."""
    with path.open("rb") as file:
        return _read_header(file, path.stat().st_size)[1]


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors (on the CPU) and metadata into a file."""
    # Wide elements first, so that each begins at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        stream.write(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of the tensors and the metadata, of a file of `size` bytes."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_HEADER, size - 8):
        raise UnpicklingError(f"its header of {length:,} bytes is larger than the file, or than any")
    header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnpicklingError("its metadata are not text")
    return header, metadata


def _place(name: str, entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor, as its entry in the header says."""
    shown = repr(name[:100])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnpicklingError(f"the entry of {shown} is none of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnpicklingError(f"{shown} has a type that is not read: {str(dtype)[:20]}")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(offsets) != 2:
        raise UnpicklingError(f"{shown} has a shape or place that cannot be")
    if math.prod(shape) * _DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise UnpicklingError(f"{shown} of {shape[:8]} x {dtype} has {offsets[1] - offsets[0]} bytes")
    return offsets[0], offsets[1]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise UnpicklingError("a name occurs twice in its header")
    return result
