"""A detector of a user's own, with torchvision's interface, as the engine trains and evaluates detectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detection.models.own.code import OwnCodeError, called


@dataclass(frozen=True)
class OwnDetectorConfig:
    """What a detector of one's own is made from.

    factory: package.module:function. num_classes: without the background. settings: further keywords of the function.
    norm, frozen_stages: nothing is known of them. has_masks: no masks are asked for.
    """

    factory: str
    num_classes: int
    settings: dict[str, Any] = field(default_factory=dict)
    norm: str = "own"
    frozen_stages: int = -1
    has_masks: bool = False

    @property
    def backbone(self) -> str:
        return self.factory

    @property
    def detections_per_image(self) -> int:
        return 100


class OwnDetector(nn.Module):
    """The module that a factory makes, called factory(num_classes=K + 1, **settings).

    It has torchvision's interface: in training mode `module(images, targets)` gives a dictionary of losses, in
    evaluation mode `module(images)` gives a list of {"boxes", "labels", "scores"}. images: a list of float [3, H, W],
    RGB, 0..1, as large as --min-size and --max-size make them. targets: a list of {"boxes": float [N, 4] xyxy,
    "labels": int64 [N], 1..K}. Label 0 is the background.

    What the module draws at random from torch's generators is a function of the batch's sample keys, so that a resumed
    training draws the same.
    """

    pixel_mean: Tensor

    def __init__(self, config: OwnDetectorConfig) -> None:
        super().__init__()
        self.config = config
        self.own = called(config.factory, num_classes=config.num_classes + 1, **config.settings)
        if not isinstance(self.own, nn.Module):
            raise OwnCodeError(f"{config.factory} gives a {type(self.own).__name__}, not a torch.nn.Module")
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1), persistent=False)  # says where the model is

    def forward(self, images: Any, targets: Any = None) -> Any:
        """As FasterRCNN's: an ImageBatch and a TargetBatch to losses, "loss_..." each; or images to detections."""
        if not self.training:
            pixels = images if isinstance(images, (list, tuple)) and not hasattr(images, "sizes") else None
            return self._detections(_as_list(images) if pixels is None else [_scaled(each) for each in pixels])
        valid, device = targets.valid, targets.valid.device
        wanted = [
            {"boxes": boxes[rows], "labels": labels[rows] + 1}
            for boxes, labels, rows in zip(targets.boxes_xyxy, targets.labels, valid, strict=True)
        ]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(targets.sample_keys.sum()) & (2**63 - 1))
            losses = self.own(_as_list(images), wanted)
        if not isinstance(losses, Mapping) or not losses or not all(map(_is_loss, losses.values())):
            raise OwnCodeError(f"{self.config.factory}: in training it must give a dictionary of scalar losses")
        return {name if name.startswith("loss_") else f"loss_{name}": loss for name, loss in losses.items()}

    @torch.no_grad()
    def detect(self, images: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
        """Detections as FasterRCNN.detect gives them, and for which images all of them are finite, bool [B]."""
        found = self._detections(_as_list(images), drop_nonfinite=False)
        finite = [each["boxes_xyxy"].isfinite().all() & each["scores"].isfinite().all() for each in found]
        return [_finite(each) for each in found], torch.stack(finite)

    def _detections(self, images: list[Tensor], *, drop_nonfinite: bool = True) -> list[dict[str, Tensor]]:
        found = self.own(images)
        if not isinstance(found, list) or len(found) != len(images):
            raise OwnCodeError(f"{self.config.factory}: in evaluation it must give a list with a dictionary an image")
        results = []
        for each in found:
            try:
                boxes, labels, scores = each["boxes"].float(), each["labels"], each["scores"].float()
            except (KeyError, TypeError, AttributeError):
                message = "a detection must have the tensors boxes, labels and scores"
                raise OwnCodeError(f"{self.config.factory}: {message}") from None
            is_object = (labels > 0) & (labels <= self.config.num_classes)
            boxes, labels, scores = boxes[is_object], labels[is_object] - 1, scores[is_object]
            order = scores.argsort(descending=True, stable=True)
            result = {"boxes_xyxy": boxes[order], "scores": scores[order], "labels": labels[order]}
            results.append(_finite(result) if drop_nonfinite else result)
        return results


def _finite(found: dict[str, Tensor]) -> dict[str, Tensor]:
    keep = found["boxes_xyxy"].isfinite().all(dim=1) & found["scores"].isfinite()
    return {name: value[keep] for name, value in found.items()}


def _as_list(images: Any) -> list[Tensor]:
    """The images of a padded batch without their padding."""
    sizes = images.sizes.tolist()
    return [_scaled(image[:, :height, :width]) for image, (height, width) in zip(images.pixels, sizes, strict=True)]


def _scaled(image: Tensor) -> Tensor:
    return image.float() / 255


def _is_loss(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.dim() == 0
