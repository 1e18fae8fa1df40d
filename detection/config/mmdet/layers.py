"""The keys of convolutions and norms in a configuration of MMDetection."""

from __future__ import annotations

from typing import Any

from detection.config.mmdet.keys import Found, only, typed
from schedules.checks import Check, Keys, optional
from schedules.errors import Place

GROUP_NORM: Keys = {
    "num_groups": only(32, required=True),
    "requires_grad": only(True),
    "eps": only(1e-5),
}


def norm_of(name: str) -> Check:
    """Group norm after each convolution of a part, or none."""
    check = optional(typed({"GN": GROUP_NORM}, hint="the other norms of necks and heads are not supported"))

    def read(value: Any, place: Place) -> Found:
        return Found(name, "gn" if check(value, place) else None, place)

    return read


def _standardized(value: Any, place: Place) -> Found:
    if value == {"type": "Conv2d"}:
        value = None
    check = optional(typed({"ConvWS": {}}, hint="the other convolutions are not supported"))
    return Found("model.standardize_weights", check(value, place) is not None, place)


CONVS: Keys = {
    "conv_cfg": (_standardized, Found("model.standardize_weights", False)),
    "norm_cfg": (norm_of("model.head_norm"), Found("model.head_norm", None)),
}
"""Of the convolutions of heads."""
