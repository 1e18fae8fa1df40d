"""Repeat factors: LVIS's formula, and epochs of one length in which an image is seen as often as its factor says."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader
from data.loading.repeat_factors import epoch_copies, epoch_length, repeat_factors
from data.loading.sampler import plan_epoch, repeat_numbers


def test_factors_equal_the_formula_on_a_small_set() -> None:
    # Images 0 to 9; class 0 is in all but 9, class 1 in images 2 and 3 (twice in 3), class 2 in image 3, 9 is empty.
    images = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 3, 3, 0])
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 0])
    factors = repeat_factors(images, labels, 10, 0.5)
    assert factors[3] == math.sqrt(0.5 / 0.1)
    assert factors[2] == math.sqrt(0.5 / 0.2)
    assert factors[[0, 1, 4, 5, 6, 7, 8, 9]].tolist() == [1.0] * 8


@given(
    boxes=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=40),
    threshold=st.floats(0.01, 1.0),
)
def test_factors_equal_the_formula_written_as_loops(boxes: list[tuple[int, int]], threshold: float) -> None:
    classes_of = [{label for image, label in boxes if image == number} for number in range(8)]
    expected = []
    for classes in classes_of:
        factor = 1.0
        for label in classes:
            fraction = sum(label in others for others in classes_of) / 8
            factor = max(factor, math.sqrt(threshold / fraction))
        expected.append(factor)
    images, labels = (np.array([box[side] for box in boxes], dtype=np.int64) for side in (0, 1))
    assert repeat_factors(images, labels, 8, threshold).tolist() == pytest.approx(expected, rel=1e-15)


@given(factors=st.lists(st.floats(1, 5), min_size=1, max_size=30), seed=st.integers(0, 2**63 - 1))
def test_copies_are_the_factor_rounded_and_their_sum_is_that_of_the_factors(factors: list[float], seed: int) -> None:
    wanted = np.array(factors)
    length = epoch_length(wanted)
    assert abs(length - wanted.sum()) <= 1 + 1e-6
    for epoch in range(3):
        copies = epoch_copies(wanted, seed=seed, epoch=epoch)
        assert (copies >= np.floor(wanted)).all() and (copies <= np.ceil(wanted)).all()
        assert length - 1 <= copies.sum() <= length


def test_over_the_epochs_an_image_is_seen_as_often_as_its_factor_says() -> None:
    wanted = np.array([1.0, 1.25, 1.5, 1.9, 2.01, 3.7, 1.0])
    counts = np.array([epoch_copies(wanted, seed=4, epoch=epoch) for epoch in range(4000)])
    # Standard error of a mean of 4,000 draws with p (1 - p) <= 1/4 is 0.008.
    assert np.abs(counts.mean(axis=0) - wanted).max() < 0.03
    # Images are rounded up in ever other company: no two are tied.
    assert len({tuple(row) for row in counts.tolist()}) > 15
    assert not np.array_equal(counts[:20], [epoch_copies(wanted, seed=5, epoch=epoch) for epoch in range(20)])


@pytest.mark.parametrize("global_batch_size", [1, 3, 4, 16])
def test_all_epochs_have_the_same_number_of_batches_and_hold_every_image(global_batch_size: int) -> None:
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(40, 90, 50), rng.integers(40, 90, 50)
    factors = np.where(rng.random(50) < 0.4, 1 + 3 * rng.random(50), 1.0)
    iterations = -(-epoch_length(factors) // global_batch_size)
    for epoch in range(40):
        batches = plan_epoch(widths, heights, seed=1, epoch=epoch, global_batch_size=global_batch_size, factors=factors)
        assert batches.shape == (iterations, global_batch_size)
        seen = np.bincount(batches.reshape(-1), minlength=50)
        copies = epoch_copies(factors, seed=1, epoch=epoch)
        # What the last batch is filled up with comes on top.
        assert (seen >= copies).all() and seen.sum() - copies.sum() <= global_batch_size
        portrait = (widths < heights)[batches]
        mixed = portrait.any(axis=1) & ~portrait.all(axis=1)
        assert mixed.sum() <= 2


def test_copies_of_an_image_do_not_follow_each_other() -> None:
    square = np.full(200, 64)
    order = plan_epoch(square, square, seed=0, epoch=0, global_batch_size=1, factors=np.full(200, 2.0)).reshape(-1)
    assert (order[1:] == order[:-1]).sum() < 6


def test_factors_of_one_change_nothing() -> None:
    sides = np.arange(40, 67), np.arange(66, 39, -1)
    for epoch in range(3):
        plain = plan_epoch(*sides, seed=2, epoch=epoch, global_batch_size=4)
        assert np.array_equal(plan_epoch(*sides, seed=2, epoch=epoch, global_batch_size=4, factors=np.ones(27)), plain)


@given(st.lists(st.integers(0, 4), max_size=30))
def test_repeats_are_counted_from_the_first_occurrence(images: list[int]) -> None:
    numbers = repeat_numbers(np.array(images, dtype=np.int64))
    assert numbers.tolist() == [images[:place].count(image) for place, image in enumerate(images)]


def rare_class_loader(dataset: CocoDataset, **options: object) -> TrainLoader:
    settings = {"min_size": 32, "max_size": 64, "batch_size": 4, "seed": 0, "repeat_threshold": 1.0}
    return TrainLoader(dataset, **(settings | options))


def test_a_loader_repeats_images_of_rare_classes_alike_on_any_number_of_processes_and_after_a_resume(
    make_dataset: Callable[..., CocoDataset],
) -> None:
    dataset = make_dataset([(40, 36), (36, 40)] * 8)
    image_of_box = np.repeat(np.arange(16), dataset.box_counts)
    factors = repeat_factors(image_of_box, dataset.labels, 16, 1.0)
    assert factors.max() > 1.1
    loader = rare_class_loader(dataset)
    assert loader.iterations_per_epoch == -(-epoch_length(factors) // 4) > 4
    last = 3 * loader.iterations_per_epoch
    whole = [plan.indices.tolist() for plan in loader.plans(0, last)]
    ranks = [rare_class_loader(dataset, batch_size=2, world_size=2, rank=rank) for rank in range(2)]
    halves = [[plan.indices.tolist() for plan in rank.plans(0, last)] for rank in ranks]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
    for first in (1, loader.iterations_per_epoch + 2, last - 1):
        resumed = rare_class_loader(dataset).plans(first, last)
        assert [plan.indices.tolist() for plan in resumed] == whole[first:]


def test_an_image_that_comes_again_in_an_epoch_is_flipped_anew(make_dataset: Callable[..., CocoDataset]) -> None:
    dataset = make_dataset([(40, 36)] * 30)
    dataset.labels = np.arange(len(dataset.labels))  # every class in one image: all are wanted sqrt(30) times
    loader = rare_class_loader(dataset, batch_size=1)
    assert loader.iterations_per_epoch == math.ceil(30 * math.sqrt(30))
    flips: dict[int, list[bool]] = {}
    for plan in loader.plans(0, loader.iterations_per_epoch):
        flips.setdefault(int(plan.indices[0]), []).append(bool(plan.flips[0]))
    assert sum(len(set(seen)) == 2 for seen in flips.values()) > 20
