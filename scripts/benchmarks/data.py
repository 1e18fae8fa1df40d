"""From JPEG to trainer: CPU-seconds an image, beside MMDetection's, torchvision's and Pillow's ways."""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.data import DataLoader

import checkout  # noqa: F401
from benchmarks.baselines import Chain, MMDetection2, MMDetection3, TorchvisionReference, cv2
from benchmarks.figures import (
    BenchmarkError,
    Samples,
    Say,
    add_common_arguments,
    figure_rows,
    figure_table,
    interleave,
    pairwise_ratio,
    rotated,
)
from benchmarks.scenes import add_image_arguments, open_images, write_annotations
from data import CocoDataset, TrainLoader, assemble, read_coco
from data.coco.checks import check_files
from data.images import decode
from data.images.files import walk
from data.images.shards import Shards, pack_images
from data.loading.batch import BatchPlan

PILLOW, TORCHVISION = "Pillow, decode alone", "torchvision reference"
MMDETECTION, MMDETECTION_2 = "MMDetection 3", "MMDetection 2, padded float32"
PEERS = (MMDETECTION, TORCHVISION)
WHOLE = f"{TORCHVISION} with its model's part"
_PAGE = 4096
_PREFETCH = 2  # batches ahead of a worker, PyTorch's default and ours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=5)
    add_image_arguments(parser, num_images=24)
    parser.add_argument("--batch-size", type=int, default=2, help="[2]")
    parser.add_argument("--min-size", type=int, default=800, help="[800]")
    parser.add_argument("--max-size", type=int, default=1333, help="[1333]")
    parser.add_argument(
        "--small-files", type=int, metavar="N", help="instead: N small files in a folder, beside the same in shards"
    )
    parser.add_argument("--small-kilobytes", type=float, default=10.0, help="size of each [10]")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    torch.set_num_threads(1)
    if arguments.small_files:
        return _files_and_shards(arguments, say)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        say("making images")
        dataset = open_images(arguments, Path(name))
        if len(dataset) < arguments.batch_size:
            raise BenchmarkError(f"--batch-size {arguments.batch_size} and only {len(dataset)} images")
        new_loader = partial(TrainLoader, dataset, min_size=arguments.min_size, max_size=arguments.max_size,
                             batch_size=arguments.batch_size, seed=arguments.seed)  # fmt: skip
        plans = list(new_loader().plans(0, len(dataset) // arguments.batch_size))
        num_images = sum(len(plan.indices) for plan in plans)
        sizes = [dataset.path(index).stat().st_size for index in range(len(dataset))]
        chains = peers_of(dataset, plans, arguments)
        say("through a worker process")
        streams = _through_a_worker(new_loader, len(plans), chains, arguments.repeats, num_images, say)
        say("in one process")
        samples = interleave(_in_process(new_loader(), len(plans), chains), arguments.repeats, say=say)
    rows = figure_rows(samples, [f"{name}, worker" for name in PEERS], "cpu_seconds", units=num_images)
    for row in rows:
        row["images_per_second"] = 1 / row["cpu_seconds"]["median"]
    figures: dict[str, Any] = {
        "device": "cpu",
        "images": num_images,
        "jpeg_kilobytes": float(np.mean(sizes)) / 1e3,
        "megapixels": float((dataset.widths * dataset.heights).mean() / 1e6),
        "through_a_worker": streams,
        "chains": rows,
    }
    return figures, _describe(figures, arguments)


def _files_and_shards(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """What is done with a folder before a training, and the reading of all its images in a training's order."""
    number, size = arguments.small_files, round(arguments.small_kilobytes * 1000)
    names = [f"{place // 1000:04d}/{place:08d}.jpg" for place in range(number)]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        files, packed = Path(name) / "files", Path(name) / "shards"
        say("writing files")
        content = np.random.default_rng(arguments.seed).bytes(size)
        for place, each in enumerate(names):
            if place % 1000 == 0:
                (files / each).parent.mkdir(parents=True)
            (files / each).write_bytes(content)
        say("packing")
        pack_images(files, names, packed, shard_bytes=256 << 20)
        order = np.random.default_rng(arguments.seed).permutation(number).tolist()
        annotations = Path(name) / "annotations.json"
        write_annotations(annotations, [(640, 480)] * number, 0, file_name=lambda place: names[place - 1])
        read = read_coco(annotations)
        shards = Shards(packed)

        def without_cache(folder: Path, call: Callable[[], object]) -> None:
            for file in walk(folder, None):
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            call()
            cold.append(number / (time.perf_counter() - start))

        def read_files() -> None:
            for place in order:
                (files / names[place]).read_bytes()

        def read_shards() -> None:
            for place in order:
                shards.content(names[place])

        os.sync()
        cold: list[float] = []
        without_cache(files, read_files)
        without_cache(packed, read_shards)
        ways: dict[str, Callable[[], object]] = {
            "files, checked": lambda: check_files(read, files),
            "shards, checked": lambda: check_files(read, packed),
            "files, read": read_files,
            "shards, read": read_shards,
        }
        rows = figure_rows(interleave(ways, arguments.repeats, say=say), ["files, read"], "seconds", units=number)
    figures = {"device": "cpu", "images": number, "bytes": size, "rows": rows, "uncached_images_per_second": cold}
    head = f"{number:,} images of {size:,} bytes: microseconds an image, in the system's cache"
    tail = f"not in the cache: {cold[0]:,.0f} images/s from files, {cold[1]:,.0f} from shards"
    return figures, f"{head}\n\n{figure_table(rows, 'seconds', 'us', 1e6)}\n\n{tail}"


def peers_of(dataset: CocoDataset, plans: Sequence[BatchPlan], arguments: argparse.Namespace) -> dict[str, Chain]:
    chains = {PILLOW: Chain(dataset, plans)}
    if cv2 is not None:
        chains |= {MMDETECTION: MMDetection3(dataset, plans), MMDETECTION_2: MMDetection2(dataset, plans)}
    return chains | {TORCHVISION: TorchvisionReference(dataset, plans, arguments.min_size, arguments.max_size)}


def _decoders() -> dict[str, contextlib.AbstractContextManager[Any]]:
    """Ours, the faster one first, and what makes a loader use it."""
    faster = {} if decode.simplejpeg is None else {"simplejpeg": contextlib.nullcontext()}
    return {**faster, "Pillow": mock.patch.object(decode, "simplejpeg", None)}


def _in_process(loader: TrainLoader, num_batches: int, chains: dict[str, Chain]) -> dict[str, Callable[[], None]]:
    """One pass over the set by each way: a worker's part, and with the device's part after it."""

    def ours(decoder: contextlib.AbstractContextManager[Any], on_device: bool) -> None:
        with decoder:
            for raw in loader.batches(0, num_batches):
                if on_device:
                    assemble(raw, "cpu")

    def theirs(chain: Chain, on_device: bool) -> None:
        for items in chain.batches:
            batch = [chain[item] for item in items]
            if on_device:
                chain.on_device(batch)

    runs: dict[str, Callable[[], None]] = {}
    for number, (name, decoder) in enumerate(_decoders().items()):
        runs[f"ours, {name}, worker"] = partial(ours, decoder, False)
        if number == 0:
            runs[f"ours, {name}, worker + device"] = partial(ours, decoder, True)
    for name, chain in chains.items():
        runs[name if name == PILLOW else f"{name}, worker"] = partial(theirs, chain, False)
        if name in PEERS:
            runs[f"{name}, worker + device"] = partial(theirs, chain, True)
    return runs


Pass = Callable[[], Iterator[Any]]
"""A pass over the set through a worker process; each batch is one that the trainer has in hand."""


def _through_a_worker(
    new_loader: Callable[..., TrainLoader],
    num_batches: int,
    chains: dict[str, Chain],
    repeats: int,
    num_images: int,
    say: Say,
) -> list[dict[str, Any]]:
    """CPU-seconds of the worker and of the main process by each way, handing over included."""
    passes: dict[str, tuple[Pass, int]] = {}
    loaders = []
    for name, decoder in _decoders().items():
        with decoder:  # while the worker is forked
            loaders.append(new_loader(workers=1))
            passes[f"ours, {name}"] = _started(partial(_our_pass, loaders[-1], num_batches))
    for name, chain in chains.items():
        passes[name] = _started(_their_pass(chain, on_device=False))
    passes[WHOLE] = _started(_their_pass(chains[TORCHVISION], on_device=True))
    samples: Samples = {name: {"worker_cpu_seconds": [], "main_cpu_seconds": []} for name in passes}
    for number, names in enumerate(rotated(list(passes), repeats), start=1):
        for name in names:
            gc.collect()
            batches, worker = passes[name]
            before = cpu_seconds(worker), time.process_time()
            for _ in batches():
                pass
            # The worker sleeps by now: every batch that it was asked for has come.
            samples[name]["worker_cpu_seconds"].append(cpu_seconds(worker) - before[0])
            samples[name]["main_cpu_seconds"].append(time.process_time() - before[1])
        say(f"round {number} of {repeats}")
    for loader in loaders:
        loader.close()
    rows = figure_rows(samples, PEERS, "worker_cpu_seconds", units=num_images)
    totals = {name: np.sum(list(quantities.values()), axis=0) for name, quantities in samples.items()}
    for row in rows:
        own = samples[row["name"]]["worker_cpu_seconds"]
        row["images_per_worker_second"] = 1 / row["worker_cpu_seconds"]["median"]
        row["ratios"][f"all of {TORCHVISION}"] = pairwise_ratio(own, totals[WHOLE])
    return rows


def cpu_seconds(pid: int) -> float:
    """CPU-seconds of all threads of another process, in user and kernel mode."""
    # The clock id that clock_getcpuclockid(3) makes of a pid on Linux; /proc/PID/stat counts in steps of 10 ms.
    return time.clock_gettime((~pid << 3) | 2)


def _our_pass(loader: TrainLoader, num_batches: int) -> Iterator[Any]:
    for raw in loader.batches(0, num_batches):
        touch(raw.pixels)
        yield raw


def _their_pass(chain: Chain, *, on_device: bool) -> Pass:
    loader = DataLoader(chain, batch_sampler=chain.batches, collate_fn=list, num_workers=1, persistent_workers=True,
                        prefetch_factor=_PREFETCH, multiprocessing_context="fork")  # fmt: skip

    def batches() -> Iterator[Any]:
        for batch in loader:
            if on_device:
                chain.on_device(batch)
            else:
                for sample in batch:
                    touch(sample.pixels)
            yield batch

    return batches


def _started(batches: Pass) -> tuple[Pass, int]:
    """With its worker running, after one pass that does not count; the worker's process id."""
    before = {child.pid for child in multiprocessing.active_children()}
    for _ in batches():
        pass
    (worker,) = {child.pid for child in multiprocessing.active_children()} - before
    assert worker is not None
    return batches, worker


def touch(pixels: torch.Tensor) -> None:
    """Reads a byte of every page: a batch is handed over when the trainer's process can read it."""
    torch.empty(0, dtype=torch.uint8).set_(pixels.untyped_storage())[::_PAGE].sum()


def _describe(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    through = figure_table(
        figures["through_a_worker"],
        "worker_cpu_seconds",
        "worker ms",
        1e3,
        main_ms=lambda row: f"{row['main_cpu_seconds']['median'] * 1e3:.2f}",
        **{"images/s_a_worker": lambda row: f"{row['images_per_worker_second']:.0f}"},
    )
    rate = {"images/s": lambda row: f"{row['images_per_second']:.2f}"}
    alone = figure_table(figures["chains"], "cpu_seconds", "ms (cpu)", 1e3, **rate)
    return (
        f"{figures['images']} JPEGs of {figures['jpeg_kilobytes']:.0f} kB and {figures['megapixels']:.2f} megapixels "
        f"on average, to {arguments.min_size} and {arguments.max_size}, batch {arguments.batch_size}\n\n"
        "Through one worker process: CPU-milliseconds an image, handing over included. Ratios are a peer's over the\n"
        "row's own, of the workers' CPU time; 'all of' adds the peer's main process with its model's part\n"
        f"{through}\n\nIn one process, nothing handed over; the device's part on the CPU\n{alone}"
    )
