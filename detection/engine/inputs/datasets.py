"""The data sets that the command line names."""

from __future__ import annotations

from collections.abc import Mapping
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
from data.coco.annotations import Words, share_coco, shared_coco
from data.coco.cache import cache_folder
from data.coco.checks import check_copies
from data.coco.layout import SplitFiles
from data.layouts.found_set import FoundSet, Wanted, find_set
from data.loading.dataset import kept_boxes
from detection.config.run_config import DataConfig
from detection.engine.distributed.agreement import run_on_all_ranks, run_on_each_node
from detection.engine.distributed.comm import Processes
from detection.reporting import counted


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a run's data sets; None for a split the run does without."""

    train: SplitFiles | None
    val: SplitFiles | None
    test: SplitFiles | None

    @property
    def annotations(self) -> list[Path]:
        """The annotation files of all of them."""
        return [split.annotations for split in (self.train, self.val, self.test) if split is not None]


def find_data(config: DataConfig, *, mode: str) -> FoundSet | None:
    """What the folder of --data-path holds, converted where need be; None where options name all files.

    Makes the shapes set where it is asked for. One process of a machine does this for all.

    Args:
        mode: train, val or test: which splits are needed.

    Raises:
        MissingDataset, LayoutError, ConversionError, AnnotationError: what is there, and what to do.
    """
    # A train set given by hand without a val set means: train without validation.
    if mode in _given(config):
        return None
    found = find_folder(config)
    if mode not in found.splits:
        there = ", ".join(found.splits)
        raise DatasetError(
            f"{found.title}: there are no images of a {mode} split, only of {there}. Give --{mode}-images"
        )
    return found


def find_folder(config: DataConfig) -> FoundSet:
    """Like `find_data`, whatever splits there are."""
    if config.dataset == "shapes":
        make_shapes(config.folder)
    if config.data_path is None:
        coco_layout(config.folder)  # its message is about getting COCO
    wanted = Wanted(config.data_format, config.classes or (), config.val_fraction, config.split_seed)
    with tqdm(unit="file", desc=f"reading {config.folder}", leave=False, disable=None) as bar:
        return find_set(config.folder, cache_folder(), wanted, bar.update)


def dataset_files(config: DataConfig, found: FoundSet | None, *, mode: str) -> DatasetFiles:
    """The files of the splits that the mode needs: those that options name, before those of the folder."""
    splits = {**(found.splits if found is not None else {}), **_given(config)}
    if mode == "train":
        return DatasetFiles(splits["train"], splits.get("val"), splits.get("test"))
    return DatasetFiles(None, splits["val"] if mode == "val" else None, splits.get("test") if mode == "test" else None)


def prepare_files(config: DataConfig, *, mode: str, masks: bool = False) -> tuple[FoundSet | None, list[str]]:
    """Find and check the files of every split, with outlines for a model with masks; main process only.

    The checks read annotations and list folders, and open no image: a few seconds for COCO.

    Returns:
        What `find_data` gives, and a line for each remark that the start of the run should show.

    Raises:
        AnnotationError, DatasetError: faults that would break or bias training; every one is listed.
        The errors of `find_data`.
    """
    found = find_data(config, mode=mode)
    files = dataset_files(config, found, mode=mode)
    findings: list[Finding] = []
    read: dict[str, CocoAnnotations] = {}
    wanted = [("train", files.train), ("val", files.val), ("test", files.test)]
    # A set is packed when it is first read, which takes a minute for COCO; on a terminal that shows.
    bar = tqdm([pair for pair in wanted if pair[1] is not None], unit="set", leave=False, disable=None)
    for name, split in bar:
        if split is not None:
            bar.set_description(f"reading {split.annotations.name}")
            read[name] = annotations = _chosen(
                config, read_coco(split.annotations, masks=masks, cache_dir=cache_folder())
            )
            if masks and name != "test" and annotations.has_boxes and not _has_outlines(annotations):
                findings.append(Finding.of("no-masks", source=annotations.source))
            findings += check_split(annotations, split.images, training=name == "train", needs_boxes=name != "test")
    if files.train is not None and files.val is not None:
        pair = read["train"], read["val"], files.train.images, files.val.images
        findings += [*check_pair(*pair), *check_copies(*pair)]
    errors = ["  " + str(finding).removeprefix("error: ") for finding in findings if finding.severity == "error"]
    if errors:
        raise DatasetError(
            "\n".join(["the data cannot be used as they are:", *errors])
            + "\nscripts/check_dataset.py lists every place, and looks into the images too."
        )
    is_known = config.data_path is None or config.dataset == "shapes"
    lines = [] if found is None or is_known else _describe(found, read)
    return found, lines + [str(finding) for finding in findings if finding.severity == "warning"]


