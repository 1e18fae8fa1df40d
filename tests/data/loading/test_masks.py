"""Masks of a batch: they move as the pixels and the boxes do, and come from worker processes as from none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.coco.annotations import read_coco
from data.loading.batch import OF_MASKS, assemble
from data.loading.dataset import CocoDataset
from data.loading.read_batch import BatchReader
from data.transforms.augmentation import Augmentation, LargeScaleJitter, ScaleSampling
from data.transforms.copy_paste import MaskedObjects, paste
from tests.data.batches import SIZES, MakeDataset, train_loader

AUGMENTATIONS = {
    "as it is": {"augmentation": Augmentation(flip_probability=0.0)},
    "flips": {"augmentation": Augmentation(flip_probability=0.5, vertical_flip_probability=0.5)},
    "scales": {"augmentation": Augmentation(scales=ScaleSampling(((40, 90), (90, 31)), "range"))},
    "jitter": {"augmentation": Augmentation(jitter=LargeScaleJitter(64, 0.1, 3.0, 0.2), vertical_flip_probability=0.5)},
}


def full_masks(batch, place):
    """The masks of an image of the batch at its padded size: bool [G, H, W]."""
    out = np.zeros((batch.valid.shape[1], *batch.padded_size), bool)
    for row, (x, y, width, height) in enumerate(batch.mask_rectangles[place].tolist()):
        start = int(batch.mask_offsets[place, row])
        crop = batch.mask_bits[start : start + width * height].reshape(height, width)
        out[row, y : y + height, x : x + width] = crop.numpy()
    return out


def nearest(mask, size):
    """A bool [h, w] mask at another size, as OpenCV's INTER_NEAREST has it."""
    places = [
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(int), old - 1)
        for new, old in zip(size, mask.shape, strict=True)
    ]
    return mask[np.ix_(*places)]


@pytest.mark.parametrize("options", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_masks_are_resized_cropped_and_flipped_at_full_size_and_each_lies_in_its_box(
    make_dataset: MakeDataset, options: dict
) -> None:
    dataset = make_dataset(SIZES, masks=True)
    seen = 0
    for batch in train_loader(dataset, batch_size=4, **options).batches(0, 9):
        plan = batch.plan
        for place, index in enumerate(plan.indices.tolist()):
            found = full_masks(batch, place)
            (top, left), (height, width) = plan.offsets[place], plan.sizes[place]
            for row, bitmap in enumerate(dataset.bitmaps(index)):
                whole = np.zeros((dataset.heights[index], dataset.widths[index]), bool)
                h, w = bitmap.bits.shape
                whole[bitmap.top : bitmap.top + h, bitmap.left : bitmap.left + w] = bitmap.bits
                expected = nearest(whole, plan.scaled_sizes[place])[top : top + height, left : left + width]
                if plan.flips[place]:
                    expected = expected[:, ::-1]
                if plan.vertical_flips[place]:
                    expected = expected[::-1]
                if not batch.valid[place, row]:
                    assert not batch.mask_rectangles[place, row].any()
                    continue
                assert np.array_equal(found[row, :height, :width], expected)
                assert found[row].sum() == expected.sum()
                seen += expected.any()
                # A polygon's pixels are in the box but for what rounding to pixels moves: at most one pixel as stored.
                ys, xs = np.nonzero(found[row])
                x0, y0, x1, y1 = batch.boxes_xyxy[place, row].tolist()
                slack = np.ceil((plan.scaled_sizes[place] / [dataset.heights[index], dataset.widths[index]]).max()) + 1
                if len(xs):
                    assert x0 - slack <= xs.min() and xs.max() <= x1 + slack
                    assert y0 - slack <= ys.min() and ys.max() <= y1 + slack
            assert not batch.mask_rectangles[place][~batch.valid[place]].any()
    assert seen > 30


def test_masks_come_from_worker_processes_as_from_none(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES, masks=True)
    alone, pool = (train_loader(dataset, batch_size=3, workers=workers) for workers in (0, 2))
    batches = list(alone.batches(0, 12))
    try:
        for expected, found in zip(batches, pool.batches(0, 12), strict=True):
            assert torch.equal(found.pixels, expected.pixels)
            for name in OF_MASKS:
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
            # In the buffer of the pixels, not in a message.
            assert found.mask_bits.untyped_storage().data_ptr() == found.pixels.untyped_storage().data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(assemble(found, "cpu").masks, expected.masks, strict=True))
    finally:
        pool.close()


