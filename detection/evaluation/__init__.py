"""Detections and annotations in, COCO metrics out."""

from detection.evaluation.backends import BACKENDS, resolve_backend
from detection.evaluation.coco_metrics import (
    LVIS_METRIC_NAMES,
    METRIC_NAMES,
    CocoEvaluator,
    evaluate_results,
    metric_names,
)
from detection.evaluation.ground_truth import GroundTruth
from detection.evaluation.judging_plan import describe_judging
from detection.evaluation.results import (
    Detections,
    EvaluationError,
    ResultsError,
    read_results,
    write_mask_results,
    write_results,
)

__all__ = [
    "BACKENDS",
    "LVIS_METRIC_NAMES",
    "METRIC_NAMES",
    "CocoEvaluator",
    "Detections",
    "EvaluationError",
    "GroundTruth",
    "ResultsError",
    "describe_judging",
    "evaluate_results",
    "metric_names",
    "read_results",
    "resolve_backend",
    "write_mask_results",
    "write_results",
]
