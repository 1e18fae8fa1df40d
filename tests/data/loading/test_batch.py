"""Assembly of a batch: resize, flip and padding of the pixels, in step with the boxes."""

import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.loading.batch import ON_DEVICE, BatchPlan, RawBatch, assemble
from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader
from data.loading.prefetcher import DevicePrefetcher
from data.transforms.augmentation import Augmentation
from tests.data.batches import train_loader


@pytest.fixture
def dataset(make_dataset: Callable[..., CocoDataset]) -> CocoDataset:
    return make_dataset([(64, 48), (50, 60), (90, 40), (48, 64), (70, 70), (33, 64)])


def loader(dataset: CocoDataset, **options: object) -> TrainLoader:
    return train_loader(dataset, **({"batch_size": 3} | options))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_each_image_is_resized_flipped_and_padded_with_zeros(dataset: CocoDataset, probability: float) -> None:
    augmentation = Augmentation(flip_probability=probability)
    for raw in loader(dataset, augmentation=augmentation).batches(0, 2):
        batch = raw.to("cpu")
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        assert batch.pixels.shape == (3, 3, *raw.padded_size)
        assert batch.flips == [probability == 1.0] * 3
        for i, image_id in enumerate(batch.image_ids.tolist()):
            native = dataset.image(int(np.flatnonzero(dataset.image_ids == image_id)[0]))
            assert native.shape[:2] == batch.native_sizes[i]
            height, width = batch.sizes[i].tolist()
            assert (height, width) == batch.resized_sizes[i]
            image = torch.from_numpy(native).permute(2, 0, 1)[None].float()
            expected = F.interpolate(image, size=(height, width), mode="bilinear")[0]
            if probability == 1.0:
                expected = expected.flip(2)
            inside = batch.pixels[i, :, :height, :width]
            assert (inside.float() - expected.round()).abs().max() <= 1
            assert batch.pixels[i, :, height:].eq(0).all()
            assert batch.pixels[i, :, :, width:].eq(0).all()


def test_boxes_stay_on_what_they_frame(make_dataset: Callable[..., CocoDataset]) -> None:
    dataset = make_dataset([(64, 48)] * 16)
    for raw in loader(dataset, batch_size=16, min_size=96, max_size=200).batches(0, 1):
        assert 0 < sum(raw.flips) < 16
        for i, image_id in enumerate(raw.image_ids.tolist()):
            boxes, labels = dataset.boxes(image_id - 100)
            count = len(boxes)
            assert raw.valid[i].tolist() == [True] * count + [False] * (raw.valid.shape[1] - count)
            assert raw.labels[i, :count].tolist() == labels.tolist()
            expected = boxes * 2
            if raw.flips[i]:
                expected = np.stack(
                    [128 - expected[:, 2], expected[:, 1], 128 - expected[:, 0], expected[:, 3]], axis=1
                )
            assert np.allclose(raw.boxes_xyxy[i, :count].numpy(), expected, atol=1e-4)
            assert raw.boxes_xyxy[i, count:].eq(0).all()
            assert raw.scale_factors[i].tolist() == [2, 2]


def test_a_batch_survives_the_way_between_processes(dataset: CocoDataset) -> None:
    raw = next(iter(loader(dataset).batches(0, 1)))
    copy = pickle.loads(pickle.dumps(raw))
    for field in dataclasses.fields(RawBatch):
        original, copied = getattr(raw, field.name), getattr(copy, field.name)
        if isinstance(original, torch.Tensor):
            assert copied.dtype == original.dtype and torch.equal(copied, original)
        elif field.name != "plan":
            assert copied == original
    for field in dataclasses.fields(BatchPlan):
        assert np.array_equal(getattr(copy.plan, field.name), getattr(raw.plan, field.name)), field.name


@pytest.mark.cuda
def test_the_gpu_gets_the_batches_of_the_cpu_without_a_synchronization(dataset: CocoDataset) -> None:
    expected = [assemble(raw, "cpu") for raw in loader(dataset).batches(0, 6)]
    raws = [raw.pin_memory() for raw in loader(dataset).batches(0, 6)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(DevicePrefetcher(iter(raws), "cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, of_cpu in zip(batches, expected, strict=True):
        assert (batch.pixels.cpu().int() - of_cpu.pixels.int()).abs().max() <= 1
        assert all(torch.equal(getattr(batch, name).cpu(), getattr(of_cpu, name)) for name in ON_DEVICE)
    assert all(batch.pixels.is_contiguous(memory_format=torch.channels_last) for batch in batches)
