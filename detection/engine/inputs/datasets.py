"""The data sets that the command line names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data import (
    AnnotationError,
    CocoAnnotations,
    DatasetError,
    Finding,
    check_pair,
    check_split,
    coco_layout,
    make_shapes,
    read_coco,
)
from data.cache.packed_file import cache_folder
from data.coco.annotations import Words, share_coco, shared_coco
from data.coco.checks import check_copies
from data.coco.findings import examples
from data.coco.layout import SplitFiles
from data.coco.merge import into_classes, joint_classes, require_one_kind
from data.layouts.found_set import LISTED, FoundSet, Wanted, find_set
from data.loading.dataset import kept_boxes
from detection.config.run_config import DataConfig, names_of
from detection.engine.distributed.agreement import run_on_all_ranks, run_on_each_node
from detection.engine.distributed.comm import Processes
from detection.reporting import counted


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a run's data sets, by split: those of each set that has it; none where the run does without."""

    train: tuple[SplitFiles, ...] = ()
    val: tuple[SplitFiles, ...] = ()
    test: tuple[SplitFiles, ...] = ()

    @property
    def annotations(self) -> list[Path]:
        """The annotation files of all of them."""
        return [files.annotations for files in (*self.train, *self.val, *self.test)]


def find_data(config: DataConfig, *, mode: str) -> tuple[FoundSet, ...]:
    """What the folders of --data-path hold, converted where need be; nothing where options name all files.

    Makes the shapes set where it is asked for. One process of a machine does this for all.

    Args:
        mode: train, val or test: which splits are needed.

    Raises:
        MissingDataset, LayoutError, ConversionError, AnnotationError: what is there, and what to do.
    """
    # A train set given by hand without a val set means: train without validation.
    given = _given(config)
    lists = tuple(
        _find_list(config, files)
        for name in ("train", "val", "test")
        for files in given.get(name, ())
        if files.annotations.suffix == ".txt" and (mode == "train" or name == mode)
    )
    if mode in given:
        return lists
    found = tuple(find_folder(config, folder) for folder in config.folders)
    for each in found:
        if mode not in each.splits:
            there = ", ".join(each.splits)
            raise DatasetError(
                f"{each.title}: there are no images of a {mode} split, only of {there}. Give --{mode}-images"
            )
    return found + lists


def _find_list(config: DataConfig, files: SplitFiles) -> FoundSet:
    """The images of a list of VOC's ImageSets as a split that is called by the list's path."""
    if not files.annotations.is_file():
        raise DatasetError(f"{files.annotations}: there is no such list of images (VOC's ImageSets/Main)")
    wanted = Wanted("voc", config.classes or (), voc_list=files.annotations.absolute())
    found = find_set(files.images, cache_folder(), wanted)
    return replace(found, splits={str(files.annotations): found.splits[LISTED]})


def find_folder(config: DataConfig, folder: Path) -> FoundSet:
    """What one folder holds, whatever splits there are; see `find_data`."""
    if config.dataset == "shapes":
        make_shapes(folder)
    if config.data_path is None:
        coco_layout(folder)  # its message is about getting COCO
    wanted = Wanted(config.data_format, config.classes or (), config.val_fraction, config.split_seed)
    if len(config.folders) > 1 or config.class_map:
        wanted = replace(wanted, classes=())  # a set may lack one of them, or have it under another name
    with tqdm(unit="file", desc=f"reading {folder}", leave=False, disable=None) as bar:
        return find_set(folder, cache_folder(), wanted, bar.update)


def dataset_files(config: DataConfig, found: Sequence[FoundSet], *, mode: str) -> DatasetFiles:
    """The files of the splits that the mode needs: those that options name, before those of the folders."""
    names = names_of(config.folders)
    lists = {path: files for each in found for path, files in each.splits.items()}
    given = {
        name: tuple(replace(lists.get(str(files.annotations), files), set_name=files.set_name) for files in of_split)
        for name, of_split in _given(config).items()
    }
    splits = {
        split: tuple(
            replace(each.splits[split], set_name=name)
            for each, name in zip(found, names, strict=False)
            if split in each.splits
        )
        for split in ("train", "val", "test")
    } | given
    if mode == "train":
        return DatasetFiles(**splits)
    return DatasetFiles(**{mode: splits[mode]})


def prepare_files(config: DataConfig, *, mode: str, masks: bool = False) -> tuple[tuple[FoundSet, ...], list[str]]:
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
    read: dict[Path, CocoAnnotations] = {}
    wanted = [(name, split) for name in ("train", "val", "test") for split in getattr(files, name)]
    # A set is packed when it is first read, which takes a minute for COCO; on a terminal that shows.
    for _, split in (bar := tqdm(wanted, unit="set", leave=False, disable=None)):
        bar.set_description(f"reading {split.annotations.name}")
        read[split.annotations] = read_coco(split.annotations, masks=masks, cache_dir=cache_folder())
    joint = _labeled(config, files, read)
    read = {path: _of_own_classes(config, files, annotations) for path, annotations in read.items()}
    for name, split in wanted:
        annotations = read[split.annotations]
        if masks and name != "test" and annotations.has_boxes and not _has_outlines(annotations):
            findings.append(Finding.of("no-masks", source=annotations.source))
        findings += check_split(annotations, split.images, training=name == "train", needs_boxes=name != "test")
    for train in files.train:
        for val in files.val:
            pair = read[train.annotations], read[val.annotations], train.images, val.images
            findings += check_pair(*pair) if train.set_name == val.set_name else []
            findings += check_copies(*pair)
    errors = ["  " + str(finding).removeprefix("error: ") for finding in findings if finding.severity == "error"]
    if errors:
        raise DatasetError(
            "\n".join(["the data cannot be used as they are:", *errors])
            + "\nscripts/check_dataset.py lists every place, and looks into the images too."
        )
    is_known = config.data_path is None or config.dataset == "shapes"
    lines = [] if is_known else [line for each in found for line in _describe(each, files, read)]
    lines += [
        f"warning: {each.source}: has no class {examples(map(repr, each.unknown_classes))}: what its images show of "
        "them counts as background in training, and detections of them there are not counted"
        for each in (joint[split.annotations] for split in files.train)
        if each.unknown_classes
    ]
    return found, lines + [str(finding) for finding in findings if finding.severity == "warning"]


