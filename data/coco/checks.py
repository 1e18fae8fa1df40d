"""Faults of a COCO-format set that show without opening an image; fast enough for the start of every run."""

import filecmp
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.cache.known_files import KnownFiles
from data.coco.annotations import CocoAnnotations
from data.coco.findings import MAX_PLACES, Finding, examples
from data.images.shards import PackedEntry, ShardsError, open_shards

CHECKS_VERSION = 1
"""Another one whenever the checks find something else."""
COPIES_LOOKED_FOR = 20_000  # images
OVERHANG = 2.0  # pixels a box may stick out of its image unmentioned; COCO's own boxes do by rounding

# Boxes are suspected to be (x1, y1, x2, y2) when, read as (x, y, width, height), nearly all have width > x and
# height > y, which corners always have, and a good part of them leaves the image, which right boxes hardly do.
XYXY_MIN_BOXES = 10
XYXY_ORDERED_SHARE = 0.99
XYXY_OUTSIDE_SHARE = 0.2


def check_split(
    annotations: CocoAnnotations, images_dir: str | Path, *, training: bool, needs_boxes: bool = True
) -> list[Finding]:
    """Faults of one split: what reading remarked, its boxes, its categories, and its files (not their content).

    training: also which images the training will leave out. needs_boxes: False for a test split, which may be a
    list of images alone.

    Of annotations out of the cache, findings without an error are kept there, until a folder of the images changes (a
    file is added, removed or renamed; not one that is written over), the annotations or CHECKS_VERSION.
    """
    images_dir = Path(images_dir)
    if annotations.stored is None or not images_dir.is_dir():
        return _check_split(annotations, images_dir, training=training, needs_boxes=needs_boxes)
    known = KnownFiles(annotations.stored.folder)
    what = repr((CHECKS_VERSION, annotations.stored.key, annotations.source, training, needs_boxes))
    if (found := known.recall(images_dir, what)) is not None:
        return [Finding(**{**one, "places": tuple(one["places"])}) for one in found]
    folders: list[Path] = []
    with known.keeping(images_dir, what, folders) as kept:
        findings = _check_split(annotations, images_dir, training=training, needs_boxes=needs_boxes)
        if all(finding.severity != "error" for finding in findings):
            folders += image_folders(annotations, images_dir)
            kept.append([finding.to_dict() for finding in findings])
    return findings


def image_folders(annotations: CocoAnnotations, images_dir: Path) -> list[Path]:
    """What changes when images are added or removed: the folders that the file names lead to, or the shards."""
    if open_shards(images_dir) is not None:
        return sorted(images_dir.iterdir())
    names = (os.path.dirname(annotations.file_name(index)) for index in range(len(annotations)))  # noqa: PTH120
    return sorted({images_dir / name for name in set(names)})


def _check_split(annotations: CocoAnnotations, images_dir: Path, *, training: bool, needs_boxes: bool) -> list[Finding]:
    findings = [*annotations.findings, *check_annotations(annotations, training=training, needs_boxes=needs_boxes)]
    if training:
        left_out = annotations.images_not_trained()
        findings += [
            annotations.images_finding(code, np.flatnonzero(which)) for code, which in left_out.items() if which.any()
        ]
        if annotations.has_boxes and np.logical_or.reduce(list(left_out.values())).all():
            findings.append(Finding.of("no-trained-image", source=annotations.source))
    return findings + check_files(annotations, images_dir)


