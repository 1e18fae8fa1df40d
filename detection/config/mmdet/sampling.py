"""The keys of `model.train_cfg` and `model.test_cfg` in a configuration of MMDetection."""

from __future__ import annotations

from typing import Any

from detection.config.mmdet.keys import NEAREST, Found, idle, only, to, typed
from schedules.checks import Check, Keys, choice, flag, number, read_dict, read_typed, whole
from schedules.errors import Place

_fraction, _iou = number(at_least=0, at_most=1), number(at_least=0, at_most=1)
_size = number(at_least=0, at_most=100_000)
_count = whole(1, 1_000_000)


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
        if prefix == "rpn":
            return found
        # Each kind says so: the stages of a cascade must have the same.
        name = "ohem" if found["type"] == "OHEMSampler" else "random"
        return [found, Found("model.roi_sampler", name, place.at("type"))]

    return read


_TARGETS = {"pos_weight": only(-1), "debug": only(False)}


def _border(value: Any, place: Place) -> Found:
    if value not in (0, -1) or isinstance(value, bool):
        raise place.unfit("must be -1 (any anchor trains) or 0 (those inside the image) here", value)
    return Found("model.anchors_within_image", value == 0, place)


RPN_TARGETS: Keys = {
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


ROI_TARGETS: Keys = {
    "assigner": _roi_assigner,
    "sampler": _sampler("roi", True),
    "mask_size": only(28),
    **_TARGETS,
}


def proposals(mode: str) -> Check:
    keys: Keys = {
        "nms_pre": to(f"model.rpn_nms_pre_{mode}", _count),
        "max_per_img": to(f"model.rpn_proposals_{mode}", whole(1, 100_000)),
        "nms": _nms("model.rpn_nms_iou"),
        "min_bbox_size": to("model.proposal_min_size", _size),
    }
    return lambda value, place: read_dict(value, place, keys)


DETECTIONS: Keys = {
    "score_thr": to("model.score_threshold", _fraction),
    "nms": _nms("model.nms_iou", may_be_soft=True),
    "max_per_img": to("model.detections_per_image", whole(1, 100_000)),
    "mask_thr_binary": only(0.5),
}