def _describe(found: FoundSet, files: DatasetFiles, read: Mapping[Path, CocoAnnotations]) -> list[str]:
    """Two lines: what a folder was read as, and what was left out or changed."""
    used = {
        name: read[split.annotations]
        for name in ("train", "val", "test")
        for split in getattr(files, name)
        if name in found.splits and split.annotations == found.splits[name].annotations
    }
    parts = [
        f"{name} {counted(len(one), 'image')}, {counted(one.num_boxes, 'box', 'boxes')}" for name, one in used.items()
    ]
    parts += [f"{name} not used here" for name in found.splits if name not in used]
    if not used:
        return []
    classes = counted(len(next(iter(used.values())).class_names), "class", "classes")
    said = "; ".join(remark for remark in found.remarks if remark)
    return [f"found: {found.title}: {'; '.join(parts)}; {classes}", f"       {said or 'all of it is used as it is'}"]


def read_annotations(
    config: DataConfig, processes: Processes, *, mode: str, found: Sequence[FoundSet] = (), masks: bool = False
) -> tuple[DatasetFiles, dict[Path, CocoAnnotations]]:
    """The files of every split, and their annotations by path; after `prepare_files`, collective.

    Those of several sets have the labels of one class list.

    One process of each machine reads them, out of the cache where they are there. The others map what it has, so that a
    machine holds them once, and parses once where no cache can be kept. It also finds the files in the folders of
    --data-path for all of its machine; found: what the main process has found already.

    Raises:
        RunError: files are faulty or missing on one of the machines.
    """
    with ExitStack() as shared:
        files = DatasetFiles()
        read: dict[Path, CocoAnnotations] = {}

        def share() -> tuple[Sequence[FoundSet], dict[str, Words]]:
            processes.at("reading the annotations for the processes of its machine")
            here = found or find_data(config, mode=mode)
            words = {}
            mine = dataset_files(config, here, mode=mode)
            for path in dict.fromkeys(mine.annotations):
                read[path], words[str(path)] = shared.enter_context(share_coco(path, cache_folder(), masks=masks))
            if len(mine.train) == 1 and read[mine.train[0].annotations].stored is not None:
                # Into the cache, from where all processes map it.
                kept_boxes(_of_own_classes(config, mine, read[mine.train[0].annotations]).training_view(), masks)
            return here, words

        def take() -> None:
            nonlocal files
            files = dataset_files(config, here, mode=mode)
            for path in files.annotations:
                if path not in read:
                    # Another command line may name another file; that they agree is checked later.
                    annotations = shared_coco(path, words[str(path)], masks=masks) if str(path) in words else None
                    read[path] = annotations or read_coco(path, masks=masks, cache_dir=cache_folder())

        here, words = run_on_each_node(processes, share)
        run_on_all_ranks(processes, take)
        return files, _labeled(config, files, read)


def _has_outlines(annotations: CocoAnnotations) -> bool:
    return annotations.segmentations is not None and bool(annotations.segmentations.present.any())


def _labeled(
    config: DataConfig, files: DatasetFiles, read: Mapping[Path, CocoAnnotations]
) -> dict[Path, CocoAnnotations]:
    """The annotations with the labels that a model learns."""
    for of_split in (files.train, files.val, files.test):
        require_one_kind([read[split.annotations] for split in of_split])
    leading = files.train or files.val or files.test
    if len(leading) == 1 and not config.class_map:
        return {path: _of_own_classes(config, files, annotations) for path, annotations in read.items()}
    sets = [read[split.annotations] for split in leading]
    names = joint_classes(sets, config.new_names, config.classes or ())
    if config.classes is not None:
        if missing := [name for name in config.classes if name not in names]:
            raise AnnotationError(
                f"--classes: no set has {examples(map(repr, missing))}; there are {examples(map(repr, names))}"
            )
        names = tuple(name for name in names if name in set(config.classes))
    return {path: into_classes(annotations, names, config.new_names) for path, annotations in read.items()}


def _of_own_classes(config: DataConfig, files: DatasetFiles, annotations: CocoAnnotations) -> CocoAnnotations:
    """The annotations with the classes of the file itself: those of --classes, under the names of --class-map."""
    several = len(files.train or files.val or files.test) > 1
    if not several and not config.class_map:
        return annotations if config.classes is None else annotations.of_classes(config.classes)
    names = dict.fromkeys(config.new_names.get(name, name) for name in annotations.class_names)
    own = [name for name in names if config.classes is None or name in config.classes]
    return into_classes(annotations, own, config.new_names)


def _given(config: DataConfig) -> dict[str, tuple[SplitFiles, ...]]:
    """The splits whose files options name."""
    files = {
        "train": (config.train_images, config.train_annotations),
        "val": (config.val_images, config.val_annotations),
        "test": (config.test_images, config.test_annotations),
    }
    return {
        name: tuple(map(SplitFiles, images, annotations, names_of(annotations)))
        for name, (images, annotations) in files.items()
        if images is not None and annotations is not None
    }
