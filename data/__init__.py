"""Images and annotations to batches. Knows nothing of models, loops or schedules."""

from data.augmentations import Augmentation, AugmentationError, LargeScaleJitter, ScaleSampling
from data.batches import DeviceBatch, RawBatch, assemble
from data.checks import check_annotations, check_pair, check_split
from data.coco import NO_CLASS, AnnotationError, CocoAnnotations, read_coco
from data.colours import ColourJitter, PhotometricDistortion
from data.dataset import CocoDataset, DatasetError
from data.findings import Finding
from data.layout import CocoLayout, MissingDataset, coco_layout, standard_layout
from data.loader import EvalLoader, TrainLoader
from data.pictures import ImageError, read_image
from data.prefetcher import DevicePrefetcher, LoadTimes
from data.randomness import hash_key
from data.replacements import UnreadableImage
from data.samplers import plan_epoch
from data.shapes import ShapesError, make_shapes
from data.transforms import resized_sizes

__all__ = [
    "NO_CLASS",
    "AnnotationError",
    "Augmentation",
    "AugmentationError",
    "CocoAnnotations",
    "CocoDataset",
    "CocoLayout",
    "ColourJitter",
    "DatasetError",
    "DeviceBatch",
    "DevicePrefetcher",
    "EvalLoader",
    "Finding",
    "ImageError",
    "LargeScaleJitter",
    "LoadTimes",
    "MissingDataset",
    "PhotometricDistortion",
    "RawBatch",
    "ScaleSampling",
    "ShapesError",
    "TrainLoader",
    "UnreadableImage",
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
