"""What a run says beforehand of its validations: by whose rules, and what they cost where that is much."""

from __future__ import annotations

import numpy as np

from data.coco.annotations import CocoAnnotations
from detection.evaluation.backends import resolve_backend
from detection.evaluation.federated import MAX_DETECTIONS

# Of pycocotools, on one core of an AMD EPYC with AVX2: `scripts/benchmark.py eval --images 1000`, 2026-11-30. Memory:
# the entry of a detection, and what COCOeval keeps of it for four size classes and ten thresholds.
_SECONDS_PER_DETECTION = 0.15e-3
_BYTES_PER_DETECTION = 2000
_WORTH_A_WORD = 60.0
"""Seconds: a shorter validation is not announced."""


def describe_judging(annotations: CocoAnnotations, backend: str, detections_per_image: int) -> list[str]:
    """Lines for the start screen; none where nothing is to be said.

    backend: as CocoEvaluator takes it.
    """
    lines = []
    if annotations.federated is not None:
        lines.append(
            f"by LVIS's rules, for the images say which classes they were searched for (neg_category_ids): up to "
            f"{MAX_DETECTIONS} detections an image, AP of rare, common and frequent classes"
        )
        if detections_per_image < MAX_DETECTIONS:
            lines.append(
                f"the model gives {detections_per_image} detections an image at most: "
                f"--model-set detections_per_image={MAX_DETECTIONS}"
            )
    if annotations.has_boxes and resolve_backend(backend) == "pycocotools":
        seconds, gigabytes = pycocotools_cost(annotations, detections_per_image)
        if seconds > _WORTH_A_WORD:
            lines.append(
                f"pycocotools needs up to {seconds / 60:.0f} minutes and {gigabytes:.1f} GB for each, on one core, "
                "while all processes wait; hotcoco has the same figures in a fiftieth of the time: pip install hotcoco"
            )
    return lines


def pycocotools_cost(annotations: CocoAnnotations, detections_per_image: int) -> tuple[float, float]:
    """Seconds and gigabytes of one judgement of boxes at most: every image has all its detections, and they are of the
    classes as the boxes are."""
    num_detections = len(annotations) * detections_per_image
    largest = np.bincount(annotations.labels).max(initial=0) / max(annotations.num_boxes, 1)
    return num_detections * _SECONDS_PER_DETECTION, num_detections * largest * _BYTES_PER_DETECTION / 1e9
