"""COCO files in a folder: which split each is of, where its images are, and what of it has to change for training."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.coco.annotations import read_coco
from data.coco.layout import SplitFiles
from data.convert.conversion import ConversionError, LabeledImage, counted, nearest
from data.convert.splits import SPLIT_OF_FOLDER, whole_splits
from data.images.shards import open_shards
from data.layouts.recognition import ROBOFLOW_FILE, LayoutError, coco_files

NUM_TRIED = 50  # images of a file that are looked for in a folder, to tell whether it is the right one


@dataclass
class CocoContent:
    """An annotation file, parsed, and what it becomes."""

    file: Path
    images: Path
    content: dict[str, Any]
    is_changed: bool = False

    def used(self) -> set[Any]:
        """Ids of the categories that have annotations."""
        return {annotation["category_id"] for annotation in self.content["annotations"]}

    def names(self) -> dict[Any, str]:
        """Name of each category by id."""
        return {category["id"]: category["name"] for category in self.content["categories"]}

    def set_categories(self, categories: list[dict[str, Any]], new_ids: dict[Any, Any]) -> None:
        """Takes these categories in place of its own; annotations of an id that is not in `new_ids` are left out."""
        kept = [one for one in self.content["annotations"] if one["category_id"] in new_ids]
        kept = [one | {"category_id": new_ids[one["category_id"]]} for one in kept]
        self.content = self.content | {"categories": categories, "annotations": kept}
        self.is_changed = True

    def part(self, image_ids: set[Any]) -> CocoContent:
        """The same with these images alone."""
        content = self.content | {
            "images": [image for image in self.content["images"] if image["id"] in image_ids],
            "annotations": [one for one in self.content["annotations"] if one["image_id"] in image_ids],
        }
        return CocoContent(self.file, self.images, content, is_changed=True)


def coco_set(
    root: Path, classes: Sequence[str], val_fraction: float | None, seed: int
) -> tuple[dict[str, CocoContent], list[str]]:
    """The splits of a folder of COCO files, with one class list; and what was left out or changed, a line each.

    classes: those to keep; all where empty. Without validation images those of the test split are validated on; without
    either the images are split by seed.

    Raises LayoutError where files are of one split, or images are not found; AnnotationError, ConversionError.
    """
    found = {split: _read(root, file, split) for split, file in _files_by_split(root).items()}
    lines: list[str] = []
    first = found.get("train") or found.get("all") or next(iter(found.values()))
    lines += _drop_root(list(found.values()))
    for other in found.values():
        if other is not first:
            _take_categories(other, first)
    if classes:
        lines += _keep(list(found.values()), classes)
    if "all" in found and found.keys() & {"train", "val"}:
        raise LayoutError(
            f"{found['all'].file}: its name says no split, and there are files that do. Take it out of {root}, or give "
            "--train-images, --train-annotations, --val-images and --val-annotations"
        )
    if "all" in found:
        found["train"] = found.pop("all")
    if val_fraction is None and "test" in found and "train" in found and "val" not in found:
        found["val"] = found.pop("test")
        lines.append(
            f"{found['val'].file.parent.name}: the test split is validated on, as there is none for validation"
        )
    if "train" in found and "val" not in found:
        whole = found["train"]
        by_key: dict[str, set[Any]] = {}
        images = []
        for image in whole.content["images"]:
            name = image["file_name"]
            if name not in by_key:
                images.append(LabeledImage(name, whole.images / name, 0, 0))
            by_key.setdefault(name, set()).add(image["id"])
        splits, line = whole_splits({"all": images}, "", val_fraction, seed)
        for split, chosen in splits.items():
            found[split] = whole.part({number for image in chosen for number in by_key[image.key]})
        lines.append(line)
    elif val_fraction is not None:
        raise ConversionError(f"{root} has a validation split of its own: leave --val-fraction away")
    return {split: found[split] for split in ("train", "val", "test") if split in found}, lines


def write_contents(contents: dict[str, CocoContent], folder: Path) -> dict[str, SplitFiles]:
    """The splits' files: the sources where nothing is changed, else files written under `folder`."""
    splits = {}
    for split, content in contents.items():
        file = content.file
        if content.is_changed:
            file = folder / "annotations" / f"instances_{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content.content, ensure_ascii=False), encoding="utf-8")
        splits[split] = SplitFiles(content.images, file)
    return splits


def split_of_name(file: Path) -> str:
    """The split that a file's name says, or that of its folder; "all" where neither does."""
    for text in (file.stem, file.parent.name):
        for word in re.findall("[a-z]+", text.lower()):
            if word in SPLIT_OF_FOLDER:
                return SPLIT_OF_FOLDER[word]
    return "all"


def _files_by_split(root: Path) -> dict[str, Path]:
    by_split: dict[str, Path] = {}
    for file in coco_files(root):
        split = split_of_name(file.relative_to(root))
        if split in by_split:
            of = f"the {split} split" if split != "all" else "no split by their names"
            lines = [f"{root}: two annotation files are of {of}. Give the one that is meant, with its images:"]
            option = "val" if split == "val" else "train"
            lines += [f"  --{option}-annotations {each} --{option}-images DIR" for each in (by_split[split], file)]
            raise LayoutError("\n".join(lines))
        by_split[split] = file
    return by_split


