"""The figure of a validation that decides which one is the best."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from detection.config import ConfigError
from detection.evaluation import METRIC_NAMES
from detection.reporting.metrics_log import LOSS, OF_CLASS


def check_best_metric(
    name: str, class_names: Sequence[str], figures: Sequence[str] = METRIC_NAMES, *, has_loss: bool
) -> None:
    """Raises ConfigError where validations of these classes, with the loss or without, have no figure of this name.

    figures: those that they have besides."""
    known = [*figures, *(OF_CLASS + each for each in class_names), *([LOSS] if has_loss else [])]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"--best-metric {name}: no validation has it{meant}; give one of {', '.join(figures)}, or "
            f"{OF_CLASS}CLASS" + (f", or {LOSS}" if has_loss else "")
        )
