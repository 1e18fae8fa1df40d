"""The keys of `model` in a configuration of MMDetection, and the settings of a model here that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detection.config.mmdet.keys import (
    NEAREST,
    Found,
    Idle,
    absent,
    found_in,
    idle,
    keyed,
    only,
    same,
    several,
    text,
    to,
    typed,
    united,
)
from schedules.checks import Check, Keys, choice, dictionary, flag, number, optional, read_dict, read_typed, whole
from schedules.errors import Place

_fraction, _iou = number(at_least=0, at_most=1), number(at_least=0, at_most=1)
_size, _std = number(at_least=0, at_most=100_000), number(above=0, at_most=1000)
_count = whole(1, 1_000_000)
_FEATURES: dict[str, dict[str, Any]] = {
    "fpn": {"num_stages": 4, "out_indices": (0, 1, 2, 3), "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)},
    "c4": {"num_stages": 3, "out_indices": (2,), "strides": (1, 2, 2), "dilations": (1, 1, 1)},
    "dc5": {"num_stages": 4, "out_indices": (3,), "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
}
"""Which of a backbone's stages give maps, and at which strides: what the models here call it."""
_LINEAR = only({"type": "Linear"})
_GROUP_NORM: Keys = {
    "num_groups": only(32, required=True),
    "requires_grad": only(True),
    "eps": only(1e-5),
}


def _norm_of(name: str) -> Check:
    """Group norm after each convolution of a part, or none."""
    check = optional(typed({"GN": _GROUP_NORM}, hint="the other norms of necks and heads are not supported"))

    def read(value: Any, place: Place) -> Found:
        return Found(name, "gn" if check(value, place) else None, place)

    return read


def _standardized(value: Any, place: Place) -> Found:
    if value == {"type": "Conv2d"}:
        value = None
    check = optional(typed({"ConvWS": {}}, hint="the other convolutions are not supported"))
    return Found("model.standardize_weights", check(value, place) is not None, place)


_CONVS: Keys = {
    "conv_cfg": (_standardized, Found("model.standardize_weights", False)),
    "norm_cfg": (_norm_of("model.head_norm"), Found("model.head_norm", None)),
}
"""Of the convolutions of heads."""


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
    if kind not in _OVERLAP_LOSSES:
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


def _nms(name: str, *, may_be_soft: bool = False) -> Check:
    keys: Keys = {"iou_threshold": to(name, _iou), "class_agnostic": only(False), **idle("nms")}
    kinds = {"nms": keys}
    if may_be_soft:
        kinds["soft_nms"] = {
            **keys,
            "iou_threshold": to(name, _iou, 0.3),
            "sigma": to("model.soft_nms_sigma", number(at_least=0.001, at_most=1000), 0.5),
            "min_score": to("model.soft_nms_min_score", _fraction, 0.001),
            "method": to("model.soft_nms", choice("linear", "gaussian", hint=" here"), "linear"),
        }
    return typed(kinds, "nms", "the others are not supported")


def _assigner(positive: Any, negative: Any, lowest: Any, low_quality: Any) -> Check:
    keys = {
        "pos_iou_thr": positive,
        "neg_iou_thr": negative,
        "min_pos_iou": lowest,
        "match_low_quality": low_quality,
        "gt_max_assign_all": only(True),
        "ignore_iof_thr": only(-1),
        "ignore_wrt_candidates": only(True),
        "gpu_assign_thr": only(-1),
        "iou_calculator": only({"type": "BboxOverlaps2D"}),
    }
    return typed({"MaxIoUAssigner": keys}, hint="the other assigners are not supported")


def _sampler(prefix: str, adds_boxes: bool) -> Check:
    keys = {
        "num": to(f"model.{prefix}_samples_per_image", _count),
        "pos_fraction": to(f"model.{prefix}_positive_fraction", _fraction),
        "neg_pos_ub": only(-1),
        "add_gt_as_proposals": only(adds_boxes, required=not adds_boxes),
    }
    kinds = {"RandomSampler": keys}
    if prefix == "roi":
        kinds["OHEMSampler"] = {**keys, "loss_key": only("loss_cls")}

    def read(value: Any, place: Place) -> Any:
        found = read_typed(value, place, kinds, hint=f" (the others are not supported; {NEAREST}RandomSampler)")
        is_ohem = found["type"] == "OHEMSampler"
        return [found, Found("model.roi_sampler", "ohem", place.at("type"))] if is_ohem else found

    return read


