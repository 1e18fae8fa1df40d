"""The data sets that the command line names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import (
    CocoAnnotations,
    CocoDataset,
    DatasetError,
    Finding,
    check_pair,
    check_split,
    coco_layout,
    make_shapes,
    read_coco,
)
from detection.config.run_config import DataConfig


@dataclass(frozen=True)
class SplitFiles:
    """Where the images and the annotations of one split are."""

    images: Path
    annotations: Path


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a run's data sets; None for a split the run does without."""

    train: SplitFiles | None
    val: SplitFiles | None
    test: SplitFiles | None


def prepare_files(config: DataConfig, *, mode: str) -> list[str]:
    """Find and check the files of every split, making the shapes set where it is asked for; main process only.

    The checks read annotations and list folders, and open no image: a few seconds for COCO. The packed annotations
    stay in the cache folder, from where the other processes map them.

    Args:
        mode: train, val or test: which splits are needed.

    Returns:
        A line for each remark that the start of the run should show.

    Raises:
        MissingDataset: the standard layout is not there; the message shows it.
        AnnotationError, DatasetError: faults that would break or bias training; every one is listed.
    """
    if config.dataset == "shapes":
        make_shapes(config.folder)
    files = dataset_files(config, mode=mode)
    findings: list[Finding] = []
    splits = {}
    wanted = [(files.train, True), (files.val, True), (files.test, False)]
    # A set is packed when it is first read, which takes a minute for COCO; on a terminal that shows.
    bar = tqdm([pair for pair in wanted if pair[0] is not None], unit="set", leave=False, disable=None)
    for split, needs_boxes in bar:
        if split is not None:
            bar.set_description(f"reading {split.annotations.name}")
            annotations = _read(split)
            splits[split] = annotations
            training = split == files.train
            findings += check_split(annotations, split.images, training=training, needs_boxes=needs_boxes)
    if files.train is not None and files.val is not None:
        findings += check_pair(splits[files.train], splits[files.val], files.train.images, files.val.images)
    errors = ["  " + str(finding).removeprefix("error: ") for finding in findings if finding.severity == "error"]
    if errors:
        raise DatasetError(
            "\n".join(["the data cannot be used as they are:", *errors])
            + "\nscripts/check_dataset.py lists every place, and looks into the images too."
        )
    return [str(finding) for finding in findings if finding.severity == "warning"]


def dataset_files(config: DataConfig, *, mode: str) -> DatasetFiles:
    """Like `prepare_files`, once everything is there."""
    train = _given(config.train_images, config.train_annotations)
    val = _given(config.val_images, config.val_annotations)
    test = _given(config.test_images, config.test_annotations)
    if mode == "test":
        return DatasetFiles(None, None, test)
    # A train set given by hand without a val set means: train without validation.
    if (mode == "train" and train is None) or (mode == "val" and val is None):
        layout = coco_layout(config.folder)
        train = train or SplitFiles(layout.train_images, layout.train_annotations)
        val = val or SplitFiles(layout.val_images, layout.val_annotations)
    return DatasetFiles(train if mode == "train" else None, val, test)


def load_train(files: SplitFiles) -> CocoDataset:
    """The training set: images and boxes that MMDetection's rules keep.

    Raises:
        AnnotationError, DatasetError: nothing is left to train on, or files are faulty or missing.
    """
    return CocoDataset(files.images, _read(files), training=True)


def load_evaluation(files: SplitFiles, class_names: tuple[str, ...]) -> CocoDataset:
    """A validation or test set whose classes are those the model was trained on.

    Raises:
        AnnotationError, DatasetError: other classes, or files that are faulty or missing.
    """
    return CocoDataset(files.images, _read(files, class_names), training=False)


def categories_of(files: SplitFiles) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids of the classes of an annotation file, by label."""
    annotations = _read(files)
    return annotations.class_names, annotations.category_ids


def _read(files: SplitFiles, class_names: tuple[str, ...] | None = None) -> CocoAnnotations:
    return read_coco(files.annotations, class_names, cache_dir=cache_folder())


def cache_folder() -> Path:
    """Where this user keeps what can be made again: $XDG_CACHE_HOME/detection-harness, or ~/.cache/..."""
    # The annotations' own folder may be read-only and shared; a user's cache serves all of his runs.
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "detection-harness"


def _given(images: Path | None, annotations: Path | None) -> SplitFiles | None:
    return SplitFiles(images, annotations) if images is not None and annotations is not None else None
