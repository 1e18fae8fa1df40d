"""The figure of a validation that decides which one is the best."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from detection.config import ConfigError
from detection.evaluation import METRIC_NAMES

OF_CLASS = "AP/"
"""Before a class's name: that class's AP."""
LOSS = "loss"


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


def metric_of(metrics: Mapping[str, Any], name: str) -> float | None:
    """The figure `name` of a validation's metrics, the loss negated: the higher the better. None where it is not
    defined."""
    if name == LOSS:
        return None if math.isnan(metrics[LOSS]) else -metrics[LOSS]
    set_name, _, of_set = name.partition("/")
    if set_name in metrics.get("sets", {}):
        return metric_of({LOSS: math.nan, **metrics["sets"][set_name]}, of_set)
    value = metrics["per_class"].get(name[len(OF_CLASS) :]) if name.startswith(OF_CLASS) else metrics[name]
    return None if value is None or value < 0 or math.isnan(value) else float(value)
