"""What other projects call our parameters, and how their tensors differ from ours.

    ours                    MMDetection 2.x/3.x                 torchvision
    backbone.layer1.0.bn1   backbone.layer1.0.bn1               backbone.body.layer1.0.bn1
    fpn.lateral.0           neck.lateral_convs.0.conv           backbone.fpn.inner_blocks.0.0
    fpn.output.0            neck.fpn_convs.0.conv               backbone.fpn.layer_blocks.0.0
    rpn.conv                rpn_head.rpn_conv                   rpn.head.conv.0.0
    rpn.objectness          rpn_head.rpn_cls                    rpn.head.cls_logits
    rpn.deltas              rpn_head.rpn_reg                    rpn.head.bbox_pred
    roi_head.fc1, fc2       roi_head.bbox_head.shared_fcs.0, 1  roi_heads.box_head.fc6, fc7
    roi_head.classifier     roi_head.bbox_head.fc_cls           roi_heads.box_predictor.cls_score
    roi_head.regressor      roi_head.bbox_head.fc_reg           roi_heads.box_predictor.bbox_pred

    ours                    Detectron2
    backbone.layer1.0.bn1   backbone.bottom_up.res2.0.conv1.norm
    fpn.lateral.0           backbone.fpn_lateral2
    fpn.output.0            backbone.fpn_output2
    rpn.conv                proposal_generator.rpn_head.conv
    rpn.objectness          proposal_generator.rpn_head.objectness_logits
    rpn.deltas              proposal_generator.rpn_head.anchor_deltas
    roi_head.fc1, fc2       roi_heads.box_head.fc1, fc2
    roi_head.classifier     roi_heads.box_predictor.cls_score
    roi_head.regressor      roi_heads.box_predictor.bbox_pred

All of them flatten a RoI's features as (channel, row, column), order a location's anchors by ratio .5, 1, 2,
and regress (dx, dy, dw, dh) divided by .1, .1, .2, .2, class by class. They differ in the class rows: the
background's is the last of the classifier everywhere but in torchvision, where it is the first, and only
torchvision has box outputs for the background. Detectron2's networks moreover look at BGR values that are not
divided by a standard deviation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

LAYOUTS = ("ours", "mmdet", "torchvision")
"""What `to_layout` can write. `to_ours` reads "detectron2" and "backbone" (a bare ResNet) as well."""

CLASSIFIER = ("roi_head.classifier.weight", "roi_head.classifier.bias")
REGRESSOR = ("roi_head.regressor.weight", "roi_head.regressor.bias")
_LEVELS = range(4)

# Prefix of ours, prefix of theirs. Where two of theirs fit, the longest counts.
_MMDET: tuple[tuple[str, str], ...] = (
    ("backbone.", "backbone."),
    *((f"fpn.lateral.{i}.", f"neck.lateral_convs.{i}.conv.") for i in _LEVELS),
    *((f"fpn.lateral_norm.{i}.", f"neck.lateral_convs.{i}.gn.") for i in _LEVELS),
    *((f"fpn.output.{i}.", f"neck.fpn_convs.{i}.conv.") for i in _LEVELS),
    *((f"fpn.output_norm.{i}.", f"neck.fpn_convs.{i}.gn.") for i in _LEVELS),
    ("rpn.conv.", "rpn_head.rpn_conv."),
    ("rpn.objectness.", "rpn_head.rpn_cls."),
    ("rpn.deltas.", "rpn_head.rpn_reg."),
    ("roi_head.fc1.", "roi_head.bbox_head.shared_fcs.0."),
    ("roi_head.fc2.", "roi_head.bbox_head.shared_fcs.1."),
    ("roi_head.classifier.", "roi_head.bbox_head.fc_cls."),
    ("roi_head.regressor.", "roi_head.bbox_head.fc_reg."),
)
_TORCHVISION: tuple[tuple[str, str], ...] = (
    ("backbone.", "backbone.body."),
    *((f"fpn.lateral.{i}.", f"backbone.fpn.inner_blocks.{i}.0.") for i in _LEVELS),
    *((f"fpn.lateral_norm.{i}.", f"backbone.fpn.inner_blocks.{i}.1.") for i in _LEVELS),
    *((f"fpn.output.{i}.", f"backbone.fpn.layer_blocks.{i}.0.") for i in _LEVELS),
    *((f"fpn.output_norm.{i}.", f"backbone.fpn.layer_blocks.{i}.1.") for i in _LEVELS),
    ("rpn.conv.", "rpn.head.conv.0.0."),
    ("rpn.objectness.", "rpn.head.cls_logits."),
    ("rpn.deltas.", "rpn.head.bbox_pred."),
    ("roi_head.fc1.", "roi_heads.box_head.fc6."),
    ("roi_head.fc2.", "roi_heads.box_head.fc7."),
    ("roi_head.classifier.", "roi_heads.box_predictor.cls_score."),
    ("roi_head.regressor.", "roi_heads.box_predictor.bbox_pred."),
)
# Before version 0.13 these were plain convolutions; torchvision's published COCO_V1 file still has the old
# names.
_TORCHVISION_OLD: tuple[tuple[str, str], ...] = (
    *((f"fpn.lateral.{i}.", f"backbone.fpn.inner_blocks.{i}.") for i in _LEVELS),
    *((f"fpn.output.{i}.", f"backbone.fpn.layer_blocks.{i}.") for i in _LEVELS),
    ("rpn.conv.", "rpn.head.conv."),
)
_DETECTRON2: tuple[tuple[str, str], ...] = (
    ("backbone.", "backbone.bottom_up."),
    ("backbone.stem.", "stem."),
    *((f"backbone.res{n}.", f"res{n}.") for n in range(2, 6)),
    *((f"fpn.lateral.{i}.", f"backbone.fpn_lateral{i + 2}.") for i in _LEVELS),
    *((f"fpn.output.{i}.", f"backbone.fpn_output{i + 2}.") for i in _LEVELS),
    ("rpn.conv.", "proposal_generator.rpn_head.conv."),
    ("rpn.objectness.", "proposal_generator.rpn_head.objectness_logits."),
    ("rpn.deltas.", "proposal_generator.rpn_head.anchor_deltas."),
    ("roi_head.fc1.", "roi_heads.box_head.fc1."),
    ("roi_head.fc2.", "roi_heads.box_head.fc2."),
    ("roi_head.classifier.", "roi_heads.box_predictor.cls_score."),
    ("roi_head.regressor.", "roi_heads.box_predictor.bbox_pred."),
)
_READ = {
    "ours": (),
    "backbone": (("backbone.", ""),),
    "mmdet": _MMDET,
    "torchvision": (*_TORCHVISION, *_TORCHVISION_OLD),
    "detectron2": _DETECTRON2,
}

COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The ids of COCO's 80 categories. torchvision's reference training takes them for labels, so its head has 90."""

