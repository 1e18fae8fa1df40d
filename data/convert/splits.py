"""Which images are trained on and which are validated on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data.convert.conversion import ConversionError, LabeledImage
from data.convert.files import read_text

SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Names of folders and lists that say which split their images are of."""
IMAGE_FOLDERS = {"images", "JPEGImages"}


def split_by_seed(images: Sequence[LabeledImage], val_fraction: float, seed: int) -> dict[str, list[LabeledImage]]:
    """A share of the images to validate on, at least one, chosen by seed and name.

    An image's turn depends on nothing but the seed and its key, so neither the order of the files nor new images
    shuffle the others; only those at the cut may change sides when the number of images changes.

    Raises ConversionError where there are fewer than two images.
    """
    if len(images) < 2:
        raise ConversionError(f"{len(images)} images cannot be split into training and validation: add some")
    turns = sorted(images, key=lambda image: _turn(image.key, seed))
    num_val = min(max(1, round(val_fraction * len(turns))), len(turns) - 1)
    chosen = {image.key for image in turns[:num_val]}
    return {
        "train": [image for image in images if image.key not in chosen],
        "val": [image for image in images if image.key in chosen],
    }


def _turn(key: str, seed: int) -> tuple[bytes, str]:
    # Without the folders that formats ask for, so that a set is split alike whichever format it comes in.
    name = "/".join(part for part in Path(key).parts if part not in IMAGE_FOLDERS)
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest(), key


def split_by_lists(
    images: Sequence[LabeledImage], lists: dict[str, Path], left_out: set[str]
) -> tuple[dict[str, list[LabeledImage]], list[str]]:
    """Splits by files that name one image a line (VOC's ImageSets: "000012", or "000012 -1"; suffixes are fine).

    left_out: keys that were found and could not be used, so that naming them is no fault. Returns the splits, and
    the keys in none of them.

    Raises ConversionError, with file and line, for a name that no label file has or that two lists have.
    """
    by_key = {image.key: image for image in images}
    by_stem: dict[str, list[str]] = {}
    for key in (*by_key, *left_out):
        by_stem.setdefault(Path(key).name, []).append(key)
    taken: dict[str, str] = {}
    splits: dict[str, list[LabeledImage]] = {}
    for split, file in lists.items():
        keys = []
        for number, line in enumerate(read_text(file, "Check the path of the list").splitlines(), 1):
            if not line.strip():
                continue
            listed = _listed_key(line, by_key.keys() | left_out, by_stem)
            if listed is None:
                raise ConversionError(
                    f"{file}, line {number}: {line.strip()!r} names no label file that was found, or several. Correct "
                    "the line, or add the file"
                )
            if taken.setdefault(listed, split) != split:
                raise ConversionError(
                    f"{file}, line {number}: {listed!r} is in the list of {taken[listed]} too: validation would "
                    "measure what was trained on. Take it out of one"
                )
            keys.append(listed)
        splits[split] = [by_key[key] for key in dict.fromkeys(keys) if key in by_key]
    return splits, [key for key in by_key if key not in taken]


def split_by_folder(images: Sequence[LabeledImage]) -> dict[str, list[LabeledImage]] | None:
    """Splits by the first folder of the keys (train/..., valid/...); None where they do not say it for all."""
    splits: dict[str, list[LabeledImage]] = {}
    for image in images:
        parts = Path(image.key).parts
        if len(parts) < 2 or parts[0].lower() not in SPLIT_OF_FOLDER:
            return None
        split = SPLIT_OF_FOLDER[parts[0].lower()]
        splits.setdefault(split, []).append(image)
    return splits if {"train", "val"} <= splits.keys() else None


def _listed_key(line: str, keys: set[str], by_stem: dict[str, list[str]]) -> str | None:
    whole = line.strip().replace("\\", "/")
    words = whole.split()
    names = [whole, words[0]] if len(words) == 2 and words[1] in ("0", "1", "-1") else [whole]
    for name in names:
        for key in (name, str(Path(name).with_suffix(""))):
            if key in keys:
                return key
            same_stem = by_stem.get(Path(key).name, [])
            if len(same_stem) == 1:
                return same_stem[0]
    return None
