"""The stream of batches: a property of seed and global batch size, whatever the processes and workers."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from data import Augmentation, LargeScaleJitter, PhotometricDistortion, ScaleSampling
from data.images.decode import ImageError
from data.loading.dataset import CocoDataset
from data.loading.loader import EvalLoader
from data.loading.sampler import Sampling
from tests.data.batches import SIZES, TENSORS, MakeDataset, facts, train_loader


def eval_loader(dataset: CocoDataset, **options: object) -> EvalLoader:
    return EvalLoader(dataset, **({"min_size": 64, "max_size": 112, "batch_size": 2} | options))


def test_workers_started_before_the_first_batch_are_those_that_serve(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    expected = [facts(raw) for raw in train_loader(dataset).batches(3, 9)]
    before = {process.pid for process in multiprocessing.active_children()}
    with closing(train_loader(dataset, workers=2)) as loader:
        loader.start()
        started = {process.pid for process in multiprocessing.active_children()} - before
        assert len(started) == 2
        assert [facts(raw) for raw in loader.batches(3, 9)] == expected
        assert {process.pid for process in multiprocessing.active_children()} - before == started


def test_epochs_of_so_many_iterations_see_the_passes_over_the_set_as_ever(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    usual, counted = train_loader(dataset), train_loader(dataset, epoch_iterations=4)
    assert (usual.iterations_per_epoch, counted.iterations_per_epoch) == (6, 4)
    assert [facts(raw) for raw in counted.batches(3, 13)] == [facts(raw) for raw in usual.batches(3, 13)]


def test_workers_change_nothing_and_serve_several_passes(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    expected = [facts(raw) for raw in train_loader(dataset).batches(0, 14)]
    with closing(train_loader(dataset, workers=2)) as loader:
        assert [facts(raw) for raw in loader.batches(0, 14)] == expected
        workers = {process.pid for process in multiprocessing.active_children()}
        assert len(workers) == 2
        abandoned = loader.batches(0, 14)
        next(abandoned)
        assert [facts(raw) for raw in loader.batches(4, 14)] == expected[4:]
        handles = num_open_files()
        for _ in range(3):
            assert [facts(raw) for raw in loader.batches(9, 12)] == expected[9:12]
        assert {process.pid for process in multiprocessing.active_children()} == workers
        assert num_open_files() <= handles
        del abandoned
    assert not multiprocessing.active_children()


def num_open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_every_image_is_seen_once_an_epoch_with_flips_of_its_own(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([(64, 48)] * 20)
    flips_by_epoch = []
    loader = train_loader(dataset, batch_size=4)
    for epoch in range(3):
        first = epoch * loader.iterations_per_epoch
        flips = {}
        for raw in loader.batches(first, first + loader.iterations_per_epoch):
            assert raw.plan.epoch == epoch
            flips.update(zip(raw.image_ids.tolist(), raw.flips, strict=True))
        assert set(flips) == set(dataset.image_ids.tolist())
        flips_by_epoch.append(tuple(flips[i] for i in sorted(flips)))
    assert len(set(flips_by_epoch)) == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 1},
        {"batch_size": 3, "few_shapes": True},
        {"limit_batches": 2},
        {"sampling": Sampling(0.9)},
        {"augmentation": Augmentation(scales=ScaleSampling(((112, 64), (112, 48))))},
        {"augmentation": Augmentation(jitter=LargeScaleJitter(96, 0.5, 2.0), color=PhotometricDistortion())},
    ],
    ids=str,
)
def test_the_largest_batch_is_as_large_as_the_largest_that_comes_and_can_be_trained_on(
    make_dataset: MakeDataset, options: dict
) -> None:
    loader = train_loader(make_dataset(SIZES), **options)
    plans = list(loader.plans(0, 12 * loader.iterations_per_epoch))
    largest = loader.largest_batch(12)
    height, width = largest.padded_size
    assert height * width == max(plan.padded_size[0] * plan.padded_size[1] for plan in plans)
    assert largest.plan.num_box_rows == max(plan.num_box_rows for plan in plans)
    assert len(largest.pixels) >= max(loader.dataset.num_bytes(plan.indices).sum() for plan in plans)
    batch = largest.to("cpu")
    assert batch.pixels.shape == (len(plans[0].indices), 3, height, width)
    assert batch.valid.shape == (len(batch), largest.plan.num_box_rows) and batch.valid.all()
    x1, y1, x2, y2 = batch.boxes_xyxy.unbind(-1)
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)).all()
    real = next(loader.batches(0, 1))
    for name in TENSORS:
        assert getattr(largest, name).dtype == getattr(real, name).dtype, name


def test_the_largest_batch_mixes_the_shapes_that_are_left_over(make_dataset: MakeDataset) -> None:
    even = train_loader(make_dataset([(112, 64)] * 4 + [(64, 112)] * 4), batch_size=4)
    assert sorted(even.largest_batch(3).padded_size) == [64, 128]
    odd = train_loader(make_dataset([(112, 64)] * 5 + [(64, 112)] * 5), batch_size=4)
    assert odd.largest_batch(3).padded_size == (128, 128)


def test_a_limited_epoch_is_the_start_of_the_whole_one(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    whole, limited = train_loader(dataset), train_loader(dataset, limit_batches=2)
    assert (whole.iterations_per_epoch, limited.iterations_per_epoch) == (6, 2)
    of_whole = [*whole.plans(0, 2), *whole.plans(6, 8)]
    for ours, theirs in zip(limited.plans(0, 4), of_whole, strict=True):
        assert ours.indices.tolist() == theirs.indices.tolist()
        assert ours.flips.tolist() == theirs.flips.tolist()


def test_rows_for_boxes_are_one_count_for_the_global_batch(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    dataset.box_counts = dataset.box_counts.copy()
    dataset.box_counts[:] = 3
    dataset.box_counts[4] = 17
    rows = {
        iteration: {
            plan.num_box_rows
            for rank in range(2)
            for plan in train_loader(dataset, world_size=2, rank=rank).plans(iteration, iteration + 1)
        }
        for iteration in range(3)
    }
    assert sorted(rows.values(), key=max) in ([{16}, {16}, {32}], [{16}, {32}, {32}])


def test_loading_leaves_torchs_global_random_state_alone(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES)
    before = torch.get_rng_state()
    assert len(list(train_loader(dataset).batches(0, 2))) == 2
    assert len(list(eval_loader(dataset).batches())) == 6
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_the_stream_with_its_name_and_no_workers_traceback(
    make_dataset: MakeDataset, tmp_path: Path, workers: int
) -> None:
    dataset = make_dataset(SIZES)
    file = tmp_path / "005.jpg"
    file.write_bytes(file.read_bytes()[:700])
    with closing(train_loader(dataset, workers=workers)) as loader:
        with pytest.raises(ImageError) as caught:
            list(loader.batches(0, 6))
        assert str(caught.value).startswith(f"{file}: cannot be decoded")
        assert "Traceback" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_evaluation_sees_every_image_once_also_when_a_process_has_none(
    make_dataset: MakeDataset, world_size: int
) -> None:
    dataset = make_dataset(SIZES, training=False)
    seen, counts = [], []
    alone = {raw.iteration: facts(raw) for raw in eval_loader(dataset).batches()}
    assert len(alone) == 6
    for rank in range(world_size):
        loader = eval_loader(dataset, rank=rank, world_size=world_size)
        assert loader.image_ids.tolist() == dataset.image_ids.tolist()
        batches = list(loader.batches())
        assert len(batches) == len(loader)
        for raw in batches:
            assert facts(raw) == alone[raw.iteration]
            seen += raw.image_ids.tolist()
            largest = raw.sizes.max(dim=0).values.tolist()
            assert [-(-side // 32) * 32 for side in largest] == list(raw.padded_size)
            assert not any(raw.flips)
        counts.append(sum(len(raw) for raw in batches))
        assert loader.num_images == counts[-1]
    assert sorted(seen) == dataset.image_ids.tolist()
    if world_size == 8:
        assert 0 in counts


def test_a_limited_evaluation_takes_the_first_images_of_the_file(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(SIZES, training=False)
    seen = []
    for rank in range(2):
        loader = eval_loader(dataset, limit_batches=2, rank=rank, world_size=2)
        assert loader.image_ids.tolist() == dataset.image_ids[:8].tolist()
        seen += [image_id for raw in loader.batches() for image_id in raw.image_ids.tolist()]
    assert sorted(seen) == dataset.image_ids[:8].tolist()


def test_like_shapes_are_evaluated_together(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([(64, 48), (48, 64)] * 6, training=False)
    for raw in eval_loader(dataset, batch_size=3).batches():
        assert len(set(raw.native_sizes)) == 1


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_workers_go_on_after_a_signal_to_the_whole_group(name: str, make_dataset: MakeDataset) -> None:
    with closing(train_loader(make_dataset(SIZES), workers=1)) as loader:
        batches = loader.batches(0, 20)
        next(batches)
        (worker,) = multiprocessing.active_children()
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # as torchrun: not from the main process
        assert len(list(batches)) == 19
        assert worker.is_alive()


def test_workers_end_when_the_main_process_terminates_them(make_dataset: MakeDataset) -> None:
    loader = train_loader(make_dataset(SIZES), workers=1)
    next(loader.batches(0, 20))
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=10)
    assert not worker.is_alive()
    loader.close()


ORPHANS = """
import multiprocessing, os, sys, time
from data.loading import workers
from data.coco.annotations import read_coco
from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader
folder = sys.argv[1]
start = workers.start_worker
def start_late(worker_id, **facts):
    time.sleep(worker_id * float(sys.argv[2]))
    start(worker_id, **facts)
workers.start_worker = start_late
dataset = CocoDataset(folder, read_coco(folder + "/annotations.json"), training=True)
loader = TrainLoader(dataset, min_size=64, max_size=112, batch_size=2, seed=0, workers=2)
next(loader.batches(0, 1000))
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 3])
def test_workers_end_when_the_main_process_is_killed(make_dataset: MakeDataset, tmp_path: Path, late: float) -> None:
    """Also one that begins its work only when the main process is gone already; nothing stays in shared memory."""
    make_dataset(SIZES)
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS, str(tmp_path), str(late)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in workers)
    assert not list(Path("/dev/shm").glob(f"torch_{process.pid}_*"))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_plans_are_small(make_dataset: MakeDataset) -> None:
    plan = next(train_loader(make_dataset(SIZES)).plans(0, 1))
    assert len(pickle.dumps(plan)) < 2000
    assert np.array_equal(plan.places, [0, 1])
