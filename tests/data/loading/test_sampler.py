"""The order of the images: grouped as MMDetection does, the same for all time; every image once an epoch, or as often
as its repeat factor says, in epochs of one length."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader
from data.loading.sampler import (
    Sampling,
    epoch_copies,
    epoch_length,
    epoch_order,
    evaluation_batches,
    group_by_aspect,
    iterations_per_epoch,
    plan_epoch,
    repeat_factors,
    repeat_numbers,
)
from data.transforms.hash_rng import hash_key, hash_uniform, hash_words, splitmix64

REFERENCE = Path(__file__).parents[2] / "reference" / "pipeline"


def plain_splitmix64(value: int) -> int:
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of the reference implementation (Vigna's splitmix64.c) for the state 1234567.
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(int(splitmix64(state)))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=5))
def test_the_hash_of_numbers_and_of_arrays_is_the_documented_chain(words: list[int]) -> None:
    state = 0
    for word in words:
        state = plain_splitmix64(state ^ (word % 2**64))
    assert int(hash_words(*words)) == state
    last = np.array([words[-1] % 2**64, 5], dtype=np.uint64)
    assert int(hash_words(*words[:-1], last)[0]) == state


def test_sample_keys_differ_by_seed_iteration_and_place() -> None:
    keys = hash_key(0, np.arange(100)[:, None], np.arange(16))
    assert keys.dtype == np.int64
    assert keys.shape == (100, 16)
    assert len(np.unique(keys)) == 1600
    assert not np.isin(hash_key(1, np.arange(100)[:, None], np.arange(16)), keys).any()
    assert hash_key(0, 7, 3) == keys[7, 3]


def test_hash_uniform_is_uniform_and_independent_of_its_neighbors() -> None:
    values = hash_uniform(5, np.arange(20000))
    assert values.min() >= 0 and values.max() < 1
    histogram = np.bincount((values * 10).astype(int), minlength=10)
    assert np.abs(histogram - 2000).max() < 200
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02


def test_the_order_of_an_epoch_is_fixed_for_all_time() -> None:
    # A run that was started with an earlier version must go on with the same order.
    assert epoch_order(0, 0, 8).tolist() == [1, 6, 5, 4, 3, 7, 2, 0]
    assert sorted(epoch_order(3, 5, 1000)) == list(range(1000))
    assert len({tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}) == 9


CASES = [run for run in json.loads((REFERENCE / "batch_sampler.json").read_text())["runs"] if not run["drop_last"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"batch{case['batch_size']}")
def test_grouping_equals_mmdetections_aspect_ratio_sampler(case: dict) -> None:
    widths, heights = np.array(json.loads((REFERENCE / "batch_sampler.json").read_text())["dims_wh"]).T
    grouped = group_by_aspect(np.array(case["order"]), widths < heights, case["batch_size"])
    starts = range(0, len(grouped), case["batch_size"])
    assert [grouped[start : start + case["batch_size"]].tolist() for start in starts] == case["batches"]


@given(
    portrait=st.lists(st.booleans(), min_size=1, max_size=60),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 50),
)
def test_an_epoch_holds_every_image_and_fills_up_only_its_last_batch(
    portrait: list[bool], batch_size: int, seed: int, epoch: int
) -> None:
    num_images = len(portrait)
    widths = np.where(portrait, 30, 50)
    heights = np.full(num_images, 40)
    plan = plan_epoch(widths, heights, seed=seed, epoch=epoch, global_batch_size=batch_size)
    assert plan.shape == (iterations_per_epoch(num_images, batch_size), batch_size)
    assert sorted(plan.ravel()[:num_images]) == list(range(num_images))
    order = epoch_order(seed, epoch, num_images).tolist()
    fill = plan.ravel()[num_images:].tolist()
    assert fill == (order * batch_size)[: len(fill)]
    assert len(fill) < batch_size
    # Batches before the left-overs are of one shape: at most two groups' rests can be mixed.
    num_full = sum(portrait) // batch_size + (num_images - sum(portrait)) // batch_size
    for batch in plan[:num_full]:
        assert len({portrait[image] for image in batch}) == 1


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=0, max_size=40),
    batch_size=st.integers(1, 9),
)
def test_evaluation_batches_hold_every_image_once_with_like_shapes_together(
    sizes: list[tuple[int, int]], batch_size: int
) -> None:
    padded = np.array(sizes, dtype=np.int64).reshape(-1, 2) * 32
    batches = evaluation_batches(padded, batch_size)
    assert sorted(image for batch in batches for image in batch) == list(range(len(sizes)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    shapes = [tuple(padded[image]) for batch in batches for image in batch]
    assert sum(a != b for a, b in zip(shapes, shapes[1:], strict=False)) == max(len(set(shapes)) - 1, 0)


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


def test_an_image_that_comes_again_in_an_epoch_is_flipped_anew(make_dataset: Callable[..., CocoDataset]) -> None:
    dataset = make_dataset([(40, 36)] * 30)
    dataset.labels = np.arange(len(dataset.labels))  # every class in one image: all are wanted sqrt(30) times
    loader = TrainLoader(dataset, min_size=32, max_size=64, batch_size=1, seed=0, sampling=Sampling(1.0))
    assert loader.iterations_per_epoch == math.ceil(30 * math.sqrt(30))
    flips: dict[int, list[bool]] = {}
    for plan in loader.plans(0, loader.iterations_per_epoch):
        flips.setdefault(int(plan.indices[0]), []).append(bool(plan.flips[0]))
    assert sum(len(set(seen)) == 2 for seen in flips.values()) > 20
