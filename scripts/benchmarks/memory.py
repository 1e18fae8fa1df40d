"""Memory of the main process and of its workers, epoch after epoch; and how long workers take to start."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import checkout  # noqa: F401
from benchmarks.inputs import add_image_arguments, open_images
from benchmarks.machine import add_common_arguments
from benchmarks.processes import MB, Memory, memory_of
from benchmarks.timing import BenchmarkError, format_table
from data import CocoDataset, TrainLoader, read_coco

OURS, PEER = "ours", "a list of dicts"
_SMALL = (96, 72)  # generated images: what is watched is the list, not the decoder

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    add_image_arguments(parser, num_images=24)
    parser.add_argument("--epochs", type=int, default=20, help="whole epochs over the list [20]")
    parser.add_argument("--workers", type=int, default=2, help="[2]")
    parser.add_argument("--batch-size", type=int, default=8, help="[8]")
    parser.add_argument(
        "--listed", type=int, default=20000, help="images listed, a few files over and over; train2017: 118000 [20000]"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave out the list of dicts that is ours' contrast")


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    if arguments.workers < 1 or arguments.epochs < 1:
        raise BenchmarkError("memory is watched over 1 or more epochs of 1 or more workers")
    if memory_of(os.getpid()) is None:
        raise BenchmarkError("this system does not tell the memory of processes (/proc/PID/smaps_rollup, Linux)")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        say("making images and a long list of them")
        file = write_long_list(open_images(arguments, folder / "images", size=_SMALL), folder, arguments.listed)
        figures: dict[str, Any] = {
            "device": "cpu",
            "workers": arguments.workers,
            "batch_size": arguments.batch_size,
            "listed_images": arguments.listed,
            OURS: _watch_ours(file, arguments, say),
        }
        if not arguments.no_peer:
            figures[PEER] = _watch_peer(file, arguments, say)
    return figures, _describe(figures, arguments)


def write_long_list(dataset: CocoDataset, folder: Path, num_images: int) -> Path:
    """A set of `num_images` entries that name the images of `dataset` over and over, as large sets' lists are: the
    annotation file, beside links to the images."""
    links = folder / "links"
    links.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, num_images + 1):
        index = number % len(dataset)
        name = f"{index}{dataset.path(index).suffix}"
        if number <= len(dataset):
            (links / name).symlink_to(dataset.path(index).resolve())
        width, height = int(dataset.widths[index]), int(dataset.heights[index])
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for box in dataset.boxes(index)[0].tolist():
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            own = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
            annotations.append({**own, "bbox": xywh, "area": xywh[2] * xywh[3], "iscrowd": 0})
    file = links / "annotations.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    file.write_text(json.dumps(content))
    return file


def _watch_ours(file: Path, arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    dataset = CocoDataset(file.parent, read_coco(file), training=True)
    loader = TrainLoader(
        dataset, min_size=64, max_size=96, batch_size=arguments.batch_size, seed=0, workers=arguments.workers
    )
    epochs = []
    start = time.perf_counter()
    first_batch = 0.0
    num = loader.iterations_per_epoch
    for epoch in range(arguments.epochs):
        for _ in loader.batches(epoch * num, (epoch + 1) * num):
            first_batch = first_batch or time.perf_counter() - start
        epochs.append(_memory())
        say(f"ours, epoch {epoch + 1} of {arguments.epochs}")
    again = time.perf_counter()
    next(loader.batches(0, num))
    next_pass = time.perf_counter() - again
    loader.close()
    return {
        "seconds_to_first_batch": first_batch,
        "seconds_to_first_batch_of_a_later_pass": next_pass,
        "epochs": epochs,
    }


class ListOfDicts(Dataset):
    """Annotations as most data sets hold them. Nothing is decoded: entries are looked at, as a worker would."""

    def __init__(self, file: Path) -> None:
        content = json.loads(file.read_bytes())
        self.images = content["images"]
        self.annotations: dict[int, list[dict[str, Any]]] = {}
        for annotation in content["annotations"]:
            self.annotations.setdefault(annotation["image_id"], []).append(annotation)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> int:
        image = self.images[index]
        boxes = [annotation["bbox"] for annotation in self.annotations.get(image["id"], [])]
        return len(torch.tensor(boxes))


def _watch_peer(file: Path, arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    # What Python holds that nothing else needs would hide the growth.
    gc.collect()
    loader = DataLoader(
        ListOfDicts(file),
        batch_size=arguments.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        num_workers=arguments.workers,
        persistent_workers=True,
    )
    epochs = []
    for epoch in range(arguments.epochs):
        for _ in loader:
            pass
        epochs.append(_memory())
        say(f"a list of dicts, epoch {epoch + 1} of {arguments.epochs}")
    del loader
    return {"epochs": epochs}


def _memory() -> dict[str, Any]:
    """MB of the main process, and of each worker."""
    processes: list[Memory] = []
    for pid in [os.getpid(), *sorted(child.pid or 0 for child in multiprocessing.active_children())]:
        memory = memory_of(pid)
        if memory is not None:
            processes.append(memory)
    named = [{key: round(value / MB, 2) for key, value in one._asdict().items()} for one in processes]
    return {"main": named[0], "workers": named[1:], "pss_together": round(sum(one["pss"] for one in named), 2)}


def _describe(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    texts = [
        f"{figures['workers']} workers, {figures['listed_images']:,} images listed, batch {figures['batch_size']}; "
        f"first batch after {figures[OURS]['seconds_to_first_batch']:.2f} s, of a later pass after "
        f"{figures[OURS]['seconds_to_first_batch_of_a_later_pass'] * 1e3:.0f} ms"
    ]
    for name in (OURS, PEER):
        if name in figures:
            texts += ["", f"{name}: MB after each epoch (pss: shared pages by their part)", _table(figures[name])]
    return "\n".join(texts)


def _table(figures: dict[str, Any]) -> str:
    headers = ["epoch", "main rss", "main pss", "workers rss", "workers private", "pss together"]
    return format_table(headers, [_cells(number, one) for number, one in enumerate(figures["epochs"], start=1)])


def _cells(number: int, one: dict[str, Any]) -> Sequence[str]:
    workers = one["workers"]
    return [
        str(number),
        f"{one['main']['rss']:.1f}",
        f"{one['main']['pss']:.1f}",
        " ".join(f"{worker['rss']:.1f}" for worker in workers),
        " ".join(f"{worker['private']:.1f}" for worker in workers),
        f"{one['pss_together']:.1f}",
    ]