# What our input is divided by, channel by channel (ImageNet's standard deviations).
PIXEL_STD_RGB = (58.395, 57.12, 57.375)


def clean_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel ("module.") and torch.compile ("_orig_mod.") put into names."""
    cleaned = {}
    for name, tensor in state.items():
        name = name.replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name[len("module.") :]
        cleaned[name] = tensor
    return cleaned


def recognize(names: Iterable[str]) -> str | None:
    """The layout of a state dict with these (cleaned) names, or None.

    One of "ours", "mmdet", "torchvision", "detectron2", "backbone".
    """
    names = list(names)

    def any_start(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if any_start("fpn.lateral", "rpn.objectness.", "roi_head.fc1.", "roi_head.classifier."):
        return "ours"
    if any_start("backbone.bottom_up.", "proposal_generator.", "stem.conv1.", "res2.", "roi_heads.box_head.fc1."):
        return "detectron2"
    if any_start("backbone.body.", "rpn.head.", "roi_heads."):
        return "torchvision"
    # A backbone alone under its own prefix has the same names in MMDetection and here.
    if any_start("neck.", "rpn_head.", "roi_head.bbox_head.", "backbone.conv1.", "backbone.layer1."):
        return "mmdet"
    if any_start("conv1.weight", "layer1."):
        return "backbone"
    return None


def to_ours(state: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict in another layout as one in ours, and what each of our names was called there.

    Names that have no counterpart (a mask head, say) keep their own and are not in the second dict. Tensors
    are shared with `state` where they need no change.
    """
    table = sorted(_READ[layout], key=lambda pair: -len(pair[1]))
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in state.items():
        if layout == "ours":
            ours[name], origin[name] = tensor, name
            continue
        for our_prefix, their_prefix in table:
            if name.startswith(their_prefix):
                our_name = our_prefix + name[len(their_prefix) :]
                if layout == "detectron2":
                    our_name = _detectron2_block(our_name)
                if layout == "mmdet":
                    our_name = re.sub(r"\.gn(\d)\.", r".bn\1.", our_name)
                ours[our_name], origin[our_name] = tensor, name
                break
        else:
            ours[name] = tensor
    if layout == "torchvision":
        _move_background(ours, first_to_last=True)
    return ours, origin


