"""From JPEG to trainer: CPU-seconds an image, beside MMDetection's, torchvision's and Pillow's ways."""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import checkout  # noqa: F401
from benchmarks.baselines import Chain, MMDetection2, MMDetection3, PillowDecode, TorchvisionReference, cv2
from benchmarks.inputs import add_image_arguments, open_images
from benchmarks.machine import add_common_arguments
from benchmarks.processes import cpu_seconds
from benchmarks.timing import (
    BenchmarkError,
    format_table,
    interleave,
    pairwise_ratio,
    spread,
    timing_rows,
    timing_table,
)
from data import CocoDataset, TrainLoader, assemble
from data.images import decode
from data.loading.batch import BatchPlan

PILLOW, TORCHVISION = "Pillow, decode alone", "torchvision reference"
MMDETECTION, MMDETECTION_2 = "MMDetection 3", "MMDetection 2, padded float32"
PEERS = (MMDETECTION, TORCHVISION)
_PAGE = 4096
_PREFETCH = 2  # batches ahead of a worker, PyTorch's default and ours

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=5)
    add_image_arguments(parser, num_images=24)
    parser.add_argument("--batch-size", type=int, default=2, help="[2]")
    parser.add_argument("--min-size", type=int, default=800, help="[800]")
    parser.add_argument("--max-size", type=int, default=1333, help="[1333]")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; figures a worker want 1 [1]")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="of the chains in one process [cpu]")
    parser.add_argument(
        "--workers",
        type=int,
        choices=[0, 1],
        default=1,
        help="1: also through a worker process, with what handing over costs on both sides [1]",
    )


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        say("making images")
        dataset = open_images(arguments, Path(name))
        plans = list(_loader(dataset, arguments, workers=0).plans(0, max(1, len(dataset) // arguments.batch_size)))
        num_images = sum(len(plan.indices) for plan in plans)
        figures: dict[str, Any] = {
            "device": "cpu",
            "threads": arguments.threads,
            "clock": arguments.clock,
            "images": num_images,
            "jpeg_kilobytes": _mean_file_size(dataset) / 1e3,
            "megapixels": float((dataset.widths * dataset.heights).mean() / 1e6),
        }
        texts = [_describe(figures, arguments)]
        chains = peers_of(dataset, plans, arguments)
        if arguments.workers > 0:
            say("through a worker process")
            figures["through_a_worker"] = _worker_rows(dataset, plans, chains, arguments, say)
            texts += ["", _worker_table(figures["through_a_worker"])]
        say("in one process")
        samples = interleave(_in_process(dataset, plans, chains, arguments), arguments.repeats, say=say)
        rows = timing_rows(samples, [f"{name}, worker" for name in PEERS], units=num_images, clock=arguments.clock)
        for row in rows:
            row["images_per_second"] = 1 / row["seconds" if arguments.clock == "wall" else "cpu_seconds"]["median"]
        figures["chains"] = rows
        title = "In one process, nothing handed over; the device's part on the CPU"
        texts += ["", title, timing_table(rows, clock=arguments.clock, rate="images/s")]
    return figures, "\n".join(texts)


def peers_of(dataset: CocoDataset, plans: Sequence[BatchPlan], arguments: argparse.Namespace) -> dict[str, Chain]:
    chains: dict[str, Chain] = {PILLOW: PillowDecode(dataset, plans)}
    if cv2 is not None:
        chains |= {MMDETECTION: MMDetection3(dataset, plans), MMDETECTION_2: MMDetection2(dataset, plans)}
    chains[TORCHVISION] = TorchvisionReference(dataset, plans, arguments.min_size, arguments.max_size)
    return chains


def decoders() -> tuple[str, ...]:
    """Ours, the faster one first."""
    return ("simplejpeg", "Pillow") if decode.simplejpeg is not None else ("Pillow",)


# --- in one process


def _in_process(
    dataset: CocoDataset, plans: Sequence[BatchPlan], chains: Mapping[str, Chain], arguments: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    loader = _loader(dataset, arguments, workers=0)
    runs: dict[str, Callable[[], None]] = {}
    for decoder in decoders():
        runs[f"ours, {decoder}, worker"] = partial(_ours, loader, plans, decoder, whole=False)
    runs[f"ours, {decoders()[0]}, worker + device"] = partial(_ours, loader, plans, decoders()[0], whole=True)
    for name, chain in chains.items():
        runs[name if name == PILLOW else f"{name}, worker"] = partial(_theirs, chain, whole=False)
        if name in PEERS:
            runs[f"{name}, worker + device"] = partial(_theirs, chain, whole=True)
    return runs


def _ours(loader: TrainLoader, plans: Sequence[BatchPlan], decoder: str, *, whole: bool) -> None:
    """What a worker does, and with `whole` what the training device does after it."""
    with _decoder(decoder):
        for raw in loader.batches(0, plans[-1].iteration + 1):
            if whole:
                assemble(raw, "cpu")


def _theirs(chain: Chain, *, whole: bool) -> None:
    for items in chain.batches:
        batch = [chain[item] for item in items]
        if whole:
            chain.on_device(batch)


@contextlib.contextmanager
def _decoder(name: str) -> Iterator[None]:
    before = decode.simplejpeg
    if name == "Pillow":
        decode.simplejpeg = None
    try:
        yield
    finally:
        decode.simplejpeg = before


# --- through a worker process


@dataclass
class Stream:
    """One way through a worker process, which lives until `close`."""

    batches: Callable[[], Iterator[Any]]
    """A pass over the set; each batch is one that the trainer has in hand"""
    close: Callable[[], None]
    worker: int = 0
    """Its pid"""
    worker_cpu: list[float] = field(default_factory=list)
    """CPU-seconds of each round"""
    main_cpu: list[float] = field(default_factory=list)

    def measure(self) -> None:
        gc.collect()
        worker, main = cpu_seconds(self.worker), cpu_seconds(os.getpid())
        for _ in self.batches():
            pass
        # The worker sleeps by now: every batch that it was asked for has come.
        self.worker_cpu.append(cpu_seconds(self.worker) - worker)
        self.main_cpu.append(cpu_seconds(os.getpid()) - main)


def _worker_rows(
    dataset: CocoDataset,
    plans: Sequence[BatchPlan],
    chains: Mapping[str, Chain],
    arguments: argparse.Namespace,
    say: Say,
) -> list[dict[str, Any]]:
    num_images = sum(len(plan.indices) for plan in plans)
    streams: dict[str, Stream] = {}
    try:
        for decoder in decoders():
            with _decoder(decoder):  # while the worker is forked
                streams[f"ours, {decoder}"] = _started(_our_stream(dataset, plans, arguments))
        for name, chain in chains.items():
            streams[name] = _started(_their_stream(chain, on_device=False))
        streams[f"{TORCHVISION} with its model's part"] = _started(_their_stream(chains[TORCHVISION], on_device=True))
        names = list(streams)
        for number in range(arguments.repeats):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                streams[name].measure()
            say(f"round {number + 1} of {arguments.repeats}")
    finally:
        for stream in streams.values():
            stream.close()
    return [_worker_row(name, stream, streams, num_images) for name, stream in streams.items()]


def _our_stream(dataset: CocoDataset, plans: Sequence[BatchPlan], arguments: argparse.Namespace) -> Stream:
    loader = _loader(dataset, arguments, workers=1)

    def batches() -> Iterator[Any]:
        for raw in loader.batches(0, plans[-1].iteration + 1):
            touch(raw.pixels)
            yield raw

    return Stream(batches, loader.close)


def _their_stream(chain: Chain, *, on_device: bool) -> Stream:
    loader: DataLoader | None = DataLoader(
        chain,
        batch_sampler=chain.batches,
        collate_fn=list,
        num_workers=1,
        persistent_workers=True,
        prefetch_factor=_PREFETCH,
        multiprocessing_context="fork",
    )

    def batches() -> Iterator[Any]:
        assert loader is not None
        for batch in loader:
            if on_device:
                chain.on_device(batch)
            else:
                for sample in batch:
                    touch(sample.pixels)
            yield batch

    def close() -> None:
        nonlocal loader
        loader = None

    return Stream(batches, close)


def _started(stream: Stream) -> Stream:
    """With its worker running, after one pass that does not count."""
    before = {child.pid for child in multiprocessing.active_children()}
    for _ in stream.batches():
        pass
    (worker,) = {child.pid for child in multiprocessing.active_children()} - before
    assert worker is not None
    stream.worker = worker
    return stream


def touch(pixels: torch.Tensor) -> None:
    """Reads a byte of every page: a batch is handed over when the trainer's process can read it."""
    torch.empty(0, dtype=torch.uint8).set_(pixels.untyped_storage())[::_PAGE].sum()


def _worker_row(name: str, stream: Stream, streams: Mapping[str, Stream], num_images: int) -> dict[str, Any]:
    worker = spread([value / num_images for value in stream.worker_cpu])
    total = _total(stream)
    row: dict[str, Any] = {
        "name": name,
        "worker_cpu_seconds": worker,
        "main_cpu_seconds": spread([value / num_images for value in stream.main_cpu]),
        "images_per_worker_second": 1 / worker["median"],
        "ratios": {
            peer: pairwise_ratio(stream.worker_cpu, streams[peer].worker_cpu) for peer in PEERS if peer in streams
        },
    }
    whole = f"{TORCHVISION} with its model's part"
    row["ratios"][f"all of {TORCHVISION}"] = pairwise_ratio(stream.worker_cpu, _total(streams[whole]))
    row["total_ratios"] = {peer: pairwise_ratio(total, _total(streams[peer])) for peer in PEERS if peer in streams}
    return row


def _total(stream: Stream) -> list[float]:
    return [worker + main for worker, main in zip(stream.worker_cpu, stream.main_cpu, strict=True)]


def _worker_table(rows: Sequence[Mapping[str, Any]]) -> str:
    headers = [
        "",
        "worker ms",
        "min..max",
        "main ms",
        "images/s a worker",
        *(f"x {peer}" for peer in rows[0]["ratios"]),
    ]
    cells = []
    for row in rows:
        worker = row["worker_cpu_seconds"]
        line = [row["name"], f"{worker['median'] * 1e3:.2f}", f"{worker['min'] * 1e3:.2f}..{worker['max'] * 1e3:.2f}"]
        line += [f"{row['main_cpu_seconds']['median'] * 1e3:.2f}", f"{row['images_per_worker_second']:.0f}"]
        line += [f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})" for ratio in row["ratios"].values()]
        cells.append(line)
    title = (
        "Through one worker process: CPU-milliseconds an image, handing over included. Ratios are a peer's over the\n"
        "row's own, of the workers' CPU time; 'all of' adds the peer's main process with its model's part"
    )
    return title + "\n" + format_table(headers, cells)


def _loader(dataset: CocoDataset, arguments: argparse.Namespace, *, workers: int) -> TrainLoader:
    if len(dataset) < arguments.batch_size:
        raise BenchmarkError(f"--batch-size {arguments.batch_size} and only {len(dataset)} images")
    return TrainLoader(
        dataset,
        min_size=arguments.min_size,
        max_size=arguments.max_size,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        workers=workers,
    )


def _mean_file_size(dataset: CocoDataset) -> float:
    return float(np.mean([dataset.path(index).stat().st_size for index in range(len(dataset))]))


def _describe(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    return (
        f"{figures['images']} JPEGs of {figures['jpeg_kilobytes']:.0f} kB and {figures['megapixels']:.2f} megapixels "
        f"on average, to {arguments.min_size} and {arguments.max_size}, batch {arguments.batch_size}, "
        f"{arguments.threads} threads"
    )