def _read(root: Path, file: Path, split: str) -> CocoContent:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        categories, images, annotations = (content.get(key, []) for key in ("categories", "images", "annotations"))
        is_whole = all("id" in one and "name" in one for one in categories) and bool(images)
        is_whole = is_whole and all("id" in one and isinstance(one["file_name"], str) for one in images)
        is_whole = is_whole and all("image_id" in one and "category_id" in one for one in annotations)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        read_coco(file)  # which says what is wrong, and where
        raise LayoutError(f"{file}: is not a COCO file of images, annotations and categories")
    content.setdefault("annotations", [])
    return _with_images(root, file, split, content)


def _with_images(root: Path, file: Path, split: str, content: dict[str, Any]) -> CocoContent:
    """The content with the folder that its file names are relative to; they are mended where programs write them so
    that they lead nowhere (Label Studio: paths of the machine that it ran on)."""
    names = [image["file_name"] for image in content["images"]]
    folders = _image_folders(root, file, split)
    for mended in (names, [re.split(r"[/\\]", name)[-1] for name in names]):
        tried = mended[:: max(1, len(mended) // NUM_TRIED)]
        num_there = {folder: _num_there(folder, tried) for folder in folders}
        best = max(folders, key=lambda folder: num_there[folder])
        if num_there[best]:
            changed = mended != names
            if changed:
                images = [image | {"file_name": name} for image, name in zip(content["images"], mended, strict=True)]
                content = content | {"images": images}
            return CocoContent(file, best, content, is_changed=changed)
    searched = ", ".join(str(folder) for folder in folders)
    raise LayoutError(
        f"{file}: none of its images is there; the first is {names[0]!r}. Searched were {searched}. Put the images "
        "beside the file or in a folder images, or give --train-images DIR --train-annotations FILE"
    )


def _num_there(folder: Path, names: Sequence[str]) -> int:
    if (shards := open_shards(folder)) is not None:
        return int((shards.find(names) >= 0).sum())
    return sum((folder / name).is_file() for name in names)


def _image_folders(root: Path, file: Path, split: str) -> list[Path]:
    """Where the images of a file may be, the likelier first."""
    bases = [file.parent, root, root / "images", file.parent / "images", root / "data", root / "JPEGImages"]
    named = [
        folder
        for base in dict.fromkeys(bases)
        if base.is_dir()
        for folder in sorted(base.iterdir())
        if folder.is_dir() and split_of_name(folder / "any") == split and split != "all"
    ]
    folders = [*named, *(folder / "images" for folder in named), *bases]
    folders += [base / "default" for base in bases]  # Datumaro's and CVAT's name for a set without splits
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _drop_root(contents: Sequence[CocoContent]) -> list[str]:
    """Takes Roboflow's root category (id 0, the others' supercategory, no annotation) out of all files."""
    lines = []
    used = set().union(*(one.used() for one in contents))
    for one in contents:
        categories = one.content["categories"]
        roots = [category for category in categories if category["id"] == 0 and 0 not in used]
        others = [category for category in categories if category["id"] != 0]
        if one.file.name != ROBOFLOW_FILE or not roots or not others:
            continue
        if all(category.get("supercategory") == roots[0]["name"] for category in others):
            lines = [f"category 0 {roots[0]['name']!r}, the root of Roboflow's export, which has no annotation"]
            one.set_categories(others, {category["id"]: category["id"] for category in others})
    return lines


def _take_categories(other: CocoContent, first: CocoContent) -> None:
    """Gives `other` the categories of `first`, by name; those of its own without an annotation are left out."""
    if other.content["categories"] == first.content["categories"]:
        return
    ids = {name: number for number, name in first.names().items()}
    used = other.used()
    for number, name in other.names().items():
        if name not in ids and number in used:
            raise ConversionError(
                f"{other.file}: has annotations of {name!r}, and {first.file} has no such category"
                f"{nearest(name, ids)}. Give both files the same category names, or name the classes to keep: --classes"
            )
    if other.names() == first.names():
        return
    new_ids = {number: ids[name] for number, name in other.names().items() if name in ids}
    other.set_categories(first.content["categories"], new_ids)


def _keep(contents: Sequence[CocoContent], classes: Sequence[str]) -> list[str]:
    lines = []
    for one in contents:
        names = one.names()
        for name in classes:
            if name not in names.values():
                raise ConversionError(f"--classes {name}: no such class in {one.file}{nearest(name, names.values())}")
        before = len(one.content["annotations"])
        categories = [category for category in one.content["categories"] if category["name"] in classes]
        one.set_categories(categories, {category["id"]: category["id"] for category in categories})
        left_out = before - len(one.content["annotations"])
        lines.append(f"{counted(left_out, 'box', 'boxes')} of other classes in {one.file.name}")
    return lines
