"""A batch on its way: what workers hand over, and what the model is fed."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from data.loading.unreadable import UnreadableImage
from data.transforms.color import ColorChange, change_colors
from data.transforms.geometry import resize_pixels


@dataclass
class RawBatch:
    """B decoded images at their native size, and all that is known of them. In host memory.

    Resize, crop, flips, colors and padding of the pixels are left to `assemble`, on the training device; boxes are
    those of the assembled batch already.
    """

    pixels: torch.Tensor
    """uint8 [total]: rows of RGB pixels of each image at its native size, one image after another"""
    native_sizes: list[tuple[int, int]]
    """(height, width) as stored"""
    scaled_sizes: list[tuple[int, int]]
    """(height, width) of the whole image after the resize"""
    offsets: list[tuple[int, int]]
    """(top, left) of the crop in the resized image"""
    resized_sizes: list[tuple[int, int]]
    """(height, width) after resize and crop: what of the image is in the batch; scaled_sizes where nothing is cut
    off"""
    flips: list[bool]
    """Which images are mirrored left to right"""
    vertical_flips: list[bool]
    """Which images are turned upside down"""
    colors: tuple[ColorChange, ...] | None
    """How the colors of each image change; None: they stay"""
    padded_size: tuple[int, int]
    """(height, width) of the batch: in training of the whole global batch, so that any number of processes
    sees the same tensors"""
    sizes: torch.Tensor
    """int64 [B, 2]: resized_sizes"""
    boxes_xyxy: torch.Tensor
    """float32 [B, G, 4]: pixels of the resized, cropped and flipped image, zeros where not valid"""
    labels: torch.Tensor
    """int64 [B, G], 0 to K-1, zero where not valid"""
    valid: torch.Tensor
    """bool [B, G]: which of the G rows hold a box"""
    image_ids: torch.Tensor
    """int64 [B], of the annotation file"""
    places: torch.Tensor
    """int64 [B]: place in the global batch"""
    sample_keys: torch.Tensor
    """int64 [B]: hash_key(seed, iteration, place)"""
    scale_factors: torch.Tensor
    """float32 [B, 2]: (x, y) factors from native to the whole resized image"""
    iteration: int
    """0-based, over the whole run; in an evaluation, the batch's number"""
    epoch: int
    """0-based"""
    unreadable: tuple[UnreadableImage, ...] = ()
    """Images that were to be in the batch, or were tried instead of one, and could not be used"""
    load_seconds: float = 0.0
    """What it took to read and decode the batch"""
    load_cpu_seconds: float = 0.0
    """The part of it that was not spent waiting, for the disk say"""

    def __len__(self) -> int:
        return len(self.native_sizes)

    def pin_memory(self) -> "RawBatch":
        """A copy in page-locked memory, from which a GPU can copy while the host goes on."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def to(self, device: torch.device | str) -> "DeviceBatch":
        """See assemble."""
        return assemble(self, device)

    # Between processes each tensor costs a file descriptor and a handshake of 0.1 ms: good for the megabytes
    # of pixels, a waste for the rest, which travel as arrays inside the message.
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in _SMALL_TENSORS:
            state[name] = state[name].numpy()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _SMALL_TENSORS:
            state[name] = torch.from_numpy(state[name])
        self.__dict__.update(state)


_TENSORS = tuple(field.name for field in fields(RawBatch) if field.type is torch.Tensor)
_SMALL_TENSORS = tuple(name for name in _TENSORS if name != "pixels")


@dataclass
class DeviceBatch:
    """What the model is fed, on the training device. Tensors have the meaning of RawBatch's; image ids and
    native sizes stay on the host."""

    pixels: torch.Tensor
    """uint8 [B, 3, H, W], channels last in memory, RGB; zeros to the right of and below each image"""
    sizes: torch.Tensor
    """int64 [B, 2] (height, width) of the images inside the padding"""
    boxes_xyxy: torch.Tensor
    """float32 [B, G, 4]"""
    labels: torch.Tensor
    """int64 [B, G]"""
    valid: torch.Tensor
    """bool [B, G]"""
    places: torch.Tensor
    """int64 [B]"""
    sample_keys: torch.Tensor
    """int64 [B]"""
    scale_factors: torch.Tensor
    """float32 [B, 2] (x, y)"""
    image_ids: torch.Tensor
    """int64 [B], on the host"""
    native_sizes: list[tuple[int, int]]
    resized_sizes: list[tuple[int, int]]
    flips: list[bool]
    iteration: int
    epoch: int
    unreadable: tuple[UnreadableImage, ...] = ()

    def __len__(self) -> int:
        return len(self.native_sizes)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that `stream` uses the tensors, which another stream made."""
        for name in ("pixels", *_ON_DEVICE):
            getattr(self, name).record_stream(stream)


_ON_DEVICE = ("sizes", "boxes_xyxy", "labels", "valid", "places", "sample_keys", "scale_factors")


def assemble(raw: RawBatch, device: torch.device | str) -> DeviceBatch:
    """The batch on `device`: each image resized (bilinear), cropped, its colors changed, flipped, and padded with
    zeros.

    The crop is a view of the resized image, so pixels are sampled once. Waits for nothing on a GPU when `raw` is
    in pinned memory: all sizes are known to the host.
    """
    native_pixels = raw.pixels.to(device, non_blocking=True)
    pixels = torch.empty(
        (len(raw), 3, *raw.padded_size), dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    start = 0
    for i, (target, native) in enumerate(zip(pixels, raw.native_sizes, strict=True)):
        end = start + native[0] * native[1] * 3
        image = native_pixels[start:end].view(1, *native, 3).permute(0, 3, 1, 2)
        (top, left), (height, width) = raw.offsets[i], raw.resized_sizes[i]
        image = resize_pixels(image, raw.scaled_sizes[i])[0, :, top : top + height, left : left + width]
        if raw.colors is not None:
            image = change_colors(image, raw.colors[i])
        mirrored = [axis for axis, flip in ((-1, raw.flips[i]), (-2, raw.vertical_flips[i])) if flip]
        target[:, :height, :width].copy_(image.flip(mirrored) if mirrored else image)
        target[:, :height, width:].zero_()
        target[:, height:].zero_()
        start = end
    return DeviceBatch(
        pixels=pixels,
        **{name: getattr(raw, name).to(device, non_blocking=True) for name in _ON_DEVICE},
        image_ids=raw.image_ids,
        native_sizes=raw.native_sizes,
        resized_sizes=raw.resized_sizes,
        flips=raw.flips,
        iteration=raw.iteration,
        epoch=raw.epoch,
        unreadable=raw.unreadable,
    )


def pad_boxes(
    boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], valid: Sequence[np.ndarray], num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes float32 [n, 4], labels int64 [n], valid bool [n] of each of B images, as one tensor each with
    num_rows rows an image (the tensors of RawBatch)."""
    padded_boxes = np.zeros((len(boxes), num_rows, 4), dtype=np.float32)
    padded_labels = np.zeros((len(boxes), num_rows), dtype=np.int64)
    padded_valid = np.zeros((len(boxes), num_rows), dtype=bool)
    for i, usable in enumerate(valid):
        count = len(usable)
        padded_boxes[i, :count] = np.where(usable[:, None], boxes[i], 0)
        padded_labels[i, :count] = np.where(usable, labels[i], 0)
        padded_valid[i, :count] = usable
    return torch.from_numpy(padded_boxes), torch.from_numpy(padded_labels), torch.from_numpy(padded_valid)
