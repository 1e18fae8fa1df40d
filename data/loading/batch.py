"""A batch on its way: planned, decoded, and as the model is fed with it."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data.loading.unreadable import UnreadableImage
from data.transforms.color import ColorChange, change_colors
from data.transforms.geometry import Geometry, resize_pixels
from data.transforms.own_change import OwnChange

OF_MASKS = ("mask_bits", "mask_offsets", "mask_rectangles")
"""The tensors of a batch that are None where the data set has no masks"""
ON_DEVICE = ("sizes", "boxes_xyxy", "labels", "valid", "places", "sample_keys", "scale_factors", *OF_MASKS)
"""The tensors of a batch, besides the pixels, that the model needs"""


@dataclass(frozen=True, kw_only=True)
class BatchPlan(Geometry):
    """What a worker has to load: B images of one process and micro-step, and where they go.

    padded_size is that of the whole global batch in training, so that any number of processes sees the same tensors.
    """

    iteration: int
    """0-based, over the whole run; in an evaluation, the batch's number"""
    epoch: int
    """0-based"""
    indices: np.ndarray
    """int64 [B], images of the dataset"""
    places: np.ndarray
    """int64 [B], places in the global batch"""
    sample_keys: np.ndarray
    """int64 [B]: hash_key(seed, iteration, place)"""
    num_box_rows: int
    """Rows for boxes of each image"""
    colors: tuple[ColorChange, ...] | None = None
    """How the colors of each image change; None: they stay"""
    own: OwnChange | None = None
    """What a function of the user's own does to the batch"""
    sources: "BatchPlan | None" = None
    """B images of which objects are pasted onto these, see data.transforms.copy_paste; their places are -1"""

    def with_sources(self) -> "BatchPlan":
        """One plan of twice as many images: these, and the sources behind them."""
        assert self.sources is not None
        joined: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                joined[name] = np.concatenate([value, getattr(self.sources, name)])
        if self.colors is not None and self.sources.colors is not None:
            joined["colors"] = self.colors + self.sources.colors
        return replace(self, sources=None, **joined)

    def part(self, which: slice) -> "BatchPlan":
        """The plan of some of the images."""
        parts: dict[str, Any] = {
            name: value[which] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, colors=self.colors and self.colors[which], **parts)


