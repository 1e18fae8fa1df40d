"""What was found out about large files, kept beside the cache until they change: a start need not find it out again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TICK_NS = 20_000_000
"""The clock of a file system may stand still for so long: two changes within it leave the same time."""


class KnownFiles:
    """Facts about files and folders, each a small JSON file in `folder`.

    A fact counts as long as none of the paths has another device, inode, size, or time of change. Every way to write a
    file sets its time of change (ctime), which no program can set back. A fact about a file that changed within the
    last instant is not kept. What cannot be written is not kept either.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, path: Path, what: str, seconds: float | None = None) -> Any | None:
        """What is known; None where nothing is, something changed, or it is older than `seconds`."""
        try:
            record = json.loads(self._record(path, what).read_text())
            paths = [path, *map(Path, record["others"])]
            if record["path"] != str(path.absolute()) or record["identities"] != [_identity(one) for one in paths]:
                return None
            if seconds is not None and not 0 <= time.time() - record["since"] / 1e9 <= seconds:
                return None
            return record["fact"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def keeping(self, path: Path, what: str, others: Sequence[Path] = ()) -> Iterator[list[Any]]:
        """Inside, the fact is found out and put into the list that is given; or the list stays empty.

        others: paths on which it depends too; they may be added to while inside.
        """
        since, identity = time.time_ns(), _identity(path)
        fact: list[Any] = []
        yield fact
        if not fact:
            return
        with suppress(OSError):
            identities = [identity, *(_identity(one) for one in others)]
            if max(one[-1] for one in identities) + _TICK_NS > since or identity != _identity(path):
                return
            record = {"path": str(path.absolute()), "others": [str(one) for one in others], "identities": identities}
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".known.", dir=self._folder)
            with os.fdopen(handle, "w") as file:
                json.dump(record | {"since": since, "fact": fact[0]}, file)
            Path(temporary).replace(self._record(path, what))

    def keep_own(self, path: Path, key: str) -> None:
        """That this process has just written `path`, which is sound."""
        time.sleep(2 * _TICK_NS / 1e9)
        with self.keeping(path, "sound") as kept:
            kept.append(key)

    def _record(self, path: Path, what: str) -> Path:
        name = hashlib.sha256(f"{what}\0{path.absolute()}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.known"


def _identity(path: Path) -> list[int]:
    try:
        # Opened, so that a network's file system asks its server.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        status = path.stat()
    else:
        status = os.fstat(handle)
        os.close(handle)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
