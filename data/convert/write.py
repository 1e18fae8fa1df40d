"""Converted sets on the disk: written whole or not at all, and never over what is there."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.coco.annotations import AnnotationError, read_coco
from data.coco.layout import SplitFiles
from data.convert.conversion import ConversionError, Exif, LabeledImage, Progress, Remarks, image_facts
from data.convert.voc_xml import Coordinates, voc_xml
from data.convert.yolo import label_path, yolo_lines
from data.convert.yolo_config import yaml_text


def write_coco_set(
    output_dir: Path,
    splits: dict[str, list[LabeledImage]],
    class_names: Sequence[str],
    *,
    images_root: Path | None = None,
    copy: bool = False,
    overwrite: bool = False,
    description: str = "",
    progress: Progress = lambda _: None,
) -> dict[str, SplitFiles]:
    """Writes annotations/instances_<split>.json for each split, and what they refer to.

    Images stay where they are, and file names are relative to images_root, or to the deepest folder that holds all
    images of the split; with `copy` they are copied into <output_dir>/<split>/. Image ids count from 1 by key over
    all splits, category ids from 1 in the order of class_names. What is there already is refused, or with
    `overwrite` moved to <name>.before_<time> first.

    Raises ConversionError for outputs that exist, and for a split without images.
    """
    for split, sources in splits.items():
        if not sources:
            raise ConversionError(f"no images are left for {split}: there is nothing to write")
    roots = {split: _root_of(sources, images_root) for split, sources in splits.items()}
    targets = {split: output_dir / "annotations" / f"instances_{split}.json" for split in splits}
    replaced = [*targets.values(), *(output_dir / split for split in splits if copy)]
    everything = sorted((source.key, split) for split, sources in splits.items() for source in sources)
    ids = {pair: number for number, pair in enumerate(everything, 1)}
    category_ids = {name: number for number, name in enumerate(class_names, 1)}
    written, annotation_id = {}, 0
    with _staged(output_dir, replaced, overwrite, _paths(splits)) as staging:
        (staging / "annotations").mkdir()
        for split, sources in splits.items():
            images, annotations = [], []
            for source in sorted(sources, key=lambda source: source.key):
                name = Path(os.path.relpath(source.path, roots[split])).as_posix()
                image_id = ids[source.key, split]
                size = {"width": source.width, "height": source.height}
                images.append({"id": image_id, "file_name": name, **size})
                for box in source.boxes:
                    annotation_id += 1
                    xywh = box.box_xywh
                    annotations.append(
                        {
                            "id": annotation_id,
                            "image_id": image_id,
                            "category_id": category_ids[box.name],
                            "bbox": xywh,
                            "area": box.area,
                            "iscrowd": int(box.crowd),
                            "segmentation": [list(map(float, ring)) for ring in box.rings],
                        }
                    )
                if copy:
                    _place_image(source.path, staging / split / name, copy=True)
                progress(1)
            content = {
                "info": {"description": description},
                "licenses": [],
                "images": images,
                "annotations": annotations,
                "categories": [
                    {"id": number, "name": name, "supercategory": ""} for name, number in category_ids.items()
                ],
            }
            staged = staging / "annotations" / targets[split].name
            staged.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            try:
                read_coco(staged)
            except AnnotationError as error:  # such as file names that leave their folder on another system
                raise ConversionError(f"the result cannot be used: {error}") from error
            images_dir = output_dir / split if copy else roots[split]
            written[split] = SplitFiles(images_dir, targets[split])
    return written


def write_voc_set(
    output_dir: Path,
    splits: dict[str, list[LabeledImage]],
    images_dirs: dict[str, Path],
    class_names: Sequence[str],
    remarks: Remarks,
    *,
    coordinates: Coordinates = "one-based",
    whole_pixels: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """Annotations/*.xml, ImageSets/Main/<split>.txt, JPEGImages/ (links, or copies) and classes.txt.

    File names stay as they are, subfolders too. Raises ConversionError for outputs that exist, and for images of
    one name (but for the suffix) in two places.
    """
    names: dict[str, Path] = {}
    for source in (source for sources in splits.values() for source in sources):
        if names.setdefault(source.key, source.path) != source.path:
            raise ConversionError(
                f"{names[source.key]} and {source.path} would both be {source.key}.xml. Rename one, or convert "
                "the splits into folders of their own"
            )
    with _staged(output_dir.parent, [output_dir], overwrite, _paths(splits)) as parent:
        staging = parent / output_dir.name
        for split, sources in splits.items():
            for source in sources:
                name = Path(os.path.relpath(source.path, images_dirs[split])).as_posix()
                xml = voc_xml(source, name, coordinates=coordinates, whole_pixels=whole_pixels)
                file = staging / "Annotations" / f"{source.key}.xml"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(xml)
                _place_image(source.path, staging / "JPEGImages" / name, copy=copy)
                progress(1)
            listed = staging / "ImageSets" / "Main" / f"{split}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text("".join(f"{source.key}\n" for source in sources), encoding="utf-8")
        (staging / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")


def write_yolo_set(
    output_dir: Path,
    splits: dict[str, list[LabeledImage]],
    images_dirs: dict[str, Path],
    class_names: Sequence[str],
    remarks: Remarks,
    *,
    exif: Exif = "auto",
    copy: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """images/<split>/ (links, or copies), labels/<split>/*.txt and data.yaml; class indices in the order given.

    Raises ConversionError for outputs that exist, and for images that differ in nothing but the suffix.
    """
    with _staged(output_dir.parent, [output_dir], overwrite, _paths(splits)) as parent:
        staging = parent / output_dir.name
        for split, sources in splits.items():
            for source in sources:
                name = Path(os.path.relpath(source.path, images_dirs[split])).as_posix()
                target = staging / "images" / split / name
                labels = label_path(target)
                if labels.exists():
                    raise ConversionError(
                        f"{source.path}: another image's label file is {labels.name} as well. Rename one of the two"
                    )
                labels.parent.mkdir(parents=True, exist_ok=True)
                facts = image_facts(source.path)
                labels.write_text(yolo_lines(source, class_names, facts, exif, remarks), encoding="utf-8")
                _place_image(source.path, target, copy=copy)
                progress(1)
        folders = {split: f"images/{split}" for split in splits}
        (staging / "data.yaml").write_text(yaml_text(list(class_names), folders), encoding="utf-8")


def _root_of(sources: Sequence[LabeledImage], images_root: Path | None) -> Path:
    if images_root is not None and all(source.path.is_relative_to(images_root) for source in sources):
        return images_root
    return Path(os.path.commonpath([source.path.parent for source in sources]))


def _place_image(source: Path, target: Path, *, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copy2(source, target)
        return
    try:
        target.symlink_to(source.resolve())
    except OSError as error:
        raise ConversionError(f"{target.name}: cannot be linked here ({error.strerror}). Give --copy") from error


def _paths(splits: dict[str, list[LabeledImage]]) -> list[Path]:
    return [source.path for sources in splits.values() for source in sources]


@contextmanager
def _staged(folder: Path, targets: Sequence[Path], overwrite: bool, inputs: Sequence[Path]) -> Iterator[Path]:
    """A folder whose content becomes the targets, which lie in `folder`, when all went well.

    What is there already is refused, unless it is an empty folder, or with `overwrite` moved aside.
    """
    for target in targets:
        if target.is_dir() and not any(target.iterdir()):
            continue
        if os.path.lexists(target):
            if not overwrite:
                raise ConversionError(
                    f"{target} exists already. Choose another output folder, or give --overwrite: what is there is "
                    "then moved aside"
                )
            if target.resolve() in {parent for path in inputs for parent in path.resolve().parents}:
                raise ConversionError(f"{target} holds the images that are converted. Choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting_", dir=folder) as staging:
        yield Path(staging)
        stamp = time.strftime("%Y%m%d_%H%M%S")
        for target in targets:
            if target.is_dir() and not any(target.iterdir()):
                target.rmdir()
            elif os.path.lexists(target):
                target.rename(_unused(target.with_name(f"{target.name}.before_{stamp}")))
            target.parent.mkdir(exist_ok=True)
            (Path(staging) / target.relative_to(folder)).replace(target)


def _unused(path: Path) -> Path:
    """The path, or with _2, _3, ... where there is one already."""
    names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))
