"""What other projects call our parameters, and how their tensors differ from ours.

All of them flatten a RoI's features as (channel, row, column), order a location's anchors by ratio .5, 1, 2,
and regress (dx, dy, dw, dh) divided by .1, .1, .2, .2, class by class. They differ in the class rows: the
background's is the last of the classifier everywhere but in torchvision, where it is the first, and only
torchvision has box outputs and masks for the background. Detectron2's networks moreover look at BGR values that are not
divided by a standard deviation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("ours", "mmdet", "torchvision")
"""What `to_layout` can write. `to_ours` reads "detectron2", and bare ResNets: "backbone" and "transformers"."""

_HEAD = re.compile(r"(roi_head\.(?:\d\.)?)classifier\.weight")


def box_heads(names: Iterable[str]) -> list[str]:
    """The prefixes of the box heads among our names: one, or those of a cascade."""
    return [match[1] for match in map(_HEAD.fullmatch, names) if match]


def classifier_names(head: str) -> tuple[str, str]:
    """The tensors of a box head that have one row for each class, the background's last."""
    return f"{head}classifier.weight", f"{head}classifier.bias"


def regressor_names(head: str) -> tuple[str, str]:
    """The tensors of a box head that have four rows for each class, or for all classes together."""
    return f"{head}regressor.weight", f"{head}regressor.bias"


def mask_logits_names(head: str) -> tuple[str, str]:
    """The tensors of the mask head beside a box head that have one row for each class."""
    head = head.replace("roi_head.", "mask_head.")
    return f"{head}logits.weight", f"{head}logits.bias"


# Prefixes of names: ours, MMDetection 2.x and 3.x, torchvision, Detectron2. {0} is the pyramid level, a stage or a
# convolution; {1}, the level's power of two, and {2} are 2 and 1 more; {3} is a second such number. Detectron2's
# pyramids with norms are not read, and neither is the one mask head of its cascade.
_PREFIXES = (
    ("backbone.", "backbone.", "backbone.body.", "backbone.bottom_up."),
    (
        "fpn.lateral.{0}.",
        "neck.lateral_convs.{0}.conv.",
        "backbone.fpn.inner_blocks.{0}.0.",
        "backbone.fpn_lateral{1}.",
    ),
    ("fpn.lateral_norm.{0}.", "neck.lateral_convs.{0}.gn.", "backbone.fpn.inner_blocks.{0}.1.", ""),
    ("fpn.output.{0}.", "neck.fpn_convs.{0}.conv.", "backbone.fpn.layer_blocks.{0}.0.", "backbone.fpn_output{1}."),
    ("fpn.output_norm.{0}.", "neck.fpn_convs.{0}.gn.", "backbone.fpn.layer_blocks.{0}.1.", ""),
    ("rpn.conv.", "rpn_head.rpn_conv.", "rpn.head.conv.0.0.", "proposal_generator.rpn_head.conv."),
    ("rpn.objectness.", "rpn_head.rpn_cls.", "rpn.head.cls_logits.", "proposal_generator.rpn_head.objectness_logits."),
    ("rpn.deltas.", "rpn_head.rpn_reg.", "rpn.head.bbox_pred.", "proposal_generator.rpn_head.anchor_deltas."),
    ("roi_head.stage.", "roi_head.shared_head.layer4.", "", "roi_heads.res5."),
    ("roi_head.fc1.", "roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6.", "roi_heads.box_head.fc1."),
    ("roi_head.fc2.", "roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7.", "roi_heads.box_head.fc2."),
    (
        *("roi_head.classifier.", "roi_head.bbox_head.fc_cls."),
        *("roi_heads.box_predictor.cls_score.", "roi_heads.box_predictor.cls_score."),
    ),
    (
        *("roi_head.regressor.", "roi_head.bbox_head.fc_reg."),
        *("roi_heads.box_predictor.bbox_pred.", "roi_heads.box_predictor.bbox_pred."),
    ),
    (
        *("mask_head.convs.{0}.", "roi_head.mask_head.convs.{0}.conv."),
        *("roi_heads.mask_head.{0}.0.", "roi_heads.mask_head.mask_fcn{2}."),
    ),
    ("mask_head.conv_norms.{0}.", "roi_head.mask_head.convs.{0}.gn.", "", ""),
    ("roi_head.convs.{0}.", "roi_head.bbox_head.shared_convs.{0}.conv.", "", ""),
    ("roi_head.conv_norms.{0}.", "roi_head.bbox_head.shared_convs.{0}.gn.", "", ""),
    (
        *("mask_head.upsample.", "roi_head.mask_head.upsample."),
        *("roi_heads.mask_predictor.conv5_mask.", "roi_heads.mask_head.deconv."),
    ),
    (
        *("mask_head.logits.", "roi_head.mask_head.conv_logits."),
        *("roi_heads.mask_predictor.mask_fcn_logits.", "roi_heads.mask_head.predictor."),
    ),
    # A cascade, whose stages are numbered; torchvision has none.
    ("roi_head.{0}.fc1.", "roi_head.bbox_head.{0}.shared_fcs.0.", "", "roi_heads.box_head.{0}.fc1."),
    ("roi_head.{0}.fc2.", "roi_head.bbox_head.{0}.shared_fcs.1.", "", "roi_heads.box_head.{0}.fc2."),
    ("roi_head.{0}.classifier.", "roi_head.bbox_head.{0}.fc_cls.", "", "roi_heads.box_predictor.{0}.cls_score."),
    ("roi_head.{0}.regressor.", "roi_head.bbox_head.{0}.fc_reg.", "", "roi_heads.box_predictor.{0}.bbox_pred."),
    ("mask_head.{0}.convs.{3}.", "roi_head.mask_head.{0}.convs.{3}.conv.", "", ""),
    ("mask_head.{0}.conv_norms.{3}.", "roi_head.mask_head.{0}.convs.{3}.gn.", "", ""),
    ("roi_head.{0}.convs.{3}.", "roi_head.bbox_head.{0}.shared_convs.{3}.conv.", "", ""),
    ("roi_head.{0}.conv_norms.{3}.", "roi_head.bbox_head.{0}.shared_convs.{3}.gn.", "", ""),
    ("mask_head.{0}.upsample.", "roi_head.mask_head.{0}.upsample.", "", ""),
    ("mask_head.{0}.logits.", "roi_head.mask_head.{0}.conv_logits.", "", ""),
)