@dataclass(kw_only=True)
class Batch:
    """B images with their boxes, and all that is known of them."""

    plan: BatchPlan
    """The plan as it was carried out: what an unreadable image was replaced by is in its place"""
    pixels: torch.Tensor
    native_sizes: list[tuple[int, int]]
    """(height, width) as stored"""
    image_ids: torch.Tensor
    """int64 [B], of the annotation file; always on the host"""
    sizes: torch.Tensor
    """int64 [B, 2]: (height, width) of the images inside the padding"""
    boxes_xyxy: torch.Tensor
    """float32 [B, G, 4]: pixels of the resized, cropped and flipped image, zeros where not valid"""
    labels: torch.Tensor
    """int64 [B, G], 0 to K-1, zero where not valid"""
    valid: torch.Tensor
    """bool [B, G]: which of the G rows hold a box"""
    places: torch.Tensor
    """int64 [B]: place in the global batch"""
    sample_keys: torch.Tensor
    """int64 [B]: hash_key(seed, iteration, place)"""
    scale_factors: torch.Tensor
    """float32 [B, 2]: (x, y) factors from native to the whole resized image"""
    mask_bits: torch.Tensor | None = None
    """uint8 [P], 0 or 1: the masks of all boxes one after another, each cut to its rectangle, row by row"""
    mask_offsets: torch.Tensor | None = None
    """int64 [B, G]: where in mask_bits the mask of each box begins"""
    mask_rectangles: torch.Tensor | None = None
    """int64 [B, G, 4]: x, y, width, height in pixels of the padded image, all 0 where not valid. A mask is zero outside
    of its rectangle."""
    unreadable: tuple[UnreadableImage, ...] = ()
    """Images that were to be in the batch, or were tried instead of one, and could not be used"""

    def __len__(self) -> int:
        return len(self.native_sizes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of ON_DEVICE that the batch has, by name."""
        return {name: value for name in ON_DEVICE if (value := getattr(self, name)) is not None}

    @property
    def masks(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """mask_bits, mask_offsets and mask_rectangles; None where the data set has no masks."""
        bits, offsets, rectangles = self.mask_bits, self.mask_offsets, self.mask_rectangles
        return None if bits is None or offsets is None or rectangles is None else (bits, offsets, rectangles)

    def whole_masks(self, place: int) -> list[np.ndarray]:
        """The masks of the boxes of an image, to be shown: bool [H, W] each, at the padded size; none without masks."""
        if self.masks is None:
            return []
        bits, offsets, rectangles = self.masks
        rows = self.valid[place].nonzero()[:, 0].tolist()
        whole = [np.zeros(self.padded_size, dtype=bool) for _ in rows]
        for mask, row in zip(whole, rows, strict=True):
            start, (x, y, width, height) = int(offsets[place, row]), rectangles[place, row].tolist()
            crop = bits[start : start + width * height].view(height, width)
            mask[y : y + height, x : x + width] = crop.cpu().numpy() > 0
        return whole

    @property
    def iteration(self) -> int:
        return self.plan.iteration

    @property
    def padded_size(self) -> tuple[int, int]:
        return self.plan.padded_size

    @property
    def resized_sizes(self) -> list[tuple[int, int]]:
        """(height, width) after resize and crop: what of each image is in the batch."""
        return [(height, width) for height, width in self.plan.sizes.tolist()]

    @property
    def flips(self) -> list[bool]:
        """Which images are mirrored left to right."""
        return self.plan.flips.tolist()


@dataclass(kw_only=True)
class RawBatch(Batch):
    """A batch of decoded images at their native size, in host memory.

    pixels: uint8 [total], rows of RGB pixels of each image, one image after another. What is to be done to them is
    left to `assemble`, on the training device; boxes are those of the assembled batch already.
    """

    source_sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) as stored of the plan's sources, whose pixels are behind those of the images"""
    first_pasted: list[int] = field(default_factory=list)
    """Row from which on the boxes of an image are those of pasted objects, with sources"""
    load_seconds: float = field(default=0.0, compare=False)
    """What it took to read and decode the batch"""
    load_cpu_seconds: float = field(default=0.0, compare=False)
    """The part of it that was not spent waiting, for the disk say"""

    @property
    def num_pixel_bytes(self) -> int:
        return sum(height * width * 3 for height, width in (*self.native_sizes, *self.source_sizes))

    @property
    def num_mask_bits(self) -> int:
        """Elements of mask_bits, by the rectangles; 0 without masks."""
        if self.mask_rectangles is None:
            return 0
        return max(int(self.mask_rectangles[..., 2:].prod(dim=-1).sum()), 1)

    def pin_memory(self) -> "RawBatch":
        """A copy in page-locked memory, from which a GPU can copy while the host goes on."""
        tensors: dict[str, Any] = {"pixels": self.pixels, **self.tensors()}
        return replace(self, **{name: value.pin_memory() for name, value in tensors.items()})

    def to(self, device: torch.device | str) -> "DeviceBatch":
        """See assemble."""
        return assemble(self, device)

    # Between processes each tensor costs a file descriptor and a handshake of 0.1 ms, and needs shared memory, of which
    # a container may have 64 MB. As arrays they travel inside the message; pixels mostly do in a shared buffer.
    def __getstate__(self) -> dict[str, Any]:
        return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(
            {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in state.items()}
        )


@dataclass(kw_only=True)
class DeviceBatch(Batch):
    """What the model is fed, on the training device.

    pixels: uint8 [B, 3, H, W], channels last in memory, RGB; zeros to the right of and below each image.
    """

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that `stream` uses the tensors, which another stream made."""
        for value in (self.pixels, *self.tensors().values()):
            value.record_stream(stream)


def assemble(raw: RawBatch, device: torch.device | str) -> DeviceBatch:
    """The batch on `device`: each image resized (bilinear), cropped, its colors changed, flipped, and padded with
    zeros.

    The crop is a view of the resized image, so pixels are sampled once. Waits for nothing on a GPU when `raw` is
    in pinned memory: all sizes are known to the host.
    """
    plan = raw.plan
    native_pixels = raw.pixels.to(device, non_blocking=True)
    pixels = torch.empty(
        (len(raw), 3, *plan.padded_size), dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    start = 0
    for i, (target, native) in enumerate(zip(pixels, raw.native_sizes, strict=True)):
        _draw(target, native_pixels[start:], native, plan, i)
        start += native[0] * native[1] * 3
    if plan.sources is not None:
        source = torch.empty_like(pixels[0])
        for i, (target, native) in enumerate(zip(pixels, raw.source_sizes, strict=True)):
            if raw.valid[i, raw.first_pasted[i] :].any():
                _draw(source, native_pixels[start:], native, plan.sources, i)
                _paste(target, source, raw, i)
            start += native[0] * native[1] * 3
    moved = {name: value.to(device, non_blocking=True) for name, value in raw.tensors().items()}
    batch = DeviceBatch(
        plan=plan,
        pixels=pixels,
        native_sizes=raw.native_sizes,
        image_ids=raw.image_ids,
        unreadable=raw.unreadable,
        **moved,
    )
    return batch if plan.own is None else plan.own.apply(batch)


def _draw(target: torch.Tensor, native_pixels: torch.Tensor, native: tuple[int, int], plan: BatchPlan, i: int) -> None:
    """Image i of the plan, whose native pixels come first, into uint8 [3, H, W]."""
    image = native_pixels[: native[0] * native[1] * 3].view(1, *native, 3).permute(0, 3, 1, 2)
    (top, left), (height, width) = plan.offsets[i].tolist(), plan.sizes[i].tolist()
    scaled_height, scaled_width = plan.scaled_sizes[i].tolist()
    image = resize_pixels(image, (scaled_height, scaled_width))[0, :, top : top + height, left : left + width]
    if plan.colors is not None:
        image = change_colors(image, plan.colors[i])
    mirrored = [axis for axis, flip in ((-1, plan.flips[i]), (-2, plan.vertical_flips[i])) if flip]
    target[:, :height, :width].copy_(image.flip(mirrored) if mirrored else image)
    target[:, :height, width:].zero_()
    target[:, height:].zero_()


def _paste(target: torch.Tensor, source: torch.Tensor, raw: RawBatch, i: int) -> None:
    """The pixels of the objects that are pasted onto image i, uint8 [3, H, W] both."""
    assert raw.masks is not None
    bits, offsets, rectangles = raw.masks
    for row in range(raw.first_pasted[i], int(raw.valid[i].sum())):
        start, (x, y, width, height) = int(offsets[i, row]), rectangles[i, row].tolist()
        inside = bits[start : start + width * height].view(height, width).to(target.device, non_blocking=True) > 0
        area = (slice(None), slice(y, y + height), slice(x, x + width))
        target[area] = torch.where(inside, source[area], target[area])
