"""Faster R-CNN: models, training engine, evaluation and reporting.

What a notebook needs is here by name, and loaded when it is first used:

    from detection import load_detector, draw_detections
    detector = load_detector("best.pt")
    draw_detections("photo.jpg", detector.predict("photo.jpg"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.engine.run import train
    from detection.evaluation import CocoEvaluator, evaluate_results
    from detection.inference.outputs import draw_detections
    from detection.models import Detector, build_model, export_state_dict, load_detector, load_weights

_HOMES = {
    "CocoEvaluator": "detection.evaluation",
    "Detector": "detection.models",
    "build_model": "detection.models",
    "draw_detections": "detection.inference.outputs",
    "evaluate_results": "detection.evaluation",
    "export_state_dict": "detection.models",
    "load_detector": "detection.models",
    "load_weights": "detection.models",
    "train": "detection.engine.run",
}

__version__ = "0.1.0"

__all__ = [
    "CocoEvaluator",
    "Detector",
    "build_model",
    "draw_detections",
    "evaluate_results",
    "export_state_dict",
    "load_detector",
    "load_weights",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detection' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
