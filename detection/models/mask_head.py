"""Masks of the second stage (He et al. 2017): the head, the RoIs and bitmaps it learns from, its loss, and pasting."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.config import FasterRCNNConfig
from detection.models.head_convs import HeadConvs, start_as_he
from detection.models.ops.mask_crops import MaskCrops, crop_masks
from detection.models.roi_head import RoISample
from detection.models.structures import MaskBatch

MASK_ROI_SIZE = 14
MASK_SIZE = 28
_NUM_CONVS = 4


class MaskHead(HeadConvs):
    """Four 3x3 convolutions, a 2x2 transposed convolution with stride 2, and logits of each class."""

    def __init__(self, config: FasterRCNNConfig) -> None:
        channels = config.mask_channels
        super().__init__(config, config.fpn_channels, channels, _NUM_CONVS)
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.logits = nn.Conv2d(channels, config.num_classes, 1)
        for layer in (self.upsample, self.logits):
            start_as_he(layer)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """RoI features [R, C, 14, 14] to the logits of each RoI's own class, [R, 28, 28].

        labels: int64 [R], 0..num_classes-1; the logits of another are 0.
        """
        hidden = F.relu_(self.upsample(self.convolve(pooled)))
        # The row of the own class instead of maps of all classes, of which the others are never used. As a product,
        # because the gradient of a selection is added up in any order on a GPU.
        classes = torch.arange(self.logits.out_channels, device=labels.device)
        is_own = (labels[:, None] == classes).to(self.logits.weight.dtype)
        assert self.logits.bias is not None
        weights = is_own @ self.logits.weight.flatten(1)
        logits = torch.bmm(weights[:, None].to(hidden.dtype), hidden.flatten(2))
        return (logits + (is_own @ self.logits.bias)[:, None, None]).unflatten(2, hidden.shape[2:])[:, 0]


class MaskRois(NamedTuple):
    """The positives of a training step in M slots an image.

    boxes_xyxy: float32 [B, M, 4], empty boxes at the origin in slots that are not positive. positive: bool [B, M].
    labels: int64 [B, M], num_classes where not positive. gt_index: int64 [B, M].
    """

    boxes_xyxy: Tensor
    positive: Tensor
    labels: Tensor
    gt_index: Tensor


@torch.no_grad()
def mask_rois(config: FasterRCNNConfig, rois: RoISample, *, trimmed: bool) -> MaskRois:
    """The positives among the sampled RoIs, in as many slots as there can be.

    trimmed: in as many as there are, which waits for the device. config: that of the stage.
    """
    most = rois.positive.shape[1]
    if config.roi_samples_per_image is not None:
        most = min(most, int(config.roi_samples_per_image * config.roi_positive_fraction))
    if trimmed:
        most = min(most, int(rois.positive.sum(dim=1).max()))
    slots = rois.positive.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, most)]
    positive = rois.positive.gather(1, slots)
    boxes = rois.boxes_xyxy.gather(1, slots[..., None].expand(-1, -1, 4))
    return MaskRois(
        torch.where(positive[..., None], boxes, 0.0),
        positive,
        torch.where(positive, rois.labels.gather(1, slots), config.num_classes),
        rois.gt_index.gather(1, slots),
    )


@torch.no_grad()
def mask_targets(config: FasterRCNNConfig, rois: MaskRois, masks: MaskBatch, image_size: tuple[int, int]) -> Tensor:
    """What the head is to answer, float32 [B * M, 28, 28] of 0 and 1, or of covered shares with mask_soft_targets.

    image_size: height and width of the padded images.
    """
    offsets = masks.offsets.gather(1, rois.gt_index)
    rectangles = masks.rectangles.gather(1, rois.gt_index[..., None].expand(-1, -1, 4))
    crops = MaskCrops(rois.boxes_xyxy.view(-1, 4), masks.bits, offsets.view(-1), rectangles.view(-1, 4))
    covered = crop_masks(crops, image_size, size=MASK_SIZE, aligned=config.roi_aligned)
    return covered if config.mask_soft_targets else (covered >= 0.5).float()


def mask_loss(logits: Tensor, targets: Tensor, rois: MaskRois) -> Tensor:
    """Binary cross-entropy, mean over the pixels of all positives of the batch: float32 scalar, 0 without positives.

    logits, targets: [B * M, 28, 28].
    """
    per_pixel = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    per_roi = per_pixel.mean(dim=(1, 2)) * rois.positive.view(-1)
    return per_roi.sum() / rois.positive.sum().clamp(min=1)


@torch.no_grad()
def paste_masks(
    mask_probabilities: Tensor, boxes_xyxy: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Masks of whole images: bool [D, H, W], True where the probability is at least `threshold`.

    mask_probabilities: float [D, m, m]. boxes_xyxy: float [D, 4] in pixels of the image. size: its height and width.
    The probabilities are interpolated bilinearly at pixel centers, with zeros outside the box. A box without an area
    has an empty mask. Besides the result it takes the memory of one float image.
    """
    height, width = size
    pasted = torch.zeros((len(boxes_xyxy), height, width), dtype=torch.bool, device=mask_probabilities.device)
    for out, probabilities, box in zip(pasted, mask_probabilities.float(), boxes_xyxy.tolist(), strict=True):
        x1, y1, x2, y2 = box
        if not (all(map(math.isfinite, box)) and x2 > x1 and y2 > y1):
            continue
        rows, top, bottom = _interpolation(y1, y2, height, probabilities)
        columns, left, right = _interpolation(x1, x2, width, probabilities)
        out[top:bottom, left:right] = rows @ probabilities @ columns.T >= threshold
    return pasted


def _interpolation(low: float, high: float, length: int, probabilities: Tensor) -> tuple[Tensor, int, int]:
    """Weights [N, m] of a mask's cells in the pixels `first` to `stop` of a side of the image, and these two."""
    number = len(probabilities)
    # A pixel beyond the box still has a share of the outermost cell, and of the zeros beside it.
    margin = (high - low) / (2 * number) + 1
    first = min(max(math.floor(low - margin), 0), length)
    stop = max(min(math.ceil(high + margin), length), first)
    pixels = torch.arange(first, stop, dtype=torch.float32, device=probabilities.device)
    places = (pixels + 0.5 - low) / (high - low) * number - 0.5
    cells = torch.arange(number, device=probabilities.device)
    return (1 - (places[:, None] - cells).abs()).clamp_(min=0), first, stop
