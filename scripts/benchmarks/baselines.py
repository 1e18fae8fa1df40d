"""The peers' ways from a JPEG to a batch, written down from what their pipelines do, with the libraries they use.

Each is split where theirs is: what a worker makes of one image, and what is done to the batch on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import checkout  # noqa: F401
from data import CocoDataset
from data.loading.batch import BatchPlan
from data.transforms.geometry import flip_boxes

try:
    import cv2
except ImportError:  # optional, for MMDetection's chain only
    cv2 = None  # type: ignore[assignment]

# ImageNet's, on a scale to 255.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_PAD_MULTIPLE = 32


class Sample(NamedTuple):
    """One image of a batch. The batch as a whole is a list of them."""

    pixels: Tensor
    boxes_xyxy: Tensor
    """float32 [n, 4]"""
    labels: Tensor
    """int64 [n]"""


class Chain(Dataset):
    """What a worker makes of the images of some plans; item i is the i-th image of all of them.

    As it stands here it is Pillow's decoding alone.
    """

    def __init__(self, dataset: CocoDataset, plans: Sequence[BatchPlan]) -> None:
        self.dataset = dataset
        self.indices, self.flips, self.sizes = (
            np.concatenate([getattr(plan, name) for plan in plans]) for name in ("indices", "flips", "sizes")
        )
        starts = np.cumsum([len(plan.indices) for plan in plans])[:-1]
        self.batches = [list(part) for part in np.split(np.arange(len(self.indices)), starts)]
        """Which items make a batch"""

    def __getitem__(self, item: int) -> Sample:
        boxes, labels = self.dataset.boxes(self.indices[item])
        with Image.open(self.dataset.path(self.indices[item])) as file:
            pixels = np.array(file.convert("RGB"))
        return Sample(torch.from_numpy(pixels), torch.from_numpy(boxes), torch.from_numpy(labels))

    def on_device(self, batch: Sequence[Sample]) -> Any:
        """What the peer does to a whole batch in its model; here on the CPU."""
        return batch


class TorchvisionReference(Chain):
    """torchvision's detection reference, preset "hflip": Pillow, tensor, flip and float in the workers; normalize,
    resize and pad in the model."""

    def __init__(self, dataset: CocoDataset, plans: Sequence[BatchPlan], min_size: int, max_size: int) -> None:
        super().__init__(dataset, plans)
        means, stds = [value / 255 for value in MEAN], [value / 255 for value in STD]
        self._transform = GeneralizedRCNNTransform(min_size, max_size, means, stds)

    def __getitem__(self, item: int) -> Sample:
        boxes, labels = self.dataset.boxes(self.indices[item])
        with Image.open(self.dataset.path(self.indices[item])) as file:
            pixels = TF.pil_to_tensor(file.convert("RGB"))
        if self.flips[item]:
            pixels, boxes = TF.hflip(pixels), flip_boxes(boxes, pixels.shape[-1], axis=0)
        floats = TF.convert_image_dtype(pixels, torch.float)
        return Sample(floats, torch.from_numpy(boxes), torch.from_numpy(labels))

    def on_device(self, batch: Sequence[Sample]) -> Any:
        targets = [{"boxes": sample.boxes_xyxy, "labels": sample.labels} for sample in batch]
        return self._transform([sample.pixels for sample in batch], targets)


class MMDetection3(Chain):
    """MMDetection 3's training pipeline: OpenCV's decode and resize, a flip, and the copy to channels first in the
    workers; channel order, normalize and pad in the model's preprocessor.

    A flipped image is a view with a negative stride there, which numpy makes contiguous; of others torch makes the
    channels-first copy, which is faster.
    """

    def resized(self, item: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint8 [h, w, 3] BGR, boxes and labels."""
        cv2.setNumThreads(1)
        content = self.dataset.path(self.indices[item]).read_bytes()
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        boxes, labels = self.dataset.boxes(self.indices[item])
        height, width = self.sizes[item].tolist()
        boxes = boxes * np.tile(np.array([width / pixels.shape[1], height / pixels.shape[0]], np.float32), 2)
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        if self.flips[item]:
            pixels, boxes = np.flip(pixels, axis=1), flip_boxes(boxes, width, axis=0)
        return pixels, boxes, labels

    def __getitem__(self, item: int) -> Sample:
        pixels, boxes, labels = self.resized(item)
        if pixels.flags.c_contiguous:
            tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return Sample(tensor, torch.from_numpy(boxes), torch.from_numpy(labels))

    def on_device(self, batch: Sequence[Sample]) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return _padded([(sample.pixels[[2, 1, 0]].float() - mean) / std for sample in batch])


class MMDetection2(MMDetection3):
    """MMDetection's pipeline as it was up to version 2: normalize, pad and the float batch in the workers too."""

    def __getitem__(self, item: int) -> Sample:
        pixels, boxes, labels = self.resized(item)
        floats = cv2.cvtColor(np.ascontiguousarray(pixels, dtype=np.float32), cv2.COLOR_BGR2RGB)
        cv2.subtract(floats, np.array([MEAN]), floats)
        cv2.multiply(floats, 1 / np.array([STD]), floats)
        bottom, right = (-side % _PAD_MULTIPLE for side in floats.shape[:2])
        floats = cv2.copyMakeBorder(floats, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=0)
        tensor = torch.from_numpy(np.ascontiguousarray(floats.transpose(2, 0, 1)))
        return Sample(tensor, torch.from_numpy(boxes), torch.from_numpy(labels))

    def on_device(self, batch: Sequence[Sample]) -> Tensor:
        return _padded([sample.pixels for sample in batch])


def _padded(images: Sequence[Tensor]) -> Tensor:
    """float32 [B, 3, H, W], sides up to a multiple of 32."""
    height, width = (-(-max(image.shape[side] for image in images) // _PAD_MULTIPLE) * _PAD_MULTIPLE for side in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    for target, image in zip(batch, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    return batch
