"""Several sets as one: every image, box and mask is that of its own set; shares of sets and classes."""

from collections import Counter

import numpy as np
import pytest

from data.errors import DataError
from data.loading.dataset import ConcatDataset, sets_of
from data.loading.loader import TrainLoader
from data.loading.sampler import Sampling, image_factors


@pytest.fixture
def sets(make_dataset, tmp_path):
    """Two sets of other images with the same file names."""
    one = make_dataset([(40, 36), (36, 50), (44, 33)], masks=True)
    one.images_dir = (tmp_path / "first").absolute()
    one.images_dir.mkdir()
    for image in tmp_path.glob("*.jpg"):
        image.rename(one.images_dir / image.name)
    return ConcatDataset([one, make_dataset([(48, 40), (33, 60)], masks=True)], ["one", "two"])


def test_images_boxes_and_masks_are_those_of_the_sets(sets):
    assert len(sets) == 5 and sets_of(sets) == {"one": slice(0, 3), "two": slice(3, 5)}
    assert len(set(sets.image_ids.tolist())) == 5 and sets.has_masks
    first_box = 0
    for index in range(5):
        part, place = (sets.parts[0], index) if index < 3 else (sets.parts[1], index - 3)
        assert sets.path(index) == part.path(place)
        assert np.array_equal(sets.image(index), part.image(place))
        assert (sets.widths[index], sets.num_bytes(index)) == (part.widths[place], part.num_bytes(place))
        boxes, labels = sets.boxes(index)
        assert np.array_equal(boxes, part.boxes(place)[0]) and len(boxes) == sets.box_counts[index]
        rows = slice(first_box, first_box + len(boxes))
        assert np.array_equal(sets.boxes_xyxy[rows], boxes) and np.array_equal(sets.labels[rows], labels)
        first_box += len(boxes)
        pairs = zip(sets.bitmaps(index), part.bitmaps(place), strict=True)
        assert all(np.array_equal(one.bits, other.bits) for one, other in pairs)
        assert len(sets.whole_masks(index)) == len(boxes)


@pytest.mark.parametrize("version", [1, 2])
def test_sets_come_by_their_shares_in_every_epoch_and_the_epoch_keeps_its_length(sets, version):
    shares = {"one": 1.0, "two": 4.0}
    loader = TrainLoader(
        sets,
        min_size=32,
        max_size=64,
        batch_size=5,
        seed=0,
        sampling=Sampling(set_shares=shares, repeat_times=4),
        image_order=version,
    )
    assert loader.images_per_epoch == 20
    seen = Counter()
    for plan in loader.plans(0, loader.iterations_per_epoch * 25):
        seen.update(plan.indices.tolist())
    per_epoch = np.array([seen[index] for index in range(5)]) / 25
    assert per_epoch == pytest.approx([4 / 3] * 3 + [8, 8], abs=0.35)


def test_class_aware_factors_are_those_of_drawing_a_class_and_then_one_of_its_images():
    # Image 0 shows class 0 twice and class 1, images 1 to 3 class 1, image 4 nothing.
    counts, labels = np.array([3, 1, 1, 1, 0]), np.array([0, 0, 1, 1, 1, 1])
    names = ["rare", "common", "unseen"]

    def factors(sampling):
        return image_factors(sampling, counts, labels, names, {})

    assert factors(Sampling(class_shares={})) == pytest.approx([2.5 + 2.5 / 4, *[2.5 / 4] * 3, 0])
    assert factors(Sampling(class_shares={"rare": 0})) == pytest.approx([5 / 4] * 4 + [0])
    assert factors(Sampling(class_shares={"common": 3, "unseen": 9})) == pytest.approx(
        [1.25 + 3.75 / 4, *[3.75 / 4] * 3, 0]
    )
    assert factors(Sampling(class_shares={"common": 0}, repeat_times=2)) == pytest.approx([10, 0, 0, 0, 0])
    assert factors(Sampling()) is None
    assert factors(Sampling(0.99, rounds_up=True)).tolist() == [3, 2, 2, 2, 1]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(class_shares={"dog": 1}), "no class 'dog', but 'cat'"),
        (Sampling(class_shares={"cat": 0}), "every class has the share 0"),
        (Sampling(set_shares={"a": 1}), "set 'b' has no share"),
        (Sampling(set_shares={"a": 1, "b": 1, "c": 1}), "no set 'c'"),
        (Sampling(set_shares={"a": 1, "b": 1}, class_shares={}), "a set with a share has no image of a class"),
    ],
)
def test_shares_that_cannot_be_are_named(sampling, words):
    with pytest.raises(DataError, match=words):
        image_factors(sampling, np.array([1, 0]), np.array([0]), ["cat"], {"a": slice(0, 1), "b": slice(1, 2)})
