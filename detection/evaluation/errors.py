"""The base of evaluation's errors."""

from detection.errors import DetectionError


class EvaluationError(DetectionError):
    """Annotations or detections that cannot be evaluated; the message says what, where, and how to mend it."""