def check_annotations(
    annotations: CocoAnnotations, *, training: bool = False, needs_boxes: bool = True
) -> list[Finding]:
    """Faults of the boxes and the use of the categories."""
    source = annotations.source
    if not annotations.has_boxes:
        return [Finding.of("no-annotations", severity="error" if needs_boxes else "info", source=source)]

    left_out = annotations.not_trained()
    thin, outside = left_out["degenerate-box"], left_out["box-outside-image"]
    faults = {
        "degenerate-box": thin,
        "no-area-of-object": left_out["no-area-of-object"] & ~thin,
        "box-outside-image": outside & ~thin,
        "box-sticks-out": ~outside & ~thin & (_overhang(annotations) > OVERHANG),
        "duplicate-box": _repeats(annotations),
    }
    findings = [_box_finding(annotations, code, faulty) for code, faulty in faults.items() if faulty.any()]
    if looks_like_xyxy(annotations):
        findings.append(Finding.of("xyxy-boxes", source=source))

    used = set(np.flatnonzero(np.bincount(annotations.labels)).tolist())
    classes = zip(annotations.class_names, annotations.category_ids, strict=True)
    unused = [f"{name!r} (category id {number})" for label, (name, number) in enumerate(classes) if label not in used]
    if unused:
        findings.append(Finding.of("unused-category", unused, source=source))
    alike: dict[str, list[str]] = {}
    for name in annotations.class_names:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    if places := [", ".join(map(repr, names)) for names in alike.values() if len(names) > 1]:
        findings.append(Finding.of("class-names-alike", places, source=source))
    if annotations.crowd.all():
        severity = "error" if needs_boxes else "warning"
        purpose = "train on" if training else "score detections against"
        findings.append(Finding.of("only-crowds", severity=severity, source=source, purpose=purpose))
    return findings


def looks_like_xyxy(annotations: CocoAnnotations) -> bool:
    """Whether the boxes are probably corners by mistake (see the constants of this file for the rule)."""
    x, y, w, h = annotations.boxes_xywh.T
    if len(x) < XYXY_MIN_BOXES:
        return False
    ordered, outside = (w > x) & (h > y), _overhang(annotations) > OVERHANG
    return bool(ordered.mean() >= XYXY_ORDERED_SHARE and outside.mean() >= XYXY_OUTSIDE_SHARE)


def _overhang(annotations: CocoAnnotations) -> np.ndarray:
    """float64 [M]: pixels by which each box leaves its image at most; not above 0 inside."""
    x, y, w, h = annotations.boxes_xywh.T
    widths, heights = (sides[annotations.image_indices] for sides in (annotations.widths, annotations.heights))
    return np.maximum.reduce([-x, -y, x + w - widths, y + h - heights])


def image_entries(
    annotations: CocoAnnotations, images_dir: Path
) -> Iterator[tuple[str, os.DirEntry[str] | PackedEntry | None]]:
    """The file name of each image, and its entry in the listing of its folder; None where it is not there.

    Each folder is listed once, which takes far less time than asking for every file. A folder of shards has its index.
    """
    if (shards := open_shards(images_dir)) is not None:
        names = [os.path.normpath(annotations.file_name(index)) for index in range(len(annotations))]
        yield from zip(names, shards.entries(names), strict=True)
        return
    listings: dict[str, dict[str, os.DirEntry[str]]] = {}
    for index in range(len(annotations)):
        name = os.path.normpath(annotations.file_name(index))  # a/./b.jpg and a//b.jpg are a/b.jpg
        folder, base = os.path.split(name)
        if folder not in listings:
            listings[folder] = _entries(images_dir / folder)
        yield name, listings[folder].get(base)


def check_files(annotations: CocoAnnotations, images_dir: Path) -> list[Finding]:
    """Faults that the listing of the image folder shows: missing and empty files, links out, names used twice."""
    if not images_dir.is_dir():
        return [Finding.of("no-image-folder", images=images_dir, source=annotations.source)]
    try:
        shards = open_shards(images_dir)
    except ShardsError as error:
        return [Finding.of("unusable-shards", message=error)]
    faults = [] if shards is None else shards.faults()
    if faults:
        return [Finding.of("lost-shard", faults, images=images_dir)]
    root = images_dir.resolve()

    @functools.cache
    def leaves(folder: str) -> bool:
        return not Path(folder).resolve().is_relative_to(root)

    first: dict[str, int] = {}
    missing, empty, linked, repeated = [], [], [], set()
    for index, (name, entry) in enumerate(image_entries(annotations, images_dir)):
        if first.setdefault(name, index) != index:
            repeated.add(first[name])
        elif entry is None or not entry.is_file():
            missing.append(index)
        else:
            if entry.stat().st_size == 0:
                empty.append(index)
            if isinstance(entry, PackedEntry):
                continue
            if leaves(os.path.dirname(entry.path)) or (entry.is_symlink() and leaves(entry.path)):  # noqa: PTH120
                linked.append(index)
    places = {"missing-image": missing, "empty-image": empty, "link-out": linked, "repeated-file": sorted(repeated)}
    return [annotations.images_finding(code, which, images=images_dir) for code, which in places.items() if which]


