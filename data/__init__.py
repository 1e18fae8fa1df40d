"""Images and annotations to batches. Knows nothing of models, loops or schedules."""

from data.coco import NO_CLASS, AnnotationError, CocoAnnotations, read_coco
from data.findings import Finding

__all__ = [
    "NO_CLASS",
    "AnnotationError",
    "CocoAnnotations",
    "Finding",
    "read_coco",
]
