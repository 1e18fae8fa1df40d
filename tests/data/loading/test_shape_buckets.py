from collections.abc import Callable

import numpy as np
import pytest

from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader
from data.loading.shape_buckets import bucket_of, shape_buckets
from data.transforms.augmentation import Augmentation, LargeScaleJitter


def test_the_usual_sizes_have_nine_buckets():
    buckets = shape_buckets(800, 1333)
    lying = [(800, 960), (800, 1088), (800, 1216), (800, 1344)]
    assert sorted(buckets) == sorted([*lying, *((width, height) for height, width in lying), (1344, 1344)])


@pytest.mark.parametrize(("min_size", "max_size"), [(800, 1333), (320, 533), (512, 512), (100, 1000)])
def test_every_batch_fits_and_no_smaller_bucket_would_do(min_size, max_size):
    buckets = shape_buckets(min_size, max_size)
    assert all(side % 32 == 0 for bucket in buckets for side in bucket)
    rng = np.random.default_rng(0)
    for _ in range(300):
        short = rng.integers(1, min_size + 1)
        size = (int(short), int(rng.integers(short, max_size + 1)))
        size = size[::-1] if rng.random() < 0.5 else size
        height, width = bucket = bucket_of(size, buckets)
        assert bucket in buckets and height >= size[0] and width >= size[1]
        for other in buckets:
            fits = other[0] >= size[0] and other[1] >= size[1]
            assert not fits or other[0] * other[1] >= height * width


def test_what_fits_no_bucket_keeps_its_size():
    assert bucket_of((2048, 64), shape_buckets(320, 533)) == (2048, 64)
    assert bucket_of((800, 832), []) == (800, 832)


def test_a_training_with_few_shapes_sees_buckets_the_same_on_any_number_of_processes(
    make_dataset: Callable[..., CocoDataset],
) -> None:
    dataset = make_dataset([(60 + 7 * i, 64) for i in range(9)] + [(64, 90 + 5 * i) for i in range(7)])

    def plans(**options):
        loader = TrainLoader(dataset, min_size=64, max_size=160, seed=3, few_shapes=True, **options)
        return list(loader.plans(0, 8))

    buckets = shape_buckets(64, 160)
    jittered = plans(batch_size=4, augmentation=Augmentation(jitter=LargeScaleJitter(128, 0.1, 2.0)))
    assert {plan.padded_size for plan in jittered} == {(128, 128)}
    whole = plans(batch_size=4)
    assert {plan.padded_size for plan in whole} <= set(buckets)
    for plan in whole:
        assert (plan.sizes <= plan.padded_size).all()
    for rank in range(2):
        part = plans(batch_size=2, world_size=2, rank=rank)
        assert [plan.padded_size for plan in part] == [plan.padded_size for plan in whole]