def test_masks_that_do_not_fit_into_a_buffer_come_in_the_message(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([(40, 40)] * 6, masks=True)
    options = {"batch_size": 2, "min_size": 400, "max_size": 400}
    alone, pool = (train_loader(dataset, workers=workers, **options) for workers in (0, 1))
    in_message = 0
    try:
        for expected, found in zip(alone.batches(0, 4), pool.batches(0, 4), strict=True):
            assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.mask_bits, expected.mask_bits)
            in_message += found.mask_bits.untyped_storage().data_ptr() != found.pixels.untyped_storage().data_ptr()
    finally:
        pool.close()
    assert in_message > 0


def test_a_box_without_an_outline_is_left_out_where_masks_are_wanted(make_dataset: MakeDataset, tmp_path) -> None:
    every = make_dataset([(50, 50)] * 3, masks=True)
    file = tmp_path / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
    file.write_text(json.dumps(content))
    fewer = CocoDataset(tmp_path, read_coco(file, masks=True), training=True, masks=True)
    assert fewer.box_counts.tolist() == [every.box_counts[0] - 1, *every.box_counts[1:].tolist()]
    assert np.array_equal(fewer.boxes(0)[0], every.boxes(0)[0][1:])
    for kept, before in zip(fewer.bitmaps(0), every.bitmaps(0)[1:], strict=True):
        assert np.array_equal(kept.bits, before.bits)
    assert CocoDataset(tmp_path, read_coco(file), training=True).box_counts.tolist() == every.box_counts.tolist()


def test_the_largest_batch_has_masks(make_dataset: MakeDataset) -> None:
    largest = train_loader(make_dataset(SIZES, masks=True), batch_size=2).largest_batch(2)
    assert largest.num_mask_bits == len(largest.mask_bits)
    inside = largest.mask_rectangles[..., :2] + largest.mask_rectangles[..., 2:]
    assert (inside.amax(dim=(0, 1)) <= torch.tensor(largest.padded_size[::-1])).all()
    assert train_loader(make_dataset(SIZES), batch_size=2).largest_batch(2).masks is None


PASTED = Augmentation(jitter=LargeScaleJitter(64, 0.4, 1.6), vertical_flip_probability=0.5, copy_paste=True)


def in_full(batch):
    """Pixels, boxes and masks of each image of a batch, on the device."""
    moved = assemble(batch, "cpu")
    return [
        (moved.pixels[i], moved.boxes_xyxy[i], moved.labels[i], moved.valid[i], full_masks(moved, i))
        for i in range(len(moved))
    ]


def test_pasted_objects_have_exactly_the_pixels_of_their_masks_and_hide_what_is_below(
    make_dataset: MakeDataset,
) -> None:
    dataset = make_dataset(SIZES, masks=True)
    loader, reader = train_loader(dataset, batch_size=4, augmentation=PASTED), BatchReader(dataset, "fail", 0, None)
    pasted = hidden = 0
    for batch in loader.batches(0, 12):
        # The same images by themselves, of plans without sources.
        alone, others = (in_full(reader.read(replace(plan, sources=None))) for plan in (batch.plan, batch.plan.sources))
        for place, (pixels, boxes, labels, valid, masks) in enumerate(in_full(batch)):
            own_pixels, own_boxes, own_labels, own_valid, own_masks = alone[place]
            other_pixels, _, other_labels, other_valid, other_masks = others[place]
            first, count = batch.first_pasted[place], int(valid.sum())
            height, width = batch.plan.sizes[place]
            inside = np.zeros(masks.shape[1:], bool)
            inside[:height, :width] = True
            on_top = masks[first:count].any(axis=0)
            assert torch.equal(pixels, torch.where(torch.from_numpy(on_top), other_pixels, own_pixels))
            rows = np.flatnonzero(other_valid)
            every = {(other_masks[row] & inside).tobytes(): int(other_labels[row]) for row in rows}
            for row in range(first, count):
                assert every[masks[row].tobytes()] == labels[row]
                assert (boxes[row] >= 0).all() and boxes[row, 2] <= width and boxes[row, 3] <= height
            expected = [
                (own_masks[row] & ~on_top, own_boxes[row], int(own_labels[row]), own_masks[row])
                for row in np.flatnonzero(own_valid)
                if (own_masks[row] & ~on_top).any() or not own_masks[row].any()
            ]
            assert len(expected) == first
            for row, (left, box, label, before) in enumerate(expected):
                assert np.array_equal(masks[row], left) and labels[row] == label
                if np.array_equal(left, before):
                    assert torch.equal(boxes[row], box)
                    continue
                ys, xs = np.nonzero(left)
                bounds = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                ys, xs = np.nonzero(before)
                earlier = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                assert torch.equal(boxes[row], torch.where(bounds != earlier, bounds.float(), box))
                hidden += 1
            pasted += count - first
    assert pasted > 30 and hidden > 5


