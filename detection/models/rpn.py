"""Region proposal network: its head, what it learns, and the proposals it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.anchors import AnchorGrid, anchors_inside_image, anchors_inside_padding
from detection.models.config import FasterRCNNConfig
from detection.models.ops.boxes import clip_boxes, decode_boxes, encode_boxes, sides_above
from detection.models.ops.conv import convolution
from detection.models.ops.matcher import MaxIoUAssigner
from detection.models.ops.nms import kept_within_levels
from detection.models.samplers import RPN_STAGE, Sample, sample
from detection.models.structures import TargetBatch

ANCHOR_STDS = (1.0, 1.0, 1.0, 1.0)  # the RPN's deltas are not scaled, in either recipe
_INIT_STD = 0.01  # Ren et al. 2015, section 3.1.3


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


class RPNHead(nn.Module):
    """A 3x3 convolution, and for each anchor one objectness logit and four deltas; shared by all levels."""

    def __init__(self, channels: int, anchors_per_cell: int) -> None:
        super().__init__()
        self.anchors_per_cell = anchors_per_cell
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors_per_cell, 1)
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=_INIT_STD)
            nn.init.zeros_(_bias(conv))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P2..P6 to logits [B, A] and deltas [B, A, 4], anchors ordered as in `AnchorGrid`."""
        # Both outputs in one convolution: it reads the hidden maps, the largest of the detector, once.
        weight = torch.cat([self.objectness.weight, self.deltas.weight])
        bias = torch.cat([_bias(self.objectness), _bias(self.deltas)])
        levels = []
        for feature in features:
            hidden = convolution(feature, self.conv.weight, self.conv.bias, padding=(1, 1), relu=True)
            levels.append(F.conv2d(hidden, weight, bias).permute(0, 2, 3, 1).flatten(1, 2))
        outputs = torch.cat(levels, dim=1)
        logits, deltas = outputs.split([self.anchors_per_cell, 4 * self.anchors_per_cell], dim=2)
        return logits.flatten(1), deltas.reshape(deltas.shape[0], -1, 4)

    def at_anchors(self, patches: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """The same for chosen anchors only, int64 [B, S]: logits [B, S], deltas [B, S, 4].

        patches: [B * S * 9, C], the 3x3 windows of features around the anchors' cells (`windows_3x3`). A training step
        learns from a few hundred of some 200,000 anchors: through these numbers it needs none of the two large
        products that the backward pass of `forward` consists of.
        """
        num_images, num_anchors = anchors.shape
        num_inputs = 9 * patches.shape[1]
        kernel = self.conv.weight.permute(0, 2, 3, 1).reshape(-1, num_inputs)
        hidden = F.relu_(F.linear(patches.view(-1, num_inputs), kernel, self.conv.bias))
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias)
        deltas = F.linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias)
        ratio = (anchors % self.anchors_per_cell).view(-1, 1)
        own_deltas = deltas.view(len(deltas), -1, 4).gather(1, ratio[..., None].expand(-1, 1, 4))
        return logits.gather(1, ratio).view_as(anchors), own_deltas.view(num_images, num_anchors, 4)


class AnchorTargets(NamedTuple):
    """The anchors that a step learns from, in the S slots of `sample`, and what they are to learn.

    delta_targets: float32 [B, S, 4], 0 where not positive. normalizer: float32 or int64 scalar, the number of sampled
    anchors in the batch as the recipe counts it.
    """

    sample: Sample
    delta_targets: Tensor
    normalizer: Tensor