def to_layout(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our state dict with MMDetection's or torchvision's names, class rows and norm counters.

    `to_ours` turns the result back into exactly `state`, but for two things: norm counters
    (num_batches_tracked, zero) that both projects expect and frozen norms here do not have; and the
    regressor's rows for the background, which torchvision needs (zeros where `state` has none) and
    MMDetection cannot hold (they are never used). Raises ValueError for a layout that is not one of LAYOUTS.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} cannot be written; choose one of {', '.join(LAYOUTS)}")
    state = dict(state)
    if layout == "ours":
        return state
    rows = state[CLASSIFIER[0]].shape[0] if CLASSIFIER[0] in state else None
    for name in REGRESSOR:
        if rows is None or name not in state:
            continue
        foreground = state[name][: 4 * (rows - 1)]
        if layout == "mmdet":
            state[name] = foreground
        elif len(state[name]) == len(foreground):
            state[name] = torch.cat((foreground, foreground.new_zeros(4, *foreground.shape[1:])))
    if layout == "torchvision":
        _move_background(state, first_to_last=False)
    table = _MMDET if layout == "mmdet" else _TORCHVISION
    result: dict[str, Tensor] = {}
    for our_name, tensor in state.items():
        name = our_name
        norm = re.fullmatch(r"(backbone(?:\..*)?)\.bn(\d)\.(weight|bias)", name)
        if layout == "mmdet" and norm and f"{norm[1]}.bn{norm[2]}.running_mean" not in state:
            name = f"{norm[1]}.gn{norm[2]}.{norm[3]}"  # a group norm, which MMDetection names so
        for our_prefix, their_prefix in table:
            if name.startswith(our_prefix):
                name = their_prefix + name[len(our_prefix) :]
                break
        result[name] = tensor
        module, _, kind = name.rpartition(".")
        if kind == "running_var" and our_name.replace("running_var", "num_batches_tracked") not in state:
            result[f"{module}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return result


def mmdet_name(name: str, *, group_norm: bool = False) -> str:
    """What MMDetection calls our parameter `name`; group_norm: the backbone's norms are group norms."""
    if group_norm:
        name = re.sub(r"^(backbone(?:\..*)?)\.bn(\d)\.", r"\1.gn\2.", name)
    for our_prefix, their_prefix in _MMDET:
        if name.startswith(our_prefix):
            return their_prefix + name[len(our_prefix) :]
    return name


def _move_background(state: dict[str, Tensor], *, first_to_last: bool) -> None:
    """The background's rows (one of the classifier, four of the regressor) from one end to the other."""
    for names, count in ((CLASSIFIER, 1), (REGRESSOR, 4)):
        for name in names:
            if name in state:
                state[name] = torch.roll(state[name], -count if first_to_last else count, dims=0)


def take_categories(state: dict[str, Tensor], category_ids: Sequence[int]) -> None:
    """Leaves the head (of our layout) the rows of these labels, in this order, and the background's. Labels begin at
    1."""
    background = len(state[CLASSIFIER[0]]) - 1
    rows = torch.tensor([*(number - 1 for number in category_ids), background])
    for names, count in ((CLASSIFIER, 1), (REGRESSOR, 4)):
        for name in names:
            if name in state:
                blocks = state[name].unflatten(0, (-1, count))
                kept = rows[rows < len(blocks)].to(blocks.device)  # a regressor may have no background
                state[name] = blocks[kept].flatten(0, 1)


def _detectron2_block(name: str) -> str:
    name = name.replace("backbone.stem.", "backbone.")
    name = re.sub(r"^backbone\.res(\d)\.", lambda match: f"backbone.layer{int(match[1]) - 1}.", name)
    name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
    return re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)


def stem_from_bgr(weight: Tensor) -> Tensor:
    """Stem weights [64, 3, 7, 7] for BGR input that was not divided by a deviation, as weights for our RGB
    input.

    Exact but for rounding: zero is the mean color in both, so the padded border agrees too.
    """
    deviation = torch.tensor(PIXEL_STD_RGB, dtype=torch.float64, device=weight.device)
    return (weight.flip(1).double() * deviation[None, :, None, None]).to(weight.dtype)
