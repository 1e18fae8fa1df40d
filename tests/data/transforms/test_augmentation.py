"""Random scale, crop and flips: boxes follow the pixels, and nothing depends on processes, workers or the past."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.coco.annotations import read_coco
from data.loading.dataset import CocoDataset
from data.loading.sampler import Sampling
from data.transforms.augmentation import Augmentation, LargeScaleJitter, ScaleSampling
from data.transforms.color import ColorJitter, PhotometricDistortion
from data.transforms.geometry import crop_boxes, resized_sizes
from tests.data.batches import SIZES, TENSORS, MakeDataset, facts, train_loader

WORDS = np.arange(6000)
EVERYTHING = {
    "multi-scale": Augmentation(
        scales=ScaleSampling(((100, 40), (80, 56), (64, 64))),
        vertical_flip_probability=0.5,
        color=PhotometricDistortion(),
    ),
    "range": Augmentation(scales=ScaleSampling(((100, 40), (120, 80)), "range"), color=ColorJitter(0.4, 0.4, 0.4, 0.1)),
    "jitter": Augmentation(
        jitter=LargeScaleJitter(72, 0.1, 2.0, min_visibility=0.3),
        vertical_flip_probability=0.3,
        color=PhotometricDistortion(),
    ),
}
PLAIN = {"plain": Augmentation()}


@pytest.fixture
def rectangles(tmp_path: Path) -> CocoDataset:
    """Black images, each with one white rectangle that its box frames exactly; PNG, so nothing is blurred."""
    rng = np.random.default_rng(7)
    images, annotations = [], []
    for index in range(24):
        width, height = rng.integers(60, 140, 2).tolist()
        left, top = int(rng.integers(2, width - 32)), int(rng.integers(2, height - 32))
        w, h = int(rng.integers(12, width - left - 2)), int(rng.integers(12, height - top - 2))
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[top : top + h, left : left + w] = 255
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append({"id": index, "width": width, "height": height, "file_name": f"{index}.png"})
        box = {"bbox": [left, top, w, h], "area": w * h, "iscrowd": 0, "category_id": 1}
        annotations.append({"id": index + 1, "image_id": index, **box})
        # A crowd region over the whole image: no crop may make a box of it.
        crowd = {"bbox": [0, 0, width, height], "area": width * height, "iscrowd": 1, "category_id": 1}
        annotations.append({"id": 100 + index, "image_id": index, "segmentation": {"counts": [], "size": []}, **crowd})
    file = tmp_path / "annotations.json"
    categories = [{"id": 1, "name": "rectangle"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return CocoDataset(tmp_path, read_coco(file), training=True)


def extent(image: np.ndarray) -> list[int] | None:
    """x1, y1, x2, y2 of what is brighter than half; None where nothing is."""
    bright = image[0] >= 128
    if not bright.any():
        return None
    columns, rows = np.flatnonzero(bright.any(axis=0)), np.flatnonzero(bright.any(axis=1))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(vertical_flip_probability=0.5),
        Augmentation(scales=ScaleSampling(((200, 48), (300, 96), (90, 90))), vertical_flip_probability=0.5),
        Augmentation(scales=ScaleSampling(((90, 40), (300, 200)), "range")),
        Augmentation(jitter=LargeScaleJitter(100, 0.3, 3.0), vertical_flip_probability=0.5),
    ],
    ids=["flips", "choice", "range", "jitter"],
)
def test_a_rectangle_is_found_where_its_box_says_within_half_a_pixel(
    rectangles: CocoDataset, augmentation: Augmentation
) -> None:
    loader = train_loader(rectangles, augmentation=augmentation, min_size=80, max_size=200, batch_size=8)
    counts = {"found": 0, "cut": 0, "gone": 0, "mirrored": 0, "upside down": 0}
    for raw in loader.batches(0, 9):
        batch = raw.to("cpu")
        assert batch.valid[:, 1:].eq(False).all()
        for i in range(len(batch)):
            height, width = batch.sizes[i].tolist()
            found = extent(batch.pixels[i, :, :height, :width].numpy())
            if not batch.valid[i, 0]:
                # Less than a pixel's center may be left of it.
                counts["gone"] += 1
                assert found is None
                continue
            box = batch.boxes_xyxy[i, 0].tolist()
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
            if found is None:
                assert min(box[2] - box[0], box[3] - box[1]) < 0.5
                continue
            assert np.abs(np.array(found) - box).max() <= 0.5 + 1e-4
            counts["found"] += 1
            is_cropped = (raw.plan.sizes[i] != raw.plan.scaled_sizes[i]).any()
            counts["cut"] += bool(is_cropped and (0 in box or width == box[2]))
            counts["mirrored"] += raw.flips[i]
            counts["upside down"] += int(raw.plan.vertical_flips[i])
    assert counts["found"] > 35 and counts["mirrored"] > 15
    if augmentation.vertical_flip_probability:
        assert counts["upside down"] > 15
    if augmentation.jitter is not None:
        assert counts["cut"] > 8 and counts["gone"] > 1


def test_a_crop_is_a_window_of_the_one_resized_image(make_dataset: MakeDataset) -> None:
    cv2 = pytest.importorskip("cv2")
    dataset = make_dataset(SIZES)
    cropped = 0
    augmentation = Augmentation(jitter=LargeScaleJitter(64, 0.4, 2.5), vertical_flip_probability=0.5)
    for raw in train_loader(dataset, augmentation=augmentation, batch_size=4).batches(0, 3):
        batch = raw.to("cpu")
        assert batch.pixels.shape == (4, 3, 64, 64)
        for i, image_id in enumerate(raw.image_ids.tolist()):
            (scaled_height, scaled_width), (top, left) = raw.plan.scaled_sizes[i], raw.plan.offsets[i]
            height, width = raw.resized_sizes[i]
            assert top + height <= scaled_height and left + width <= scaled_width
            expected = cv2.resize(dataset.image(image_id - 100), (scaled_width, scaled_height))
            expected = expected[top : top + height, left : left + width]
            expected = expected[:: -1 if raw.plan.vertical_flips[i] else 1, :: -1 if raw.flips[i] else 1]
            ours = batch.pixels[i].permute(1, 2, 0).numpy()
            assert np.abs(ours[:height, :width].astype(int) - expected).max() <= 1
            assert not ours[height:].any() and not ours[:, width:].any()
            cropped += (height, width) != (scaled_height, scaled_width)
    assert cropped > 3


@pytest.mark.parametrize("augmentation", (PLAIN | EVERYTHING).values(), ids=PLAIN | EVERYTHING)
@pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(2, 2, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2)])
def test_processes_and_micro_steps_only_divide_the_tensors_of_a_global_batch(
    make_dataset: MakeDataset, augmentation: Augmentation, batch_size: int, world_size: int, accumulate: int
) -> None:
    dataset = make_dataset(SIZES)
    options = {
        "augmentation": augmentation,
        "sampling": Sampling() if augmentation == Augmentation() else Sampling(0.9),
    }
    loader = train_loader(dataset, batch_size=4, **options)
    whole = [raw.to("cpu") for raw in loader.batches(0, 7)]
    assert loader.iterations_per_epoch < 7
    options |= {"batch_size": batch_size, "accumulate": accumulate, "world_size": world_size}
    ranks = [
        [raw.to("cpu") for raw in train_loader(dataset, rank=rank, **options).batches(0, 7)]
        for rank in range(world_size)
    ]
    for iteration, batch in enumerate(whole):
        parts = [ranks[rank][iteration * accumulate + step] for step in range(accumulate) for rank in range(world_size)]
        position = (iteration, iteration // loader.iterations_per_epoch)
        assert {(part.iteration, part.plan.epoch) for part in [*parts, batch]} == {position}
        for name in TENSORS:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)), name
        assert [flip for part in parts for flip in part.flips] == batch.flips


@pytest.mark.parametrize("augmentation", (PLAIN | EVERYTHING).values(), ids=PLAIN | EVERYTHING)
def test_a_resume_inside_an_epoch_and_any_number_of_workers_change_nothing(
    make_dataset: MakeDataset, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(SIZES)
    options = {"augmentation": augmentation, "sampling": Sampling(0.9), "batch_size": 4}
    whole = [facts(raw) for raw in train_loader(dataset, **options).batches(0, 8)]
    assert len({str(fact) for fact in whole}) == 8
    with closing(train_loader(dataset, workers=2, **options)) as with_workers:
        assert [facts(raw) for raw in with_workers.batches(2, 8)] == whole[2:]
    loaded = []
    image = CocoDataset.image
    monkeypatch.setattr(CocoDataset, "image", lambda self, *of: (loaded.append(of[0]), image(self, *of))[1])
    assert [facts(raw) for raw in train_loader(dataset, **options).batches(5, 8)] == whole[5:]
    assert len(loaded) == 3 * 4


def test_an_image_that_loses_all_its_boxes_stays_as_one_without_boxes(rectangles: CocoDataset) -> None:
    jitter = Augmentation(jitter=LargeScaleJitter(40, 2.5, 4.0))
    without = 0
    for raw in train_loader(rectangles, augmentation=jitter, batch_size=4).batches(0, 6):
        assert len(raw) == 4 and raw.padded_size == (64, 64)
        gone = ~raw.valid.any(dim=1)
        without += int(gone.sum())
        assert raw.boxes_xyxy[gone].eq(0).all() and raw.labels[gone].eq(0).all()
    assert without > 3


def test_an_unreadable_image_is_replaced_inside_what_the_crop_left_it(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = make_dataset([(64, 48)] * 4)
    (tmp_path / "001.jpg").write_bytes(b"")
    jitter = Augmentation(jitter=LargeScaleJitter(64, 2.0, 2.0))
    (raw,) = train_loader(dataset, augmentation=jitter, batch_size=4, max_bad_images=2).batches(0, 1)
    place = [fault.place for fault in raw.unreadable][0]
    assert place is not None and raw.plan.offsets[place].tolist() == [0, 0]
    assert raw.plan.scaled_sizes[place].tolist() == raw.plan.sizes[place].tolist() == [48, 64]
    whole = raw.boxes_xyxy[place][raw.valid[place]]
    assert torch.equal(whole, torch.from_numpy(dataset.boxes(int(raw.image_ids[place]) - 100)[0])) != raw.flips[place]
    assert raw.to("cpu").pixels.shape == (4, 3, 64, 64)


@pytest.mark.parametrize("augmentation", EVERYTHING.values(), ids=EVERYTHING)
def test_the_geometry_of_an_image_is_its_own_whatever_stands_beside_it(augmentation: Augmentation) -> None:
    rng = np.random.default_rng(1)
    widths, heights = rng.integers(30, 500, 40), rng.integers(30, 500, 40)

    def geometry(words: np.ndarray, seed: int = 5, epoch: int = 2) -> list[list]:
        result = augmentation.geometry(
            widths[words], heights[words], words=words, seed=seed, epoch=epoch, min_size=1, max_size=1
        )
        columns = (result.scaled_sizes, result.offsets, result.sizes, result.flips, result.vertical_flips)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        return [*zip(rows, augmentation.colors(words, seed=seed, epoch=epoch), strict=True)]

    images = np.arange(40)
    whole = geometry(images)
    for chosen in ([3], [39, 0, 17]):
        assert geometry(images[chosen]) == [whole[image] for image in chosen]
    for other in (geometry(images, seed=6), geometry(images, epoch=3)):
        assert sum(one == two for one, two in zip(whole, other, strict=True)) < 4


def test_scales_are_chosen_alike_likely_and_resize_as_a_single_scale_does() -> None:
    scales = ScaleSampling(((1333, 640), (704, 1333), (1333, 800), (500, 500)))
    shorter, longer = scales.sample(0, 0, WORDS)
    chosen, counts = np.unique(np.stack([shorter, longer], axis=1), axis=0, return_counts=True)
    assert chosen.tolist() == [[500, 500], [640, 1333], [704, 1333], [800, 1333]]
    assert np.abs(counts - 1500).max() < 150
    widths, heights = np.full(6000, 640), np.full(6000, 427)
    augmentation = Augmentation(scales=scales)
    geometry = augmentation.geometry(widths, heights, words=WORDS, seed=0, epoch=0, min_size=1, max_size=1)
    for i in range(50):
        (size,) = resized_sizes(widths[:1], heights[:1], min_size=int(shorter[i]), max_size=int(longer[i])).tolist()
        assert geometry.sizes[i].tolist() == geometry.scaled_sizes[i].tolist() == size
    assert not geometry.offsets.any()


def test_scales_of_a_range_are_whole_numbers_between_its_ends_drawn_for_each_side() -> None:
    shorter, longer = ScaleSampling(((1333, 640), (1400, 650)), "range").sample(0, 0, WORDS)
    assert (shorter.min(), shorter.max(), longer.min(), longer.max()) == (640, 650, 1333, 1400)
    assert np.abs(np.bincount(shorter - 640) - 6000 / 11).max() < 100
    assert abs(np.corrcoef(shorter, longer)[0, 1]) < 0.05
    one_longer = ScaleSampling(((1333, 640), (1333, 800)), "range").sample(0, 0, WORDS)[1]
    assert np.unique(one_longer).tolist() == [1333]


def test_large_scale_jitter_draws_factors_and_windows_uniformly() -> None:
    jitter = LargeScaleJitter(1000, 0.1, 2.0)
    edges = jitter.edges(0, 0, WORDS)
    assert 100 <= edges.min() < 110 and 1990 < edges.max() < 2000
    assert np.abs(np.histogram(edges, bins=10, range=(100, 2000))[0] - 600).max() < 90
    offsets, sizes = jitter.crops(np.tile([1003, 700], (6000, 1)), 0, 0, WORDS)
    assert np.unique(sizes, axis=0).tolist() == [[1000, 700]]
    assert not offsets[:, 1].any()
    assert np.abs(np.bincount(offsets[:, 0]) - 1500).max() < 150  # 0 to 3, both ends included
    both = jitter.crops(np.tile([1500, 1500], (6000, 1)), 0, 0, WORDS)[0]
    assert abs(np.corrcoef(both.T)[0, 1]) < 0.05
    assert abs(np.corrcoef(edges, both[:, 0])[0, 1]) < 0.05


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), word=st.integers(0, 2**40))
def test_large_scale_jitter_fits_any_image_into_its_square(width: int, height: int, word: int) -> None:
    jitter = LargeScaleJitter(128, 0.1, 2.0)
    geometry = Augmentation(jitter=jitter).geometry(
        np.array([width]), np.array([height]), words=np.array([word]), seed=0, epoch=0, min_size=1, max_size=1
    )
    edge = int(jitter.edges(0, 0, np.array([word]))[0])
    factor = min(edge / max(width, height), edge / min(width, height))
    scaled = [max(int(side * factor + 0.5), 1) for side in (height, width)]
    assert geometry.scaled_sizes[0].tolist() == scaled
    assert geometry.sizes[0].tolist() == [min(side, 128) for side in scaled]
    assert (geometry.offsets >= 0).all() and (geometry.offsets + geometry.sizes <= geometry.scaled_sizes).all()
    assert geometry.padded_size == (128, 128)


def cropped(boxes: Sequence[Sequence[float]], **options: float) -> tuple[list, list]:
    result, left = crop_boxes(np.array(boxes, dtype=np.float32), (10, 20), (50, 100), **options)
    return result.tolist(), left.tolist()


def test_boxes_are_moved_clipped_and_dropped_by_what_the_crop_shows_of_them() -> None:
    boxes = [
        [30, 20, 60, 40],  # inside
        [0, 0, 40, 30],  # cut at left and top
        [0, 0, 20, 60],  # ends where the crop begins
        [120, 20, 140, 40],  # begins where the crop ends
        [110, 50, 120.5, 60.5],  # in the corner
        [20, 59.995, 40, 80],  # a two-hundredth of a pixel is left
        [0, 0, 300, 300],  # all round
    ]
    moved, left = cropped(boxes)
    assert left == [True, True, False, False, True, False, True]
    assert moved[0] == [10, 10, 40, 30]
    assert moved[1] == [0, 0, 20, 20]
    assert moved[4] == [90, 40, 100, 50]
    assert moved[6] == [0, 0, 100, 50]


def test_boxes_of_which_too_small_a_part_is_left_are_dropped_when_that_is_asked_for() -> None:
    boxes = [[30, 20, 60, 40], [0, 0, 40, 30], [10, 20, 30, 40], [11, 20, 31, 40]]
    assert cropped(boxes, min_visibility=1.0)[1] == [True, False, False, False]
    # One third, one half and a little more of it are left.
    assert cropped(boxes, min_visibility=0.5)[1] == [True, False, True, True]
    assert cropped(boxes, min_visibility=0.52)[1] == [True, False, False, True]
    assert cropped(boxes, min_visibility=0.0)[1] == [True] * 4
    assert cropped(np.zeros((0, 4)), min_visibility=0.5) == ([], [])


def test_flips_are_as_frequent_as_asked_for_and_independent_of_each_other_and_of_other_epochs_and_seeds() -> None:
    def flips(left_right: float, up_down: float, seed: int = 0, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        side = np.full(6000, 64)
        augmentation = Augmentation(flip_probability=left_right, vertical_flip_probability=up_down)
        whole = augmentation.geometry(side, side, words=WORDS, seed=seed, epoch=epoch, min_size=64, max_size=64)
        return whole.flips, whole.vertical_flips

    first, vertical = flips(0.3, 0.6)
    for found, expected in ((first, 0.3), (vertical, 0.6), (first & vertical, 0.18)):
        assert abs(found.mean() - expected) < 0.025
    for other in (flips(0.3, 0.6, epoch=1), flips(0.3, 0.6, seed=1)):
        assert abs((first & other[0]).mean() - 0.09) < 0.025
        assert abs((vertical & other[1]).mean() - 0.36) < 0.025
    assert [found.mean() for found in (*flips(0, 1), *flips(1, 0))] == [0, 1, 1, 0]
