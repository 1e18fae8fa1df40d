"""The files of torch.save, read without torch.load: members and storages are checked against the file's size first."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from detection.models.weights.pickles import Storage, read_pickle

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of the files that torch.save wrote before version 1.6 (its magic number, pickled)."""
_MAX_DIRECTORY = 2**24
"""Bytes of a zip file's directory, of which a member takes 60 or more, and Python ten times as many to hold it."""
_LOCAL_HEADER = 30  # bytes before a member's name
_MAX_KEY = 100  # characters; torch's are numbers
_DAMAGED = "it is damaged or cut short"


def read_archive(path: Path, *, verified: bool = False, with_tensors: bool = True) -> Any:
    """The object in a zip file of torch.save, as `read_pickle` returns it, tensors on the CPU.

    verified: every member's checksum is compared. with_tensors: otherwise only the pickle is read, and a StandIn takes
    each tensor's place.

    Raises:
        UnpicklingError: the file is not of torch.save, a member is compressed, occurs twice, overlaps another or is
            not as large as the storage that it is; or the pickle is refused.
        OSError, zipfile.BadZipFile, and what `read_pickle` raises: it cannot be read, or is damaged.
    """
    with _Reader(path.open("rb", buffering=0)) as file:
        archive = _Archive(file, verified)
        root = archive.names[0].partition("/")[0] if archive.names else ""
        if f"{root}/data.pkl" not in archive.names:
            raise UnpicklingError("it is a zip file, and not one of torch.save")
        if f"{root}/byteorder" in archive.names:
            order = bytes(archive.read(f"{root}/byteorder").numpy()).decode("latin1")
            if order != sys.byteorder:
                raise UnpicklingError(f"it was written by a machine whose byte order is {order[:10]!r}")

        storages: dict[tuple[torch.dtype, str], Storage] = {}

        def load_storage(saved_id: Any) -> Storage:
            dtype, key, num_values = _checked(saved_id, length=5)
            name = f"{root}/data/{key}"
            if archive.size(name) != num_values * dtype.itemsize:
                raise UnpicklingError(f"its storage {key!r} of {num_values} x {dtype} has {archive.size(name)} bytes")
            if (dtype, name) not in storages:
                storages[dtype, name] = Storage(_view_as(archive.read(name), dtype) if with_tensors else None)
            return storages[dtype, name]

        content = io.BytesIO(archive.read(f"{root}/data.pkl").numpy().data)
        state = read_pickle(content, archive.file_size, load_storage)
        if verified:
            for name in archive.names:
                archive.read(name)
        return state


def read_legacy(path: Path) -> Any:
    """The object in a file that torch.save wrote before version 1.6; see `read_archive`. It is in memory twice."""
    content = path.read_bytes()
    stream, size = io.BytesIO(content), len(content)
    storages: dict[str, tuple[torch.dtype, Tensor]] = {}
    unclaimed = size

    def load_storage(saved_id: Any) -> Storage:
        nonlocal unclaimed
        dtype, key, num_values = _checked(saved_id, length=6)
        if key not in storages:
            unclaimed -= num_values * dtype.itemsize
            if unclaimed < 0:
                raise UnpicklingError("its storages are larger than the file")
            storages[key] = dtype, torch.zeros(num_values * dtype.itemsize, dtype=torch.uint8)
        if len(storages[key][1]) != num_values * dtype.itemsize:
            raise UnpicklingError(f"its storage {key!r} has two sizes")
        values = storages[key][1].view(dtype)
        if saved_id[5] is not None:
            _, offset, num_viewed = saved_id[5]
            values = values[offset : offset + num_viewed]
        return Storage(values)

    read_pickle(stream, size)  # the magic number
    version, system = read_pickle(stream, size), read_pickle(stream, size)
    if version != 1001 or (isinstance(system, dict) and system.get("little_endian") is not (sys.byteorder == "little")):
        raise UnpicklingError("it was written by a machine of another byte order, or another version of torch.save")
    state = read_pickle(stream, size, load_storage)
    keys = read_pickle(stream, size)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError(_DAMAGED)
    for dtype, values in (storages[key] for key in keys):
        (num_values,) = struct.unpack("<q", stream.read(8))
        if num_values * dtype.itemsize != len(values) or stream.readinto(values.numpy().data) != len(values):
            raise EOFError(_DAMAGED)
        _view_as(values, dtype)
    return state


def _checked(saved_id: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Type, key and number of values of the storage that a persistent id refers to."""
    if type(saved_id) is not tuple or len(saved_id) != length or saved_id[0] != "storage":
        raise UnpicklingError("it refers to what is not a storage")
    _, dtype, key, _, num_values = saved_id[:5]
    if not isinstance(dtype, torch.dtype) or type(key) is not str or len(key) > _MAX_KEY:
        raise UnpicklingError("it refers to a storage without a type or key")
    if type(num_values) is not int or num_values < 0:
        raise UnpicklingError("it refers to a storage without a size")
    return dtype, key, num_values


def _view_as(content: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as elements of a type."""
    if dtype == torch.bool and (content > 1).any():
        raise UnpicklingError("it has truth values other than 0 and 1")  # torch's operators reckon with no others
    return content.view(dtype)


class _Reader(io.BufferedReader):
    """Refuses to read a directory, which zipfile does at once, that would take more memory than any file needs."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise UnpicklingError("the directory of its zip file is larger than any")
        return super().read(size)


class _Archive:
    """The members of a zip file as torch.save writes it: not compressed, each name once, and one behind the other."""

    def __init__(self, file: _Reader, verified: bool) -> None:
        self._file = file
        self._verified = verified
        self._read: dict[str, Tensor] = {}
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(member.filename.endswith("/constants.pkl") for member in members):
            raise UnpicklingError("it is a TorchScript program; save its state_dict() instead")
        self.file_size = file.seek(0, io.SEEK_END)
        self.names = [member.filename for member in members]
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise UnpicklingError("two members of its zip file have one name")
        end = 0
        for member in sorted(members, key=lambda member: member.header_offset):
            shown = repr(member.filename[:60])
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise UnpicklingError(f"its member {shown} is compressed or encrypted, which torch.save never does")
            if member.header_offset < end or member.file_size != member.compress_size:
                raise UnpicklingError(f"its member {shown} overlaps another, or has two sizes")
            end = member.header_offset + _LOCAL_HEADER + member.file_size
        if end > self.file_size:
            raise EOFError(_DAMAGED)

    def size(self, name: str) -> int:
        """Bytes of a member; -1 for one that is not there."""
        return self._members[name].file_size if name in self._members else -1

    def read(self, name: str) -> Tensor:
        """The content of a member, uint8 [bytes]; the same tensor every time."""
        if name in self._read:
            return self._read[name]
        member = self._members[name]
        self._file.seek(member.header_offset)
        signature, name_length, extra_length = struct.unpack("<4s22xHH", self._file.read(_LOCAL_HEADER))
        self._file.seek(name_length + extra_length, io.SEEK_CUR)
        content = torch.empty(member.file_size, dtype=torch.uint8)
        if signature != b"PK\3\4" or self._file.readinto(content.numpy().data) != member.file_size:
            raise EOFError(_DAMAGED)
        if self._verified and zlib.crc32(content.numpy().data) != member.CRC:
            raise ValueError(f"the checksum of {name} is wrong, the file was altered")
        self._read[name] = content
        return content