def test_an_object_that_is_hidden_as_a_whole_is_gone_and_one_in_part_has_a_smaller_box() -> None:
    def square(x, side, label):
        box = np.array([[x + 0.25, 2.5, x + side, 2 + side]], dtype=np.float32)
        return MaskedObjects(box, np.array([label]), [(x, 2, side, side)], [np.ones((side, side), dtype=np.uint8)])

    on_top = square(4, 4, 7)
    gone, own = paste(square(5, 2, 1), on_top, (10, 20))
    assert own == 0 and gone.labels.tolist() == [7] and np.array_equal(gone.boxes_xyxy, on_top.boxes_xyxy)
    partly, own = paste(square(6, 4, 1), on_top, (10, 20))
    assert own == 1 and partly.labels.tolist() == [1, 7]
    assert partly.boxes_xyxy[0].tolist() == [8, 2.5, 10, 6] and partly.rectangles[0] == (8, 2, 2, 4)
    cut, own = paste(square(0, 2, 1), on_top, (10, 6))  # the image ends in the pasted object
    assert own == 1 and cut.boxes_xyxy[1].tolist() == [4.25, 2.5, 6, 6] and cut.bits[1].shape == (4, 2)
    assert paste(square(0, 2, 1), on_top, (10, 4))[0].labels.tolist() == [1]


def test_boxes_of_masks_are_the_bounds_of_what_the_crop_shows(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES, masks=True)
    jitters = (LargeScaleJitter(64, 0.4, 1.6, boxes_of_masks=exact) for exact in (False, True))
    loaders = (train_loader(dataset, batch_size=4, augmentation=Augmentation(jitter=each)) for each in jitters)
    cut = gone = 0
    for usual, exact in zip(*(loader.batches(0, 12) for loader in loaders), strict=True):
        assert torch.equal(usual.pixels, exact.pixels)
        for before, after in zip(in_full(usual), in_full(exact), strict=True):
            for row in np.flatnonzero(before[3]):
                ys, xs = np.nonzero(before[4][row])
                assert bool(after[3][row]) == (len(ys) > 0)
                gone += len(ys) == 0
                if len(ys) > 0:
                    bounds = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                    assert after[1][row].tolist() == bounds and np.array_equal(before[4][row], after[4][row])
                    cut += (before[1][row] - after[1][row]).abs().max() > 1.5
    assert cut > 5 and gone > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_copy_paste_is_the_same_on_any_number_of_processes(make_dataset: MakeDataset, world_size: int) -> None:
    dataset = make_dataset(SIZES, masks=True)
    alone = train_loader(dataset, batch_size=6, augmentation=PASTED).batches(0, 4)
    options = {"batch_size": 6 // world_size, "world_size": world_size, "augmentation": PASTED}
    ranks = zip(*(train_loader(dataset, rank=rank, **options).batches(0, 4) for rank in range(world_size)), strict=True)
    for whole, parts in zip(alone, ranks, strict=True):
        for one, other in zip(in_full(whole), (each for part in parts for each in in_full(part)), strict=True):
            assert all(torch.equal(*pair) for pair in zip(one[:4], other[:4], strict=True))
            assert np.array_equal(one[4], other[4])


def test_copy_paste_comes_from_worker_processes_as_from_none_through_the_buffers(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES, masks=True)
    alone, pool = (train_loader(dataset, batch_size=3, workers=w, augmentation=PASTED) for w in (0, 2))
    batches = list(alone.batches(0, 8))
    try:
        for expected, found in zip(batches, pool.batches(0, 8), strict=True):
            assert torch.equal(found.pixels, expected.pixels) and found.first_pasted == expected.first_pasted
            assert torch.equal(found.mask_bits, expected.mask_bits)
            assert torch.equal(assemble(found, "cpu").pixels, assemble(expected, "cpu").pixels)
            assert found.mask_bits.untyped_storage().data_ptr() == found.pixels.untyped_storage().data_ptr()
    finally:
        pool.close()


def test_an_unreadable_source_is_replaced_and_is_no_image_of_the_batch(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES, masks=True)
    dataset.path(0).write_bytes(b"no image")
    loader = train_loader(dataset, batch_size=2, augmentation=PASTED, max_bad_images=3)
    told = [(each.image_id, each.place, batch.plan) for batch in loader.batches(0, 12) for each in batch.unreadable]
    assert any(place is None for _, place, _ in told) and any(place is not None for _, place, _ in told)
    assert {number for number, _, _ in told} == {int(dataset.image_ids[0])}
