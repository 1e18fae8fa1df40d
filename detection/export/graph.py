"""A detector as one graph of tensors that `torch.export` and ONNX can hold: images in, boxes in their pixels out.

The arithmetic is that of `Detector.predict`, operation by operation; what differs is its form. Numbers that depend on
the image's content become fixed shapes with a count beside them, and suppression and RoIAlign are operators that
other runtimes have too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor, nn

from detection.errors import DetectionError
from detection.models import Detector, FasterRCNN
from detection.models.anchors import anchors_of_map, base_anchors
from detection.models.detector import network_size
from detection.models.ops.backend import implementation
from detection.models.ops.boxes import clip_boxes, decode_boxes, sides_above
from detection.models.rpn import ANCHOR_STDS
from detection.models.structures import SIZE_DIVISOR, ImageBatch, round_up

Suppression = Callable[[Tensor, Tensor, float, int], Tensor]
"""boxes_xyxy float32 [G, N, 4], scores float32 [G, N] (-inf: takes no part), IoU threshold, most kept of a group ->
kept, bool [G, N]: greedy suppression within each group."""

OUTPUT_NAMES = ("boxes_xyxy", "scores", "labels", "num_detections")
MASK_OUTPUT_NAME = "mask_probabilities"
"""Behind the others, of a model with masks."""


def suppress_groups(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, most: int) -> Tensor:
    """`Suppression` with torchvision's operator, all groups in one call: side by side in float64, where the distance
    between them costs no digits. It keeps more than `most` of a group, which the ranking that follows cuts off."""
    del most
    group, place = (scores > -torch.inf).nonzero(as_tuple=True)
    # Two boxes that overlap nothing: torchvision tells exporters that at least two are always kept.
    guards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]], dtype=torch.float64, device=scores.device)
    boxes = torch.cat((guards, boxes_xyxy[group, place].double()))
    rank = torch.cat((guards[:, 0], scores[group, place].double()))
    distance = boxes.amax(dim=(0, 1)) + 1
    column = torch.cat((torch.zeros_like(guards[:, 0]), group + 1.0)) * distance
    kept = torchvision.ops.nms(boxes + column[:, None], rank, iou_threshold)
    is_kept = torch.zeros_like(rank).index_fill(0, kept, 1.0)[2:] > 0
    return torch.zeros_like(scores, dtype=torch.bool).index_put((group, place), is_kept)


class ExportError(DetectionError):
    """An export that cannot be made or opened."""


def graph_model(detector: Detector) -> FasterRCNN:
    """The model that graphs are made of. Raises ExportError for a detector of a user's own."""
    if not isinstance(detector.model, FasterRCNN):
        raise ExportError(f"{detector.model.config.factory} is a detector of your own: no graph is made of it")
    return detector.model


