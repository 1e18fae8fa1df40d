"""Images and targets as the detector takes them: padded tensors with fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.config import ModelError

SIZE_DIVISOR = 32  # the coarsest stride of the backbone; both recipes pad to its multiples


class ImageBatch(NamedTuple):
    """Images padded to one size.

    pixels: uint8 or float [B, 3, H, W], RGB, 0..255, H and W multiples of 32; what lies outside an image is
    ignored. sizes: int64 [B, 2], height and width of each image inside the padding, on the same device.
    """

    pixels: Tensor
    sizes: Tensor


class MaskBatch(NamedTuple):
    """Ground-truth bitmaps of a batch, each cropped to a rectangle of its own: a whole bitmap is zero outside it.

    bits: uint8 [P], 0 or 1, all crops one after another, row by row, one byte a pixel; it may be longer than what is
    used. offsets: int64 [B, G], first element of each crop in `bits`. rectangles: int64 [B, G, 4], x, y, width and
    height in pixels of the padded image, within it; width and height are 0 where there is no bitmap.
    """

    bits: Tensor
    offsets: Tensor
    rectangles: Tensor


class TargetBatch(NamedTuple):
    """Ground truth padded to one number of boxes an image.

    boxes_xyxy: float32 [B, G, 4], pixels of the padded image. labels: int64 [B, G], 0..num_classes-1. valid:
    bool [B, G], False for padding. sample_keys: int64 [B], the only source of randomness in training: the
    same key draws the same samples from an image. masks: of the boxes, for a model with masks.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    valid: Tensor
    sample_keys: Tensor
    masks: MaskBatch | None = None

    def to(self, device: torch.device) -> TargetBatch:
        """The same on another device."""
        boxes, labels, valid, keys = (each.to(device) for each in self[:4])
        masks = None if self.masks is None else MaskBatch(*(each.to(device) for each in self.masks))
        return TargetBatch(boxes, labels, valid, keys, masks)


def batch_images(images: Sequence[Tensor], device: torch.device) -> ImageBatch:
    """Pads images (uint8 or float [3, H, W], RGB, 0..255) to the right and below, to common multiples of 32.

    Raises ModelError for an empty list or an image of another shape.
    """
    if not images:
        raise ModelError("the list of images is empty")
    for index, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ModelError(f"image {index} has the shape {list(image.shape)}; an image is [3, height, width]")
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    dtype = torch.uint8 if all(image.dtype == torch.uint8 for image in images) else torch.float32
    shape = (len(images), 3, round_up(height, SIZE_DIVISOR), round_up(width, SIZE_DIVISOR))
    pixels = torch.zeros(shape, dtype=dtype, device=device)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image.to(device, dtype)
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64)
    return ImageBatch(pixels, sizes.to(device))


def batch_targets(targets: Sequence[Mapping[str, Tensor]], num_classes: int, device: torch.device) -> TargetBatch:
    """Pads a list of {"boxes_xyxy": float [N, 4], "labels": int64 [N]} to the largest N.

    All of them may have "masks", bool or uint8 [N, H, W] of 0 and 1, at the image's size, too. The sample keys are
    drawn from torch's default CPU generator. Raises ModelError for shapes that do not fit together, labels out of range
    and masks of some images only.
    """
    for index, target in enumerate(targets):
        boxes, labels = target["boxes_xyxy"], target["labels"]
        if labels.dim() != 1 or boxes.shape != (len(labels), 4):
            raise ModelError(
                f"target {index} has boxes_xyxy of shape {list(boxes.shape)} and labels of "
                f"shape {list(labels.shape)}; expected [N, 4] and [N]"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ModelError(
                f"target {index} has labels from {int(labels.min())} to {int(labels.max())}; the model's "
                f"{num_classes} classes are 0..{num_classes - 1}"
            )
    num_images = len(targets)
    num_boxes = max([1, *(len(target["labels"]) for target in targets)])
    padded_boxes = torch.zeros((num_images, num_boxes, 4), device=device)
    padded_labels = torch.zeros((num_images, num_boxes), dtype=torch.int64, device=device)
    valid = torch.zeros((num_images, num_boxes), dtype=torch.bool, device=device)
    for index, target in enumerate(targets):
        count = len(target["labels"])
        padded_boxes[index, :count] = target["boxes_xyxy"].to(device, torch.float32)
        padded_labels[index, :count] = target["labels"].to(device)
        valid[index, :count] = True
    sample_keys = torch.randint(2**63 - 1, (num_images,), dtype=torch.int64)
    masks = _batch_masks(targets, num_boxes, device) if any("masks" in target for target in targets) else None
    return TargetBatch(padded_boxes, padded_labels, valid, sample_keys.to(device), masks)


def _batch_masks(targets: Sequence[Mapping[str, Tensor]], num_boxes: int, device: torch.device) -> MaskBatch:
    offsets = torch.zeros((len(targets), num_boxes), dtype=torch.int64)
    rectangles = torch.zeros((len(targets), num_boxes, 4), dtype=torch.int64)
    crops = []
    used = 0
    for index, target in enumerate(targets):
        masks, count = target.get("masks"), len(target["labels"])
        if masks is None or masks.dim() != 3 or len(masks) != count or masks.dtype not in (torch.bool, torch.uint8):
            found = "no masks" if masks is None else f"masks of {masks.dtype} and shape {list(masks.shape)}"
            raise ModelError(
                f"target {index} has {found} for {count} boxes; expected bool or uint8 [{count}, height, width]"
            )
        for number, mask in enumerate(masks.cpu().bool()):
            rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
            if len(rows):
                top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
                offsets[index, number] = used
                rectangles[index, number] = torch.tensor([left, top, right - left, bottom - top])
                crops.append(mask[top:bottom, left:right].flatten())
                used += len(crops[-1])
    bits = torch.cat(crops).to(torch.uint8) if crops else torch.zeros(1, dtype=torch.uint8)
    return MaskBatch(bits.to(device), offsets.to(device), rectangles.to(device))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple
