"""Images and annotations to batches. Knows nothing of models, loops or schedules."""

from data.batches import DeviceBatch, RawBatch, assemble
from data.checks import check_annotations, check_pair, check_split
from data.coco import NO_CLASS, AnnotationError, CocoAnnotations, read_coco
from data.dataset import CocoDataset, DatasetError
from data.findings import Finding
from data.layout import CocoLayout, MissingDataset, coco_layout, standard_layout
from data.loader import EvalLoader, TrainLoader
from data.pictures import ImageError, read_image
from data.prefetcher import DevicePrefetcher
from data.randomness import hash_key
from data.samplers import plan_epoch
from data.shapes import ShapesError, make_shapes
from data.transforms import resized_sizes

__all__ = [
    "NO_CLASS",
    "AnnotationError",
    "CocoAnnotations",
    "CocoDataset",
    "CocoLayout",
    "DatasetError",
    "DeviceBatch",
    "DevicePrefetcher",
    "EvalLoader",
    "Finding",
    "ImageError",
    "MissingDataset",
    "RawBatch",
    "ShapesError",
    "TrainLoader",
    "assemble",
    "check_annotations",
    "check_pair",
    "check_split",
    "coco_layout",
    "hash_key",
    "make_shapes",
    "plan_epoch",
    "read_coco",
    "read_image",
    "resized_sizes",
    "standard_layout",
]