class DetectorGraph(nn.Module):
    """`Detector.predict` for a batch of images of one size.

    forward: uint8 [B, H, W, 3], RGB -> boxes_xyxy float32 [B, D, 4] in pixels of those images, scores float32
    [B, D], labels int64 [B, D], num_detections int64 [B]. Best first; D is the model's detections_per_image, and rows
    from num_detections on are zero, their labels -1. Of a model with masks also mask_probabilities float32
    [B, D, 28, 28].
    """

    def __init__(self, detector: Detector, suppress: Suppression = suppress_groups) -> None:
        super().__init__()
        self.model = graph_model(detector)
        config = self.model.config
        if config.features != "fpn":
            raise ExportError(f"a graph is made of models with a pyramid only, not of features {config.features!r}")
        if config.soft_nms is not None:
            raise ExportError("soft_nms is no part of a graph: export the detector without it")
        self.config = config
        self.min_size, self.max_size = detector.min_size, detector.max_size
        self._suppress = suppress
        for level, size in enumerate(config.anchor_sizes):
            anchors = base_anchors(size, config.anchor_ratios, rounded=config.round_anchors)
            self.register_buffer(f"base_anchors_{level}", anchors.to(detector.model.pixel_mean.device))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        batch, factors = self._network_input(images)
        features = self.model.extract_features(batch)
        boxes, valid = self._proposals(features, batch)
        with implementation(roi_align="operator"):
            class_logits, deltas, boxes = self.model.second_stage(features, boxes, batch.sizes)
        found, scores, labels, is_box = self._detections(class_logits, deltas, boxes, valid, batch.sizes)
        masks = []
        if self.config.has_masks:
            with implementation(roi_align="operator"):
                probabilities = self.model.mask_probabilities(features, found, labels)
            masks = [torch.where(is_box[..., None, None], probabilities, 0.0)]
        edges = torch.stack((_scalar(images, 2), _scalar(images, 1))).repeat(2).float()
        found = torch.minimum((found / factors).clamp(min=0), edges)
        return (
            torch.where(is_box[..., None], found, 0.0),
            torch.where(is_box, scores, 0.0),
            torch.where(is_box, labels, -1),
            is_box.sum(dim=1),
            *masks,
        )

    def _network_input(self, images: Tensor) -> tuple[ImageBatch, Tensor]:
        """The padded batch at the network's scale, and its factors x, y, x, y to the images: float32 [4]."""
        height, width = images.shape[1:3]
        sides = torch.stack((_scalar(images, 1), _scalar(images, 2))).double()
        padded: list[int]
        if isinstance(height, int) and isinstance(width, int):
            size = network_size(height, width, self.min_size, self.max_size)
            sizes = torch.tensor(size, device=images.device)
            padded = [round_up(side, SIZE_DIVISOR) for side in size]
        else:
            scale = torch.minimum(self.max_size / sides.amax(dim=0), self.min_size / sides.amin(dim=0))
            sizes = (sides * scale + 0.5).to(torch.int64).clamp(min=1)
            # The graph reads them at run time, in steps of the divisor, so that all maps' sizes are their multiples.
            steps = (-(-sizes // SIZE_DIVISOR)).tolist()
            for number in steps:
                torch._check(number >= 1)
                torch._check(number <= 1 + self.max_size // SIZE_DIVISOR)
            padded = [number * SIZE_DIVISOR for number in steps]
        rows = _resized(images, 1, sizes[0], padded[0])
        pixels = _resized(rows, 2, sizes[1], padded[1]).round().clamp(0, 255).permute(0, 3, 1, 2)
        factors = (sizes / sides).float().flip(0).repeat(2)
        return ImageBatch(pixels, sizes[None].expand(images.shape[0], 2)), factors

    def _proposals(self, features: Sequence[Tensor], batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """boxes_xyxy float32 [B, P, 4] and valid bool [B, P]; P is the model's rpn_proposals_test."""
        config = self.config
        padded_height, padded_width = batch.pixels.shape[-2:]
        boxes, scores = [], []
        for level, feature in enumerate(features):
            logits, deltas = self.model.rpn([feature])
            height, width = feature.shape[-2:]
            stride_y = stride_x = config.anchor_strides[level]
            if config.anchor_stride_from_grid:
                stride_y, stride_x = padded_height // height, padded_width // width
            base = self.get_buffer(f"base_anchors_{level}")
            anchors = anchors_of_map(base, (height, width), (stride_y, stride_x))
            # A small map has fewer anchors than are to be taken: rows of -inf make up for them.
            missing = logits.new_full((logits.shape[0], config.rpn_nms_pre_test), -torch.inf)
            best, index = torch.cat((logits.float(), missing), dim=1).topk(config.rpn_nms_pre_test, dim=1)
            index = torch.where(best > -torch.inf, index, 0)
            best_deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4)).float()
            shrinking = config.clip_shrinking
            boxes.append(decode_boxes(best_deltas, anchors[index], ANCHOR_STDS, clip_shrinking=shrinking))
            scores.append(best)
        clipped = clip_boxes(torch.cat(boxes, dim=1), batch.sizes)
        ranking = torch.cat(scores, dim=1)
        usable = sides_above(clipped, config.proposal_min_size) & (ranking > -torch.inf)
        ranking = torch.where(usable, ranking, -torch.inf)
        # The shift that `models.nms.suppress` makes too, because its rounding decides pairs at the threshold.
        largest = torch.where(usable[..., None], clipped, 0.0).amax(dim=(1, 2))
        levels = torch.arange(len(boxes), device=clipped.device).repeat_interleave(config.rpn_nms_pre_test)
        shifted = clipped + (levels * (largest + 1)[:, None])[..., None]
        keep = self._suppress(
            shifted.view(-1, config.rpn_nms_pre_test, 4),
            ranking.view(-1, config.rpn_nms_pre_test),
            config.rpn_nms_iou,
            config.rpn_nms_pre_test,
        ).view_as(ranking)
        top, index = torch.where(keep, ranking, -torch.inf).topk(
            min(config.rpn_proposals_test, config.rpn_nms_pre_test * len(boxes)), dim=1
        )
        return clipped.gather(1, index[..., None].expand(-1, -1, 4)), top > -torch.inf

    def _detections(
        self, class_logits: Tensor, deltas: Tensor, boxes_xyxy: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes [B, D, 4] at the network's scale, scores [B, D], labels [B, D] and which of them exist, bool [B, D].

        Each class of each image is a group of P candidates.
        """
        config = self.config
        num_proposals = valid.shape[1]
        scores = class_logits.float().softmax(dim=1)[:, : config.num_classes]
        scores = scores.reshape(-1, num_proposals, config.num_classes).permute(0, 2, 1)
        deltas = deltas.float().reshape(-1, num_proposals, deltas.shape[1], 4)[:, :, : config.num_classes]
        deltas = deltas.expand(-1, -1, config.num_classes, -1)
        boxes = decode_boxes(
            deltas.permute(0, 2, 1, 3),
            boxes_xyxy[:, None],
            config.stages[-1].roi_delta_stds,
            clip_shrinking=config.clip_shrinking,
        ).reshape(-1, config.num_classes * num_proposals, 4)
        boxes = clip_boxes(boxes, sizes)
        usable = ((scores > config.score_threshold) & valid[:, None]).flatten(1)
        if config.detection_min_size is not None:
            usable = usable & sides_above(boxes, config.detection_min_size)
        ranking = torch.where(usable, scores.flatten(1), -torch.inf)
        keep = self._suppress(
            boxes.view(-1, num_proposals, 4),
            ranking.view(-1, num_proposals),
            config.nms_iou,
            config.detections_per_image,
        ).view_as(ranking)
        most = min(config.detections_per_image, config.num_classes * num_proposals)
        top, index = torch.where(keep, ranking, -torch.inf).topk(most, dim=1)
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)), top, index // num_proposals, top > -torch.inf


def _scalar(images: Tensor, dim: int) -> Tensor:
    """The length of an axis as an int64 scalar, computed from the input and not written into the graph."""
    return torch.scalar_tensor(images.shape[dim], dtype=torch.int64, device=images.device)


def _resized(images: Tensor, dim: int, length: Tensor, padded: int) -> Tensor:
    """Bilinear along one axis of [B, H, W, 3] to `length` (int64 scalar), float32, and on to `padded` pixels.

    What lies beyond `length` is repeated pixels. F.interpolate's arithmetic, written out because that wants to know
    its size where the graph is made.
    """
    last = _scalar(images, dim) - 1
    places = torch.arange(padded, device=images.device)
    source = ((places + 0.5) * ((last + 1).float() / length.float()) - 0.5).clamp(min=0)
    lower = torch.minimum(source.floor().long(), last)
    upper = torch.minimum(lower + 1, last)
    fraction = (source - lower).clamp(max=1)
    fraction = fraction[:, None, None] if dim == 1 else fraction[:, None]
    near, far = (images.index_select(dim, index).float() for index in (lower, upper))
    return near * (1 - fraction) + far * fraction
