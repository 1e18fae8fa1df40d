"""Large files over HTTP: fetched in pieces, resumed, verified, unpacked. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from data.errors import DataError

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0
FIRST_ATTEMPTS = 4  # before anything has arrived: a server that is not there will not come
LATER_ATTEMPTS = 10  # in a row without a single byte, once something has
LONGEST_PAUSE_SECONDS = 60.0
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}

Say = Callable[[str], None]
ProgressOf = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""progress(description, total bytes): a context whose value is called with the bytes done so far."""


class DownloadError(DataError):
    """A file that cannot be fetched, verified or unpacked; the message says why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of known content: address, size in bytes, SHA-256 in hexadecimal digits."""

    url: str
    size: int
    sha256: str


def download(
    remote: RemoteFile, target: Path, *, say: Say, progress: ProgressOf, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Brings the remote file to `target`; False where it was there already.

    What has arrived stays in `target`.part, also when this raises, and the next call goes on from there. A dropped
    connection is tried again with growing pauses. `target` appears only when size and sum are right.

    Raises:
        DownloadError: the server cannot be reached or has another file, the disk is full, a second process is at it.
    """
    if target.exists():
        say(f"checking {target}")
        if target.stat().st_size != remote.size or _sha256(target) != remote.sha256:
            raise DownloadError(f"{target} is not the file that {remote.url} should be: delete it and start again")
        return False
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(part) as file:
        if _length(file) > remote.size:
            file.truncate(0)
        for is_last_try in [False, True] if _length(file) else [True]:  # what was there may be of another file
            with progress(target.name, remote.size) as advance:
                _receive(remote, file, part, say, advance, sleep)
            say(f"checking {target.name}")
            if _sha256(part) == remote.sha256:
                part.replace(target)
                return True
            file.truncate(0)
            if not is_last_try:
                say(f"{part} does not fit together (wrong SHA-256): starting over")
    raise DownloadError(
        f"{remote.url} has the right size and a wrong SHA-256: the file there is damaged or another one. "
        "What came was thrown away; try again later, or another mirror with --base-url"
    )


def _receive(
    remote: RemoteFile, file: IO[bytes], part: Path, say: Say, advance: Callable[[int], None], sleep: Callable
) -> None:
    """Appends to `file` until it has the remote file's length."""
    failures, has_received = 0, False
    while (start := _length(file)) < remote.size:
        advance(start)
        try:
            _receive_once(remote, file, part, say, advance)
            reason = "the server closed the connection"
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start > 0:
                file.truncate(0)
                continue
            if error.code not in TRANSIENT_STATUS:
                raise DownloadError(
                    f"{remote.url}: the server answers {error.code} {error.reason}; is --base-url right?"
                ) from error
            reason = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise DownloadError(f"{remote.url}: {cause}; is --base-url right?") from error
            reason = str(cause) or type(error).__name__
        length = _length(file)
        if length >= remote.size:
            break
        failures = 0 if length > start else failures + 1
        has_received |= length > start
        if failures >= (LATER_ATTEMPTS if has_received else FIRST_ATTEMPTS):
            kept = f" {_shown(length)} of {_shown(remote.size)} stay in {part}." if length else ""
            raise DownloadError(
                f"{remote.url} cannot be reached ({reason}).{kept} Check the network (proxies: https_proxy, "
                "http_proxy), then run the same command again; or give a mirror with --base-url"
            )
        pause = min(2.0**failures, LONGEST_PAUSE_SECONDS)
        say(f"{part.name}: {reason} at {_shown(length)} of {_shown(remote.size)}; trying again in {pause:.0f} s")
        sleep(pause)
    advance(remote.size)


def _receive_once(remote: RemoteFile, file: IO[bytes], part: Path, say: Say, advance: Callable[[int], None]) -> None:
    start = _length(file)
    try:
        request = urllib.request.Request(remote.url, headers={"Accept-Encoding": "identity"})
    except ValueError as error:
        raise DownloadError(f"{remote.url} is no address: {error}") from error
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        is_rest = start > 0 and response.status == http.HTTPStatus.PARTIAL_CONTENT
        if start and not is_rest:
            say(f"{part.name}: the server cannot send the rest alone: starting over")
            file.truncate(0)
            start = 0
        _check_size(remote, response, start)
        while start < remote.size and (chunk := response.read(min(CHUNK_BYTES, remote.size - start))):
            start += len(chunk)
            with _disk_full_explained(part):
                while chunk:  # an unbuffered file may take less than it is given
                    chunk = chunk[file.write(chunk) :]
            advance(start)


def _check_size(remote: RemoteFile, response: http.client.HTTPResponse, start: int) -> None:
    """Refuses another file than the one asked for before its gigabytes are fetched."""
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else remote.size
    if start:
        span, _, announced = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if not span.startswith(f"{start}-"):
            raise DownloadError(f"{remote.url}: asked for the bytes from {start} on, the server sends {span!r}")
        total = int(announced) if announced.isdigit() else total
    if total != remote.size:
        raise DownloadError(
            f"{remote.url} has {total} bytes there, and should have {remote.size}: it is another file (an error page, "
            "a login page, a wrong mirror?)"
        )


def unpack(archive: Path, folder: Path, top: str, *, progress: ProgressOf) -> int:
    """Unpacks a zip file whose members are all `top`/NAME into `folder`; the number of files.

    Checksums are verified. The folder `top` appears whole; where it exists already, each file is put into it whole.

    Raises:
        DownloadError: the archive is damaged, has a member with another path or of another kind, or the disk is full.
    """
    staging = folder / f".{top}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            for member in members:
                _check_member(archive, member, top)
            staging.mkdir(parents=True)
            done = 0
            with progress(f"unpacking {archive.name}", sum(member.file_size for member in members)) as advance:
                for member in members:
                    path = staging / PurePosixPath(member.filename).name
                    with _disk_full_explained(archive), content.open(member) as source, path.open("wb") as file:
                        shutil.copyfileobj(source, file, CHUNK_BYTES)
                    done += member.file_size
                    advance(done)
        target = folder / top
        if target.exists():
            for path in staging.iterdir():
                path.replace(target / path.name)
        else:
            staging.rename(target)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{archive} cannot be unpacked ({error}): delete it and start again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(members)


def _check_member(archive: Path, member: zipfile.ZipInfo, top: str) -> None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if not re.fullmatch(rf"{re.escape(top)}/[^./\\:\0][^/\\:\0]*", member.filename) or kind not in (0, stat.S_IFREG):
        raise DownloadError(
            f"{archive} was not unpacked: its member {member.filename!r} is no plain file of {top}/; "
            "delete the archive, its source cannot be trusted"
        )


@contextmanager
def _exclusive(part: Path) -> Iterator[IO[bytes]]:
    """The file opened for appending, with no second process at it."""
    with part.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{part} is being written by another download; wait for it or stop it") from error
        except OSError:
            pass  # a file system without locks; the checksum still catches two writers
        yield file


@contextmanager
def _disk_full_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise DownloadError(f"{path.parent} cannot be written: {error}") from error
        free = shutil.disk_usage(path.parent).free
        raise DownloadError(
            f"the disk of {path.parent} is full ({_shown(free)} free); {path.name} stays. Make room and run the same "
            "command again"
        ) from error


def _length(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _shown(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
