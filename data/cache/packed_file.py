"""Numpy arrays in one file that processes map instead of read: the cache behind read_coco.

Layout: a line of magic and the arrays, each on a multiple of 64 bytes; a header (JSON: key, facts, the SHA-256 of all
before it, and name, type, shape and place of each array), its length, and the SHA-256 of the header and its length.
So a file that was cut off, damaged or made by something else is recognized.

The header is checked whenever a file is opened. The arrays are read through for their checksum once: that they were
sound is kept, and counts until size, inode or times of the file change, for CHECKED_FOR_SECONDS at most. In the same
way the SHA-256 of the annotation file is kept. See data/cache/known_files.py.
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

from data.cache.known_files import KnownFiles
from data.errors import DataError

_KIND = b"packed annotations "
MAGIC = _KIND + b"6\n"  # another number whenever what is stored changes its meaning
ALIGNMENT = 64
PATIENCE_SECONDS = 600.0
"""How long a program waits for another one that packs the same file, before it does so itself."""
CHECKED_FOR_SECONDS = 7 * 86_400.0
"""After a week a checksum is computed anew: a disk may lose bits without a change of the file's times."""
_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20
_SHA_BYTES = 32


class Packed(NamedTuple):
    """Arrays by name, and facts of JSON's types."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    checksum: str = ""
    """Of those read from a file, the SHA-256 of its header, and so of all of it"""


class UnusableFile(Exception):
    """Why packed arrays cannot be read."""


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
    digest = _digest(source, KnownFiles(folder))
    return keep_built(folder, digest + variant, source, lambda: _built(source, digest, build))


def keep_built(folder: Path, key: str, source: Path, build: Callable[[], Packed]) -> PackedFile:
    """What build() makes, out of the cache folder where it is there already; see `load_or_build`.

    key: says what it is made of, and how. source: the file that messages name.
    """
    path, known = folder / f"{key}.packed", KnownFiles(folder)
    found = _open(path, key, known)
    if found is not None:
        return PackedFile(*found, key, None)
    built = problem = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_builder(source, path, "packs"):
            found = _open(path, key, known)
            if found is None:
                built = build()
                write_packed(path, built, key)
                known.keep_own(path, key)
                found = _open(path, key, known)
    except OSError as error:
        problem = error
    return PackedFile(*(found or _in_memory(built or build(), key)), key, problem)


def is_packed(path: Path) -> bool:
    """Whether the file begins as one of packed arrays does, of whatever version."""
    try:
        with path.open("rb") as file:
            return file.read(len(_KIND)) == _KIND
    except (OSError, ValueError):  # a path with a NUL
        return False


def open_packed(path: Path, key: str, known: KnownFiles | None) -> tuple[Packed, BinaryIO]:
    """The arrays of a file, checked and mapped, and the open file.

    known: where it is kept that the file is sound; None to read all of it.

    Raises OSError, and UnusableFile for one of another key, or that is not whole.
    """
    file = path.open("rb")
    try:
        if known is None:
            return map_packed(file, key), file
        is_sound = known.recall(path, "sound", CHECKED_FOR_SECONDS) == key
        with known.keeping(path, "sound") as kept:
            packed = map_packed(file, key, is_sound=is_sound)
            if not is_sound:
                kept.append(key)
        return packed, file
    except BaseException:
        file.close()
        raise


def map_packed(file: BinaryIO, key: str, *, is_sound: bool = False) -> Packed:
    """The arrays of the file, mapped read-only.

    is_sound: the arrays were checked, so that the header's own checksum will do.

    Raises UnusableFile for one of another key, or that is not whole.
    """
    try:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError is mmap's word for an empty file
        raise UnusableFile("is empty") from error
    if content[: len(MAGIC)] != MAGIC:
        is_other = content[: len(_KIND)] == _KIND
        raise UnusableFile("was packed by another version of this program" if is_other else "is no packed file")
    end = len(content) - _SHA_BYTES - 8
    start = end - int.from_bytes(content[end : end + 8], "little") if end >= len(MAGIC) else -1
    if start < 0 or hashlib.sha256(content[start : end + 8]).digest() != content[end + 8 :]:
        raise UnusableFile("is cut off or damaged")
    header = json.loads(content[start:end])
    if header["key"] != key:
        raise UnusableFile("is of the cache, and not of a packed set")
    if not is_sound and _sha256(file, start) != header["sha256"]:
        raise UnusableFile("is damaged: its SHA-256 is not the one it was packed with")
    arrays = {}
    for name, dtype, shape, offset in header["arrays"]:
        array = np.frombuffer(content, dtype=dtype, count=int(np.prod(shape, dtype=np.int64)), offset=offset)
        arrays[name] = array.reshape(shape)
    return Packed(arrays, header["facts"], content[end + 8 :].hex())


def read_packed(file: BinaryIO, key: str, *, is_sound: bool = False) -> Packed | None:
    """Like map_packed; None for a file of another key, or that is not whole."""
    try:
        return map_packed(file, key, is_sound=is_sound)
    except UnusableFile:
        return None


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


def _digest(source: Path, known: KnownFiles) -> str:
    """SHA-256 of the file, read only where it is not known."""
    found = known.recall(source, "digest")
    if found is None:
        with known.keeping(source, "digest") as kept, source.open("rb") as file:
            kept.append(found := _sha256(file))
    return str(found)


def _sha256(file: BinaryIO, size: int | None = None) -> str:
    """Of its first bytes, or of all of it. By reading: what is mapped would count as this process's memory."""
    sha = hashlib.sha256()
    file.seek(0)
    left = os.fstat(file.fileno()).st_size if size is None else size
    while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        sha.update(chunk)
        left -= len(chunk)
    return sha.hexdigest()


def _built(source: Path, digest: str, build: Callable[[], Packed]) -> Packed:
    built = build()
    with source.open("rb") as file:
        is_same = _sha256(file) == digest
    if not is_same:
        raise DataError(f"{source}: was changed while it was read. Start again when it is complete.")
    return built


def _open(path: Path, key: str, known: KnownFiles) -> tuple[Packed, BinaryIO] | None:
    try:
        return open_packed(path, key, known)
    except (OSError, UnusableFile):
        return None


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
    sha, position = hashlib.sha256(), 0

    def put(content: Any) -> None:
        nonlocal position
        for part in (memoryview(content), bytes(-len(content) % ALIGNMENT)):
            file.write(part)
            sha.update(part)
            position += len(part)

    put(MAGIC)
    entries = []
    for name, array in packed.arrays.items():
        entries.append([name, array.dtype.str, list(array.shape), position])
        put(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    facts = {"key": key, "facts": packed.facts, "sha256": sha.hexdigest(), "arrays": entries}
    header = json.dumps(facts).encode()
    header += len(header).to_bytes(8, "little")
    file.write(header)
    file.write(hashlib.sha256(header).digest())
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
