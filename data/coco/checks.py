"""Faults of a COCO-format set that show without opening an image; fast enough for the start of every run."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.coco.annotations import NO_CLASS, CocoAnnotations
from data.coco.findings import MAX_PLACES, Finding, Severity, examples

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
    """
    findings = [*annotations.findings, *check_annotations(annotations, needs_boxes=needs_boxes)]
    if training:
        left_out = annotations.training_view().findings
        findings += [finding for finding in left_out if finding.code in ("small-image", "image-without-annotation")]
    return findings + check_files(annotations, Path(images_dir))


def check_annotations(annotations: CocoAnnotations, *, needs_boxes: bool = True) -> list[Finding]:
    """Faults of the boxes and the use of the categories."""
    source = annotations.source
    findings: list[Finding] = []
    if not annotations.has_boxes:
        severity: Severity = "error" if needs_boxes else "info"
        text = f"{source}: no annotations at all: it can neither be trained on nor scored. Give a file with boxes"
        return [Finding(severity, "no-annotations", text)]

    x, y, w, h = annotations.boxes_xywh.T
    widths = annotations.widths[annotations.image_indices]
    heights = annotations.heights[annotations.image_indices]
    thin = (w < 1) | (h < 1)
    no_area = ~thin & (annotations.areas <= 0)
    inside = (np.minimum(x + w, widths) > np.maximum(x, 0)) & (np.minimum(y + h, heights) > np.maximum(y, 0))
    outside = ~thin & ~inside
    overhang = np.maximum.reduce([-x, -y, x + w - widths, y + h - heights])
    sticks_out = inside & ~thin & (overhang > OVERHANG)
    not_trained = "not trained on; correct or delete"
    for code, faulty, text in (
        ("degenerate-box", thin, f"boxes with a side below 1 pixel are {not_trained} them"),
        ("no-area-of-object", no_area, f'annotations with an "area" of 0 or less are {not_trained} them'),
        ("box-outside-image", outside, f"boxes that lie outside their image are {not_trained} them"),
        ("box-sticks-out", sticks_out, "boxes that stick out of their image are clipped for training"),
        ("duplicate-box", _repeats(annotations), "annotations repeat box and class of another; delete them"),
    ):
        if faulty.any():
            findings.append(_box_finding(annotations, faulty, "warning", code, text))
    if looks_like_xyxy(annotations):
        text = (
            f"{source}: the boxes look like corners [x1, y1, x2, y2], and COCO has [x, y, width, height]: most "
            "have width > x and height > y and many leave their image. Convert them, or training learns wrong boxes"
        )
        findings.append(Finding("warning", "xyxy-boxes", text))

    unused = np.bincount(annotations.labels[annotations.labels != NO_CLASS], minlength=len(annotations.class_names))
    names = [
        f"{name!r} (category id {category_id})"
        for name, category_id, count in zip(
            annotations.class_names, annotations.category_ids, unused.tolist(), strict=True
        )
        if count == 0
    ]
    if names:
        text = f"{source}: categories that no annotation uses; their AP is undefined. Fine if it is meant so"
        findings.append(Finding("warning", "unused-category", text, len(names), tuple(names)))
    if not np.any(~annotations.crowd & (annotations.labels != NO_CLASS)):
        text = f"{source}: no annotation but crowd regions and other categories: nothing to train on"
        findings.append(Finding("error" if needs_boxes else "warning", "only-crowds", text))
    return findings


def looks_like_xyxy(annotations: CocoAnnotations) -> bool:
    """Whether the boxes are probably corners by mistake (see the constants of this file for the rule)."""
    x, y, w, h = annotations.boxes_xywh.T
    if len(x) < XYXY_MIN_BOXES:
        return False
    ordered = (w > x) & (h > y)
    outside = (x + w > annotations.widths[annotations.image_indices] + OVERHANG) | (
        y + h > annotations.heights[annotations.image_indices] + OVERHANG
    )
    return bool(ordered.mean() >= XYXY_ORDERED_SHARE and outside.mean() >= XYXY_OUTSIDE_SHARE)


