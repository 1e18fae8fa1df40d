"""Second stage: its box heads, the RoIs they learn from, their losses, and the boxes that a cascade passes on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones.architectures import ARCHITECTURES
from detection.models.backbones.resnet import Convolutions, make_norm, make_stage
from detection.models.config import FasterRCNNConfig
from detection.models.head_convs import HeadConvs
from detection.models.ops.box_losses import overlap_loss
from detection.models.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from detection.models.ops.matcher import IGNORED, POSITIVE, MaxIoUAssigner
from detection.models.samplers import ROI_STAGE, sample
from detection.models.structures import TargetBatch

ClassLosses = Callable[[Tensor, Tensor], Tensor]
"""Boxes float32 [B, N, 4] and labels int64 [B, N], the background's last, to classification losses [B, N]."""
_CLASSIFIER_STD, _REGRESSOR_STD = 0.01, 0.001  # Girshick 2015, section 3.1


class BoxHead(HeadConvs):
    """Convolutions and hidden layers, or the backbone's fourth stage; class logits and box deltas: of each class, or
    one for all."""

    def __init__(self, config: FasterRCNNConfig) -> None:
        super().__init__(config, config.map_channels, config.map_channels, config.roi_num_convs)
        inputs = config.map_channels * config.roi_output_size**2
        hidden = config.roi_hidden_channels
        self.stage = last_stage_of(config) if config.features == "c4" else None
        self.num_classes = config.num_classes
        num_regressed = (
            1 if config.regressor_is_class_agnostic else config.num_classes + config.regressor_has_background
        )
        layers: list[nn.Linear] = []
        if self.stage is None:
            self.fc1 = nn.Linear(inputs, hidden)
            layers.append(self.fc1)
            self.fc2: nn.Module | None = None
            if config.roi_num_hidden == 2:
                self.fc2 = second = nn.Linear(hidden, hidden)
                layers.append(second)
        else:
            hidden = ARCHITECTURES[config.backbone].stages[3].channels
        self.classifier = nn.Linear(hidden, config.num_classes + 1)
        self.regressor = nn.Linear(hidden, 4 * num_regressed)
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.classifier.weight, std=_CLASSIFIER_STD)
        nn.init.normal_(self.regressor.weight, std=_REGRESSOR_STD)
        for layer in (*layers, self.classifier, self.regressor):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features [R, C, S, S] to logits [R, K + 1], background last, and deltas [R, classes, 4]."""
        if self.stage is not None:
            hidden = self.stage(pooled).mean(dim=(2, 3))
        else:
            hidden = F.relu_(self.fc1(self.convolve(pooled).flatten(1)))
            hidden = hidden if self.fc2 is None else F.relu_(self.fc2(hidden))
        # bf16 would round a logit of 9 to the next sixteenth, and so the loss by a percent.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.classifier.weight.dtype)
            # shape[0] and not len(): an exported graph keeps the number open.
            return self.classifier(hidden), self.regressor(hidden).view(hidden.shape[0], -1, 4)


def last_stage_of(config: FasterRCNNConfig) -> nn.Sequential:
    """The fourth stage of the backbone, which is a head's."""
    norm = functools.partial(make_norm, config.norm, config.train_norm_affine, config.norm_eps)
    make = Convolutions(norm, standardized=config.standardize_weights)
    return make_stage(ARCHITECTURES[config.backbone], 4, make, stride_in_1x1=config.stride_in_1x1)


class RoISample(NamedTuple):
    """RoIs of a training step in S slots an image, and what they are to learn.

    boxes_xyxy: float32 [B, S, 4], empty boxes at the origin in slots not chosen. chosen, positive: bool [B, S]. labels:
    int64 [B, S], num_classes for the background. delta_targets: float32 [B, S, 4], 0 where not positive. gt_index:
    int64 [B, S], the box that a positive learns. targets_xyxy: float32 [B, S, 4], that box; any where not positive.
    candidate: int64 [B, S], the place of each among the proposals and the ground-truth boxes behind them; None where
    slot i is candidate i.
    """

    boxes_xyxy: Tensor
    chosen: Tensor
    positive: Tensor
    labels: Tensor
    delta_targets: Tensor
    gt_index: Tensor
    targets_xyxy: Tensor
    candidate: Tensor | None


