"""The detector's settings, and the three recipes it can follow.

`FasterRCNNConfig`'s defaults are MMDetection's faster-rcnn_r50_fpn_1x_coco. `TORCHVISION_RECIPE` lists everything in
which torchvision's fasterrcnn_resnet50_fpn differs, `CASCADE_RECIPE` everything in which MMDetection's Cascade R-CNN
does; nothing else in this package asks which recipe it serves.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from detection.errors import DetectionError
from detection.models.backbones.architectures import ARCHITECTURES
from detection.models.backbones.resnet import GROUPS_OF_GROUP_NORM, NORMS
from detection.models.ops.box_losses import BOX_LOSSES
from detection.models.own.backbone import is_own_backbone


class ModelError(DetectionError):
    """A model, a setting of it, or an input to it that cannot work."""


def number(default: Any, low: float, high: float, *, length: int | None = None) -> Any:
    """A field that is a number from low to high, or a list of such. length: of the list; None: any."""
    return dataclasses.field(default=default, metadata={"limits": (low, high), "length": length})


def choice(default: str | None, choices: Iterable[str], *, or_else: Callable[[str], bool] | None = None) -> Any:
    """A field that is one of several words, or else one that `or_else` says yes to."""
    return dataclasses.field(default=default, metadata={"choices": choices, "or_else": or_else})


@dataclass(frozen=True)
class FasterRCNNConfig:
    """Everything that determines a Faster R-CNN besides its weights. Lengths are in pixels of the network's
    input.
    """

    num_classes: int = number(dataclasses.MISSING, 1, 100_000)
    """Foreground classes, labeled 0..num_classes-1. The classifier's background is its last output."""

    # Pixels
    pixel_mean: tuple[float, ...] = number((123.675, 116.28, 103.53), -1000, 1000, length=3)
    pixel_std: tuple[float, ...] = number((58.395, 57.12, 57.375), 0.001, 1000, length=3)
    """In the order of pixel_order, of values 0..255. What lies outside an image is zero after normalization."""
    pixel_order: str = choice("rgb", ("rgb", "bgr"))
    """How the backbone takes the channels; images are given as RGB in any case."""

    # Backbone and feature pyramid
    backbone: str = choice("resnet50", ARCHITECTURES, or_else=is_own_backbone)
    """Or timm/NAME, or package.module:function (docs/extend.md)."""
    norm: str = choice("frozen_bn", NORMS)
    norm_eps: float = number(1e-5, 0, 1)
    train_norm_affine: bool = True
    """Whether a frozen norm's weight and bias are trained (its statistics never are)."""
    frozen_stages: int = number(1, -1, 4)
    """-1 trains all, 0 freezes the stem, n the stem and the first n stages."""
    stride_in_1x1: bool = False
    features: str = choice("fpn", ("fpn", "c4", "dc5"))
    """fpn: the pyramid P2..P6. c4: the third stage's map, and the fourth stage on what is pooled from it (Ren et al.
    2015). dc5: the fourth stage's map, dilated in place of its stride."""
    fpn_channels: int = number(256, 1, 4096)
    fpn_norm: str | None = choice(None, ("gn",))
    head_norm: str | None = choice(None, ("gn",))
    """After each convolution of the box and mask heads."""
    standardize_weights: bool = False
    """The weights of backbone, pyramid and heads get a mean of 0 and a standard deviation of 1 in each output channel,
    whenever they are used (Qiao et al. 2019)."""
    init: str = choice("mmdet", ("mmdet", "torchvision"))
    """Whose random weights pyramid and box heads begin with; those of backbone and RPN are the same in both."""
    zero_last_norms: bool = True
    """Whether the last norm of each residual block begins with a weight of zero (not where it is frozen)."""

    # Anchors: one size a level, P2..P6, or all sizes at the one map; every ratio (height over width) at equal area
    anchor_strides: tuple[int, ...] = number((4, 8, 16, 32, 64), 1, 1024)
    anchor_sizes: tuple[float, ...] = number((32.0, 64.0, 128.0, 256.0, 512.0), 1, 100_000)
    anchor_ratios: tuple[float, ...] = number((0.5, 1.0, 2.0), 0.001, 1000)
    round_anchors: bool = False
    anchor_stride_from_grid: bool = False
    """Space a level's anchors by padded size // grid size, which is not the stride where the grid was rounded
    up.
    """
    anchors_within_own_padding: bool = True
    """Anchors take part in training only where their image, padded to a multiple of 32 by itself, reaches."""
    anchors_within_image: bool = False
    """Anchors take part in training only where they lie inside their image as a whole."""

    # Region proposal network: targets and loss
    rpn_positive_iou: float = number(0.7, 0, 1)
    rpn_negative_iou: float = number(0.3, 0, 1)
    rpn_low_quality_iou: float = number(0.3, 0, 1)
    """A box's best anchors are positive below rpn_positive_iou too, from this IoU on."""
    rpn_low_quality_takes_own_box: bool = True
    """Such an anchor learns the (last) box whose best it is; otherwise the box it overlaps most."""
    rpn_samples_per_image: int | None = number(256, 1, 1_000_000)
    """None takes every anchor that is not ignored."""
    rpn_positive_fraction: float = number(0.5, 0, 1)
    rpn_loss_beta: float = number(0.0, 0, 1000)
    """Where smooth L1 turns linear; 0 is L1."""
    rpn_counts_at_least_one: bool = True
    """The normalizer counts an image without positives (or negatives) as if it had one."""

    # Proposals
    rpn_nms_pre_train: int = number(2000, 1, 1_000_000)
    rpn_nms_pre_test: int = number(1000, 1, 1_000_000)
    """Best anchors of each level that go into the suppression."""
    rpn_proposals_train: int = number(1000, 1, 100_000)
    rpn_proposals_test: int = number(1000, 1, 100_000)
    """Best proposals of all levels that are left after it."""
    rpn_nms_iou: float = number(0.7, 0, 1)
    proposal_min_size: float = number(0.0, 0, 100_000)
    """Proposals need sides above this."""
    clip_shrinking: bool = True
    """Limit how much a predicted delta shrinks a box, as well as how much it enlarges it (to 1000/16 times).
    """

    # Second stage: targets and loss
    roi_iou: float = number(0.5, 0, 1)
    roi_samples_per_image: int | None = number(512, 1, 1_000_000)
    """None takes every proposal and box."""
    roi_positive_fraction: float = number(0.25, 0, 1)
    roi_box_matches_itself: bool = True
    """A ground-truth box among the RoIs is its own target; otherwise the first of equal boxes is."""
    roi_low_quality_iou: float | None = number(None, 0, 1)
    """A box's best proposals are positive below roi_iou too, and learn that box, from this IoU on. None: they are not.
    """
    roi_sampler: str = choice("random", ("random", "ohem"))
    """ohem: those with the largest classification loss, in place of some at random (Shrivastava et al. 2016)."""
    roi_box_loss: str = choice("l1", ("l1", *BOX_LOSSES))
    """l1: of deltas, smooth below roi_loss_beta. The others compare the decoded boxes (ops/box_losses.py)."""
    roi_box_loss_weight: float = number(1.0, 0, 1000)
    roi_loss_beta: float = number(0.0, 0, 1000)
    roi_delta_stds: tuple[float, ...] = number((0.1, 0.1, 0.2, 0.2), 1e-6, 1000, length=4)

    # Second stage: features and head
    roi_output_size: int = number(7, 1, 64)
    roi_sampling_ratio: int = number(0, 0, 64)
    """Samples per bin and axis; 0 takes one a feature cell."""
    roi_aligned: bool = True
    """Shift by half a cell, and let RoIs be smaller than one cell."""
    roi_finest_scale: float = number(56.0, 1, 100_000)
    """RoIs from this size to twice this size are pooled from P2."""
    roi_level_eps_inside_log: bool = True
    roi_num_convs: int = number(0, 0, 16)
    """3x3 convolutions before the hidden layers."""
    roi_num_hidden: int = number(2, 1, 2)
    roi_hidden_channels: int = number(1024, 1, 16_384)
    regressor_has_background: bool = False
    regressor_is_class_agnostic: bool = False
    """One box for all classes."""

    # Cascade R-CNN (Cai and Vasconcelos 2018): each stage takes the boxes that the one before has refined
    cascade_ious: tuple[float, ...] | None = number(None, 0, 1)
    """The IoU of each stage, instead of roi_iou. None: one stage, Faster R-CNN."""
    cascade_delta_stds: tuple[float, ...] = number(
        (0.1, 0.1, 0.2, 0.2, 0.05, 0.05, 0.1, 0.1, 0.033, 0.033, 0.067, 0.067), 1e-6, 1000
    )
    """Four a stage, instead of roi_delta_stds."""
    cascade_loss_weights: tuple[float, ...] = number((1.0, 0.5, 0.25), 0, 1000)

    # Masks (He et al. 2017)
    has_masks: bool = False
    """A third branch gives each detection a mask. A cascade has one for each stage."""
    mask_channels: int = number(256, 1, 4096)
    mask_soft_targets: bool = False
    """A cell of a mask learns the share of it that is covered; otherwise 1 from half of it on, and 0 below."""

    # Detections
    score_threshold: float = number(0.05, 0, 1)
    nms_iou: float = number(0.5, 0, 1)
    soft_nms: str | None = choice(None, ("linear", "gaussian"))
    """Lower the scores of boxes that overlap a better one of their class, instead of dropping them (Bodla et al. 2017):
    times 1 - IoU from nms_iou on, or times exp(-IoU**2 / soft_nms_sigma)."""
    soft_nms_sigma: float = number(0.5, 0.001, 1000)
    soft_nms_min_score: float = number(0.001, 0, 1)
    """A box whose score falls below goes."""
    detections_per_image: int = number(100, 1, 100_000)
    detection_min_size: float | None = number(None, 0, 100_000)
    """Detections need sides above this. None drops nothing."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _require_fit(setting, getattr(self, setting.name))
        if self.rpn_negative_iou > self.rpn_positive_iou:
            raise ModelError(
                f"rpn_negative_iou {self.rpn_negative_iou} is above rpn_positive_iou {self.rpn_positive_iou}: anchors "
                "between the two would be both; give a smaller one"
            )
        if self.norm == "bn" and self.norm_eps == 0:
            raise ModelError(
                "norm_eps is 0, with which batch norm cannot be trained: give e.g. 1e-5, or norm frozen_bn"
            )
        if self.stride_in_1x1 and (self.backbone not in ARCHITECTURES or not ARCHITECTURES[self.backbone].bottleneck):
            raise ModelError(f"stride_in_1x1 has no meaning for {self.backbone}: its blocks have 3x3 convolutions only")
        if self.norm == "gn" and self.backbone not in ARCHITECTURES:
            raise ModelError(f"{self.backbone} has norms of its own: give norm bn or frozen_bn, not gn")
        self._check_group_norm()
        weights = self.map_channels * self.roi_output_size**2 * self.roi_hidden_channels
        if weights > _MOST_WEIGHTS_OF_A_LAYER:
            raise ModelError(
                f"{self.map_channels} channels x roi_output_size {self.roi_output_size} squared x "
                f"roi_hidden_channels {self.roi_hidden_channels} are {weights:,} weights in one layer: give smaller "
                f"ones, for at most {_MOST_WEIGHTS_OF_A_LAYER:,}"
            )
        self._check_features()
        if self.cascade_ious is not None:
            self._check_cascade(self.cascade_ious)

    def _check_group_norm(self) -> None:
        normed = [("fpn_norm", "fpn_channels", self.fpn_channels)] if self.fpn_norm else []
        if self.head_norm:
            normed += [("head_norm", "fpn_channels", self.fpn_channels)] if self.roi_num_convs else []
            normed += [("head_norm", "mask_channels", self.mask_channels)] if self.has_masks else []
        for norm, name, channels in normed:
            if channels % GROUPS_OF_GROUP_NORM:
                raise ModelError(
                    f"{name} is {channels}, which group norm cannot divide into {GROUPS_OF_GROUP_NORM} groups: give a "
                    f"multiple of {GROUPS_OF_GROUP_NORM}, or {norm} None"
                )
        architecture = ARCHITECTURES.get(self.backbone)
        if self.norm == "gn" and architecture is not None:
            widths = {architecture.stem_channels, *(n for s in architecture.stages for n in (s.channels, s.width))}
            if any(width % GROUPS_OF_GROUP_NORM for width in widths):
                raise ModelError(
                    f"{self.backbone} has {sorted(widths)} channels, which group norm cannot divide into "
                    f"{GROUPS_OF_GROUP_NORM} groups: give norm bn or frozen_bn, or another backbone"
                )
        if self.standardize_weights and architecture is None:
            raise ModelError(f"{self.backbone} has convolutions of its own: give standardize_weights False")

    def _check_features(self) -> None:
        levels = 5 if self.features == "fpn" else 1
        for name in ("anchor_strides", "anchor_sizes")[: 2 if levels == 5 else 1]:
            if len(given := getattr(self, name)) != levels:
                raise ModelError(f"{name} is {given!r}, expected a list of {levels} with features {self.features!r}")
        architecture = ARCHITECTURES.get(self.backbone)
        is_plain = self.cascade_ious is None and not self.has_masks and not self.roi_num_convs
        if levels == 1 and (not is_plain or architecture is None or not architecture.bottleneck):
            raise ModelError(
                f"features {self.features!r} are those of Faster R-CNN with a ResNet of 50 layers or more: use "
                "features 'fpn'"
            )

    @property
    def map_channels(self) -> int:
        """Of the maps that the RPN and the RoIs see."""
        if self.features == "fpn":
            return self.fpn_channels
        return ARCHITECTURES[self.backbone].stages[self.last_stage - 1].channels

    @property
    def last_stage(self) -> int:
        """Of the backbone."""
        return 3 if self.features == "c4" else 4

    def anchor_sizes_of(self, level: int) -> tuple[float, ...]:
        """Of each cell of a level."""
        return self.anchor_sizes if self.features != "fpn" else self.anchor_sizes[level : level + 1]

    @property
    def anchors_per_cell(self) -> int:
        return len(self.anchor_ratios) * len(self.anchor_sizes_of(0))

    def _check_cascade(self, ious: tuple[float, ...]) -> None:
        lengths = (len(ious), len(self.cascade_loss_weights), len(self.cascade_delta_stds) / 4)
        if len(set(lengths)) > 1:
            raise ModelError(
                f"cascade_ious has {len(ious)} stages, cascade_loss_weights {lengths[1]} and cascade_delta_stds "
                f"{len(self.cascade_delta_stds)} numbers: give one IoU, one weight and four numbers for each stage"
            )
        if len(ious) > _MOST_STAGES:
            raise ModelError(f"cascade_ious has {len(ious)} stages; give at most {_MOST_STAGES}")
        if self.regressor_has_background:
            raise ModelError("cascade_ious and regressor_has_background do not go together: no such recipe exists")

    @functools.cached_property
    def stages(self) -> tuple[FasterRCNNConfig, ...]:
        """The settings of each stage of the second stage: one, or those of a cascade."""
        if self.cascade_ious is None:
            return (self,)
        stds = [self.cascade_delta_stds[4 * stage : 4 * stage + 4] for stage in range(len(self.cascade_ious))]
        return tuple(
            dataclasses.replace(self, cascade_ious=None, roi_iou=iou, roi_delta_stds=of_stage)
            for iou, of_stage in zip(self.cascade_ious, stds, strict=True)
        )


_MOST_STAGES = 4
_MOST_WEIGHTS_OF_A_LAYER = 2**31  # 8 GiB of float32, which few machines have for one layer
_LONGEST_LIST = 100
_KINDS = {"str": "text", "bool": "True or False", "int": "whole number", "float": "number"}
# True is an int to Python, and 1 is a float to people.
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}


def _require_fit(setting: dataclasses.Field[Any], value: Any) -> None:
    """Raises ModelError where `value` is not of the kind that the field is annotated with, or not in its range."""
    annotation, *none = str(setting.type).split(" | ")
    kind = annotation.removeprefix("tuple[").removesuffix(", ...]")
    is_list = kind != annotation
    choices, limits, length = (setting.metadata.get(key) for key in ("choices", "limits", "length"))
    values = value if is_list else (value,)
    if (
        (value is None and none)
        or isinstance(values, tuple)
        and (len(values) == length if length else 0 < len(values) <= _LONGEST_LIST)
        and all(type(one) in _TYPES[kind] for one in values)
        and (choices is None or value in choices or ((or_else := setting.metadata["or_else"]) and or_else(value)))
        and (limits is None or all(limits[0] <= one <= limits[1] for one in values))
    ):
        return
    expected = " or ".join(map(repr, choices)) if choices else _KINDS[kind]
    if kind in ("int", "float"):
        expected = f"a list of {f'{length} ' if length else ''}{expected}s" if is_list else f"a {expected}"
    if limits is not None:
        expected += f" from {limits[0]} to {limits[1]}"
    raise ModelError(f"{setting.name} is {value!r}, expected {expected}{' or None' if none else ''}")


TORCHVISION_RECIPE: dict[str, Any] = {
    # The affine of frozen batch norm stays as it was loaded.
    "train_norm_affine": False,
    # What a network begins with where no weights are loaded.
    "init": "torchvision",
    "zero_last_norms": False,
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

CASCADE_RECIPE: dict[str, Any] = {
    # MMDetection's cascade-rcnn_r50_fpn_1x_coco: more than the heads differs from its Faster R-CNN.
    "anchors_within_image": True,
    "rpn_loss_beta": 1 / 9,
    "rpn_proposals_train": 2000,
    "roi_loss_beta": 1.0,
    "regressor_is_class_agnostic": True,
    "cascade_ious": (0.5, 0.6, 0.7),
}

_SHORT = {name: name.replace("resnet", "r").replace("resnext", "x") for name in ARCHITECTURES}
_MASKS: dict[str, Any] = {"has_masks": True}
_RECIPES: dict[str, dict[str, Any]] = {
    "faster_rcnn": {},
    "cascade_rcnn": CASCADE_RECIPE,
    # The second stage takes low-quality matches here, and not in the others.
    "mask_rcnn": {**_MASKS, "roi_low_quality_iou": 0.5},
    "cascade_mask_rcnn": {**CASCADE_RECIPE, **_MASKS},
}
MODELS: dict[str, dict[str, Any]] = {
    **{
        f"{recipe}_{short}_fpn": {"backbone": name, **settings}
        for recipe, settings in _RECIPES.items()
        for name, short in _SHORT.items()
    },
    **{f"fasterrcnn_{name}_fpn": {"backbone": name, **TORCHVISION_RECIPE} for name in ("resnet18", "resnet50")},
    "maskrcnn_resnet50_fpn": {"backbone": "resnet50", **TORCHVISION_RECIPE, **_MASKS, "mask_soft_targets": True},
}


def model_config(name: str, num_classes: int = 80, **overrides: Any) -> FasterRCNNConfig:
    """The resolved settings of the model `name`. Raises ModelError for a name or a setting that does not
    exist.
    """
    if name not in MODELS:
        raise ModelError(
            f"model {name!r} is not known{_nearest(name, MODELS)} Models: {', '.join(MODELS)}, and "
            "package.module:function for one's own"
        )
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
    return FasterRCNNConfig(**fields)


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else "."
