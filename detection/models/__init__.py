"""Faster R-CNN: tensors to losses or detections. Knows no files of a run, no ranks, no logging."""

from detection.models.batch import ImageBatch, TargetBatch
from detection.models.faster_rcnn import FasterRCNN, build_model, model_from_config
from detection.models.recipes import MODELS, FasterRCNNConfig, ModelError

__all__ = [
    "MODELS",
    "FasterRCNN",
    "FasterRCNNConfig",
    "ImageBatch",
    "ModelError",
    "TargetBatch",
    "build_model",
    "model_from_config",
]