def check_files(annotations: CocoAnnotations, images_dir: Path) -> list[Finding]:
    """Faults that the listing of the image folder shows: missing and empty files, links out, names used twice."""
    if not images_dir.is_dir():
        text = f"{images_dir}: no such folder; it should hold the images of {annotations.source}. Check the path"
        return [Finding("error", "no-image-folder", text)]
    indices_by_name: dict[str, list[int]] = defaultdict(list)
    for index in range(len(annotations)):
        # a/./b.jpg and a//b.jpg are a/b.jpg
        indices_by_name[os.path.normpath(annotations.file_name(index))].append(index)
    names_by_folder: dict[str, set[str]] = defaultdict(set)
    for name in indices_by_name:
        folder, base = os.path.split(name)
        names_by_folder[folder].add(base)

    missing, empty, linked = [], [], []
    root = images_dir.resolve()
    for folder, wanted in names_by_folder.items():
        entries = _entries(images_dir / folder)
        folder_leaves = not (images_dir / folder).resolve().is_relative_to(root)
        for base in wanted:
            path = os.path.join(folder, base)  # noqa: PTH118 - 118,000 of them
            entry = entries.get(base)
            if entry is None or not entry.is_file():
                missing.append(path)
                continue
            if entry.stat().st_size == 0:
                empty.append(path)
            if folder_leaves or (entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root)):
                linked.append(path)

    faults: tuple[tuple[Severity, str, list[str], str], ...] = (
        ("error", "missing-image", missing, "image files are missing. Add them, or take the images out of"),
        ("error", "empty-image", empty, "image files are empty (0 bytes). Fetch them again, or take them out of"),
        ("warning", "link-out", linked, "image files are links that leave the folder. Is that meant? Named in"),
        (
            "warning",
            "repeated-file",
            [name for name, indices in indices_by_name.items() if len(indices) > 1],
            "image files are listed under several image ids, which counts them several times. Join them in",
        ),
    )
    findings = []
    for severity, code, names, text in faults:
        if names:
            indices = sorted(indices_by_name[name][0] for name in names)
            text = f"{images_dir}: {text} {annotations.source}"
            findings.append(annotations.images_finding(severity, code, text, indices))
    return findings


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
        text = f"the categories differ: {said}. Give both files the same category names"
        findings.append(Finding("error", "classes-differ", text, len(only_train) + len(only_val)))
    elif dict(zip(train.class_names, train.category_ids, strict=True)) != dict(
        zip(val.class_names, val.category_ids, strict=True)
    ):
        text = f"{train.source} and {val.source} give the same classes different ids; classes are matched by name"
        findings.append(Finding("info", "category-ids-differ", text))
    if Path(train_images).resolve() == Path(val_images).resolve():
        names = {os.path.normpath(train.file_name(index)) for index in range(len(train))}
        shared = [i for i in range(len(val)) if os.path.normpath(val.file_name(i)) in names]
        if shared:
            text = (
                f"{val.source} lists image files that {train.source} lists too: validation would measure what was "
                "trained on. Take them out of one of the two"
            )
            findings.append(val.images_finding("error", "shared-image", text, shared))
    return findings


def _box_finding(annotations: CocoAnnotations, faulty: np.ndarray, severity: Severity, code: str, text: str) -> Finding:
    rows = np.flatnonzero(faulty)
    images = annotations.image_indices[rows[:MAX_PLACES]]
    places = tuple(
        f"annotation id {annotations.annotation_ids[row]} ({annotations.place(int(image))}, "
        f"bbox {[round(value, 2) for value in annotations.boxes_xywh[row].tolist()]})"
        for row, image in zip(rows, images, strict=False)
    )
    return Finding(severity, code, f"{annotations.source}: {text}", len(rows), places)


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
