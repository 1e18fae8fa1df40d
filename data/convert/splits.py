"""Which images are trained on and which are validated on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.convert.conversion import ConversionError, LabeledImage, counted
from data.convert.files import read_text
from data.convert.near_equal import near_equal_groups

DEFAULT_VAL_FRACTION = 0.1
SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training", "train2017"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "val2017"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of folders and lists that say which split their images are of."""
IMAGE_FOLDERS = {"images", "JPEGImages"}


def split_by_seed(
    images: Sequence[LabeledImage], val_fraction: float, seed: int
) -> tuple[dict[str, list[LabeledImage]], str]:
    """A share of the images to validate on, at least one, chosen by seed and name; and a line that says so.

    An image's turn depends on nothing but the seed and its key, so neither the order of the files nor new images
    shuffle the others; only those at the cut may change sides when the number of images changes. Images that are
    nearly equal stay together, so that validation does not measure what was trained on; a group that is larger than
    the whole share is trained on.

    Raises ConversionError where there are fewer than two images.
    """
    if len(images) < 2:
        raise ConversionError(f"{counted(len(images), 'image')} cannot be split into training and validation: add some")
    turns = sorted(images, key=lambda image: _turn(image.key, seed))
    num_val = min(max(1, round(val_fraction * len(turns))), len(turns) - 1)
    groups: dict[int, list[str]] = {}
    for image, group in zip(turns, near_equal_groups([image.path for image in turns]), strict=True):
        groups.setdefault(group, []).append(image.key)
    chosen: set[str] = set()
    for keys in groups.values():
        if len(chosen) + len(keys) <= num_val:
            chosen.update(keys)
    line = f"by seed {seed} and file name, {val_fraction:g} of the images to validate on"
    if not chosen:
        smallest = min(groups.values(), key=len)
        if len(smallest) < len(turns):
            chosen.update(smallest)
        else:
            chosen.update(image.key for image in turns[:num_val])
            line += "; all images are nearly equal, so validation flatters"
    num_alike = sum(len(keys) for keys in groups.values() if len(keys) > 1)
    if num_alike and len(groups) > 1:
        line += f"; {num_alike:,} images are nearly equal to others and stay with them"
    splits = {
        "train": [image for image in images if image.key not in chosen],
        "val": [image for image in images if image.key in chosen],
    }
    return splits, line


def whole_splits(
    found: Mapping[str, Sequence[LabeledImage]], origin: str, val_fraction: float | None, seed: int
) -> tuple[dict[str, list[LabeledImage]], str]:
    """Splits with images to train and to validate on, made of those found; and a line that says where they are from.

    found: train, val and test as far as the source has them; "all" for images that it says nothing of. Without
    validation images, those of the test split are validated on; without either, or with `val_fraction`, the others are
    split by seed.
    """
    splits = {name: list(images) for name, images in found.items() if images}
    test = {"test": splits["test"]} if "test" in splits else {}
    apart = {image.path for image in test.get("test", [])}
    if val_fraction is None and "train" in splits and splits.keys() & {"val", "test"}:
        strays = splits.pop("all", [])
        if "val" not in splits:
            splits["val"] = splits.pop("test")
            origin += "; the test split is validated on, as there is none for validation"
        if strays:
            origin += f"; {counted(len(strays), 'image')} outside of the splits left out, the first {strays[0].path}"
        return {name: splits[name] for name in ("train", "val", "test") if name in splits}, origin
    rest = {image.key: image for name in ("train", "val", "all") for image in splits.get(name, [])}
    if not rest:
        rest, test, apart = {image.key: image for image in splits["test"]}, {}, set()
    pool = [image for _, image in sorted(rest.items()) if image.path not in apart]
    made, line = split_by_seed(pool, DEFAULT_VAL_FRACTION if val_fraction is None else val_fraction, seed)
    return made | test, line


def split_of_path(path: Path, root: Path) -> str:
    """The split that the first folder of such a name below `root` says: train, val or test; "all" without one."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return next((SPLIT_OF_FOLDER[name.lower()] for name in folders if name.lower() in SPLIT_OF_FOLDER), "all")


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
