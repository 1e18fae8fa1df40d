"""Suppression as an operator that becomes ONNX's NonMaxSuppression. Imports onnxscript, an optional extra."""

from __future__ import annotations

from typing import Any

import onnxscript
import torch
from torch import Tensor

from detection.export.graph import suppress_groups

op: Any = onnxscript.opset18


@torch.library.custom_op("detection::suppress_groups", mutates_args=())
def suppress(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """`detection.export.graph.suppress_groups` under a name that the exporter can find."""
    return suppress_groups(boxes_xyxy, scores, iou_threshold, most)


@suppress.register_fake
def _(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


_LOWEST_SCORE = -3.0e38  # float32; below every score, above the -inf of what takes no part


def translate(boxes_xyxy: Any, scores: Any, iou_threshold: float, most: int) -> Any:
    """`suppress` in ONNX: a group is a batch of NonMaxSuppression, whose rows (group, class, place) are scattered."""
    chosen = op.NonMaxSuppression(
        boxes_xyxy,
        op.Unsqueeze(scores, op.Constant(value_ints=[1])),
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[_LOWEST_SCORE]),
    )
    group_and_place = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    count = op.Shape(chosen, start=0, end=1)
    ones = op.Expand(op.Constant(value_ints=[1]), count)
    nothing = op.Expand(op.Constant(value_ints=[0]), op.Shape(scores))
    return op.Cast(op.ScatterND(nothing, group_and_place, ones), to=9)  # 9: bool


TRANSLATIONS: dict[Any, Any] = {torch.ops.detection.suppress_groups.default: translate}
"""For `torch.onnx.export(custom_translation_table=...)`."""
