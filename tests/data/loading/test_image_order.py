"""The order of the images, batch by batch: every image once an epoch, or as often as its factor says, in batches of one
shape; the same however much of it is asked for, and the same for all time."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loading.dataset import CocoDataset
from data.loading.image_order import NEWEST_ORDER, ORDERS, ImageOrder
from data.loading.sampler import plan_epoch
from data.transforms.hash_rng import SORTED_PLACES, hash_permutation
from tests.data.batches import train_loader


@given(number=st.integers(1, 3 * SORTED_PLACES), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_takes_every_place_to_another(number: int, seed: int) -> None:
    places = np.arange(number)
    shuffled = hash_permutation(places, number, seed, 5)
    assert np.array_equal(np.sort(shuffled), places)
    some = places[:: max(number // 7, 1)].reshape(1, -1)
    assert np.array_equal(hash_permutation(some, number, seed, 5), shuffled[some])


@pytest.mark.parametrize("number", [60, 5003])
def test_permutations_are_even(number: int) -> None:
    drawn = np.array([hash_permutation(np.arange(number), number, seed) for seed in range(200)])
    # Where a place goes, and how far from its neighbors: chi squared of 30 by 30 cells, and of the differences.
    cells = np.histogram2d(np.tile(np.arange(number), 200), drawn.reshape(-1), bins=30)[0]
    expected = 200 * (number / 30) ** 2 / number
    assert ((cells - expected) ** 2 / expected).sum() / 29**2 < 1.2
    for lag in (1, 71 % number):
        differences = np.bincount(((drawn[:, lag:] - drawn[:, :-lag]) % number).reshape(-1), minlength=number)[1:]
        excess = ((differences - differences.mean()) ** 2 / differences.mean()).sum() - (number - 2)
        assert abs(excess) < 5 * np.sqrt(2 * number)


def test_the_order_of_an_epoch_is_fixed_for_all_time() -> None:
    # A run that was started with an earlier version must go on with the same order.
    sides = np.arange(40, 52), np.arange(46, 34, -1)
    factors = np.where(np.arange(12) % 3 == 0, 1.75, 1.0)
    once = ImageOrder(*sides, seed=3, global_batch_size=4)
    often = ImageOrder(*sides, seed=3, global_batch_size=4, factors=factors)
    many = ImageOrder(np.full(9000, 5), np.full(9000, 4), seed=3, global_batch_size=4)
    assert once.batches(1, np.arange(3))[0].tolist() == [[10, 4, 11, 7], [8, 5, 6, 9], [0, 2, 1, 3]]
    images, repeats = often.batches(1, np.arange(4))
    assert images.tolist() == [[2, 0, 1, 0], [8, 3, 9, 6], [6, 4, 5, 7], [10, 3, 11, 8]]
    assert repeats.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert many.batches(1, np.array([0, 2249]))[0].tolist() == [[1335, 1786, 835, 203], [6826, 4865, 3163, 2063]]


@given(
    portrait=st.lists(st.booleans(), min_size=1, max_size=60),
    factors=st.none() | st.lists(st.floats(1, 5), min_size=60, max_size=60),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 50),
)
def test_an_epoch_holds_every_image_as_often_as_wanted_in_batches_of_one_shape(
    portrait: list[bool], factors: list[float] | None, batch_size: int, seed: int, epoch: int
) -> None:
    tall = np.array(portrait)
    sides, wanted = (np.where(tall, 30, 50), np.full(len(tall), 40)), np.ones(len(tall))
    if factors is not None:
        wanted = np.array(factors[: len(tall)])
    settings = {"seed": seed, "global_batch_size": batch_size, "factors": None if factors is None else wanted}
    order, first = ImageOrder(*sides, **settings), ORDERS[1](*sides, **settings)
    # The learning rate depends on it: no epoch, and no version of the order, has another number.
    assert (order.length, order.num_batches) == (first.length, first.num_batches)
    images, repeats = order.batches(epoch, np.arange(order.num_batches))
    assert images.shape == repeats.shape == (order.num_batches, batch_size)
    # The factors are stretched by what makes their sum a whole number.
    wanted = wanted * order.length / wanted.sum()
    flat, times = images.reshape(-1)[: order.length], repeats.reshape(-1)[: order.length]
    counts = np.bincount(flat, minlength=len(tall))
    assert (counts >= np.floor(wanted - 1e-6)).all() and (counts <= np.ceil(wanted + 1e-6)).all()
    for image in range(len(tall)):
        assert sorted(times[flat == image]) == list(range(counts[image]))
    # No augmentation is drawn twice, not even for what the last batch is filled up with.
    assert len(set(zip(images.ravel().tolist(), repeats.ravel().tolist(), strict=True))) == images.size
    mixed = tall[images].any(axis=1) & ~tall[images].all(axis=1)
    assert not mixed[:-2].any() and mixed.sum() <= 1
    for number in range(order.num_batches):
        alone = order.batches(epoch, np.array([number]))
        assert np.array_equal(alone[0][0], images[number]) and np.array_equal(alone[1][0], repeats[number])


def test_over_the_epochs_an_image_is_seen_as_often_as_its_factor_says_and_anywhere() -> None:
    wanted = np.array([1.0, 1.25, 1.5, 1.9, 2.01, 3.7, 1.0, 1.64])  # their sum is a whole number
    order = ImageOrder(np.full(8, 5), np.full(8, 4), seed=4, global_batch_size=1, factors=wanted)
    assert order.length == 14
    epochs = np.array([order.batches(epoch, np.arange(14))[0].reshape(-1) for epoch in range(2000)])
    counts = np.array([(epochs == image).sum(axis=1) for image in range(8)])
    # Standard error of a mean of 2,000 draws with p (1 - p) <= 1/4 is 0.011.
    assert np.abs(counts.mean(axis=1) - wanted).max() < 0.05
    assert np.abs((epochs == 5).mean(axis=0) - 3.7 / 14).max() < 0.05
    assert (epochs[:, 1:] == epochs[:, :-1]).mean() < 0.12


def test_a_loader_takes_the_order_of_its_version(make_dataset: Callable[..., CocoDataset]) -> None:
    dataset = make_dataset([(40, 36), (36, 40), (50, 40)] * 5)
    sides = dataset.widths, dataset.heights
    order = ImageOrder(*sides, seed=3, global_batch_size=2)
    expected = {
        1: plan_epoch(*sides, seed=3, epoch=1, global_batch_size=2),
        2: order.batches(1, np.arange(order.num_batches))[0],
        3: order.batches(1, np.arange(order.num_batches))[0],  # it differs beyond 16 images: test_padding_groups.py
    }
    assert NEWEST_ORDER == max(expected) == max(ORDERS)
    for version, batches in expected.items():
        loader = train_loader(dataset, image_order=version)
        iterations = loader.iterations_per_epoch
        plans = loader.plans(iterations, 2 * iterations)
        assert np.array_equal([plan.indices for plan in plans], batches)
