"""Groups of a global batch: of like shape, padded apart, the same for all divisions into processes and micro-steps."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import CocoDataset, TrainLoader
from data.loading.padding_groups import GROUP_SIZE, group_size, grouped
from data.transforms.geometry import padded_size

SIDES = [(40, 36), (36, 40), (80, 40), (44, 90), (60, 40), (33, 50)]


def loader_of(
    dataset: CocoDataset, rank: int, world_size: int, batch_size: int, accumulate: int, **more
) -> TrainLoader:
    settings = {"min_size": 64, "max_size": 150, "seed": 5, **more}
    return TrainLoader(
        dataset, batch_size=batch_size, accumulate=accumulate, rank=rank, world_size=world_size, **settings
    )


def images_of(dataset: CocoDataset, division: tuple[int, int, int], **more) -> dict[tuple[int, int], tuple]:
    """(iteration, place) -> image, flip and padded size, from all processes of a division."""
    found = {}
    for rank in range(division[0]):
        loader = loader_of(dataset, rank, *division, **more)
        for plan in loader.plans(0, 2 * loader.iterations_per_epoch):
            for place, image, flip in zip(
                plan.places.tolist(), plan.indices.tolist(), plan.flips.tolist(), strict=True
            ):
                found[plan.iteration, place] = image, flip, plan.padded_size
    return found


@given(
    sides=st.lists(st.tuples(st.integers(32, 200), st.integers(32, 200)), min_size=1, max_size=60),
    number=st.sampled_from([1, 2, 3, 4, 6, 12]),
    turn=st.integers(0, 2**62),
)
def test_groups_are_a_permutation_of_like_shapes_with_one_mixed_group_at_most(sides, number, turn):
    sizes = np.resize(np.array(sides), (2, 12, 2))
    order = grouped(sizes, number, np.array([turn, 0]))
    assert (np.sort(order, axis=1) == np.arange(12)).all()
    by_group = np.take_along_axis(sizes, order[..., None], axis=1).reshape(2, -1, number, 2)
    tall = by_group[..., 0] > by_group[..., 1]
    assert ((tall.any(axis=-1) & ~tall.all(axis=-1)).sum(axis=1) <= 1).all()
    assert padded_size(by_group).prod(axis=-1).sum() <= padded_size(sizes).prod(axis=-1).sum() * (12 // number)
    if turn % (12 // number) == 0:  # otherwise the groups stand elsewhere
        assert (grouped(sizes[:1], number, np.array([0])) == order[:1]).all()


@pytest.mark.parametrize(("batch", "expected"), [(1, 1), (2, 2), (16, 16), (24, 12), (128, 16), (17, 1), (20, 10)])
def test_a_group_is_a_divisor_of_the_batch(batch, expected):
    assert group_size(batch) == expected <= GROUP_SIZE


def test_all_divisions_see_the_same_images_and_sizes_and_fewer_pixels_than_before(
    make_dataset: Callable[..., CocoDataset],
) -> None:
    dataset = make_dataset(SIDES * 11)
    divisions = [(1, 16, 2), (2, 8, 2), (8, 2, 2), (16, 2, 1), (1, 1, 32), (4, 4, 2)]
    first, *others = [images_of(dataset, division) for division in divisions]
    assert all(other == first for other in others)
    before = images_of(dataset, (1, 16, 2), image_order=2)
    for iteration in range(6):
        places = [(iteration, place) for place in range(32)]
        assert len({before[key][2] for key in places}) == 1  # the batch's
        assert sorted(first[key][:2] for key in places) == sorted(before[key][:2] for key in places)
    pixels = [sum(int(np.prod(size)) for *_, size in found.values()) for found in (first, before)]
    assert pixels[0] < 0.95 * pixels[1]


def test_up_to_sixteen_images_nothing_changes_and_a_process_with_more_pads_them_as_the_largest(
    make_dataset: Callable[..., CocoDataset],
) -> None:
    dataset = make_dataset(SIDES * 11)
    assert images_of(dataset, (2, 4, 2)) == images_of(dataset, (2, 4, 2), image_order=2)
    apart, together = images_of(dataset, (1, 16, 2)), images_of(dataset, (1, 32, 1))
    for iteration in range(3):
        sizes = {apart[iteration, place][2] for place in range(32)}
        largest = tuple(map(max, zip(*sizes, strict=True)))
        assert {together[iteration, place][2] for place in range(32)} == {largest}


@pytest.mark.parametrize("division", [(1, 16, 2), (2, 8, 2), (1, 32, 1), (1, 12, 4), (1, 32, 2)])
def test_no_batch_is_larger_than_the_largest_that_is_tried(make_dataset, division):
    dataset = make_dataset(SIDES * 11)
    loader = loader_of(dataset, 0, *division, few_shapes=True)
    height, width = loader.largest_batch(2).padded_size
    plans = list(loader.plans(0, 2 * loader.iterations_per_epoch))
    largest = max(plan.padded_size[0] * plan.padded_size[1] for plan in plans)
    assert largest <= height * width
    if 16 % division[1] == 0:
        assert largest == height * width
