"""Faster, Mask and Cascade R-CNN with a feature pyramid: images and targets to losses, images to detections."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from detection.models.anchors import AnchorGenerator, AnchorGrid
from detection.models.backbones.architectures import ARCHITECTURES
from detection.models.backbones.fpn import FPN, LastMap, size_of_p6
from detection.models.backbones.resnet import ResNet, start_norms_at_one
from detection.models.config import FasterRCNNConfig, ModelError, config_from_dict, model_config
from detection.models.glue import Glue, at_anchors, backbone_features, pyramid_table, windows_of
from detection.models.mask_head import MASK_ROI_SIZE, MASK_SIZE, MaskHead, mask_loss, mask_rois, mask_targets
from detection.models.ops.feature_table import (
    TableGradient,
    cell_table,
    maps_of_table,
    rows_of_table,
    shared_table,
)
from detection.models.ops.roi_align import RoIAlign, roi_levels
from detection.models.ops.selfcheck import check_kernels
from detection.models.own.backbone import OwnBackbone
from detection.models.own.code import OwnCodeError, is_own
from detection.models.own.detector import OwnDetector, OwnDetectorConfig
from detection.models.postprocess import Detections, select_detections
from detection.models.roi_head import BoxHead, RoISample, is_proposal, refine_boxes, roi_losses, sample_rois
from detection.models.rpn import RPNHead, anchor_targets, rpn_losses, select_proposals
from detection.models.structures import ImageBatch, MaskBatch, TargetBatch, batch_images, batch_targets

Images = ImageBatch | Sequence[Tensor]
Targets = TargetBatch | Sequence[Mapping[str, Tensor]]
Pass = Callable[[ImageBatch, TargetBatch | None], dict[str, Tensor]]
Recorder = Callable[[Pass, ImageBatch, TargetBatch | None], dict[str, Tensor]]
"""Gives what a pass gives for a batch."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


