"""A trained detector to use: model, class names and preprocessing; images in, boxes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detection.models.config import ModelError
from detection.models.faster_rcnn import AnyDetector

ImageInput: TypeAlias = "np.ndarray | Image.Image | str | Path"
"""RGB as uint8 [H, W, 3], a PIL image of any mode, or a path to an image file."""


class DetectorError(ModelError):
    """An image that a detector cannot take, or a device that it cannot work on."""


@dataclass(frozen=True)
class Detector:
    """A model in evaluation mode with what it needs to be used.

    class_names and category_ids: one per label, in label order. min_size, max_size: images are enlarged or
    reduced, keeping their shape, until the shorter side is min_size, or the longer max_size if that comes
    first.
    """

    model: AnyDetector
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    min_size: int
    max_size: int

    def __repr__(self) -> str:
        classes = ", ".join(self.class_names[:4]) + (", ..." if len(self.class_names) > 4 else "")
        return (
            f"Detector({self.model.config.backbone}, {len(self.class_names)} classes: {classes}; images at "
            f"{self.min_size} to {self.max_size} pixels, on {self.model.pixel_mean.device})"
        )

    def predict(self, images: ImageInput | Sequence[ImageInput], batch_size: int = 1) -> Any:
        """Detections in one image, or a list of them for a list of images, best first.

        Each is {"boxes_xyxy": float32 [N, 4] in pixels of the image as it is stored, "scores": float32 [N],
        "labels": int64 [N], "names": list of N class names}, tensors on the CPU; of a model with masks also
        "mask_probabilities" float32 [N, 28, 28], of which `paste_masks` makes masks. Any EXIF orientation is ignored,
        as in training: turn photos with PIL.ImageOps.exif_transpose first. Raises DetectorError for an image that
        cannot be read or has another form than `Image` says.
        """
        if batch_size < 1:
            raise DetectorError(f"batch_size is {batch_size}; give at least 1")
        if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
            return self.predict([images])[0]
        results: list[dict[str, Any]] = []
        for first in range(0, len(images), batch_size):
            results += self._predict_batch(images[first : first + batch_size])
        return results

    @torch.inference_mode()
    def _predict_batch(self, images: Sequence[ImageInput]) -> list[dict[str, Any]]:
        device = self.model.pixel_mean.device
        originals = [load_pixels(source) for source in images]
        resized = [resize(image.to(device), self.min_size, self.max_size) for image in originals]
        results = []
        for detection, original, network_input in zip(self.model(resized), originals, resized, strict=True):
            size, network_size = original.shape[1:], network_input.shape[1:]
            scale = torch.tensor([network_size[1] / size[1], network_size[0] / size[0]] * 2)
            limits = torch.tensor([size[1], size[0]] * 2)
            boxes = torch.minimum((detection["boxes_xyxy"].cpu().float() / scale).clamp(min=0), limits)
            labels = detection["labels"].cpu()
            results.append(
                {
                    **{key: value.cpu() for key, value in detection.items()},
                    "boxes_xyxy": boxes,
                    "names": [self.class_names[label] for label in labels.tolist()],
                }
            )
        return results


def network_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width of an image at the network's scale, by MMDetection's keep-ratio rule."""
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize(image: Tensor, min_size: int, max_size: int) -> Tensor:
    """An image, uint8 [3, H, W], at the network's scale: uint8 [3, h, w].

    Plain bilinear interpolation, without antialiasing, rounded to whole gray levels.
    """
    height, width = image.shape[1:]
    size = network_size(height, width, min_size, max_size)
    if size == (height, width):
        return image
    pixels = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def load_pixels(source: ImageInput) -> Tensor:
    """Pixels of an image in any of its forms: uint8 [3, H, W], RGB, as stored. Raises DetectorError."""
    if isinstance(source, (str, Path)):
        try:
            with Image.open(source) as image:
                return _from_pil(image)
        except Exception as error:  # broken files make Pillow's readers raise nearly anything
            raise DetectorError(f"the image {source} cannot be read: {error}") from error
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if not isinstance(source, np.ndarray):
        raise DetectorError(f"an image is an array, a PIL image or a path, not a {type(source).__name__}")
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
        raise DetectorError(
            f"an array of {source.dtype} with the shape {list(source.shape)} is no image; "
            "expected uint8 [height, width, 3], RGB"
        )
    # A copy: numpy calls a mirrored array of one column contiguous, and its negative stride stays.
    return torch.from_numpy(source.transpose(2, 0, 1).copy())


def _from_pil(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):
        # PIL would cut 16-bit gray values off at 255 instead of scaling them.
        gray = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
    return torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1).copy())