@torch.no_grad()
def anchor_targets(config: FasterRCNNConfig, anchors: AnchorGrid, sizes: Tensor, targets: TargetBatch) -> AnchorTargets:
    """Assigns and samples anchors; sizes int64 [B, 2] of the images."""
    assigner = MaxIoUAssigner(
        config.rpn_positive_iou,
        config.rpn_negative_iou,
        config.rpn_low_quality_iou,
        config.rpn_low_quality_takes_own_box,
    )
    usable = anchors_inside_padding(anchors, sizes) if config.anchors_within_own_padding else None
    if config.anchors_within_image:
        inside = anchors_inside_image(anchors, sizes)
        usable = inside if usable is None else usable & inside
    anchor_boxes = anchors.boxes_xyxy[None]
    kind, gt_index = assigner(targets.boxes_xyxy, targets.valid, anchor_boxes, usable)
    chosen = sample(
        kind,
        targets.sample_keys,
        stage=RPN_STAGE,
        num_samples=config.rpn_samples_per_image,
        positive_fraction=config.rpn_positive_fraction,
    )
    gt_index = chosen.take(gt_index)
    gt_boxes = targets.boxes_xyxy.gather(1, gt_index[..., None].expand(-1, -1, 4))
    references = chosen.take(anchor_boxes.expand(len(kind), -1, -1))
    deltas = encode_boxes(gt_boxes, references, ANCHOR_STDS)
    num_positive, num_chosen = chosen.positive.sum(dim=1), chosen.chosen.sum(dim=1)
    if config.rpn_counts_at_least_one:
        normalizer = (num_positive.clamp(min=1) + (num_chosen - num_positive).clamp(min=1)).sum()
    else:
        normalizer = num_chosen.sum().clamp(min=1)
    return AnchorTargets(chosen, torch.where(chosen.positive[..., None], deltas, 0.0), normalizer)


def rpn_losses(
    config: FasterRCNNConfig, logits: Tensor, deltas: Tensor, targets: AnchorTargets
) -> tuple[Tensor, Tensor]:
    """Objectness and box loss, float32 scalars: sums over the sampled anchors divided by the normalizer.

    logits [B, S] and deltas [B, S, 4] of the sampled anchors.
    """
    chosen = targets.sample
    loss_cls = F.binary_cross_entropy_with_logits(
        logits.float(), chosen.positive.float(), weight=chosen.chosen.float(), reduction="sum"
    )
    differences = F.smooth_l1_loss(deltas.float(), targets.delta_targets, reduction="none", beta=config.rpn_loss_beta)
    loss_bbox = (differences * chosen.positive[..., None]).sum()
    return loss_cls / targets.normalizer, loss_bbox / targets.normalizer


class Proposals(NamedTuple):
    """boxes_xyxy: float32 [B, P, 4]. scores: float32 [B, P], logits, best first. valid: bool [B, P]."""

    boxes_xyxy: Tensor
    scores: Tensor
    valid: Tensor


@torch.no_grad()
def select_proposals(
    config: FasterRCNNConfig,
    logits: Tensor,
    deltas: Tensor,
    anchors: AnchorGrid,
    sizes: Tensor,
    *,
    training: bool,
) -> Proposals:
    """The best proposals of each image: top of each level, clipped to the image, suppressed within the level, then
    the top of all levels. logits [B, A], deltas [B, A, 4], sizes int64 [B, 2].
    """
    nms_pre = config.rpn_nms_pre_train if training else config.rpn_nms_pre_test
    max_proposals = config.rpn_proposals_train if training else config.rpn_proposals_test
    scores, boxes = [], []
    levels = zip(
        logits.detach().float().split(anchors.per_level, dim=1),
        deltas.detach().split(anchors.per_level, dim=1),
        anchors.boxes_xyxy.split(anchors.per_level),
        strict=True,
    )
    for level_logits, level_deltas, level_anchors in levels:
        best, index = level_logits.topk(min(nms_pre, level_logits.shape[1]), dim=1)
        best_deltas = level_deltas.gather(1, index[..., None].expand(-1, -1, 4)).float()
        scores.append(best)
        boxes.append(decode_boxes(best_deltas, level_anchors[index], ANCHOR_STDS, clip_shrinking=config.clip_shrinking))
    candidate_scores = torch.cat(scores, dim=1)
    candidates = clip_boxes(torch.cat(boxes, dim=1), sizes)
    keep = kept_within_levels(
        candidates,
        candidate_scores,
        sides_above(candidates, config.proposal_min_size),
        [level.shape[1] for level in scores],
        config.rpn_nms_iou,
    )
    ranking = torch.where(keep, candidate_scores, -torch.inf)
    top, index = ranking.topk(min(max_proposals, ranking.shape[1]), dim=1)
    return Proposals(candidates.gather(1, index[..., None].expand(-1, -1, 4)), top, keep.gather(1, index))