class FasterRCNN(nn.Module):
    """Ren et al. 2015 with Lin et al.'s feature pyramid (2017), after the recipe that `config` describes; with Cai and
    Vasconcelos's cascade (2018) and He et al.'s masks (2017) where that has them.

    In training mode `model(images, targets)` gives losses, in evaluation mode `model(images)` gives
    detections. The dense parts (backbone, fpn, rpn, roi_head, mask_head) run in autocast's precision where that is on,
    all the rest in float32.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: FasterRCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _backbone(config)
        self.fpn: nn.Module = LastMap()
        if config.features == "fpn":
            self.fpn = FPN(
                self.backbone.out_channels,
                config.fpn_channels,
                config.fpn_norm,
                standardized=config.standardize_weights,
            )
        self.rpn = RPNHead(config.map_channels, config.anchors_per_cell)
        heads = [BoxHead(stage) for stage in config.stages]
        self.roi_head = heads[0] if config.cascade_ious is None else nn.ModuleList(heads)
        self.mask_head: nn.Module | None = None
        if config.has_masks:
            masks = [MaskHead(stage) for stage in config.stages]
            self.mask_head = masks[0] if config.cascade_ious is None else nn.ModuleList(masks)
        if not config.zero_last_norms:
            start_norms_at_one(self.backbone)
        if config.init == "torchvision":
            self._initialize_as_torchvision()
        self._anchor_generator = AnchorGenerator(config)
        self._roi_align, self._mask_align = (
            RoIAlign(size, config.roi_sampling_ratio, config.roi_aligned, config.anchor_strides)
            for size in (config.roi_output_size, MASK_ROI_SIZE)
        )
        self.glue = Glue()
        """What a training step does between the dense parts."""
        self.fixed_shapes = False
        """Whether the mask head takes as many RoIs as can be in training, on the CPU too. Otherwise there it takes as
        many as are positive."""
        self.recorder: Recorder | None = None
        """Runs what of a detection has fixed shapes, for instance by replaying a recording of it."""
        for name in ("pixel_mean", "pixel_std"):  # which may be given as whole numbers
            values = torch.tensor(getattr(config, name), dtype=torch.get_default_dtype())
            self.register_buffer(name, values[:, None, None], persistent=False)

    def _initialize_as_torchvision(self) -> None:
        # torchvision 0.23: FeaturePyramidNetwork, and the defaults of nn.Linear in TwoMLPHead and FastRCNNPredictor.
        for conv in (*self.fpn.lateral, *self.fpn.output) if isinstance(self.fpn, FPN) else ():
            nn.init.kaiming_uniform_(conv.get_parameter("weight"), a=1)
        for head in self.roi_heads:
            for layer in head.children():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    def forward(self, images: Images, targets: Targets | None = None) -> dict[str, Tensor] | list[Detections]:
        """Training: {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}, float32 scalars. A cascade has the last
        two for each stage, times its weight: "loss_cls_s0", "loss_bbox_s0", "loss_cls_s1", ... With masks there is a
        "loss_mask" too, in a cascade for each stage.

        Evaluation: for each image {"boxes_xyxy": float32 [D, 4], "scores": float32 [D], "labels": int64 [D]},
        best first, in pixels of the images as they were given. With masks also "mask_probabilities": float32
        [D, 28, 28], within the box; `paste_masks` makes masks of the image's size of them.

        images: an ImageBatch, or a list of uint8 or float [3, H, W], RGB, 0..255. targets, for training only:
        a TargetBatch, or a list of {"boxes_xyxy": float [N, 4], "labels": int64 [N]}, with "masks": bool or uint8
        [N, H, W] where the model has masks.

        As in both reference implementations, the padding's size has a small influence on what is found near it: an
        image is exactly the same alone as among others only at the same padded size.
        """
        device = self.pixel_mean.device
        check_kernels(device)
        if not isinstance(images, ImageBatch):
            images = batch_images(images, device)
        if not self.training:
            return self.detect(images)[0]
        if targets is None:
            raise ModelError("training needs targets; call model.eval() first for detections")
        if not isinstance(targets, TargetBatch):
            targets = batch_targets(targets, self.config.num_classes, device)
        if len(targets.labels) != len(images.sizes):
            raise ModelError(f"there are {len(images.sizes)} images and {len(targets.labels)} targets")
        if self.config.has_masks and targets.masks is None:
            raise ModelError('the model learns masks, and the targets have none: give "masks", or a model without')
        return self._losses(images, targets)

    @property
    def roi_heads(self) -> list[nn.Module]:
        """The box head of each stage: one, or those of a cascade."""
        return list(self.roi_head) if isinstance(self.roi_head, nn.ModuleList) else [self.roi_head]

    @property
    def mask_heads(self) -> list[nn.Module]:
        """The mask head of each stage; none without masks."""
        if isinstance(self.mask_head, nn.ModuleList):
            return list(self.mask_head)
        return [] if self.mask_head is None else [self.mask_head]

    def compile_dense_parts(self, **torch_compile_kwargs: Any) -> None:
        """Compiles backbone, fpn, rpn, box and mask heads in place; names in the state dict stay."""
        self.fixed_shapes = True
        for _, part in self.dense_parts:
            part.compile(**torch_compile_kwargs)

    def _glue(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        return self.glue.form_of(function, self.pixel_mean.device) if self.training else function

    @property
    def dense_parts(self) -> list[tuple[str, nn.Module]]:
        """What is compiled, each with what it is."""
        parts = [("backbone", self.backbone), ("pyramid", self.fpn), ("RPN head", self.rpn)]
        parts += [("box head", head) for head in self.roi_heads]
        return parts + [("mask head", head) for head in self.mask_heads]

    def _losses(self, images: ImageBatch, targets: TargetBatch) -> dict[str, Tensor]:
        if self._glue(pyramid_table) is pyramid_table or not isinstance(self.fpn, FPN):
            return self._losses_of(self.extract_features(images), None, images, targets)
        return self._losses_of(*self._features_in_table(images), images, targets)

    def _losses_of(
        self, features: tuple[Tensor, ...], table: Tensor | None, images: ImageBatch, targets: TargetBatch
    ) -> dict[str, Tensor]:
        config = self.config
        with _full_precision(images.pixels.device):
            anchors = self._anchors(images, features)
            learned = anchor_targets(config, anchors, images.sizes, targets)
        table_gradient = None
        if learned.sample.candidate is None:
            logits, deltas = sampled_logits, sampled_deltas = self.rpn(features)
        else:
            candidates = learned.sample.candidate
            windows = self._glue(windows_of)(candidates, self.rpn.anchors_per_cell, anchors.layout)
            table, table_gradient = shared_table(cell_table(features) if table is None else table)
            patches = rows_of_table(table, windows.view(-1), table_gradient)
            # Before the pass without gradients: autocast keeps the parameters it casts, with their graph or without.
            sampled_logits, sampled_deltas = self._glue(at_anchors)(self.rpn, patches, candidates)
            with torch.no_grad():
                logits, deltas = self.rpn(features)
        with _full_precision(images.pixels.device):
            loss_rpn_cls, loss_rpn_bbox = self._glue(rpn_losses)(config, sampled_logits, sampled_deltas, learned)
            select = self._glue(select_proposals)
            proposals = select(config, logits, deltas, anchors, images.sizes, training=True)
        losses = {"loss_rpn_cls": loss_rpn_cls, "loss_rpn_bbox": loss_rpn_bbox}
        boxes, valid = proposals.boxes_xyxy, proposals.valid
        for number, (head, stage) in enumerate(zip(self.roi_heads, config.stages, strict=True)):
            with _full_precision(images.pixels.device):
                class_losses = functools.partial(self._class_losses, head, features)
                rois = sample_rois(stage, boxes, valid, targets, stage=number, class_losses=class_losses)
                pooled = self.pool(features, rois.boxes_xyxy, table, table_gradient)
            class_logits, box_deltas = head(pooled)
            with _full_precision(images.pixels.device):
                loss_cls, loss_bbox = self._glue(roi_losses)(stage, class_logits, box_deltas, rois)
            of_stage = {"loss_cls": loss_cls, "loss_bbox": loss_bbox}
            if targets.masks is not None and config.has_masks:
                image_size = (images.pixels.shape[2], images.pixels.shape[3])
                of_stage["loss_mask"] = self._mask_loss(
                    number, features, table, table_gradient, rois, targets.masks, image_size
                )
            if config.cascade_ious is None:
                return losses | of_stage
            weight = config.cascade_loss_weights[number]
            losses |= {f"{name}_s{number}": weight * loss for name, loss in of_stage.items()}
            if number + 1 < len(config.stages):
                with _full_precision(images.pixels.device):
                    # The next stage puts the ground-truth boxes among them again.
                    valid = is_proposal(rois, valid.shape[1])
                    boxes = refine_boxes(stage, rois.boxes_xyxy, class_logits, box_deltas, images.sizes, rois.labels)
        return losses

    def _mask_loss(
        self,
        number: int,
        features: Sequence[Tensor],
        table: Tensor | None,
        table_gradient: TableGradient | None,
        rois: RoISample,
        masks: MaskBatch,
        image_size: tuple[int, int],
    ) -> Tensor:
        stage, device = self.config.stages[number], rois.positive.device
        with _full_precision(device):
            # Other devices would wait for the number.
            positives = mask_rois(stage, rois, trimmed=device.type == "cpu" and not self.fixed_shapes)
            pooled = self.pool(features, positives.boxes_xyxy, table, table_gradient, mask=True)
            learned = mask_targets(stage, positives, masks, image_size)
        logits = self.mask_heads[number](pooled, positives.labels.view(-1))
        with _full_precision(device):
            return mask_loss(logits, learned, positives)

    @torch.no_grad()
    def _class_losses(self, head: nn.Module, features: Sequence[Tensor], boxes_xyxy: Tensor, labels: Tensor) -> Tensor:
        # In float32 also under autocast, which keeps the parameters that it casts here, without their graph.
        logits, _ = head(self.pool(features, boxes_xyxy).float())
        return F.cross_entropy(logits.float(), labels.view(-1), reduction="none").view_as(labels)

    @torch.no_grad()
    def detect_with_losses(
        self, images: ImageBatch, targets: TargetBatch
    ) -> tuple[list[Detections], Tensor, dict[str, Tensor]]:
        """What `detect` gives, and the losses as `forward` gives them in training, of the same feature maps."""
        outputs = self._outputs(images, targets)
        losses = {name: value for name, value in outputs.items() if name.startswith("loss_")}
        return *self._found(outputs, images.sizes), losses

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> tuple[list[Detections], Tensor]:
        """Detections as `forward` gives them, and for which images all outputs of the network are finite, bool [B].

        What is NaN or infinite is no detection.
        """
        return self._found(self._outputs(images, None), images.sizes)

    def _outputs(self, images: ImageBatch, targets: TargetBatch | None) -> dict[str, Tensor]:
        if self.recorder is None:
            return self.fixed_outputs(images, targets)
        kind = images.pixels.device.type
        # Weights that a cast has left in autocast's cache would be gone when the recording is replayed.
        with torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        ):
            return self.recorder(self.fixed_outputs, images, targets)

    @torch.no_grad()
    def fixed_outputs(self, images: ImageBatch, targets: TargetBatch | None = None) -> dict[str, Tensor]:
        """The part of a detection whose shapes do not depend on what is found, and with targets the losses.

        "class_logits", "box_deltas" and "boxes_xyxy" as `second_stage` gives them; "valid" bool [B, R], which RoIs
        exist; "is_finite" bool [B]; with masks the feature maps "p0", "p1", ...
        """
        features = self.extract_features(images)
        logits, deltas = self.rpn(features)
        with _full_precision(images.pixels.device):
            anchors = self._anchors(images, features)
            proposals = select_proposals(self.config, logits, deltas, anchors, images.sizes, training=False)
        class_logits, box_deltas, boxes = self.second_stage(features, proposals.boxes_xyxy, images.sizes)
        outputs = {"class_logits": class_logits, "box_deltas": box_deltas, "boxes_xyxy": boxes}
        outputs["is_finite"] = _finite_images([logits, deltas, *outputs.values()], len(images.sizes))
        outputs["valid"] = proposals.valid
        if self.config.has_masks:
            outputs |= {f"p{number}": feature for number, feature in enumerate(features)}
        return outputs if targets is None else outputs | self._losses_of(features, None, images, targets)

    def _found(self, outputs: Mapping[str, Tensor], sizes: Tensor) -> tuple[list[Detections], Tensor]:
        config, is_finite = self.config, outputs["is_finite"]
        logits, deltas, boxes, valid = (outputs[name] for name in ("class_logits", "box_deltas", "boxes_xyxy", "valid"))
        with _full_precision(sizes.device):
            found = select_detections(config.stages[-1], logits, deltas, boxes, valid, sizes)
        if config.has_masks:
            found_boxes, labels = (
                pad_sequence([each[key] for each in found], batch_first=True) for key in ("boxes_xyxy", "labels")
            )
            features = [value for name, value in outputs.items() if name.startswith("p")]
            probabilities = self.mask_probabilities(features, found_boxes, labels)
            is_finite = is_finite & _finite_images([probabilities], len(found))
            for of_image, each in zip(found, probabilities, strict=True):
                of_image["mask_probabilities"] = each[: len(of_image["labels"])]
        return found, is_finite

    def second_stage(
        self, features: Sequence[Tensor], boxes_xyxy: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the second stage makes of RoIs, float32 [B, R, 4], of images of `sizes` [B, 2].

        Class logits [B * R, K + 1], box deltas [B * R, classes, 4], and the RoIs [B, R, 4] that the deltas move. Of a
        cascade the mean logits of its stages, and the deltas and RoIs of the last.
        """
        first, *others = zip(self.roi_heads, self.config.stages, strict=True)
        head, stage = first
        class_logits, box_deltas = head(self._pool_in_full_precision(features, boxes_xyxy))
        total = class_logits
        for head, following in others:
            with _full_precision(boxes_xyxy.device):
                boxes_xyxy = refine_boxes(stage, boxes_xyxy, class_logits, box_deltas, sizes)
            class_logits, box_deltas = head(self._pool_in_full_precision(features, boxes_xyxy))
            total, stage = total + class_logits, following
        return (total / (1 + len(others)) if others else total), box_deltas, boxes_xyxy

    def mask_probabilities(self, features: Sequence[Tensor], boxes_xyxy: Tensor, labels: Tensor) -> Tensor:
        """Masks of boxes, float32 [B, D, 4], of the classes `labels`, int64 [B, D]: float32 [B, D, 28, 28].

        Of a cascade the mean of its stages' masks.
        """
        if labels.numel() == 0:
            return boxes_xyxy.new_zeros((*labels.shape, MASK_SIZE, MASK_SIZE))
        with _full_precision(boxes_xyxy.device):
            pooled = self.pool(features, boxes_xyxy, mask=True)
        of_stages = [head(pooled, labels.flatten()).float().sigmoid() for head in self.mask_heads]
        return torch.stack(of_stages).mean(dim=0).view(*labels.shape, MASK_SIZE, MASK_SIZE)

    def extract_features(self, images: ImageBatch) -> tuple[Tensor, ...]:
        """P2..P6, [B, fpn_channels, H_l, W_l], of images normalized and with zeros outside."""
        features: tuple[Tensor, ...] = self.fpn(self._backbone_maps(images))
        return features

    def _features_in_table(self, images: ImageBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same as views of their table of cells, and the table: compiled code writes the maps straight into it."""
        maps = self._backbone_maps(images)
        table = self._glue(pyramid_table)(self.fpn, maps)
        sizes = [(each.shape[2], each.shape[3]) for each in maps]
        return maps_of_table(table, len(images.sizes), [*sizes, size_of_p6(sizes[-1])]), table

    def _backbone_maps(self, images: ImageBatch) -> tuple[Tensor, ...]:
        is_bgr = self.config.pixel_order == "bgr"
        return self._glue(backbone_features)(self.backbone, images, self.pixel_mean, self.pixel_std, is_bgr)

    def _anchors(self, images: ImageBatch, features: Sequence[Tensor]) -> AnchorGrid:
        height, width = images.pixels.shape[-2:]
        sizes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        return self._anchor_generator((height, width), sizes, images.pixels.device)

    def _pool_in_full_precision(self, features: Sequence[Tensor], boxes_xyxy: Tensor) -> Tensor:
        with _full_precision(boxes_xyxy.device):
            return self.pool(features, boxes_xyxy)

    def pool(
        self,
        features: Sequence[Tensor],
        boxes_xyxy: Tensor,
        table: Tensor | None = None,
        table_gradient: TableGradient | None = None,
        *,
        mask: bool = False,
    ) -> Tensor:
        """Boxes [B, R, 4] in pixels from the level of their size: [B * R, C, S, S]; see `RoIAlign`.

        mask: as the mask head takes them.
        """
        config = self.config
        if config.features == "fpn":
            levels = roi_levels(
                boxes_xyxy, finest_scale=config.roi_finest_scale, eps_inside_log=config.roi_level_eps_inside_log
            )
        else:
            levels = torch.zeros_like(boxes_xyxy[..., 0], dtype=torch.int64)
        align = self._mask_align if mask else self._roi_align
        return align(features, boxes_xyxy, levels, table, table_gradient)


AnyDetector = FasterRCNN | OwnDetector
"""What the engine trains and evaluates."""


def _backbone(config: FasterRCNNConfig) -> ResNet | OwnBackbone:
    if config.backbone not in ARCHITECTURES:
        return OwnBackbone(config.backbone, norm=config.norm, frozen_stages=config.frozen_stages)
    return ResNet(
        config.backbone,
        norm=config.norm,
        train_norm_affine=config.train_norm_affine,
        frozen_stages=config.frozen_stages,
        norm_eps=config.norm_eps,
        standardized=config.standardize_weights,
        stride_in_1x1=config.stride_in_1x1,
        num_stages=config.last_stage,
        dilate_last=config.features == "dc5",
    )


def build_model(name: str = "faster_rcnn_r50_fpn", num_classes: int = 80, **overrides: Any) -> FasterRCNN:
    """A fresh model. `overrides` are fields of `FasterRCNNConfig`; num_classes does not count the background.

    Raises ModelError for a model or a setting that does not exist.
    """
    return FasterRCNN(model_config(name, num_classes, **overrides))


def build_detector(name: str, num_classes: int, **settings: Any) -> AnyDetector:
    """As build_model; package.module:function makes a detector of one's own, of which `settings` are keywords.

    Raises OwnCodeError as well.
    """
    if is_own(name):
        return OwnDetector(OwnDetectorConfig(name, num_classes, settings))
    return build_model(name, num_classes, **settings)


def model_from_config(
    settings: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None, own_code: Collection[str | None] = ()
) -> AnyDetector:
    """A model from `dataclasses.asdict(model.config)`, which may have been through JSON.

    weights: its state dict; None: a fresh model. own_code: names of a user's own code that he has given; what is only
    named in the settings is not run: OwnCodeError. Raises ModelError for settings of no model, and RuntimeError for
    weights of another: before memory is taken for the model, of which settings from a file may say any size.
    """
    code = settings.get("factory") or settings.get("backbone")
    if isinstance(code, str) and is_own(code) and code not in own_code:
        option = "--model" if "factory" in settings else "--backbone"
        raise OwnCodeError(f"the model is made by {code}, which no file alone may start: give {option} {code} as well")
    if "factory" in settings:
        own = OwnDetector(OwnDetectorConfig(**settings))
        if weights is not None:
            own.load_state_dict(weights)
        return own
    config = config_from_dict(settings)
    if weights is None:
        return FasterRCNN(config)
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    with torch.device("meta"):
        empty = FasterRCNN(config)
    try:
        empty.load_state_dict(shapes)
    except RuntimeError as error:  # whose message has a line for every tensor
        raise RuntimeError(textwrap.shorten(str(error), 300)) from error
    model = FasterRCNN(config)
    model.load_state_dict(weights)
    return model


def _finite_images(outputs: Sequence[Tensor], num_images: int) -> Tensor:
    """For which images everything is finite, bool [B]."""
    return torch.stack([each.isfinite().view(num_images, -1).all(dim=1) for each in outputs]).all(dim=0)


def _full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
