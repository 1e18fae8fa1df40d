"""The data sets that the command line names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data import CocoDataset, coco_layout, make_shapes, read_coco
from detection.config import DataConfig

SHAPES_FOLDER = Path("datasets/shapes")
COCO_FOLDER = Path("datasets/coco")


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


def prepare_files(config: DataConfig, *, mode: str) -> DatasetFiles:
    """Find the files of every split, making the shapes set where it is asked for and absent; main process only.

    Args:
        mode: train, val or test: which splits are needed.

    Raises:
        MissingDataset: the standard layout is not there; the message shows it.
    """
    if config.dataset == "shapes":
        make_shapes(config.data_path or SHAPES_FOLDER)
    return dataset_files(config, mode=mode)


def dataset_files(config: DataConfig, *, mode: str) -> DatasetFiles:
    """Like `prepare_files`, once everything is there."""
    train = _given(config.train_images, config.train_annotations)
    val = _given(config.val_images, config.val_annotations)
    test = _given(config.test_images, config.test_annotations)
    if mode == "test":
        return DatasetFiles(None, None, test)
    # A train set given by hand without a val set means: train without validation.
    if (mode == "train" and train is None) or (mode == "val" and val is None):
        layout = coco_layout(config.data_path or (SHAPES_FOLDER if config.dataset == "shapes" else COCO_FOLDER))
        train = train or SplitFiles(layout.train_images, layout.train_annotations)
        val = val or SplitFiles(layout.val_images, layout.val_annotations)
    return DatasetFiles(train if mode == "train" else None, val, test)


def load_train(files: SplitFiles) -> CocoDataset:
    """The training set: images and boxes that MMDetection's rules keep.

    Raises:
        AnnotationError, DatasetError: nothing is left to train on, or files are faulty or missing.
    """
    return CocoDataset(files.images, read_coco(files.annotations), training=True)


def load_evaluation(files: SplitFiles, class_names: tuple[str, ...]) -> CocoDataset:
    """A validation or test set whose classes are those the model was trained on.

    Raises:
        AnnotationError, DatasetError: other classes, or files that are faulty or missing.
    """
    return CocoDataset(files.images, read_coco(files.annotations, class_names), training=False)


def _given(images: Path | None, annotations: Path | None) -> SplitFiles | None:
    return SplitFiles(images, annotations) if images is not None and annotations is not None else None
