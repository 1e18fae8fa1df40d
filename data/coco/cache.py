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
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.errors import DataError

MAGIC = b"packed annotations 5\n"  # another number whenever what is stored changes its meaning
ALIGNMENT = 64
PATIENCE_SECONDS = 600.0
"""How long a program waits for another one that packs the same file, before it does so itself."""
_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20


class Packed(NamedTuple):
    """Arrays by name, and facts of JSON's types."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


class PackedFile(NamedTuple):
    """Packed arrays, and the open file that they are mapped from: in the cache, or without a name in memory."""

    packed: Packed
    file: BinaryIO
    key: str
    """SHA-256 of the source's content, and the variant"""
    problem: OSError | None
    """Why the cache cannot keep them; None where it does."""

    @property
    def path(self) -> Path:
        """Where other processes of this machine can open the file, as long as this one has it open."""
        return Path(f"/proc/{os.getpid()}/fd/{self.file.fileno()}")


def cache_folder() -> Path:
    """Where this user keeps what can be made again: $XDG_CACHE_HOME/detection-harness, or ~/.cache/..."""
    # The annotations' own folder may be read-only and shared; a user's cache serves all of his runs.
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "detection-harness"


def load_or_build(source: Path, folder: Path, build: Callable[[], Packed], variant: str = "") -> PackedFile:
    """What build() makes of `source`, out of the cache folder where it is there already.

    variant: of what is built, where it is not all the same; each has a file of its own.

    A cache file counts only for the content that it was made of, whatever the source's path and times of change, and
    only when it is whole; otherwise it is made anew. Of several programs that start at once, one builds and the others
    wait for it, PATIENCE_SECONDS at most. Where the folder cannot be written to, the file is one in memory.

    Raises:
        OSError: the source cannot be read.
        DataError: it changed while it was read. Errors of build() pass through.
    """
    key = _digest(source) + variant
    path = folder / f"{key}.packed"
    found = _open(path, key)
    if found is not None:
        return PackedFile(*found, key, None)
    built = problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_builder(source, path, "packs"):
            found = _open(path, key)
            if found is None:
                built = _built(source, key.removesuffix(variant), build)
                write_packed(path, built, key)
                found = _open(path, key)
    except OSError as error:
        problem = error
    return PackedFile(
        *(found or _in_memory(built or _built(source, key.removesuffix(variant), build), key)), key, problem
    )


def read_packed(file: BinaryIO, key: str) -> Packed | None:
    """The arrays of the file, mapped read-only; None for one of another key, or that is not whole."""
    try:
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


def write_packed(path: Path, packed: Packed, key: str) -> None:
    """Writes the file under a temporary name and renames it, so that none ever sees a part of it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, packed, key)
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp's file is for its owner alone
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _digest(source: Path) -> str:
    sha = hashlib.sha256()
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
    return sha.hexdigest()


def _built(source: Path, digest: str, build: Callable[[], Packed]) -> Packed:
    built = build()
    if _digest(source) != digest:
        raise DataError(f"{source}: was changed while it was read. Start again when it is complete.")
    return built


def _open(path: Path, key: str) -> tuple[Packed, BinaryIO] | None:
    try:
        file = path.open("rb")
    except OSError:
        return None
    packed = read_packed(file, key)
    if packed is None:
        file.close()
        return None
    return packed, file


def _in_memory(packed: Packed, key: str) -> tuple[Packed, BinaryIO]:
    file: BinaryIO
    if sys.platform == "linux":
        file = os.fdopen(os.memfd_create("annotations"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    _write(file, packed, key)
    mapped = read_packed(file, key)
    assert mapped is not None
    return mapped, file


def _write(file: BinaryIO, packed: Packed, key: str) -> None:
    chunks, entries = [MAGIC.ljust(ALIGNMENT)], []
    for name, array in packed.arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        entries.append([name, array.dtype.str, list(array.shape), sum(map(len, chunks))])
        chunks.append(content + bytes(-len(content) % ALIGNMENT))
    header = json.dumps({"key": key, "facts": packed.facts, "arrays": entries}).encode()
    body = b"".join([*chunks, header, len(header).to_bytes(8, "little")])
    file.write(body)
    file.write(hashlib.sha256(body).digest())
    file.flush()


@contextmanager
def one_builder(source: Path, path: Path, does: str) -> Iterator[None]:
    """Inside, other programs that would build `path` of `source` wait for this one. does: what they read meanwhile:
    "packs".

    It spares work and keeps nothing safe: where the file system has no locks, or the one that holds the lock neither
    comes to an end nor dies, each builds for itself.
    """
    with path.with_suffix(".lock").open("a+") as lock:
        since = time.monotonic()
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # somebody holds it; over NFS there are two words for that
                if path.exists() or time.monotonic() - since > PATIENCE_SECONDS:
                    break
                if not told:
                    lock.seek(0)
                    holder = lock.read() or "another process"
                    limit = f"{PATIENCE_SECONDS / 60:g} minutes at most"
                    print(f"{source}: {holder} {does} it (lock: {lock.name}); waiting, {limit}", file=sys.stderr)
                    told = True
            except OSError:
                break
            else:
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {platform.node()}")
                lock.flush()
                break
            time.sleep(_POLL_SECONDS)
        yield