_TARGETS = {"pos_weight": only(-1), "debug": only(False)}


def _border(value: Any, place: Place) -> Found:
    if value not in (0, -1) or isinstance(value, bool):
        raise place.unfit("must be -1 (any anchor trains) or 0 (those inside the image) here", value)
    return Found("model.anchors_within_image", value == 0, place)


_RPN_TARGETS: Keys = {
    "assigner": _assigner(
        to("model.rpn_positive_iou", _iou),
        to("model.rpn_negative_iou", _iou),
        to("model.rpn_low_quality_iou", _iou, 0.0),
        only(True),
    ),
    "sampler": _sampler("rpn", False),
    "allowed_border": _border,
    **_TARGETS,
}
_ROI_ASSIGNER = _assigner(to("model.roi_iou", _iou), to("model.roi_iou", _iou), (_iou, 0.0), (flag, True))


def _roi_assigner(value: Any, place: Place) -> Any:
    found = _ROI_ASSIGNER(value, place)
    low_quality_iou = found["min_pos_iou"] if found["match_low_quality"] else None
    return [found, Found("model.roi_low_quality_iou", low_quality_iou, place.at("match_low_quality"))]


_ROI_TARGETS: Keys = {
    "assigner": _roi_assigner,
    "sampler": _sampler("roi", True),
    "mask_size": only(28),
    **_TARGETS,
}


def _proposals(mode: str) -> Check:
    keys: Keys = {
        "nms_pre": to(f"model.rpn_nms_pre_{mode}", _count),
        "max_per_img": to(f"model.rpn_proposals_{mode}", whole(1, 100_000)),
        "nms": _nms("model.rpn_nms_iou"),
        "min_bbox_size": to("model.proposal_min_size", _size),
    }
    return lambda value, place: read_dict(value, place, keys)


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


