"""Image files that a user names: files, folders and patterns."""

from __future__ import annotations

import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.errors import DataError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFilesError(DataError):
    """A name under which there is no image."""


def walk(folder: Path, suffixes: Iterable[str] | None, excluded: Sequence[Path] = ()) -> list[Path]:
    """Files below a folder by suffix (None: all), sorted; hidden ones and a Mac's shadow files are left out.

    Links to folders are followed, each folder once, but not those that lead to a folder above. excluded: resolved
    folders that are not looked into.
    """
    found = []
    seen = {str(above) for above in Path(folder).resolve().parents}
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        if _is_below(Path(parent) / "any", excluded):
            folders.clear()
            continue
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if suffixes is None or path.suffix.lower() in suffixes)


def find_images(sources: Iterable[str | Path], *, excluded: Iterable[Path] = ()) -> list[Path]:
    """The image files that the sources name, each once, in the order of the sources.

    sources: files (taken whatever their suffix), folders (their images by suffix, subfolders too, sorted, hidden
    ones left out) and glob patterns with *, ?, [...] and ** (sorted). excluded: folders that are passed over where they
    lie inside a folder to look through, such as the one that results are written into.

    Raises ImageFilesError for a source that names nothing.
    """
    left_out = [folder.resolve() for folder in excluded]
    found: dict[Path, Path] = {}
    for source in sources:
        files = _files_of(str(source), left_out)
        if not files:
            raise ImageFilesError(
                f"{source}: no such file or folder"
                if not (Path(source).exists() or glob.has_magic(str(source)))
                else f"{source}: no images there ({' '.join(sorted(IMAGE_SUFFIXES))})"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def distinct_names(files: Sequence[Path]) -> list[str]:
    """A name without suffix for each file, no two equal (nor equal but for upper and lower case).

    It is the file's own stem where no other file has it, else folder and stem, else those with a number.
    """
    stems = [file.stem for file in files]
    longer = [f"{file.resolve().parent.name}_{file.stem}" for file in files]
    counts = Counter(stem.lower() for stem in stems)
    # Names that belong to one file alone are given first, so that no longer name takes them away.
    names = [stem if counts[stem.lower()] == 1 else None for stem in stems]
    taken = {name.lower() for name in names if name is not None}
    result = []
    for name, base in zip(names, longer, strict=True):
        if name is None:
            candidates = itertools.chain([base], (f"{base}_{number}" for number in itertools.count(2)))
            name = next(candidate for candidate in candidates if candidate.lower() not in taken)
            taken.add(name.lower())
        result.append(name)
    return result


class ProtectedFiles:
    """Input files that no output may replace, under whatever name (links, upper and lower case) it comes.

    Those that are not there, as images in shards, are passed over.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        there = (file for file in files if file.exists())
        self._files = {(status.st_dev, status.st_ino): file for file in there for status in [file.stat()]}

    def check(self, target: Path) -> None:
        """Raises ImageFilesError where writing `target` would overwrite an input."""
        if target.exists() and (file := self._files.get((target.stat().st_dev, target.stat().st_ino))):
            raise ImageFilesError(f"{target} would overwrite the input {file}; choose another place for the output")


def _files_of(source: str, left_out: Sequence[Path]) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    # The folder that the search starts from is wanted, even where it is to take the results.
    start = path if path.is_dir() else Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    left_out = [folder for folder in left_out if start.resolve() in folder.parents]
    if path.is_dir():
        return walk(path, IMAGE_SUFFIXES, left_out)
    files: list[Path] = []
    for match in sorted(glob.glob(source, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        if Path(match).is_dir():
            if "**" not in source:  # which lists the folders' content itself
                files += walk(Path(match), IMAGE_SUFFIXES, left_out)
        elif Path(match).suffix.lower() in IMAGE_SUFFIXES and not _is_below(Path(match), left_out):
            files.append(Path(match))
    return files


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    parents = path.resolve().parents
    return any(folder in parents for folder in folders)
