"""Images and annotations to batches. Knows nothing of models, loops or schedules."""

from data.coco.annotations import AnnotationError, CocoAnnotations, read_coco
from data.coco.checks import check_pair, check_split
from data.coco.findings import Finding
from data.coco.layout import coco_layout
from data.errors import DataError
from data.images.decode import ImageError, read_image
from data.loading.batch import DeviceBatch, RawBatch, assemble
from data.loading.dataset import CocoDataset, DatasetError
from data.loading.image_order import NEWEST_ORDER, ORDERS
from data.loading.loader import EvalLoader, TrainLoader
from data.loading.prefetcher import DevicePrefetcher, LoadTimes
from data.loading.sampler import plan_epoch
from data.loading.unreadable import UnreadableImage
from data.loading.workers import WorkerError, worker_error
from data.tools.shapes import make_shapes
from data.transforms.augmentation import Augmentation, LargeScaleJitter, ScaleSampling
from data.transforms.color import ColorJitter, PhotometricDistortion
from data.transforms.geometry import resized_sizes

__all__ = [
    "AnnotationError",
    "Augmentation",
    "CocoAnnotations",
    "CocoDataset",
    "DataError",
    "ColorJitter",
    "DatasetError",
    "DeviceBatch",
    "DevicePrefetcher",
    "EvalLoader",
    "Finding",
    "ImageError",
    "LargeScaleJitter",
    "LoadTimes",
    "NEWEST_ORDER",
    "ORDERS",
    "PhotometricDistortion",
    "RawBatch",
    "ScaleSampling",
    "TrainLoader",
    "UnreadableImage",
    "WorkerError",
    "assemble",
    "check_pair",
    "check_split",
    "coco_layout",
    "make_shapes",
    "plan_epoch",
    "read_coco",
    "read_image",
    "resized_sizes",
    "worker_error",
]
