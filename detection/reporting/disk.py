"""Files that survive: written whole or not at all, and on the disk before anything relies on them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be written into a folder, or it cannot be made; leaves nothing behind."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    with tempfile.TemporaryFile(dir=there):
        pass


def write_whole(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Make a file or replace it: at any time, also after a power loss, it is the old one or the new one.

    content: what it holds, or what writes it.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk (fsync): new, renamed and removed ones."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
