"""Buffers shared with workers: nothing in use is overwritten, nothing is lost, nothing stays behind."""

import gc
import multiprocessing
import os
import signal
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

import data.loading.workers
from data.loading.loader import TrainLoader
from data.loading.shared_buffers import SharedBuffers
from tests.data.batches import MakeDataset, train_loader

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="buffers are shared with forked workers only"
)


def pixels_of(loader: TrainLoader, last: int) -> list[torch.Tensor]:
    return [raw.pixels.clone() for raw in loader.batches(0, last)]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The buffers out of which pixels came; other batches have them in the message."""
    numbers: list[int] = []
    take = SharedBuffers.take
    monkeypatch.setattr(SharedBuffers, "take", lambda self, *of: (numbers.append(of[0]), take(self, *of))[1])
    return numbers


def test_a_buffer_is_free_again_once_the_last_tensor_on_it_is_gone() -> None:
    buffers = SharedBuffers(2, 8)
    number = buffers.reserve()
    buffers.view(number)[:] = range(8)
    tensor = buffers.take(number, 6)
    part = tensor.view(2, 3)[1]
    assert (buffers.reserve(), buffers.reserve()) == (1 - number, None)
    del tensor
    gc.collect()
    assert buffers.reserve() is None
    assert part.tolist() == [3, 4, 5]
    del part
    gc.collect()
    assert buffers.reserve() == number


def test_reserved_buffers_are_freed_together_and_those_in_use_are_not() -> None:
    buffers = SharedBuffers(4, 4)
    tensor = buffers.take(buffers.reserve(), 4)
    buffers.release(buffers.reserve())
    assert buffers.reserve() is not None and buffers.reserve() is not None
    buffers.release_all()
    assert None not in (buffers.reserve(), buffers.reserve(), buffers.reserve()) and buffers.reserve() is None
    assert len(tensor) == 4


@needs_fork
def test_batches_that_are_kept_stay_as_they_are(make_dataset: MakeDataset, taken: list[int]) -> None:
    dataset = make_dataset([(64, 48)] * 40)
    expected = pixels_of(train_loader(dataset), 20)
    with closing(train_loader(dataset, workers=1)) as loader:
        kept = [raw.pixels for raw in loader.batches(0, 20)]
        assert all(map(torch.equal, kept, expected))
        # While so many are in use, the rest come in another way.
        assert 0 < len(taken) < 20
        taken.clear()
        del kept
        gc.collect()
        assert all(map(torch.equal, pixels_of(loader, 20), expected))
        assert len(taken) == 20


@needs_fork
def test_passes_that_are_given_up_leave_no_buffer_in_use(make_dataset: MakeDataset, taken: list[int]) -> None:
    dataset = make_dataset([(64, 48)] * 40)
    expected = pixels_of(train_loader(dataset), 20)
    with closing(train_loader(dataset, workers=2)) as loader:
        for _ in range(8):
            next(loader.batches(0, 20))
        taken.clear()
        assert all(map(torch.equal, pixels_of(loader, 20), expected))
        assert len(taken) == 20


@needs_fork
def test_an_image_too_large_for_the_buffers_comes_in_another_way(make_dataset: MakeDataset, taken: list[int]) -> None:
    dataset = make_dataset([(40, 40)] * 20 + [(400, 400)] * 2)
    expected = pixels_of(train_loader(dataset), 11)
    with closing(train_loader(dataset, workers=1)) as loader:
        assert all(map(torch.equal, pixels_of(loader, 11), expected))
        assert 9 <= len(taken) <= 10


@needs_fork
def test_pixels_need_no_file_in_shared_memory(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    def refuse(self: torch.UntypedStorage, *rest: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    # As in a container whose /dev/shm is full; the workers are forked after this.
    monkeypatch.setattr(torch.UntypedStorage, "share_memory_", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", refuse)
    monkeypatch.setattr(data.loading.workers, "LARGEST_BUFFER", 1.0)
    dataset = make_dataset([(40, 40)] * 8 + [(80, 80)] * 8)
    expected = pixels_of(train_loader(dataset), 8)
    with closing(train_loader(dataset, workers=1)) as loader:
        assert all(map(torch.equal, pixels_of(loader, 8), expected))
        assert 0 < len(taken) < 8


@needs_fork
def test_images_of_any_kind_and_replaced_ones_of_another_size_are_delivered_whole(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    dataset = make_dataset([(64, 48), (60, 40), (80, 60), (72, 50), (64, 64), (90, 48)])
    with Image.open(tmp_path / "000.jpg") as gray, Image.open(tmp_path / "001.jpg") as palette:
        gray.convert("L").save(tmp_path / "000.jpg")
        palette.convert("P").save(tmp_path / "001.jpg", format="PNG")
    (tmp_path / "002.jpg").write_bytes(b"")
    alone = train_loader(dataset, max_bad_images=3)
    with closing(train_loader(dataset, max_bad_images=3, workers=1)) as with_worker:
        assert all(map(torch.equal, pixels_of(with_worker, 9), pixels_of(alone, 9)))


@needs_fork
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_an_error_and_no_wait_without_end(make_dataset: MakeDataset) -> None:
    loader = train_loader(make_dataset([(64, 48)] * 8), workers=1)
    batches = loader.batches(0, 400)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*exited|killed"):
        list(batches)
    loader.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "spawn"])
def test_workers_that_are_not_forked_deliver_the_same(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, method: str | None
) -> None:
    if method is None and "fork" in multiprocessing.get_all_start_methods():
        pytest.skip("the default of this system is fork")
    monkeypatch.setattr(data.loading.workers, "worker_context", lambda: method)
    dataset = make_dataset([(64, 48)] * 8)
    expected = pixels_of(train_loader(dataset), 4)
    with closing(train_loader(dataset, workers=1)) as loader:
        assert all(map(torch.equal, pixels_of(loader, 4), expected))
