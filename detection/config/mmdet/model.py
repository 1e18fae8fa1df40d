"""The keys of `model` in a configuration of MMDetection, and the settings of a model here that they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detection.config.mmdet.backbone import BACKBONES, REGNETS, backbone_of, features_of
from detection.config.mmdet.heads import CHANNELS, ROI_HEADS, RPN_HEAD, single_map, stages
from detection.config.mmdet.keys import Found, Idle, absent, found_in, idle, keyed, only, several, to, typed, united
from detection.config.mmdet.layers import CONVS, norm_of
from detection.config.mmdet.sampling import DETECTIONS, ROI_TARGETS, RPN_TARGETS, proposals
from schedules.checks import Keys, choice, dictionary, flag, number, optional, read_dict, whole
from schedules.errors import Place

_NECK: dict[str, Keys] = {
    "FPN": {
        "in_channels": several(whole(1), 4),
        "out_channels": CHANNELS,
        "num_outs": only(5, required=True),
        "start_level": only(0),
        "end_level": only(-1, 3),
        **{key: only(False) for key in ("add_extra_convs", "relu_before_extra_convs", "no_norm_on_lateral")},
        "conv_cfg": CONVS["conv_cfg"],
        "norm_cfg": (norm_of("model.fpn_norm"), Found("model.fpn_norm", None)),
        "act_cfg": only(None),
        "upsample_cfg": only({"mode": "nearest"}),
        "init_cfg": only(None, {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}),
    }
}
_DETECTORS = ("FasterRCNN", "MaskRCNN", "CascadeRCNN")
_PAD: Keys = {
    "size": to("pad_to", several(whole(33, 16384), 2)),
    "img_pad_value": only(0),
    "pad_mask": (flag, False),
    **{key: only(False) for key in ("pad_seg",)},
    **{key: (lambda value, place: None, None) for key in ("mask_pad_value", "seg_pad_value")},
}
_NO_AUGMENT = "the other augmentations of a batch are not supported"
_ORDERS = {True: "rgb", False: "bgr"}
_BGR = Found("model.pixel_order", "bgr")
_PREPROCESSOR: dict[str, Keys] = {
    "DetDataPreprocessor": {
        # Theirs are read as BGR.
        "bgr_to_rgb": (lambda value, place: Found("model.pixel_order", _ORDERS[flag(value, place)], place), _BGR),
        "rgb_to_bgr": only(False, hint="images are read as BGR there already"),
        "mean": to("model.pixel_mean", several(number(at_least=-1000, at_most=1000), 3)),
        "std": to("model.pixel_std", several(number(at_least=0.001, at_most=1000), 3)),
        "pad_size_divisor": only(32, required=True),
        "pad_value": only(0),
        "batch_augments": (optional(several(typed({"BatchFixedSizePad": _PAD}, hint=_NO_AUGMENT), 1)), None),
        **idle("data_preprocessor"),
    }
}


def model_of(value: Any, place: Place) -> list[Found | Idle]:
    hint = " (one-stage detectors and others are not supported)"
    choice(*_DETECTORS, hint=hint)(dictionary(value, place).get("type"), place.at("type"))
    staged = dictionary(value.get("roi_head"), place.at("roi_head")).get("type") == "CascadeRoIHead"
    rcnn = stages(keyed(ROI_TARGETS)) if staged else keyed(ROI_TARGETS)
    backbone = dictionary(value.get("backbone"), place.at("backbone"))
    features = features_of(backbone, place.at("backbone"))
    neck: Any = typed(_NECK, hint="the other necks are not supported")
    rpn_head: Mapping[str, Keys] = RPN_HEAD
    roi_heads: Mapping[str, Keys] = ROI_HEADS
    if features != "fpn":
        if backbone.get("type") == "RegNet":
            raise place.at("backbone").at("type").unfit("must be 'ResNet' or 'ResNeXt' without a pyramid", "RegNet")
        neck = absent("a neck with this backbone is")
        rpn_head, roi_heads = single_map(features)
    keys: Keys = {
        "type": choice(*_DETECTORS),
        "backbone": typed(BACKBONES, hint="the other backbones are not supported"),
        "data_preprocessor": typed(_PREPROCESSOR),
        "rpn_head": typed(rpn_head, hint="FCOS and others as RPN are not supported"),
        "neck": neck,
        "roi_head": typed(roi_heads, hint="the other heads are not supported"),
        "train_cfg": keyed({"rpn": keyed(RPN_TARGETS), "rpn_proposal": proposals("train"), "rcnn": rcnn}),
        "test_cfg": keyed({"rpn": proposals("test"), "rcnn": keyed(DETECTIONS)}),
        "init_cfg": only(None),
    }
    found = read_dict(value, place, keys)
    if features == "fpn":
        _require_widths(found, place)
        _require_stages(found, place)
    elif features == "c4":
        _require_same_stage(found, place)
    recipe = {(False, False): "faster_rcnn", (False, True): "mask_rcnn", (True, False): "cascade_rcnn"}
    has_masks = _has_masks(found["roi_head"], place.at("roi_head"))
    name = recipe.get((staged, has_masks), "cascade_mask_rcnn")
    return [
        Found("model.features", features, place.at("backbone").at("num_stages")),
        *found_in(found),
        *backbone_of(found["backbone"], place.at("backbone"), name),
    ]


def _require_same_stage(model: Mapping[str, Any], place: Place) -> None:
    """The head's stage is one of the backbone's."""
    head, backbone = model["roi_head"]["shared_head"], model["backbone"]
    at = place.at("roi_head").at("shared_head")
    for key in ("depth", "style"):
        if head[key] != backbone[key]:
            raise at.at(key).unfit(f"must be the backbone's, {backbone[key]!r}", head[key])
    norms = [(each["norm_cfg"]["type"], each["norm_cfg"].get("requires_grad")) for each in (head, backbone)]
    if norms[0] != norms[1]:
        raise at.at("norm_cfg").error("must be that of the backbone: the two stages have one norm here")
    if not backbone["norm_eval"]:
        raise (
            place.at("backbone")
            .at("norm_eval")
            .error("must be True, as in the head's stage: the two have one norm here")
        )


def _has_masks(roi_head: Mapping[str, Any], place: Place) -> bool:
    parts = ("mask_roi_extractor", "mask_head")
    given = [key for key in parts if roi_head[key] is not None]
    if len(given) == 1:
        raise place.at(given[0]).error(f"masks need both {' and '.join(parts)}; give both, or neither")
    return bool(given)


def _require_widths(model: Mapping[str, Any], place: Place) -> None:
    backbone = model["backbone"]
    if backbone["type"] == "RegNet":
        widths = REGNETS[backbone["arch"]]
    else:
        widths = (64, 128, 256, 512) if backbone["depth"] < 50 else (256, 512, 1024, 2048)
    given = model["neck"]["in_channels"]
    if given != widths:
        raise place.at("neck").at("in_channels").unfit(f"must be {list(widths)}, which the backbone gives", given)


def _require_stages(model: Mapping[str, Any], place: Place) -> None:
    if model["roi_head"]["type"] != "CascadeRoIHead":
        return
    num_stages = model["roi_head"]["num_stages"]
    for key in ("bbox_roi_extractor", "mask_roi_extractor", "mask_head"):
        given = model["roi_head"][key]
        if isinstance(given, tuple) and len(given) != num_stages:
            message = f"is of {len(given)} stages, and roi_head.num_stages is {num_stages}; give one of each stage"
            raise place.at("roi_head").at(key).error(message)
    settings = united(found_in(model))
    lengths = {"model.cascade_ious": 1, "model.cascade_delta_stds": 4, "model.cascade_loss_weights": 1}
    for name, numbers in lengths.items():
        if (count := len(settings[name].value) // numbers) != num_stages:
            at = settings[name].place
            assert at is not None
            raise at.error(f"is of {count} stages, and roi_head.num_stages is {num_stages}; give one of each stage")
