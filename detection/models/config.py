"""The detector's settings, and the two recipes it can follow.

`FasterRCNNConfig`'s defaults are MMDetection's faster-rcnn_r50_fpn_1x_coco. `TORCHVISION_RECIPE` lists
everything in which torchvision's fasterrcnn_resnet50_fpn differs; nothing else in this package asks which
recipe it serves.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from detection.errors import DetectionError


class ModelError(DetectionError):
    """A model, a setting of it, or an input to it that cannot work."""


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Everything that determines a Faster R-CNN besides its weights. Lengths are in pixels of the network's
    input.
    """

    num_classes: int
    """Foreground classes, labeled 0..num_classes-1. The classifier's background is its last output."""

    # Pixels
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)
    """RGB, of values 0..255. What lies outside an image is zero after normalization."""

    # Backbone and feature pyramid
    backbone: str = "resnet50"
    norm: str = "frozen_bn"
    norm_eps: float = 1e-5
    train_norm_affine: bool = True
    """Whether a frozen norm's weight and bias are trained (its statistics never are)."""
    frozen_stages: int = 1
    """-1 trains all, 0 freezes the stem, n the stem and the first n stages."""
    stride_in_1x1: bool = False
    fpn_channels: int = 256
    fpn_norm: str | None = None

    # Anchors: one size a level, P2..P6, and every ratio (height over width) at equal area
    anchor_strides: tuple[int, ...] = (4, 8, 16, 32, 64)
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    round_anchors: bool = False
    anchor_stride_from_grid: bool = False
    """Space a level's anchors by padded size // grid size, which is not the stride where the grid was rounded
    up.
    """
    anchors_within_own_padding: bool = True
    """Anchors take part in training only where their image, padded to a multiple of 32 by itself, reaches."""

    # Region proposal network: targets and loss
    rpn_positive_iou: float = 0.7
    rpn_negative_iou: float = 0.3
    rpn_low_quality_iou: float = 0.3
    """A box's best anchors are positive below rpn_positive_iou too, from this IoU on."""
    rpn_low_quality_takes_own_box: bool = True
    """Such an anchor learns the (last) box whose best it is; otherwise the box it overlaps most."""
    rpn_samples_per_image: int | None = 256
    """None takes every anchor that is not ignored."""
    rpn_positive_fraction: float = 0.5
    rpn_loss_beta: float = 0.0
    """Where smooth L1 turns linear; 0 is L1."""
    rpn_counts_at_least_one: bool = True
    """The normalizer counts an image without positives (or negatives) as if it had one."""

    # Proposals
    rpn_nms_pre_train: int = 2000
    rpn_nms_pre_test: int = 1000
    """Best anchors of each level that go into the suppression."""
    rpn_proposals_train: int = 1000
    rpn_proposals_test: int = 1000
    """Best proposals of all levels that are left after it."""
    rpn_nms_iou: float = 0.7
    proposal_min_size: float = 0.0
    """Proposals need sides above this."""
    clip_shrinking: bool = True
    """Limit how much a predicted delta shrinks a box, as well as how much it enlarges it (to 1000/16 times).
    """

    # Second stage: targets and loss
    roi_iou: float = 0.5
    roi_samples_per_image: int | None = 512
    """None takes every proposal and box."""
    roi_positive_fraction: float = 0.25
    roi_box_matches_itself: bool = True
    """A ground-truth box among the RoIs is its own target; otherwise the first of equal boxes is."""
    roi_loss_beta: float = 0.0
    roi_delta_stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)

    # Second stage: features and head
    roi_output_size: int = 7
    roi_sampling_ratio: int = 0
    """Samples per bin and axis; 0 takes one a feature cell."""
    roi_aligned: bool = True
    """Shift by half a cell, and let RoIs be smaller than one cell."""
    roi_finest_scale: float = 56.0
    """RoIs from this size to twice this size are pooled from P2."""
    roi_level_eps_inside_log: bool = True
    roi_hidden_channels: int = 1024
    regressor_has_background: bool = False

    # Detections
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detections_per_image: int = 100
    detection_min_size: float | None = None
    """Detections need sides above this. None drops nothing."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ModelError(f"num_classes is {self.num_classes}; a detector needs one foreground class at least")
        for field in _AT_LEAST_ONE:
            if getattr(self, field) < 1:
                raise ModelError(f"{field} is {getattr(self, field)}; give at least 1")
        for field in _SHARES:
            if not 0 <= getattr(self, field) <= 1:
                raise ModelError(f"{field} is {getattr(self, field)}; give a number from 0 to 1")
        for field in ("rpn_samples_per_image", "roi_samples_per_image"):
            number = getattr(self, field)
            if number is not None and number < 1:
                raise ModelError(f"{field} is {number}; give a positive number, or None to take all")
        if len(self.anchor_sizes) != len(self.anchor_strides):
            raise ModelError(
                f"anchor_sizes has {len(self.anchor_sizes)} sizes and anchor_strides {len(self.anchor_strides)} "
                "strides: give one of each for every level"
            )


_AT_LEAST_ONE = (
    *("fpn_channels", "rpn_nms_pre_train", "rpn_nms_pre_test", "rpn_proposals_train", "rpn_proposals_test"),
    *("roi_output_size", "roi_finest_scale", "roi_hidden_channels", "detections_per_image"),
)
_SHARES = (
    *("rpn_positive_iou", "rpn_negative_iou", "rpn_low_quality_iou", "rpn_positive_fraction", "rpn_nms_iou"),
    *("roi_iou", "roi_positive_fraction", "score_threshold", "nms_iou"),
)

TORCHVISION_RECIPE: dict[str, Any] = {
    # The affine of frozen batch norm stays as it was loaded.
    "train_norm_affine": False,
    # Anchors: corners rounded to whole pixels, a stride recomputed from the grid, all of them used.
    "round_anchors": True,
    "anchor_stride_from_grid": True,
    "anchors_within_own_padding": False,
    # Low-quality matches at any IoU, each with the box that the anchor overlaps most.
    "rpn_low_quality_iou": 0.0,
    "rpn_low_quality_takes_own_box": False,
    "rpn_counts_at_least_one": False,
    "roi_box_matches_itself": False,
    # Smooth L1 instead of L1.
    "rpn_loss_beta": 1 / 9,
    "roi_loss_beta": 1 / 9,
    # Twice the training proposals; tiny ones and tiny detections are dropped; deltas may shrink a box to
    # nothing.
    "rpn_proposals_train": 2000,
    "proposal_min_size": 1e-3,
    "detection_min_size": 1e-2,
    "clip_shrinking": False,
    # RoIAlign as it was before the half-cell shift; the regressor has four outputs for the background too.
    "roi_sampling_ratio": 2,
    "roi_aligned": False,
    "roi_level_eps_inside_log": False,
    "regressor_has_background": True,
}

MODELS: dict[str, dict[str, Any]] = {
    "faster_rcnn_r18_fpn": {"backbone": "resnet18"},
    "faster_rcnn_r34_fpn": {"backbone": "resnet34"},
    "faster_rcnn_r50_fpn": {"backbone": "resnet50"},
    "faster_rcnn_r101_fpn": {"backbone": "resnet101"},
    "faster_rcnn_x101_32x4d_fpn": {"backbone": "resnext101_32x4d"},
    "fasterrcnn_resnet18_fpn": {"backbone": "resnet18", **TORCHVISION_RECIPE},
    "fasterrcnn_resnet50_fpn": {"backbone": "resnet50", **TORCHVISION_RECIPE},
}


def model_config(name: str, num_classes: int = 80, **overrides: Any) -> FasterRCNNConfig:
    """The resolved settings of the model `name`. Raises ModelError for a name or a setting that does not
    exist.
    """
    if name not in MODELS:
        raise ModelError(f"model {name!r} is not known{_nearest(name, MODELS)} Models: {', '.join(MODELS)}")
    return config_from_dict({"num_classes": num_classes, **MODELS[name], **overrides})


def config_from_dict(settings: Mapping[str, Any]) -> FasterRCNNConfig:
    """Settings from what `dataclasses.asdict` or JSON made of them. Raises ModelError for one that does not
    exist.
    """
    known = [field.name for field in dataclasses.fields(FasterRCNNConfig)]
    for key in settings:
        if key not in known:
            raise ModelError(f"{key!r} is not a setting of the model{_nearest(key, known)}")
    if "num_classes" not in settings:
        raise ModelError("the model's settings lack num_classes")
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    for key, value in fields.items():
        _require_kind(key, value)
    return FasterRCNNConfig(**fields)


_KINDS = {
    "str": "a text", "bool": "True or False", "int": "a whole number", "float": "a number",
    "tuple[int, ...]": "a list of whole numbers", "tuple[float, ...]": "a list of numbers", "None": "None",
}  # fmt: skip
_MAY_BE_NEGATIVE = ("frozen_stages", "pixel_mean")


def _require_kind(key: str, value: Any) -> None:
    """Raises ModelError where `value` is not of the kind that the field `key` is annotated with."""
    annotation = str(FasterRCNNConfig.__annotations__[key])
    kinds = annotation.split(" | ")
    if not any(_is_of_kind(value, kind) for kind in kinds):
        raise ModelError(f"{key} is {value!r}, expected {' or '.join(_KINDS[kind] for kind in kinds)}")
    numbers = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, (int, float))]
    if not all(map(math.isfinite, numbers)) or (min(numbers, default=0) < 0 and key not in _MAY_BE_NEGATIVE):
        raise ModelError(f"{key} is {value!r}, expected finite numbers of at least 0")


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return isinstance(value, tuple) and len(value) > 0 and all(_is_of_kind(one, inner) for one in value)
    # True is an int to Python, and 1 is a float to people.
    types = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int), "None": (type(None),)}[kind]
    return type(value) in types


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else "."
