"""Numpy arrays in one file that processes map instead of read: the cache behind read_coco.

Layout: a line of magic and the arrays, each on a multiple of 64 bytes; a header (JSON: facts, and name, type, shape and
place of each array) and its length. The last 32 bytes are the SHA-256 of all before, so that a file that was cut off,
damaged or made by something else is recognized.
"""

import fcntl
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"packed annotations 3\n"  # another number whenever what is stored changes its meaning
ALIGNMENT = 64


class Packed(NamedTuple):
    """Arrays by name, and facts of JSON's types."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def load_or_build(source: Path, folder: Path, build: Callable[[], Packed]) -> tuple[Packed, OSError | None]:
    """What build() makes of `source`, out of the cache folder where it is there already.

    A cache file counts only for the very file that it was made of (path, size, times of change) and only when it is
    whole; otherwise it is made anew. Of several processes that start at once, one builds and the others wait for
    it. Where the folder cannot be written to, the built value is returned with the error. Errors of build() pass
    through.
    """
    status = source.stat()
    path = str(source.resolve())
    key = [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    name = f"{source.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.packed"
    found = read_packed(folder / name, key)
    if found is not None:
        return found, None
    built = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            found = read_packed(folder / name, key)
            if found is None:
                built = build()
                write_packed(folder / name, built, key)
                found = read_packed(folder / name, key) or built
            return found, None
    except OSError as error:
        return built or build(), error


def read_packed(path: Path, key: list[Any]) -> Packed | None:
    """The arrays of the file, mapped read-only; None for a file that is missing, of another key, or not whole."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # mmap's word for an empty file
        return None
    if content[: len(MAGIC)] != MAGIC or hashlib.sha256(memoryview(content)[:-32]).digest() != content[-32:]:
        return None
    end = len(content) - 40
    header = json.loads(content[end - int.from_bytes(content[end:-32], "little") : end])
    if header["key"] != key:
        return None
    arrays = {}
    for name, dtype, shape, offset in header["arrays"]:
        array = np.frombuffer(content, dtype=dtype, count=int(np.prod(shape, dtype=np.int64)), offset=offset)
        arrays[name] = array.reshape(shape)
    return Packed(arrays, header["facts"])


def write_packed(path: Path, packed: Packed, key: list[Any]) -> None:
    """Writes the file under a temporary name and renames it, so that none ever sees a part of it."""
    chunks, entries = [MAGIC.ljust(ALIGNMENT)], []
    for name, array in packed.arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        entries.append([name, array.dtype.str, list(array.shape), sum(map(len, chunks))])
        chunks.append(content + bytes(-len(content) % ALIGNMENT))
    header = json.dumps({"key": key, "facts": packed.facts, "arrays": entries}).encode()
    body = b"".join([*chunks, header, len(header).to_bytes(8, "little")])
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.write(hashlib.sha256(body).digest())
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's file is for its owner alone
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; released by the system when that dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