def check_pair(
    train: CocoAnnotations, val: CocoAnnotations, train_images: str | Path, val_images: str | Path
) -> list[Finding]:
    """Faults between the splits: different classes, or the same image files in both."""
    findings = []
    only_train = [name for name in train.class_names if name not in set(val.class_names)]
    only_val = [name for name in val.class_names if name not in set(train.class_names)]
    if only_train or only_val:
        lacking = [(val.source, only_train), (train.source, only_val)]
        said = ", ".join(f"{file} lacks {examples(map(repr, names))}" for file, names in lacking if names)
        findings.append(Finding.of("classes-differ", differences=said, count=len(only_train) + len(only_val)))
    elif dict(zip(train.class_names, train.category_ids, strict=True)) != dict(
        zip(val.class_names, val.category_ids, strict=True)
    ):
        findings.append(Finding.of("category-ids-differ", train=train.source, source=val.source))
    if Path(train_images).resolve() == Path(val_images).resolve():
        names = {os.path.normpath(train.file_name(index)) for index in range(len(train))}
        shared = [i for i in range(len(val)) if os.path.normpath(val.file_name(i)) in names]
        if shared:
            findings.append(val.images_finding("shared-image", shared, train=train.source))
    return findings


def check_copies(
    train: CocoAnnotations, val: CocoAnnotations, train_images: str | Path, val_images: str | Path
) -> list[Finding]:
    """Files of the validation split that are copies of training images, byte for byte, whatever their names.

    Sets of more than COPIES_LOOKED_FOR images, and shards, are not looked through here, as it opens the files of equal
    size.
    """
    if len(train) + len(val) > COPIES_LOOKED_FOR or any(open_shards(Path(p)) for p in (train_images, val_images)):
        return []
    by_size: dict[int, list[tuple[int, str]]] = {}
    for index, (_, entry) in enumerate(image_entries(train, Path(train_images))):
        if entry is not None and entry.is_file():
            by_size.setdefault(entry.stat().st_size, []).append((index, entry.path))
    copies = []
    for index, (_, entry) in enumerate(image_entries(val, Path(val_images))):
        same_size = by_size.get(entry.stat().st_size, []) if entry is not None and entry.is_file() else []
        for trained, path in same_size:
            if entry is not None and filecmp.cmp(path, entry.path, shallow=False):
                copies.append(f"{val.place(index)} is {train.place(trained)} of training")
                break
    if not copies:
        return []
    return [Finding.of("copy-in-val", copies, source=val.source, train=train.source)]


def _box_finding(annotations: CocoAnnotations, code: str, faulty: np.ndarray) -> Finding:
    rows = np.flatnonzero(faulty)
    images = annotations.image_indices[rows[:MAX_PLACES]]
    places = [
        f"annotation id {annotations.annotation_ids[row]} ({annotations.place(int(image))}, "
        f"bbox {[round(value, 2) for value in annotations.boxes_xywh[row].tolist()]})"
        for row, image in zip(rows, images, strict=False)
    ]
    return Finding.of(code, places, count=len(rows), source=annotations.source)


def _repeats(annotations: CocoAnnotations) -> np.ndarray:
    """bool [M]: annotations with image, class, crowd flag and box of an earlier one."""
    columns = [annotations.image_indices, annotations.labels, annotations.crowd.astype(np.int64)]
    columns += list(annotations.boxes_xywh.view(np.int64).T)
    order = np.lexsort(columns)
    same = np.ones(max(0, len(order) - 1), dtype=bool)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    repeats = np.zeros(len(order), dtype=bool)
    repeats[order[1:][same]] = True
    return repeats


def _entries(folder: Path) -> dict[str, os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries}
    except OSError:  # a folder that is missing or shut: each of its files is reported
        return {}