_CHANNELS = to("model.fpn_channels", whole(1, 4096))
_RPN_HEAD = {
    "RPNHead": {
        "in_channels": _CHANNELS,
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
    **_CONVS,
    "conv_out_channels": to("model.fpn_channels", whole(1, 4096), 256),
}
_BOX_HEADS: dict[str, Keys] = {"Shared2FCBBoxHead": _BOX_HEAD_KEYS, "Shared4Conv1FCBBoxHead": _CONV_BOX_HEAD_KEYS}


def _box_head(value: Any, place: Place, kinds: Mapping[str, Keys] = _BOX_HEADS) -> Any:
    found = read_typed(value, place, kinds, hint=" (the other box heads are not supported)")
    kind = (value.get("loss_bbox") or {}).get("type")
    if found["reg_decoded_bbox"] != (kind in _OVERLAP_LOSSES):
        message = f"{kind} compares {'boxes' if kind in _OVERLAP_LOSSES else 'deltas'}; give reg_decoded_bbox="
        raise place.at("loss_bbox").at("type").error(f"{message}{kind in _OVERLAP_LOSSES} beside it")
    if found["type"] == "Shared4Conv1FCBBoxHead":
        at = place.at("type")
        found["layers"] = [Found("model.roi_num_convs", 4, at), Found("model.roi_num_hidden", 1, at)]
    return found


def _extractor(output_size: Any, channels: Any = _CHANNELS, strides: Sequence[int] = (4, 8, 16, 32)) -> Check:
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
            **_CONVS,
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


def _stages(check: Check) -> Check:
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


_ROI_HEADS: dict[str, Keys] = {
    "StandardRoIHead": {**_ROI_PARTS, "bbox_roi_extractor": _EXTRACTOR, "bbox_head": _box_head},
    "CascadeRoIHead": {
        **_ROI_PARTS,
        "num_stages": whole(1, 4),
        "stage_loss_weights": to("model.cascade_loss_weights", several(number(at_least=0, at_most=1000))),
        "bbox_roi_extractor": _each_stage(_EXTRACTOR),
        "bbox_head": _stages(_box_head),
    },
}


def _single_map(features: str) -> tuple[dict[str, Keys], dict[str, Keys]]:
    """The tables of rpn_head and roi_head for a backbone with one map of stride 16."""
    is_c4 = features == "c4"
    channels = only(1024 if is_c4 else 2048, required=True)
    rpn_head = {
        **_RPN_HEAD["RPNHead"],
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
    shared_head = typed({"ResLayer": _FOURTH_STAGE}, hint="the other shared heads are not supported")
    roi_head = {
        **_ROI_PARTS,
        **{key: absent("masks without a pyramid are") for key in ("mask_roi_extractor", "mask_head")},
        "bbox_roi_extractor": extractor,
        "bbox_head": lambda value, place: _box_head(value, place, kinds),
    }
    return {"RPNHead": rpn_head}, {"StandardRoIHead": roi_head | ({"shared_head": shared_head} if is_c4 else {})}


_NORM: dict[str, Keys] = {
    kind: {
        "requires_grad": (flag, True),
        "eps": to("model.norm_eps", number(at_least=0, at_most=1), 1e-5),
        "momentum": only(0.1),
    }
    for kind in ("BN", "SyncBN")
}
_NORM["GN"] = {**_GROUP_NORM, "eps": _NORM["BN"]["eps"]}
_STAGED: Keys = {
    "style": (choice("pytorch", "caffe"), "pytorch"),
    **{key: (lambda value, place: None, None) for key in _FEATURES["fpn"]},  # see _features
    "frozen_stages": to("frozen_stages", whole(-1, 4), -1),
    "norm_cfg": (
        typed(_NORM, hint="the other norms are not supported"),
        {"type": "BN", "requires_grad": True},
    ),
    "norm_eval": (flag, True),
    "init_cfg": (
        optional(typed({"Pretrained": {"checkpoint": text, "prefix": only(None, "backbone.")}})),
        None,
    ),
    "in_channels": only(3),
    **{key: only(False) for key in ("deep_stem", "avg_down")},
    "stage_with_dcn": only([False] * 4),
    "conv_cfg": _CONVS["conv_cfg"],
    **{key: only(None) for key in ("dcn", "plugins", "pretrained")},
    **idle("backbone"),
}
"""What ResNets and RegNets have in common."""
_RESNET: Keys = {
    **_STAGED,
    "depth": choice(18, 34, 50, 101, hint=f" here ({NEAREST}50 or 101)"),
    "stem_channels": only(None, 64),
    "base_channels": only(64),
}
_FOURTH_STAGE: Keys = {
    "stage": only(3),
    "stride": only(2),
    "dilation": only(1),
    **{key: _RESNET[key] for key in ("depth", "style", "norm_cfg")},
    "norm_eval": only(True),
    "init_cfg": (lambda value, place: None, None),  # the backbone's file has it too
    **{key: only(None) for key in ("dcn", "pretrained")},
    "with_cp": idle("backbone")["with_cp"],
}
"""The stage of the backbone that C4 has as a head."""
_RESNEXTS = "ResNeXt is there as 50 layers, 32x4d, and 101 layers, 32x4d, 64x4d and 32x8d"
_REGNETS: dict[str, tuple[int, ...]] = {
    "regnetx_400mf": (32, 64, 160, 384),
    "regnetx_800mf": (64, 128, 288, 672),
    "regnetx_1.6gf": (72, 168, 408, 912),
    "regnetx_3.2gf": (96, 192, 432, 1008),
    "regnetx_4.0gf": (80, 240, 560, 1360),
    "regnetx_6.4gf": (168, 392, 784, 1624),
    "regnetx_8.0gf": (80, 240, 720, 1920),
    "regnetx_12gf": (224, 448, 896, 2240),
}
"""The channels of the maps that each gives."""
_BACKBONES: dict[str, Keys] = {
    "ResNet": _RESNET,
    "ResNeXt": {
        **_RESNET,
        "depth": choice(50, 101, hint=f" here ({_RESNEXTS})"),
        "groups": choice(32, 64, hint=f" here ({_RESNEXTS})"),
        "base_width": (choice(4, 8, hint=f" here ({_RESNEXTS})"), 4),
    },
    "RegNet": {
        **_STAGED,
        "arch": choice(*_REGNETS, hint=" here"),
        "strides": only((2, 2, 2, 2)),
        "stem_channels": only(32),
        "base_channels": only(32),
    },
}
_NECK: dict[str, Keys] = {
    "FPN": {
        "in_channels": several(whole(1), 4),
        "out_channels": _CHANNELS,
        "num_outs": only(5, required=True),
        "start_level": only(0),
        "end_level": only(-1, 3),
        **{key: only(False) for key in ("add_extra_convs", "relu_before_extra_convs", "no_norm_on_lateral")},
        "conv_cfg": _CONVS["conv_cfg"],
        "norm_cfg": (_norm_of("model.fpn_norm"), Found("model.fpn_norm", None)),
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


def _features(value: Mapping[str, Any], place: Place) -> str:
    """Which maps a backbone gives: a key of _FEATURES."""
    usual = _FEATURES["fpn"]
    if value.get("type") == "RegNet":  # its strides are its own
        value = {**value, "strides": usual["strides"]}
    for name, keys in _FEATURES.items():
        if all(same(value.get(key, usual[key]), keys[key]) for key in keys):
            return name
    key = next(key for key in usual if not same(value.get(key, usual[key]), usual[key]))
    others = "; ".join(", ".join(f"{k}={v}" for k, v in keys.items()) for keys in _FEATURES.values())
    raise place.at(key).unfit(f"must go with the others; here there are {others}", value[key])


def model_of(value: Any, place: Place) -> list[Found | Idle]:
    hint = " (one-stage detectors and others are not supported)"
    choice(*_DETECTORS, hint=hint)(dictionary(value, place).get("type"), place.at("type"))
    staged = dictionary(value.get("roi_head"), place.at("roi_head")).get("type") == "CascadeRoIHead"
    rcnn = _stages(keyed(_ROI_TARGETS)) if staged else keyed(_ROI_TARGETS)
    backbone = dictionary(value.get("backbone"), place.at("backbone"))
    features = _features(backbone, place.at("backbone"))
    neck: Any = typed(_NECK, hint="the other necks are not supported")
    rpn_head: Mapping[str, Keys] = _RPN_HEAD
    roi_heads: Mapping[str, Keys] = _ROI_HEADS
    if features != "fpn":
        if backbone.get("type") == "RegNet":
            raise place.at("backbone").at("type").unfit("must be 'ResNet' or 'ResNeXt' without a pyramid", "RegNet")
        neck = absent("a neck with this backbone is")
        rpn_head, roi_heads = _single_map(features)
    keys: Keys = {
        "type": choice(*_DETECTORS),
        "backbone": typed(_BACKBONES, hint="the other backbones are not supported"),
        "data_preprocessor": typed(_PREPROCESSOR),
        "rpn_head": typed(rpn_head, hint="FCOS and others as RPN are not supported"),
        "neck": neck,
        "roi_head": typed(roi_heads, hint="the other heads are not supported"),
        "train_cfg": keyed({"rpn": keyed(_RPN_TARGETS), "rpn_proposal": _proposals("train"), "rcnn": rcnn}),
        "test_cfg": keyed(
            {
                "rpn": _proposals("test"),
                "rcnn": keyed(
                    {
                        "score_thr": to("model.score_threshold", _fraction),
                        "nms": _nms("model.nms_iou", may_be_soft=True),
                        "max_per_img": to("model.detections_per_image", whole(1, 100_000)),
                        "mask_thr_binary": only(0.5),
                    }
                ),
            }
        ),
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
        *_backbone(found["backbone"], place.at("backbone"), name),
    ]


def _require_same_stage(model: Mapping[str, Any], place: Place) -> None:
    """The head's stage is one of the backbone's."""
    for key in ("depth", "style"):
        if model["roi_head"]["shared_head"][key] != model["backbone"][key]:
            message = f"must be the backbone's, {model['backbone'][key]!r}"
            raise place.at("roi_head").at("shared_head").at(key).unfit(message, model["roi_head"]["shared_head"][key])


def _has_masks(roi_head: Mapping[str, Any], place: Place) -> bool:
    parts = ("mask_roi_extractor", "mask_head")
    given = [key for key in parts if roi_head[key] is not None]
    if len(given) == 1:
        raise place.at(given[0]).error(f"masks need both {' and '.join(parts)}; give both, or neither")
    return bool(given)


def _require_widths(model: Mapping[str, Any], place: Place) -> None:
    backbone = model["backbone"]
    if backbone["type"] == "RegNet":
        widths = _REGNETS[backbone["arch"]]
    else:
        widths = (64, 128, 256, 512) if backbone["depth"] < 50 else (256, 512, 1024, 2048)
    given = model["neck"]["in_channels"]
    if given != widths:
        raise place.at("neck").at("in_channels").unfit(f"must be {list(widths)}, which the backbone gives", given)


def _require_stages(model: Mapping[str, Any], place: Place) -> None:
    if model["roi_head"]["type"] != "CascadeRoIHead":
        return
    num_stages = model["roi_head"]["num_stages"]
    settings = united(found_in(model))
    lengths = {"model.cascade_ious": 1, "model.cascade_delta_stds": 4, "model.cascade_loss_weights": 1}
    for name, numbers in lengths.items():
        if (count := len(settings[name].value) // numbers) != num_stages:
            at = settings[name].place
            assert at is not None
            raise at.error(f"is of {count} stages, and roi_head.num_stages is {num_stages}; give one of each stage")


def _backbone(found: Mapping[str, Any], place: Place, recipe: str) -> Iterator[Found]:
    """Name of the model, norm and starting weights."""
    is_resnet = found["type"] == "ResNet"
    depth = found.get("depth", 50)
    short = found["arch"] if found["type"] == "RegNet" else f"r{depth}"
    if found["type"] == "ResNeXt":
        short = f"x{depth}_{found['groups']}x{found['base_width']}d"
        if short not in ("x50_32x4d", "x101_32x4d", "x101_64x4d", "x101_32x8d"):
            raise place.at("base_width").error(f"{_RESNEXTS}, and not {depth} layers, {short.partition('_')[2]}")
    yield Found("model", f"{recipe}_{short}_fpn", place.at("type"))
    in_1x1 = found["style"] == "caffe" and depth >= 50  # blocks of two 3x3 convolutions have no other place
    yield Found("model.stride_in_1x1", in_1x1, place.at("style"))
    norm = found["norm_cfg"]
    if norm["type"] == "GN":
        yield Found("norm", "gn", place.at("norm_cfg"))
    else:
        yield from _batch_norm(found, norm, place)
    at_weights = place.at("init_cfg").at("checkpoint")
    spec = found["init_cfg"]["checkpoint"] if found["init_cfg"] is not None else "none"
    if is_resnet and spec == f"torchvision://resnet{depth}":
        spec = "imagenet"
    spec = _PUBLISHED.get(spec, spec) if is_resnet and depth == 50 else spec
    yield Found("weights", spec, at_weights)


_PUBLISHED = {"https://download.pytorch.org/models/resnet50-11ad3fa6.pth": "IMAGENET1K_V2"}


def _batch_norm(found: Mapping[str, Any], norm: Mapping[str, Any], place: Place) -> Iterator[Found]:
    if not found["norm_eval"] and not norm["requires_grad"]:
        message = "batch norm whose statistics are trained has trained weights here; set requires_grad=True"
        raise place.at("norm_cfg").error(message)
    yield Found("norm", "frozen_bn" if found["norm_eval"] else "bn", place.at("norm_eval"))
    yield Found("sync_bn", norm["type"] == "SyncBN" and not found["norm_eval"], place.at("norm_cfg"))
    yield Found("model.train_norm_affine", norm["requires_grad"], place.at("norm_cfg"))