def _describe(found: FoundSet, read: Mapping[str, CocoAnnotations]) -> list[str]:
    """Two lines: what a folder was read as, and what was left out or changed."""
    parts = [
        f"{name} {counted(len(one), 'image')}, {counted(one.num_boxes, 'box', 'boxes')}" for name, one in read.items()
    ]
    parts += [f"{name} not used here" for name in found.splits if name not in read]
    classes = counted(len(next(iter(read.values())).class_names), "class", "classes")
    said = "; ".join(remark for remark in found.remarks if remark)
    return [f"found: {found.title}: {'; '.join(parts)}; {classes}", f"       {said or 'all of it is used as it is'}"]


def read_annotations(
    config: DataConfig, processes: Processes, *, mode: str, found: FoundSet | None = None, masks: bool = False
) -> tuple[DatasetFiles, dict[Path, CocoAnnotations]]:
    """The files of every split, and their annotations by path; after `prepare_files`, collective.

    One process of each machine reads them, out of the cache where they are there. The others map what it has, so that a
    machine holds them once, and parses once where no cache can be kept. It also finds the files in the folder of
    --data-path for all of its machine; found: what the main process has found already.

    Raises:
        RunError: files are faulty or missing on one of the machines.
    """
    with ExitStack() as shared:
        files = DatasetFiles(None, None, None)
        read: dict[Path, CocoAnnotations] = {}

        def share() -> tuple[FoundSet | None, dict[str, Words]]:
            processes.at("reading the annotations for the processes of its machine")
            here = found or find_data(config, mode=mode)
            words = {}
            mine = dataset_files(config, here, mode=mode)
            for path in mine.annotations:
                read[path], words[str(path)] = shared.enter_context(share_coco(path, cache_folder(), masks=masks))
            if mine.train is not None and read[mine.train.annotations].stored is not None:
                # Into the cache, from where all processes map it.
                kept_boxes(_chosen(config, read[mine.train.annotations]).training_view(), masks)
            return here, words

        def take() -> None:
            nonlocal files
            files = dataset_files(config, here, mode=mode)
            for path in files.annotations:
                if path not in read:
                    # Another command line may name another file; that they agree is checked later.
                    annotations = shared_coco(path, words[str(path)]) if str(path) in words else None
                    read[path] = annotations or read_coco(path, masks=masks, cache_dir=cache_folder())

        here, words = run_on_each_node(processes, share)
        run_on_all_ranks(processes, take)
        return files, {path: _chosen(config, annotations) for path, annotations in read.items()}


def _has_outlines(annotations: CocoAnnotations) -> bool:
    return annotations.segmentations is not None and bool(annotations.segmentations.present.any())


def _chosen(config: DataConfig, annotations: CocoAnnotations) -> CocoAnnotations:
    return annotations if config.classes is None else annotations.of_classes(config.classes)


def _given(config: DataConfig) -> dict[str, SplitFiles]:
    """The splits whose files options name."""
    files = {
        "train": (config.train_images, config.train_annotations),
        "val": (config.val_images, config.val_annotations),
        "test": (config.test_images, config.test_annotations),
    }
    return {
        name: SplitFiles(images, annotations)
        for name, (images, annotations) in files.items()
        if images is not None and annotations is not None
    }
