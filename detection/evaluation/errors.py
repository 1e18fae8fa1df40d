"""The base of evaluation's errors."""


class EvaluationError(ValueError):
    """Annotations or detections that cannot be evaluated; the message says what, where, and how to mend it."""
