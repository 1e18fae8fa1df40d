"""What a training step does between its dense parts, compiled or as it is written.

A compiler makes few launches of many: of normalizing, proposals, losses and the table of the pyramid's cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from detection.models.ops.backend import implementation_of
from detection.models.ops.feature_table import cell_table, windows_3x3
from detection.models.roi_head import roi_losses
from detection.models.rpn import RPNHead, rpn_losses, select_proposals
from detection.models.structures import ImageBatch

Function = Callable[..., Any]
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Glue:
    """The compiled forms of the functions of FUNCTIONS, which run where `backend` says "compiled"."""

    def __init__(self) -> None:
        self._compiled: dict[Function, Function] = {}

    def compile(self, compiler: Callable[[Function, str], Function]) -> None:
        """compiler: gives the compiled form of a function; it is told the stage of a step that this is part of."""
        self._compiled = {function: compiler(function, stage) for function, stage in FUNCTIONS.items()}

    def leave_uncompiled(self) -> None:
        """From here on all functions run as they are written."""
        self._compiled.clear()

    def form_of(self, function: Callable[_P, _R], device: torch.device) -> Callable[_P, _R]:
        """The form of `function` that runs on `device`."""
        return self._compiled.get(function, function) if implementation_of("glue", device) == "compiled" else function


def normalized(images: ImageBatch, mean: Tensor, std: Tensor, *, is_bgr: bool) -> Tensor:
    """Pixels [B, 3, H, W] less the mean [3, 1, 1], divided by std [3, 1, 1]; zeros outside of each image.

    is_bgr: the channels come as red, green, blue and leave the other way round.
    """
    pixels, sizes = images
    rows = torch.arange(pixels.shape[2], device=pixels.device)
    columns = torch.arange(pixels.shape[3], device=pixels.device)
    below = rows >= sizes[:, :1]
    beside = columns >= sizes[:, 1:]
    outside = below[:, :, None] | beside[:, None, :]
    if is_bgr:
        pixels = pixels.flip(1)
    return torch.sub(pixels, mean).div_(std).masked_fill_(outside[:, None], 0.0)


def backbone_features(
    backbone: nn.Module, images: ImageBatch, mean: Tensor, std: Tensor, is_bgr: bool
) -> tuple[Tensor, ...]:
    """The backbone's maps of normalized images."""
    features: tuple[Tensor, ...] = backbone(normalized(images, mean, std, is_bgr=is_bgr))
    return features


def pyramid_table(fpn: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    """`cell_table` of the pyramid over the backbone's maps: compiled, the pyramid's last pass writes the table."""
    return cell_table(fpn(maps))


def windows_of(anchors: Tensor, anchors_per_cell: int, layout: Tensor) -> Tensor:
    """`windows_3x3` of anchors by their numbers."""
    return windows_3x3(anchors // anchors_per_cell, layout)


def at_anchors(rpn: RPNHead, patches: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """`RPNHead.at_anchors`."""
    return rpn.at_anchors(patches, anchors)


FUNCTIONS: dict[Function, str] = {
    backbone_features: "backbone",
    pyramid_table: "pyramid",
    windows_of: "RPN head",
    at_anchors: "RPN head",
    rpn_losses: "losses",
    select_proposals: "proposals and NMS",
    roi_losses: "losses",
}
"""Each with the stage of a step that it is part of. Assignment and sampling are not among them: their shapes follow the
largest number of boxes in a batch, and each would be compiled anew."""
