"""The order of the images: grouped as MMDetection does, every image once an epoch, the same for all time."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.loading.sampler import epoch_order, evaluation_batches, group_by_aspect, iterations_per_epoch, plan_epoch
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


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


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


def test_a_plan_for_all_of_coco_takes_well_under_a_tenth_of_a_second() -> None:
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(300, 641, 118_000), rng.integers(300, 641, 118_000)
    start = time.process_time()
    plan_epoch(widths, heights, seed=0, epoch=1, global_batch_size=16)
    assert time.process_time() - start < 0.1


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
