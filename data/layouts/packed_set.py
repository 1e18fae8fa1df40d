"""A packed set: a folder with the annotations of each split as one file to map, and its images in shards.

    packed_set.json    {"version": 1, "splits": {"train": {"annotations": "train.packed", "images": "train"}, ...}}
    train.packed       the annotations: data/cache/packed_file.py has the layout
    train/             the images: data/images/shards.py has the layout
    val.packed, val/, test.packed, test/

Paths in packed_set.json are relative to the folder, so that it can be moved. Images that were not packed have absolute
ones. packed_set.json is written last: a folder without it was not packed to its end.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path

from data.coco.annotations import CocoAnnotations, read_coco, write_annotations
from data.coco.layout import SplitFiles
from data.errors import DataError
from data.images.shards import open_shards, pack_images

RECORD = "packed_set.json"
VERSION = 1


class PackedSetError(DataError):
    """A packed set that cannot be written or read; the message says what of it, and how to mend it."""


def write_set(
    target: Path,
    splits: Mapping[str, tuple[CocoAnnotations, Path]],
    *,
    with_images: bool = True,
    shard_bytes: int = 1 << 30,
    progress: Callable[[int], object] = lambda number: None,
) -> None:
    """Packs the annotations of each split, and the images that they name, into a new folder.

    splits: by name, annotations read with masks=True, and the folder of their images. with_images: False leaves the
    images where they are, and notes their folder.

    Raises PackedSetError where `target` has something in it, ShardsError where an image is missing, OSError where the
    disk is full.
    """
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise PackedSetError(f"{target}: is not empty. Give a new folder, or delete what is there")
    entries = {}
    for name, (read, images) in splits.items():
        write_annotations(read, target / f"{name}.packed")
        if with_images:
            # An image may be named as a.jpg and as ./a.jpg.
            names = dict.fromkeys(posixpath.normpath(read.file_name(index)) for index in range(len(read)))
            pack_images(images, names, target / name, shard_bytes=shard_bytes, progress=progress)
        entries[name] = {
            "annotations": f"{name}.packed",
            "images": name if with_images else str(images.absolute()),
        }
    temporary = target / f".{RECORD}.new"
    temporary.write_text(json.dumps({"version": VERSION, "splits": entries}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target / RECORD)


def read_set(folder: Path) -> dict[str, SplitFiles] | None:
    """The splits of a packed set; None for any other folder.

    Raises PackedSetError for a set of another version, or with a part missing.
    """
    record = folder / RECORD
    if not record.is_file():
        return None
    remedy = "Copy the whole folder again from where the set was packed, or pack it again: scripts/pack_dataset.py"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        version = content["version"]
        splits = {
            name: SplitFiles(folder / entry["images"], folder / entry["annotations"])
            for name, entry in content["splits"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackedSetError(f"{record}: cannot be read: {error!r}. {remedy}") from error
    if version != VERSION:
        raise PackedSetError(f"{record}: is of version {version}, this program reads {VERSION}. {remedy}")
    for files in splits.values():
        for path in (files.annotations, files.images):
            if not path.exists():
                raise PackedSetError(f"{path}: is missing, which {record} names. {remedy}")
    return splits


def damaged(folder: Path, progress: Callable[[int], object] = lambda number: None) -> list[str]:
    """A line for each fault of a packed set. All of it is read, and compared with its checksums.

    Raises PackedSetError where the folder is none.
    """
    splits = read_set(folder)
    if splits is None:
        raise PackedSetError(f"{folder}: has no {RECORD}: no set was packed into it")
    lines = []
    for name, files in splits.items():
        try:
            annotations = read_coco(files.annotations, masks=True)
            shards = open_shards(files.images)
        except DataError as error:
            lines.append(str(error))
            continue
        if shards is None:
            continue  # the images were not packed
        lines += [f"{name}: {line}" for line in shards.damaged(progress)]
        found = shards.find(annotations.file_name(index) for index in range(len(annotations)))
        if (found < 0).any():
            lines.append(f"{name}: {(found < 0).sum():,} images of {files.annotations} are not in the shards")
    return lines
