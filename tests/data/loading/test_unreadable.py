"""Images that break in mid-run: replaced the same way on any number of processes and workers, and named."""

import numpy as np
import pytest
import torch

from data.images.decode import ImageError
from data.loading.dataset import CocoDataset
from data.loading.loader import EvalLoader, TrainLoader
from data.loading.unreadable import fitted_size, replacement_candidates
from tests.data.batches import MakeDataset, facts, train_loader

# Two groups: portrait are the indices 1, 3, 6 (ids 101, 103, 106).
SIZES = [(64, 48), (50, 60), (90, 40), (48, 64), (70, 70), (64, 33), (40, 44), (60, 50)]


def mended_loader(dataset: CocoDataset, **options: object) -> TrainLoader:
    return train_loader(dataset, **({"max_bad_images": 10} | options))


def spoil(dataset: CocoDataset, *indices: int) -> None:
    for index in indices:
        dataset.path(index).write_bytes(b"\xff\xd8 no image any more")


def test_the_next_image_of_the_group_that_has_room_comes_in_its_place() -> None:
    widths, heights = np.array(SIZES).T
    counts = np.ones(8, dtype=np.int64)
    counts[3] = 40
    order = [int(i) for i in replacement_candidates(1, widths, heights, counts, num_box_rows=16)]
    assert order == [6, 2, 4, 5, 7, 0]
    assert list(replacement_candidates(1, widths, heights, counts, num_box_rows=48))[:2] == [3, 6]


def test_a_replacement_fits_into_what_was_planned() -> None:
    assert fitted_size(64, 48, (64, 85)) == (64, 85)
    assert fitted_size(90, 40, (64, 85)) == (38, 85)
    assert fitted_size(1000, 1, (64, 85)) == (1, 85)


def test_a_broken_image_is_replaced_and_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    whole = list(mended_loader(dataset).batches(0, 8))
    spoil(dataset, 3)
    mended = list(mended_loader(dataset).batches(0, 8))
    assert [batch.padded_size for batch in mended] == [batch.padded_size for batch in whole]
    faults = [fault for batch in mended for fault in batch.unreadable]
    assert len(faults) >= 2  # two epochs
    for before, after in zip(whole, mended, strict=True):
        expected = [106 if image_id == 103 else image_id for image_id in before.image_ids.tolist()]
        assert after.image_ids.tolist() == expected
        assert [fault.image_id for fault in after.unreadable] == [i for i in before.image_ids.tolist() if i == 103]
        for fault in after.unreadable:
            assert fault.replacement_id == 106 and "003.jpg" in fault.message
            assert fault.place == before.places.tolist()[before.image_ids.tolist().index(103)]
        # The replacement has its own boxes, inside the image at its own scale.
        after.to("cpu")
        for number, image_id in enumerate(after.image_ids.tolist()):
            height, width = after.sizes[number].tolist()
            rows = after.valid[number]
            assert int(rows.sum()) == int(dataset.box_counts[image_id - 100])
            corners = after.boxes_xyxy[number][rows]
            assert bool((corners <= torch.tensor([width, height, width, height])).all())


def test_processes_workers_and_a_resume_find_the_same_replacements(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    spoil(dataset, 0, 2, 3)
    whole = list(mended_loader(dataset, batch_size=4).batches(0, 6))
    with_workers = list(mended_loader(dataset, batch_size=4, workers=2).batches(0, 6))
    assert [facts(batch) for batch in with_workers] == [facts(batch) for batch in whole]
    resumed = list(mended_loader(dataset, batch_size=4).batches(4, 6))
    assert [facts(batch) for batch in resumed] == [facts(batch) for batch in whole[4:]]
    halves = [list(mended_loader(dataset, rank=rank, world_size=2).batches(0, 6)) for rank in range(2)]
    for iteration, batch in enumerate(whole):
        parts = [half[iteration] for half in halves]
        assert sum((part.image_ids.tolist() for part in parts), []) == batch.image_ids.tolist()
        assert [fault.image_id for part in parts for fault in part.unreadable] == [
            fault.image_id for fault in batch.unreadable
        ]
        pixels = torch.cat([part.to("cpu").pixels for part in parts])
        assert torch.equal(pixels, batch.to("cpu").pixels)


def test_a_whole_folder_gone_gives_black_images_and_no_endless_search(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    spoil(dataset, *range(8))
    batch = next(mended_loader(dataset, max_bad_images=2, batch_size=1).batches(0, 1))
    assert len(batch.unreadable) == 3  # one more than the limit, which ends a run
    assert batch.unreadable[0].place == 0 and batch.unreadable[1].place is None
    assert all(fault.replacement_id is None for fault in batch.unreadable)
    assert not batch.valid.any() and not batch.to("cpu").pixels.any()


def test_an_image_of_another_size_counts_as_unreadable(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    dataset.path(3).write_bytes(dataset.path(2).read_bytes())
    faults = [fault for batch in mended_loader(dataset).batches(0, 4) for fault in batch.unreadable]
    assert {fault.image_id for fault in faults} == {103}
    assert "is 90x40 pixels" in faults[0].message


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_gives_a_black_image_and_still_counts_the_image(make_dataset: MakeDataset, workers: int) -> None:
    dataset = make_dataset(SIZES, training=False)
    spoil(dataset, 3, 4)
    settings = {"min_size": 64, "max_size": 112, "batch_size": 2, "workers": workers}
    batches = list(EvalLoader(dataset, **settings, max_bad_images=10).batches())
    assert sorted(i for batch in batches for i in batch.image_ids.tolist()) == list(range(100, 108))
    assert {fault.image_id for batch in batches for fault in batch.unreadable} == {103, 104}
    for batch in batches:
        pixels = batch.to("cpu").pixels
        for number, image_id in enumerate(batch.image_ids.tolist()):
            assert bool(pixels[number].any()) == (image_id not in (103, 104))
    with pytest.raises(ImageError, match=r"00[34]\.jpg"):
        list(EvalLoader(dataset, **settings).batches())
