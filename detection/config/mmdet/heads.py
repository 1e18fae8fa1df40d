"""The keys of `model.rpn_head` and `model.roi_head` in a configuration of MMDetection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detection.config.mmdet.backbone import FOURTH_STAGE
from detection.config.mmdet.keys import Found, absent, found_in, only, several, to, typed, united
from detection.config.mmdet.layers import CONVS
from schedules.checks import Check, Keys, dictionary, flag, number, optional, read_typed, whole
from schedules.errors import Place

_LINEAR = only({"type": "Linear"})


def _class_loss(use_sigmoid: bool, *, of_masks: bool = False) -> Check:
    keys = {
        "use_sigmoid": only(use_sigmoid, required=use_sigmoid),
        "loss_weight": only(1.0),
        "reduction": only("mean"),
        **{key: only(None) for key in ("class_weight", "ignore_index")},
        "use_mask": only(of_masks, required=of_masks),
        "avg_non_ignore": only(False),
    }
    what = "masks" if of_masks else "classes"
    return typed({"CrossEntropyLoss": keys}, hint=f"the other losses of {what} are not supported")


_OVERLAP: Keys = {"eps": only(1e-6)}
_OVERLAP_LOSSES: dict[str, tuple[str, Keys]] = {
    "IoULoss": ("iou", {**_OVERLAP, "linear": only(False), "mode": only("log")}),
    "GIoULoss": ("giou", _OVERLAP),
    "DIoULoss": ("diou", _OVERLAP),
    "CIoULoss": ("ciou", _OVERLAP),
    "BoundedIoULoss": ("bounded_iou", {"eps": only(1e-3), "beta": only(0.2)}),
}
"""Losses of decoded boxes: what they are called here, and their own keys."""


def _box_loss(beta: str, weight: Any) -> Check:
    """A loss of deltas."""
    keys: Keys = {"loss_weight": weight, "reduction": only("mean")}
    kinds = {"L1Loss": keys, "SmoothL1Loss": {**keys, "beta": to(beta, number(above=0, at_most=1000), 1.0)}}

    def read(value: Any, place: Place) -> Any:
        found = read_typed(value, place, kinds, hint=f" (losses of overlap are those of {_OF_HEAD} alone)")
        return [found, Found(beta, 0.0, place)] if found["type"] == "L1Loss" else found

    return read


_OF_HEAD = "roi_head.bbox_head"
_HEAD_WEIGHT = to("model.roi_box_loss_weight", number(at_least=0, at_most=1000), 1.0)
_OF_DELTAS = _box_loss("model.roi_loss_beta", _HEAD_WEIGHT)


def _head_box_loss(value: Any, place: Place) -> Any:
    """A loss of deltas, or of decoded boxes."""
    kind = dictionary(value, place).get("type")
    if not isinstance(kind, str) or kind not in _OVERLAP_LOSSES:
        return [_OF_DELTAS(value, place), Found("model.roi_box_loss", "l1", place)]
    name, own = _OVERLAP_LOSSES[kind]
    found = read_typed(value, place, {kind: {**own, "loss_weight": _HEAD_WEIGHT, "reduction": only("mean")}})
    return [found, Found("model.roi_box_loss", name, place.at("type"))]


def _coder(stds: Any) -> Check:
    keys = {
        "target_means": only([0.0, 0.0, 0.0, 0.0]),
        "target_stds": stds,
        "clip_border": only(True),
        "add_ctr_clamp": only(False),
        "ctr_clamp": only(32),
        "use_box_type": only(False),
    }
    return typed({"DeltaXYWHBBoxCoder": keys}, hint="the other box coders are not supported")


def _anchors(value: Any, place: Place, levels: int = 5) -> Any:
    """One size at each of the levels, or any sizes at a single one."""
    keys: Keys = {
        "scales": several(number(above=0, at_most=100_000), 1 if levels > 1 else None),
        "ratios": to("model.anchor_ratios", several(number(above=0, at_most=1000))),
        "strides": several(whole(1, 1024), levels),
        "center_offset": only(0.0),
        "scale_major": only(True),
        "use_box_type": only(False),
        **{key: only(None) for key in ("base_sizes", "octave_base_scale", "scales_per_octave", "centers")},
    }
    found = read_typed(value, place, {"AnchorGenerator": keys}, hint=" (the other anchors are not supported)")
    strides = found["strides"]
    sizes = tuple(stride * scale for stride in strides for scale in found["scales"])
    found["sizes"] = [
        Found("model.anchor_strides", strides, place.at("strides")),
        Found("model.anchor_sizes", sizes, place.at("scales")),
    ]
    return found


CHANNELS = to("model.fpn_channels", whole(1, 4096))
RPN_HEAD = {
    "RPNHead": {
        "in_channels": CHANNELS,
        "feat_channels": to("model.fpn_channels", whole(1, 4096), 256),
        "num_classes": only(1),
        "num_convs": only(1),
        "anchor_generator": _anchors,
        "bbox_coder": (_coder(only([1.0, 1.0, 1.0, 1.0])), None),
        "loss_cls": (_class_loss(True), None),
        "loss_bbox": (_box_loss("model.rpn_loss_beta", only(1.0)), Found("model.rpn_loss_beta", 1 / 9)),
        "reg_decoded_bbox": only(False),
        "init_cfg": only(None),
    }
}
_STDS = several(number(above=0, at_most=1000), 4)
_STDS_DEFAULT = (0.1, 0.1, 0.2, 0.2)
_BOX_HEAD_KEYS: Keys = {
    "in_channels": to("model.fpn_channels", whole(1, 4096), 256),
    "fc_out_channels": to("model.roi_hidden_channels", whole(1, 16_384), 1024),
    "roi_feat_size": to("model.roi_output_size", whole(1, 64), 7),
    "num_classes": to("num_classes", whole(1, 100_000), 80),
    # Without stds in a coder that is there, they are 1; without a coder they are 0.1 and 0.2.
    "bbox_coder": (
        _coder(to("model.roi_delta_stds", _STDS, (1.0, 1.0, 1.0, 1.0))),
        Found("model.roi_delta_stds", _STDS_DEFAULT),
    ),
    "reg_class_agnostic": to("model.regressor_is_class_agnostic", flag, False),
    "loss_cls": (_class_loss(False), None),
    "loss_bbox": (_head_box_loss, Found("model.roi_loss_beta", 1.0)),
    "reg_decoded_bbox": (flag, False),
    "with_avg_pool": only(False),
    **{key: only(True) for key in ("with_cls", "with_reg")},
    **{key: only(None) for key in ("conv_cfg", "norm_cfg", "init_cfg")},
    **dict.fromkeys(("reg_predictor_cfg", "cls_predictor_cfg"), _LINEAR),
    "predict_box_type": only("hbox"),
}
_CONV_BOX_HEAD_KEYS: Keys = {
    **_BOX_HEAD_KEYS,
    **CONVS,
    "conv_out_channels": to("model.fpn_channels", whole(1, 4096), 256),
}
_BOX_HEADS: dict[str, Keys] = {"Shared2FCBBoxHead": _BOX_HEAD_KEYS, "Shared4Conv1FCBBoxHead": _CONV_BOX_HEAD_KEYS}
_LAYERS = {"Shared2FCBBoxHead": (0, 2), "Shared4Conv1FCBBoxHead": (4, 1)}
"""How many convolutions and hidden layers each has."""


def _box_head(value: Any, place: Place, kinds: Mapping[str, Keys] = _BOX_HEADS) -> Any:
    found = read_typed(value, place, kinds, hint=" (the other box heads are not supported)")
    kind = (value.get("loss_bbox") or {}).get("type")
    if found["reg_decoded_bbox"] != (kind in _OVERLAP_LOSSES):
        message = f"{kind} compares {'boxes' if kind in _OVERLAP_LOSSES else 'deltas'}; give reg_decoded_bbox="
        raise place.at("loss_bbox").at("type").error(f"{message}{kind in _OVERLAP_LOSSES} beside it")
    # Each kind says so: the stages of a cascade must have the same.
    if (layers := _LAYERS.get(found["type"])) is not None:
        at = place.at("type")
        found["layers"] = [Found("model.roi_num_convs", layers[0], at), Found("model.roi_num_hidden", layers[1], at)]
    return found


def _extractor(output_size: Any, channels: Any = CHANNELS, strides: Sequence[int] = (4, 8, 16, 32)) -> Check:
    keys: Keys = {
        "output_size": output_size,
        "sampling_ratio": to("model.roi_sampling_ratio", whole(0, 64), 0),
        "aligned": to("model.roi_aligned", flag, True),
        "pool_mode": only("avg"),
        "use_torchvision": only(False),
    }
    of_extractor: Keys = {
        "roi_layer": typed({"RoIAlign": keys}, hint="the other poolings are not supported"),
        "out_channels": channels,
        "featmap_strides": only(strides, required=True),
        "finest_scale": to("model.roi_finest_scale", number(above=0, at_most=100_000), 56.0),
        "init_cfg": only(None),
    }
    return typed({"SingleRoIExtractor": of_extractor}, hint="the other extractors are not supported")


_EXTRACTOR = _extractor(to("model.roi_output_size", whole(1, 64)))
_MASK_EXTRACTOR = _extractor(only(14, required=True))
_MASK_HEAD: Check = typed(
    {
        "FCNMaskHead": {
            "num_convs": only(4),
            "roi_feat_size": only(14),
            "in_channels": to("model.fpn_channels", whole(1, 4096), 256),
            "conv_kernel_size": only(3),
            "conv_out_channels": to("model.mask_channels", whole(1, 4096), 256),
            "num_classes": to("num_classes", whole(1, 100_000), 80),
            "class_agnostic": only(False),
            "upsample_cfg": only({"type": "deconv", "scale_factor": 2}),
            **CONVS,
            "init_cfg": only(None),
            "predictor_cfg": only({"type": "Conv"}),
            "loss_mask": (_class_loss(False, of_masks=True), None),
        }
    },
    hint="the other mask heads are not supported",
)
_ROI_PARTS: Keys = {
    "shared_head": absent("a stage shared by heads is", "a backbone with num_stages=3, as in C4,"),
    "mask_roi_extractor": (lambda value, place: optional(_each_stage(_MASK_EXTRACTOR))(value, place), None),
    "mask_head": (lambda value, place: optional(_each_stage(_MASK_HEAD))(value, place), None),
    "mask_iou_head": absent("scores of masks are"),
    **{key: absent("semantic heads are") for key in ("semantic_roi_extractor", "semantic_head")},
    "init_cfg": only(None),
}
_OF_STAGES = {"model.roi_iou": "model.cascade_ious", "model.roi_delta_stds": "model.cascade_delta_stds"}


def stages(check: Check) -> Check:
    """A list with an entry for each stage, which may differ in what _OF_STAGES has."""

    def read(value: Any, place: Place) -> list[Found]:
        entries = several(check)(value, place)
        settings = [united(found_in(entry)) for entry in entries]
        same = [each for of_stage in settings for each in of_stage.values() if each.name not in _OF_STAGES]
        for name, whole_name in _OF_STAGES.items():
            values = [of_stage[name].value for of_stage in settings if name in of_stage]
            if values and isinstance(values[0], tuple):
                values = [number for stage in values for number in stage]
            if values:
                same.append(Found(whole_name, tuple(values), place))
        return same

    return read


def _each_stage(check: Check) -> Check:
    """One for all stages, or a list with an entry for each."""
    return lambda value, place: (several(check) if isinstance(value, (list, tuple)) else check)(value, place)


ROI_HEADS: dict[str, Keys] = {
    "StandardRoIHead": {**_ROI_PARTS, "bbox_roi_extractor": _EXTRACTOR, "bbox_head": _box_head},
    "CascadeRoIHead": {
        **_ROI_PARTS,
        "num_stages": whole(1, 4),
        "stage_loss_weights": to("model.cascade_loss_weights", several(number(at_least=0, at_most=1000))),
        "bbox_roi_extractor": _each_stage(_EXTRACTOR),
        "bbox_head": stages(_box_head),
    },
}


def single_map(features: str) -> tuple[dict[str, Keys], dict[str, Keys]]:
    """The tables of rpn_head and roi_head for a backbone with one map of stride 16."""
    is_c4 = features == "c4"
    channels = only(1024 if is_c4 else 2048, required=True)
    rpn_head = {
        **RPN_HEAD["RPNHead"],
        "in_channels": channels,
        "feat_channels": channels,
        "anchor_generator": lambda value, place: _anchors(value, place, levels=1),
    }
    box_head = {**_BOX_HEAD_KEYS, "in_channels": only(2048, required=True)}
    if is_c4:
        box_head |= {"with_avg_pool": only(True, required=True), "roi_feat_size": only(7)}
        del box_head["fc_out_channels"]
    kinds = {"BBoxHead" if is_c4 else "Shared2FCBBoxHead": box_head}
    extractor = _extractor(to("model.roi_output_size", whole(1, 64)), channels, (16,))
    shared_head = typed({"ResLayer": FOURTH_STAGE}, hint="the other shared heads are not supported")
    roi_head = {
        **_ROI_PARTS,
        **{key: absent("masks without a pyramid are") for key in ("mask_roi_extractor", "mask_head")},
        "bbox_roi_extractor": extractor,
        "bbox_head": lambda value, place: _box_head(value, place, kinds),
    }
    return {"RPNHead": rpn_head}, {"StandardRoIHead": roi_head | ({"shared_head": shared_head} if is_c4 else {})}