def _column(number: int) -> dict[str, str]:
    """Prefixes of ours to those of another project."""
    rows = [(row[0], row[number]) for row in _PREFIXES if row[number]]
    numbers = [(i, i + 2, i + 1, j) for i in range(4) for j in range(4)]
    return {ours.format(*each): theirs.format(*each) for ours, theirs in rows for each in numbers}


def _swapped(prefixes: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in prefixes.items()}


_WRITTEN = {"mmdet": _column(1), "torchvision": _column(2)}
_READ = {
    "backbone": {"": "backbone."},
    "mmdet": _swapped(_column(1)),
    # Before version 0.13 these were plain convolutions; torchvision's published COCO_V1 file still has the old names.
    "torchvision": {
        **_swapped(_column(2)),
        **{f"backbone.fpn.inner_blocks.{i}.": f"fpn.lateral.{i}." for i in range(4)},
        **{f"backbone.fpn.layer_blocks.{i}.": f"fpn.output.{i}." for i in range(4)},
        "rpn.head.conv.": "rpn.conv.",
        **{f"roi_heads.mask_head.mask_fcn{i + 1}.": f"mask_head.convs.{i}." for i in range(4)},
    },
    "detectron2": {
        **_swapped(_column(3)),
        **{f"{part}.": f"backbone.{part}." for part in ("stem", "res2", "res3", "res4", "res5")},
    },
}

COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The ids of COCO's 80 categories. torchvision's reference training takes them for labels, so its head has 90."""


class PixelInput(NamedTuple):
    """What a network's stem takes: the order of the channels, rgb or bgr, and what each (in that order) is divided
    by."""

    order: str
    std: tuple[float, ...]


IMAGENET_INPUT = PixelInput("rgb", (58.395, 57.12, 57.375))  # ImageNet's standard deviations
CAFFE_INPUT = PixelInput("bgr", (1.0, 1.0, 1.0))


def clean_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel ("module.") and torch.compile ("_orig_mod.") put into names."""
    return {re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")): tensor for name, tensor in state.items()}


def recognize(names: Iterable[str]) -> str | None:
    """The layout of a state dict with these (cleaned) names, or None.

    One of "ours", "mmdet", "torchvision", "detectron2", "transformers", "backbone".
    """
    names = list(names)
    starts = {
        "ours": ("fpn.lateral", "rpn.objectness.", "roi_head.fc1.", "roi_head.classifier.", "roi_head.0."),
        "detectron2": (
            "backbone.bottom_up.",
            "proposal_generator.",
            "stem.conv1.",
            "res2.",
            "roi_heads.box_head.fc1.",
            "roi_heads.box_head.0.",
        ),
        "torchvision": ("backbone.body.", "rpn.head.", "roi_heads."),
        # A backbone alone under its own prefix has the same names in MMDetection and here.
        "mmdet": ("neck.", "rpn_head.", "roi_head.bbox_head.", "backbone.conv1.", "backbone.layer1."),
        "transformers": ("resnet.embedder.", "resnet.encoder.", "embedder.embedder.", "encoder.stages."),
        "backbone": ("conv1.weight", "layer1."),
    }
    return next((layout for layout, prefixes in starts.items() if any(n.startswith(prefixes) for n in names)), None)


def to_ours(state: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict in another layout as one in ours, and what each of our names was called there.

    Names that have no counterpart (of another kind of head, say) keep their own and are not in the second dict. Tensors
    are shared with `state` where they need no change.
    """
    if layout == "ours":
        return dict(state), {name: name for name in state}
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in state.items():
        our_name = _of_transformers(name) if layout == "transformers" else _renamed(name, _READ[layout])
        if our_name is None:
            ours[name] = tensor
            continue
        if layout == "detectron2":
            our_name = _detectron2_block(our_name)
        if layout in ("mmdet", "backbone"):  # MMDetection's group norms
            our_name = re.sub(r"\.gn(\d)\.", r".bn\1.", our_name)
        ours[our_name], origin[our_name] = tensor, name
    if layout == "torchvision":
        _move_background(ours, first_to_last=True)
        for name in _mask_rows(ours):
            ours[name] = ours[name][1:]
    return ours, origin


def to_layout(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our state dict with MMDetection's or torchvision's names, class rows and norm counters.

    `to_ours` turns the result back into exactly `state`, but for two things: norm counters (num_batches_tracked, zero)
    that both projects expect and frozen norms here do not have; and the rows for the background of the regressor, and
    of the masks, which torchvision needs (zeros where `state` has none) and MMDetection cannot hold (they are never
    used). Raises ValueError for a layout that is not one of LAYOUTS, and for torchvision's layout of a cascade.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} cannot be written; choose one of {', '.join(LAYOUTS)}")
    state = dict(state)
    if layout == "ours":
        return state
    heads = box_heads(state)
    if layout == "torchvision" and len(heads) > 1:
        raise ValueError("torchvision has no Cascade R-CNN: choose the layout mmdet or ours")
    for head in heads:
        num_classes = len(state[classifier_names(head)[0]]) - 1
        for name in regressor_names(head):
            foreground = state[name][: 4 * num_classes]
            if layout == "mmdet":
                state[name] = foreground
            elif len(state[name]) == len(foreground):
                state[name] = torch.cat((foreground, foreground.new_zeros(4, *foreground.shape[1:])))
    if layout == "torchvision":
        _move_background(state, first_to_last=False)
        for name in _mask_rows(state):
            state[name] = torch.cat((torch.zeros_like(state[name][:1]), state[name]))
    group_norm = not any(".bn" in name and name.endswith(".running_mean") for name in state)
    result: dict[str, Tensor] = {}
    for our_name, tensor in state.items():
        if layout == "mmdet":
            name = mmdet_name(our_name, group_norm=group_norm)
        else:
            name = _renamed(our_name, _WRITTEN[layout]) or our_name
        result[name] = tensor
        if name.endswith("running_var"):
            counter = "num_batches_tracked"
            if our_name.replace("running_var", counter) not in state:
                result[name.replace("running_var", counter)] = torch.zeros((), dtype=torch.int64)
    return result


def mmdet_name(name: str, *, group_norm: bool = False) -> str:
    """What MMDetection calls our parameter `name`; group_norm: the backbone's norms are group norms."""
    if group_norm:
        name = re.sub(r"^(backbone(?:\..*)?)\.bn(\d)\.", r"\1.gn\2.", name)
    return _renamed(name, _WRITTEN["mmdet"]) or name


def _renamed(name: str, prefixes: Mapping[str, str]) -> str | None:
    """`name` with its longest prefix among the keys replaced; None where it has none of them."""
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    longest = max(fitting, key=len, default=None)
    return None if longest is None else prefixes[longest] + name[len(longest) :]


def _move_background(state: dict[str, Tensor], *, first_to_last: bool) -> None:
    """The background's rows (one of the classifier, four of the regressor) from one end to the other."""
    for head in box_heads(state):
        for name, count in _rows_of_class(head):
            if name in state:
                state[name] = torch.roll(state[name], -count if first_to_last else count, dims=0)


def _mask_rows(state: Mapping[str, Tensor]) -> list[str]:
    return [name for head in box_heads(state) for name in mask_logits_names(head) if name in state]


def _rows_of_class(head: str) -> list[tuple[str, int]]:
    return [*((name, 1) for name in classifier_names(head)), *((name, 4) for name in regressor_names(head))]


def take_categories(state: dict[str, Tensor], head: str, category_ids: Sequence[int]) -> None:
    """Leaves a box head (of our layout), and the mask head beside it, the rows of these labels, in this order, and the
    background's. Labels begin at 1."""
    background = len(state[classifier_names(head)[0]]) - 1
    rows = torch.tensor([*(number - 1 for number in category_ids), background])
    for name, count in (*_rows_of_class(head), *((name, 1) for name in mask_logits_names(head))):
        if name in state:
            blocks = state[name].unflatten(0, (-1, count))
            kept = rows[rows < len(blocks)].to(blocks.device)  # regressors may have no background, masks have none
            state[name] = blocks[kept].flatten(0, 1)


_TRANSFORMERS_BLOCK = re.compile(
    r"encoder\.stages\.(\d)\.layers\.(\d+)\.(?:shortcut|layer\.(\d))\.(convolution|normalization)\.(\w+)"
)


def _of_transformers(name: str) -> str | None:
    """Our name of a tensor of transformers' ResNet; None for its classifier."""
    name = name.removeprefix("resnet.")
    if (stem := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name)) is not None:
        return f"backbone.{'conv1' if stem[1] == 'convolution' else 'bn1'}.{stem[2]}"
    if (block := _TRANSFORMERS_BLOCK.fullmatch(name)) is None:
        return None
    is_norm = block[4] == "normalization"
    if block[3] is None:
        part = f"downsample.{int(is_norm)}"
    else:
        part = f"{'bn' if is_norm else 'conv'}{int(block[3]) + 1}"
    return f"backbone.layer{int(block[1]) + 1}.{block[2]}.{part}.{block[5]}"


def _detectron2_block(name: str) -> str:
    name = name.replace("backbone.stem.", "backbone.")
    name = re.sub(r"^backbone\.res(\d)\.", lambda match: f"backbone.layer{int(match[1]) - 1}.", name)
    name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
    return re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name)


def stem_for(weight: Tensor, made_for: PixelInput, to_get: PixelInput) -> Tensor:
    """Stem weights [64, 3, 7, 7] of a network that is given one kind of input, as weights for another.

    Exact but for rounding: zero is the mean color in both, so the padded border agrees too.
    """
    rgb = _factors(to_get, weight) / _factors(made_for, weight)
    factors = rgb.flip(0) if made_for.order == "bgr" else rgb
    result = (weight.double() * factors[None, :, None, None]).to(weight.dtype)
    return result.flip(1) if made_for.order != to_get.order else result


def _factors(pixels: PixelInput, weight: Tensor) -> Tensor:
    std = torch.tensor(pixels.std, dtype=torch.float64, device=weight.device)
    return std.flip(0) if pixels.order == "bgr" else std
