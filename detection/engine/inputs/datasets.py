"""The data sets that the command line names."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import (
    CocoAnnotations,
    DatasetError,
    Finding,
    check_pair,
    check_split,
    coco_layout,
    make_shapes,
    read_coco,
)
from data.coco.annotations import share_coco, shared_coco
from detection.config.run_config import DataConfig
from detection.engine.distributed.agreement import run_on_all_ranks, run_on_each_node
from detection.engine.distributed.comm import Processes


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

    The checks read annotations and list folders, and open no image: a few seconds for COCO.

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
            annotations = _chosen(config, read_coco(split.annotations, cache_dir=cache_folder()))
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


def read_annotations(config: DataConfig, processes: Processes, *, mode: str) -> dict[Path, CocoAnnotations]:
    """The annotation files of every split, by path; after `prepare_files`, collective.

    One process of each machine reads them, out of the cache where they are there. The others map what it has, so that a
    machine holds them once, and parses once where no cache can be kept.

    Raises:
        RunError: files are faulty or missing on one of the machines.
    """
    with ExitStack() as shared:
        read: dict[Path, CocoAnnotations] = {}

        def share() -> dict[str, tuple[str, str]]:
            processes.at("reading the annotations for the processes of its machine")
            words = {}
            for path in _annotation_files(config, mode):
                read[path], words[str(path)] = shared.enter_context(share_coco(path, cache_folder()))
            return words

        def take() -> None:
            for path in _annotation_files(config, mode):
                if path not in read:
                    # Another command line may name another file; that they agree is checked later.
                    annotations = shared_coco(path, words[str(path)]) if str(path) in words else None
                    read[path] = annotations or read_coco(path, cache_dir=cache_folder())

        words = run_on_each_node(processes, share)
        run_on_all_ranks(processes, take)
        return {path: _chosen(config, annotations) for path, annotations in read.items()}


def _chosen(config: DataConfig, annotations: CocoAnnotations) -> CocoAnnotations:
    return annotations if config.classes is None else annotations.of_classes(config.classes)


def _annotation_files(config: DataConfig, mode: str) -> list[Path]:
    files = dataset_files(config, mode=mode)
    return [split.annotations for split in (files.train, files.val, files.test) if split is not None]


def cache_folder() -> Path:
    """Where this user keeps what can be made again: $XDG_CACHE_HOME/detection-harness, or ~/.cache/..."""
    # The annotations' own folder may be read-only and shared; a user's cache serves all of his runs.
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "detection-harness"


def _given(images: Path | None, annotations: Path | None) -> SplitFiles | None:
    return SplitFiles(images, annotations) if images is not None and annotations is not None else None