@torch.no_grad()
def sample_rois(
    config: FasterRCNNConfig,
    boxes_xyxy: Tensor,
    valid: Tensor,
    targets: TargetBatch,
    *,
    stage: int = 0,
    class_losses: ClassLosses | None = None,
) -> RoISample:
    """Assigns and samples proposals, with the ground-truth boxes among them.

    config: that of the stage. boxes_xyxy float32 [B, P, 4], valid bool [B, P]. class_losses: tells the hardest, where
    the sampler is "ohem".
    """
    candidates = torch.cat((boxes_xyxy, targets.boxes_xyxy), dim=1)
    assigner = MaxIoUAssigner(config.roi_iou, config.roi_iou, config.roi_low_quality_iou)
    if config.roi_box_matches_itself:
        kind, gt_index = assigner(targets.boxes_xyxy, targets.valid, boxes_xyxy, valid)
        kind = torch.cat((kind, torch.where(targets.valid, POSITIVE, IGNORED)), dim=1)
        own_index = torch.arange(targets.valid.shape[1], device=gt_index.device)
        gt_index = torch.cat((gt_index, own_index.expand_as(targets.valid)), dim=1)
    else:
        valid = torch.cat((valid, targets.valid), dim=1)
        kind, gt_index = assigner(targets.boxes_xyxy, targets.valid, candidates, valid)
    hardness = None
    if config.roi_sampler == "ohem":
        assert class_losses is not None
        labels = torch.where(kind == POSITIVE, targets.labels.gather(1, gt_index), config.num_classes)
        hardness = class_losses(candidates, labels)
    chosen = sample(
        kind,
        targets.sample_keys,
        stage=ROI_STAGE + stage,
        num_samples=config.roi_samples_per_image,
        positive_fraction=config.roi_positive_fraction,
        hardness=hardness,
    )
    gt_index = chosen.take(gt_index)
    boxes = torch.where(chosen.chosen[..., None], chosen.take(candidates), 0.0)
    gt_boxes = targets.boxes_xyxy.gather(1, gt_index[..., None].expand(-1, -1, 4))
    deltas = encode_boxes(gt_boxes, boxes, config.roi_delta_stds)
    return RoISample(
        boxes,
        chosen.chosen,
        chosen.positive,
        torch.where(chosen.positive, targets.labels.gather(1, gt_index), config.num_classes),
        torch.where(chosen.positive[..., None], deltas, 0.0),
        gt_index,
        gt_boxes,
        chosen.candidate,
    )


def roi_losses(
    config: FasterRCNNConfig, class_logits: Tensor, deltas: Tensor, rois: RoISample
) -> tuple[Tensor, Tensor]:
    """Classification and box loss, float32 scalars, both divided by the number of sampled RoIs of the batch.

    class_logits [B * S, K + 1], deltas [B * S, classes, 4].
    """
    labels = rois.labels.view(-1)
    normalizer = rois.chosen.sum().clamp(min=1)
    per_roi = F.cross_entropy(class_logits.float(), labels, reduction="none")
    # A background RoI has no outputs of its own in MMDetection's recipe; any will do, its weight is 0.
    own_class = labels.clamp(max=deltas.shape[1] - 1)
    own_deltas = deltas.gather(1, own_class[:, None, None].expand(-1, 1, 4)).float()[:, 0]
    positive = rois.positive.view(-1, 1)
    if config.roi_box_loss == "l1":
        differences = F.smooth_l1_loss(
            own_deltas, rois.delta_targets.view(-1, 4), reduction="none", beta=config.roi_loss_beta
        )
    else:
        rois_xyxy, targets_xyxy = rois.boxes_xyxy.view(-1, 4), rois.targets_xyxy.view(-1, 4)
        boxes = decode_boxes(own_deltas, rois_xyxy, config.roi_delta_stds, clip_shrinking=config.clip_shrinking)
        # Where nothing is to be learned, numbers that no formula makes NaN of, which times 0 stay NaN.
        boxes = torch.where(positive, boxes, 0.0)
        targets_xyxy = torch.where(positive, targets_xyxy, 0.0)
        differences = overlap_loss(config.roi_box_loss, boxes, targets_xyxy)[:, None]
    loss_bbox = config.roi_box_loss_weight * (differences * positive).sum()
    return (per_roi * rois.chosen.view(-1)).sum() / normalizer, loss_bbox / normalizer


@torch.no_grad()
def refine_boxes(
    config: FasterRCNNConfig,
    boxes_xyxy: Tensor,
    class_logits: Tensor,
    deltas: Tensor,
    sizes: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """RoIs as a stage of a cascade passes them on: moved by its deltas and cut at the image's edges, float32 [B, S, 4].

    config: that of the stage. boxes_xyxy float32 [B, S, 4], class_logits [B * S, K + 1], deltas [B * S, classes, 4],
    sizes int64 [B, 2]. labels: int64 [B, S], whose deltas a RoI takes where it learns a class; other RoIs take those of
    the class with the largest logit.
    """
    own_deltas = deltas[:, 0]
    if deltas.shape[1] > 1:
        own_class = class_logits[:, : config.num_classes].argmax(dim=1)
        if labels is not None:
            own_class = torch.where(labels.view(-1) < config.num_classes, labels.view(-1), own_class)
        own_deltas = deltas.gather(1, own_class[:, None, None].expand(-1, 1, 4))[:, 0]
    refined = decode_boxes(
        own_deltas.float().view_as(boxes_xyxy), boxes_xyxy, config.roi_delta_stds, clip_shrinking=config.clip_shrinking
    )
    return clip_boxes(refined, sizes)


def is_proposal(rois: RoISample, num_proposals: int) -> Tensor:
    """Which slots hold a proposal, and not a ground-truth box that was put among them: bool [B, S]."""
    place = rois.candidate
    if place is None:
        place = torch.arange(rois.chosen.shape[1], device=rois.chosen.device)
    return rois.chosen & (place < num_proposals)
