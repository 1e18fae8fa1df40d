"""Images in tar shards, read by offset: a few large files in place of many small ones.

A folder of shards has WebDataset's shard-000000.tar, ..., which any program for tar files reads, and beside them

- shards.json: {"version": 1, "location": null, "num_images", "index_sha256", "shards": [{"name", "bytes", "sha256"}]}.
  location: where the tar files are if not in this folder: a folder, or an address for fsspec ("s3://bucket/coco");
- shards.npy: a numpy array with a row for each image, by ascending key: "key" uint64, the first 8 bytes of its name's
  BLAKE2b, little-endian; "shard" uint32, its place in the list; "size" uint32 and "offset" uint64 in bytes.

Processes map the index instead of reading it, so one copy serves a machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError

FACTS, INDEX = "shards.json", "shards.npy"
VERSION = 1
ROW = np.dtype([("key", "<u8"), ("shard", "<u4"), ("size", "<u4"), ("offset", "<u8")])
MAX_OPEN = 200
"""Shards that a process keeps open: systems allow 1024 files or more."""
_BLOCK = 512
"""What tar rounds the content of a file to, in bytes"""


class ShardsError(DataError):
    """Shards that cannot be written or read; the message says which, and how to mend it."""


@dataclass(frozen=True)
class PackedEntry:
    """An image in a shard, with the part of os.DirEntry that the checks of a folder use."""

    path: str
    size: int

    @property
    def st_size(self) -> int:
        return self.size

    def stat(self) -> PackedEntry:
        return self

    def is_file(self) -> bool:
        return True

    def is_symlink(self) -> bool:
        return False


class Shards:
    """A folder of shards, opened. Any number of threads, and of processes forked after, may read at once."""

    def __init__(self, folder: Path) -> None:
        """Raises ShardsError where the index cannot be read."""
        self.folder = folder
        try:
            facts = json.loads((folder / FACTS).read_bytes())
            if facts["version"] != VERSION:
                raise ShardsError(
                    f"{folder / FACTS}: is of version {facts['version']}, this program reads {VERSION}: update it"
                )
            self._shards: list[dict[str, Any]] = facts["shards"]
            if not all(each.keys() >= {"name", "bytes", "sha256"} for each in self._shards):
                raise ValueError("a shard lacks its name, its bytes or its SHA-256")
            self.location: str = os.fspath(facts["location"] or folder)
            self._rows = np.load(folder / INDEX, mmap_mode="r")
            if self._rows.dtype != ROW or len(self._rows) != facts["num_images"]:
                raise ValueError(f"{len(self._rows)} rows for {facts['num_images']} images")
        except ShardsError:
            raise
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardsError(
                f"{folder}: the index of the shards ({FACTS}, {INDEX}) cannot be read: {error}. "
                "Copy both again from where the set was packed, or pack it again: scripts/pack_dataset.py"
            ) from error
        self._open: OrderedDict[int, Callable[[int, int], bytes]] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def count(self) -> int:
        """Shards."""
        return len(self._shards)

    def find(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        """The row of each image, int64 [n]; -1 where there is none of this name."""
        keys = np.fromiter(map(_key, names), dtype=np.uint64)
        rows = np.searchsorted(self._rows["key"], keys)
        found = self._rows["key"][np.minimum(rows, len(self._rows) - 1)] == keys
        return np.where(found, rows, -1)

    def entries(self, names: Sequence[str]) -> Iterator[PackedEntry | None]:
        """What there is of each name; None where there is no such image."""
        found = self.find(names)
        rows = self._rows[np.maximum(found, 0)]
        paths = [str(self.folder / shard["name"]) for shard in self._shards]
        columns = found.tolist(), rows["shard"].tolist(), rows["size"].tolist()
        for name, row, shard, size in zip(names, *columns, strict=True):
            yield PackedEntry(f"{paths[shard]}/{name}", size) if row >= 0 and shard < len(paths) else None

    def content(self, name: str) -> bytes:
        """The bytes of an image file.

        Raises OSError (FileNotFoundError where there is no such image), which names the shard.
        """
        key = _key(name)
        place = int(np.searchsorted(self._rows["key"], np.uint64(key)))
        if place == len(self._rows) or int(self._rows["key"][place]) != key:
            raise FileNotFoundError(2, f"not in the shards of {self.folder}")
        row = self._rows[place]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        if shard >= len(self._shards):
            raise OSError(5, f"the index of {self.folder} is damaged: copy it again")
        content = self._reader(shard)(offset, size)
        if len(content) != size:
            raise OSError(5, f"shard {self._shards[shard]['name']} ends before byte {offset + size:,}: copy it again")
        return content

    def faults(self) -> list[str]:
        """A line for each shard that is missing, or of another size than it was packed with."""
        lines = []
        for shard in self._shards:
            try:
                size = self._size(shard["name"])
            except FileNotFoundError:
                lines.append(f"{shard['name']} is missing in {self.location}")
            except OSError as error:
                lines.append(f"{shard['name']} in {self.location} cannot be read: {error}")
            else:
                if size != shard["bytes"]:
                    lines.append(f"{shard['name']} has {size:,} bytes, it was packed with {shard['bytes']:,}")
        return lines

    def damaged(self, progress: Callable[[int], object] = lambda number: None) -> list[str]:
        """Like `faults`, with the checksum of every shard and of the index: everything is read."""
        lines = self.faults()
        named = {line.split(" ", 1)[0] for line in lines}
        for place, shard in enumerate(self._shards):
            if shard["name"] not in named:
                sha, read = hashlib.sha256(), self._reader(place)
                for start in range(0, shard["bytes"], 1 << 24):
                    sha.update(read(start, min(1 << 24, shard["bytes"] - start)))
                    progress(1)
                if sha.hexdigest() != shard["sha256"]:
                    lines.append(f"{shard['name']} is damaged: its SHA-256 is not the one it was packed with")
        facts = json.loads((self.folder / FACTS).read_bytes())
        if hashlib.sha256((self.folder / INDEX).read_bytes()).hexdigest() != facts["index_sha256"]:
            lines.append(f"{INDEX} is damaged: its SHA-256 is not the one it was packed with")
        return lines

    @property
    def _is_remote(self) -> bool:
        return "://" in self.location

    def _size(self, name: str) -> int:
        if self._is_remote:
            files, root = _file_system(self.location)
            return int(files.size(posixpath.join(root, name)))
        return (Path(self.location) / name).stat().st_size

    def _reader(self, shard: int) -> Callable[[int, int], bytes]:
        """Reads (offset, size) of a shard, which stays open."""
        if self._owner != os.getpid():  # object stores' clients do not outlive a fork
            self._owner = os.getpid()
            if self._is_remote:
                self._open.clear()
                _file_system.cache_clear()
        reader = self._open.pop(shard, None)
        if reader is None:
            name = self._shards[shard]["name"]
            if self._is_remote:
                files, root = _file_system(self.location)
                path = posixpath.join(root, name)
                reader = lambda offset, size: files.cat_file(path, start=offset, end=offset + size)  # noqa: E731
            else:
                reader = _OpenFile(Path(self.location) / name)
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
        self._open[shard] = reader
        return reader


class _OpenFile:
    """Reads without a position of its own, so that threads and forked processes do not disturb each other."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self._close = os.close  # at the end of a program the module is gone first

    def __call__(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        self._close(self._descriptor)


@lru_cache(maxsize=64)
def open_shards(folder: Path) -> Shards | None:
    """The shards in a folder; None for a folder without. Opened once a process.

    Raises ShardsError where their index cannot be read.
    """
    return Shards(folder) if (folder / FACTS).is_file() else None


def packed_content(path: Path) -> bytes | None:
    """The bytes of an image file that lies in a shard of one of the folders above it; None where there is none."""
    for folder in path.parents:
        if (shards := open_shards(folder)) is not None:
            return shards.content(path.relative_to(folder).as_posix())
    return None


class ShardWriter:
    """Writes images into shards of a new folder, one after the other; the same images give the same bytes.

    The index is written last, by `close`: a folder without shards.json is one that was not packed to its end.
    """

    def __init__(self, target: Path, shard_bytes: int) -> None:
        """Raises ShardsError where `target` has something in it."""
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise ShardsError(f"{target}: is not empty. Give a new folder, or delete what is there")
        self._target, self._shard_bytes = target, shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._rows = array("Q")
        self._file: _HashedFile | None = None
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, content: bytes) -> None:
        """Writes an image file. Raises OSError where the disk is full."""
        if self._tar is None or self._file is None or self._file.length + len(content) > self._shard_bytes:
            self._end()
            self._file = _HashedFile(self._target / f"shard-{len(self._shards):06d}.tar")
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        self._tar.addfile(member, io.BytesIO(content))
        padded = -(-len(content) // _BLOCK) * _BLOCK
        self._rows.extend((_key(name), len(self._shards), len(content), self._file.length - padded))

    def close(self) -> Shards:
        """Writes the index. Raises ShardsError where an image was given twice."""
        self._end()
        columns = np.frombuffer(self._rows, dtype=np.uint64).reshape(-1, 4)
        index = np.empty(len(columns), dtype=ROW)
        index["key"], index["shard"], index["size"], index["offset"] = columns[np.argsort(columns[:, 0])].T
        twice = np.flatnonzero(index["key"][1:] == index["key"][:-1])
        if len(twice):
            raise ShardsError(f"{self._target}: {len(twice)} images were given twice. Give each file once")
        np.save(self._target / INDEX, index)
        facts = {
            "version": VERSION,
            "location": None,
            "num_images": len(index),
            "index_sha256": hashlib.sha256((self._target / INDEX).read_bytes()).hexdigest(),
            "shards": self._shards,
        }
        _write_facts(self._target, facts)
        return Shards(self._target)

    def _end(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._shards.append(
                {"name": self._file.path.name, "bytes": self._file.length, "sha256": self._file.close()}
            )
            self._tar = None


def pack_images(
    source: Path,
    names: Iterable[str],
    target: Path,
    *,
    shard_bytes: int = 1 << 30,
    progress: Callable[[int], object] = lambda number: None,
) -> Shards:
    """Writes the image files `names` (relative to `source`, files or shards) into shards, in this order.

    Raises ShardsError where `target` has something in it, and where an image is missing or is given twice; OSError
    where the disk is full.
    """
    writer, packed = ShardWriter(target, shard_bytes), open_shards(source)
    for name in names:
        try:
            content = (source / name).read_bytes() if packed is None else packed.content(name)
        except OSError as error:
            raise ShardsError(
                f"{source / name}: cannot be read: {error.strerror}. Is this the right folder?"
            ) from error
        writer.add(name, content)
        progress(1)
    return writer.close()


def relocate(folder: Path, location: str | None) -> None:
    """Notes where the tar files are: a folder, an address for fsspec, or (None) beside their index."""
    if open_shards(folder) is None:
        raise ShardsError(f"{folder}: has no {FACTS}: no shards were packed into it")
    _write_facts(folder, json.loads((folder / FACTS).read_bytes()) | {"location": location})
    open_shards.cache_clear()


class _HashedFile:
    """A new file, of which length and SHA-256 are known as it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.length = path, 0
        self._sha, self._file = hashlib.sha256(), path.open("xb")

    def write(self, content: Any) -> int:
        self._sha.update(content)
        self.length += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        return self.length

    def close(self) -> str:
        """Puts it on the disk; its SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._sha.hexdigest()


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    temporary = folder / f".{FACTS}.new"
    temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / FACTS)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(posixpath.normpath(name).encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=8)
def _file_system(location: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path there."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ShardsError(f"{location}: reading shards from there needs fsspec: pip install fsspec") from error
    try:
        files, root = url_to_fs(location)
    except ImportError as error:  # the client of this kind of store
        raise ShardsError(f"{location}: {error}") from error
    return files, root
