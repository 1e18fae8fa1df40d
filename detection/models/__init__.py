"""Faster R-CNN: tensors to losses or detections. Knows no files of a run, no ranks, no logging."""

from detection.models.config import MODELS, FasterRCNNConfig, ModelError, model_config
from detection.models.detector import Detector, DetectorError
from detection.models.faster_rcnn import AnyDetector, FasterRCNN, build_detector, build_model, model_from_config
from detection.models.mask_head import paste_masks
from detection.models.ops.selfcheck import describe_kernels, uses_triton
from detection.models.own.code import OwnCodeError, imported, is_own
from detection.models.own.detector import OwnDetector
from detection.models.structures import ImageBatch, MaskBatch, TargetBatch
from detection.models.weights.files import WeightsError
from detection.models.weights.layouts import mmdet_name
from detection.models.weights.load import (
    WeightReport,
    export_state_dict,
    load_detector,
    load_weights,
    prefetch_weights,
)
from detection.models.weights.sources import WeightsUnavailable
from detection.models.weights.torch_files import read_archive

__all__ = [
    "MODELS",
    "AnyDetector",
    "Detector",
    "DetectorError",
    "FasterRCNN",
    "FasterRCNNConfig",
    "ImageBatch",
    "MaskBatch",
    "ModelError",
    "OwnCodeError",
    "OwnDetector",
    "TargetBatch",
    "WeightReport",
    "WeightsError",
    "WeightsUnavailable",
    "build_detector",
    "build_model",
    "describe_kernels",
    "export_state_dict",
    "imported",
    "is_own",
    "load_detector",
    "load_weights",
    "mmdet_name",
    "model_config",
    "model_from_config",
    "paste_masks",
    "prefetch_weights",
    "read_archive",
    "uses_triton",
]
