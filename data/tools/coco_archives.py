"""The archives of COCO 2017: where they are, what they hold, and bringing them into the standard layout."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tools.download import DownloadError, ProgressOf, RemoteFile, Say, download, unpack

BASE_URL = "http://images.cocodataset.org"  # its own certificate does not fit the name; the sums below do the trusting


@dataclass(frozen=True)
class CocoArchive:
    """One zip file of COCO 2017.

    path: below the base URL. size, unpacked_size: bytes (the latter roughly, with what file systems round up).
    folder: where its files go. It is complete when num_files files there fit `pattern`.
    """

    path: str
    size: int
    sha256: str
    folder: str
    pattern: str
    num_files: int
    unpacked_size: int

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def num_present(self, data_path: Path) -> int:
        """Files fitting the pattern that lie unpacked under data_path."""
        return sum(1 for _ in (data_path / self.folder).glob(self.pattern))


# Sizes are the servers' Content-Length; the sums are those that TensorFlow Datasets and many others pin.
ARCHIVES = {
    "annotations": CocoArchive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        "annotations",
        "instances_*2017.json",  # captions and keypoints come along and are not used
        2,
        840_000_000,
    ),
    "val": CocoArchive(
        "zips/val2017.zip",
        815_585_330,
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        "val2017",
        "*.jpg",
        5_000,
        830_000_000,
    ),
    "train": CocoArchive(
        "zips/train2017.zip",
        19_336_861_798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        "train2017",
        "*.jpg",
        118_287,
        19_700_000_000,
    ),
}


def space_needed(archives: Sequence[CocoArchive], data_path: Path, *, keep_archives: bool) -> int:
    """Bytes that must be free to fetch and unpack the archives one after the other, at the worst moment.

    What lies under data_path already counts as paid for.
    """
    used = peak = 0
    for archive in archives:
        if archive.num_present(data_path) < archive.num_files:
            files = (data_path / archive.name, data_path / f"{archive.name}.part")
            here = next((min(file.stat().st_size, archive.size) for file in files if file.is_file()), 0)
            used += archive.size - here + archive.unpacked_size
            peak = max(peak, used)
            used -= 0 if keep_archives else archive.size
    return peak


def check_space(archives: Sequence[CocoArchive], data_path: Path, *, keep_archives: bool) -> None:
    """Raises DownloadError where the disk has too little room for what is still to come."""
    needed = space_needed(archives, data_path, keep_archives=keep_archives)
    existing = next(path for path in (data_path.absolute(), *data_path.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DownloadError(
            f"{data_path} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed (archive and unpacked "
            "files lie side by side for a while): make room, choose another --data-path, or fewer --parts"
        )


def fetch_archive(
    archive: CocoArchive,
    data_path: Path,
    *,
    base_url: str = BASE_URL,
    keep_archive: bool = False,
    say: Say,
    progress: ProgressOf,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetches, verifies and unpacks one archive into data_path; does nothing where its files are there.

    An archive that this call fetched is deleted after unpacking unless keep_archive says otherwise.

    Raises DownloadError as `data.tools.download` does.
    """
    present = archive.num_present(data_path)
    if present >= archive.num_files:
        say(f"{data_path / archive.folder}: complete, {present} files")
        return
    if present:
        say(f"{data_path / archive.folder}: {present} of {archive.num_files} files, all are fetched again")
    file = data_path / archive.name
    remote = RemoteFile(f"{base_url.rstrip('/')}/{archive.path}", archive.size, archive.sha256)
    is_new = download(remote, file, say=say, progress=progress, sleep=sleep)
    count = unpack(file, data_path, archive.folder, progress=progress)
    say(f"{data_path / archive.folder}: {count} files")
    if is_new and not keep_archive:
        file.unlink()
    else:
        say(f"{file} is no longer needed and was kept")
