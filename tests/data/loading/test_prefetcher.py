"""Batches one ahead of the model, and how long it has had to wait for them."""

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch

from data.loading.batch import DeviceBatch, RawBatch
from data.loading.prefetcher import DevicePrefetcher
from tests.data.batches import MakeDataset, train_loader


class FakeGpu:
    """The timeline of a GPU with its streams, for the order of what the prefetcher asks of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_until = 0.0
        self.log: list[str] = []

    def wait_stream(self, other: object) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def work(self, seconds: float) -> None:
        """Launches a kernel, which takes the host no time."""
        self.busy_until = max(self.busy_until, self.now) + seconds


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.time = gpu, 0.0

    def record(self, stream: object) -> None:
        self.time = max(self.gpu.now, self.gpu.busy_until)

    def elapsed_time(self, other: "FakeEvent") -> float:
        return (other.time - self.time) * 1e3


def fake_prefetcher(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, raws: Iterator[RawBatch]) -> DevicePrefetcher:
    prefetcher = DevicePrefetcher(raws, "cpu")
    prefetcher._stream = object()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(gpu))
    monkeypatch.setattr(RawBatch, "pin_memory", lambda self: self)
    monkeypatch.setattr(DeviceBatch, "record_stream", lambda self, stream: None)
    return prefetcher


@pytest.mark.parametrize("load_seconds", [0.5, 4.0])
def test_a_gpu_is_idle_only_for_as_long_as_the_workers_keep_it_waiting(
    make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, load_seconds: float
) -> None:
    gpu = FakeGpu()
    raws = list(train_loader(make_dataset([(64, 48)] * 8)).batches(0, 4))

    def loaded() -> Iterator[RawBatch]:
        for raw in raws:
            gpu.now += load_seconds
            yield raw

    prefetcher = fake_prefetcher(monkeypatch, gpu, loaded())
    idle = []
    iterations = []
    for batch in prefetcher:
        iterations.append(batch.iteration)
        gpu.work(1.0)
        prefetcher.prepare()
        prefetcher.prepare()
        idle.append(prefetcher.take_idle_seconds())
    assert iterations == [0, 1, 2, 3]
    # The first batch, for which it has no work yet; then what loading takes beyond the work; at the end nothing.
    assert idle == pytest.approx([load_seconds + max(load_seconds - 1, 0), *[max(load_seconds - 1, 0)] * 2, 0])
    assert prefetcher.load_times.num_images == 8


def test_on_the_cpu_every_batch_is_handed_on_and_the_idle_time_is_the_wait_for_it(make_dataset: MakeDataset) -> None:
    def slow(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
        for raw in batches:
            time.sleep(0.02)
            yield raw

    prefetcher = DevicePrefetcher(slow(train_loader(make_dataset([(64, 48)] * 8)).batches(0, 4)), "cpu")
    for iteration, batch in enumerate(prefetcher):
        assert batch.iteration == iteration
        assert 0.02 <= prefetcher.take_idle_seconds() <= prefetcher.data_seconds
        assert prefetcher.take_idle_seconds() == 0
    assert iteration == 3
    assert prefetcher.load_times.cpu_seconds > 0
