"""Memory of the main process and of its workers, epoch after epoch, or of many processes that have one set."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import checkout  # noqa: F401
from benchmarks.figures import BenchmarkError, Say, add_common_arguments, format_table, in_own_process
from benchmarks.scenes import draw_sizes, write_annotations, write_boxes, write_images
from data import CocoDataset, TrainLoader, read_coco
from data.coco.annotations import share_coco, shared_coco

OURS, PEER = "ours", "a list of dicts"
_NUM_FILES = 24
_DRAWN_IMAGES = 2000
"""What these hold is repeated."""
_SHARED_SIZE, _BATCHES, _SMALL_SET = (400, 400), 4, 1000
"""Of a set that many processes share: its images, what is taken of it, and the set it is compared with"""
_SIZE = (96, 72)  # of the images: what is watched is the list, not the decoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=1)
    parser.add_argument("--epochs", type=int, default=20, help="whole epochs over the list [20]")
    parser.add_argument("--workers", type=int, default=2, help="[2]")
    parser.add_argument("--batch-size", type=int, default=8, help="[8]")
    parser.add_argument(
        "--listed", type=int, default=20000, help="images listed, a few files over and over; train2017: 118000 [20000]"
    )
    text = "instead: N processes of one machine, each with --workers, share a set, as those of a training do"
    parser.add_argument("--processes", type=int, metavar="N", help=text)
    parser.add_argument("--boxes-per-image", type=float, default=7.3, help="with --processes; Objects365: 14.7 [7.3]")
    text = "the memory of so many instances' polygons of 24 vertices instead, COCO's mean; train2017: 860001"
    parser.add_argument("--polygons", type=int, metavar="N", help=text)


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    if arguments.processes is not None and arguments.processes < 1:
        raise BenchmarkError("--processes: give 1 or more")
    if arguments.workers < 1 or arguments.epochs < 1:
        raise BenchmarkError("memory is watched over 1 or more epochs of 1 or more workers")
    if memory_of(os.getpid()) is None:
        raise BenchmarkError("this system does not tell the memory of processes (/proc/PID/smaps_rollup, Linux)")
    if arguments.polygons is not None:
        return _polygons(arguments.polygons, say)
    torch.set_num_threads(1)
    if arguments.processes is not None:
        return _processes(arguments, say)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        say("making images and a long list of them")
        file = write_images(Path(name), [_SIZE] * _NUM_FILES, seed=0)
        names = [f"{number + 1}.jpg" for number in range(_NUM_FILES)]
        sizes = [_SIZE] * arguments.listed
        write_annotations(file, sizes, seed=0, file_name=lambda number: names[number % _NUM_FILES])
        figures: dict[str, Any] = {
            "device": "cpu",
            "workers": arguments.workers,
            "batch_size": arguments.batch_size,
            "listed_images": arguments.listed,
            OURS: _watch_ours(file, arguments, say),
            PEER: _watch_peer(file, arguments, say),
        }
    return figures, _describe(figures)


def memory_of(pid: int | None) -> dict[str, float] | None:
    """MB of a process: rss, pss and private. None where the system does not tell (it needs Linux).

    pss counts shared pages by the part that is the process's, so its sum over processes is what they take together.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    found = {"rss": kilobytes["Rss"], "pss": kilobytes["Pss"], "private": private}
    return {name: round(value * 1024 / 1e6, 2) for name, value in found.items()}


def _watch(name: str, epoch_of: Callable[[int], Iterable[Any]], epochs: int, say: Say) -> list[dict[str, Any]]:
    """The memory after each of `epochs` passes."""
    found = []
    for epoch in range(epochs):
        for _ in epoch_of(epoch):
            pass
        found.append(_memory())
        say(f"{name}, epoch {epoch + 1} of {epochs}")
    return found


def _watch_ours(file: Path, arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    dataset = CocoDataset(file.parent, read_coco(file), training=True)
    batch_size, workers = arguments.batch_size, arguments.workers
    loader = TrainLoader(dataset, min_size=64, max_size=96, batch_size=batch_size, seed=0, workers=workers)
    num = loader.iterations_per_epoch

    def seconds_to_first_batch() -> float:
        start = time.perf_counter()
        next(loader.batches(0, num))
        return time.perf_counter() - start

    first = seconds_to_first_batch()
    epochs = _watch(OURS, lambda epoch: loader.batches(epoch * num, (epoch + 1) * num), arguments.epochs, say)
    later = seconds_to_first_batch()
    loader.close()
    return {"seconds_to_first_batch": first, "seconds_to_first_batch_of_a_later_pass": later, "epochs": epochs}


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
        boxes = [annotation["bbox"] for annotation in self.annotations[self.images[index]["id"]]]
        return len(torch.tensor(boxes))


def _watch_peer(file: Path, arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    gc.collect()  # what Python holds that nothing else needs would hide the growth
    loader = DataLoader(
        ListOfDicts(file),
        batch_size=arguments.batch_size,
        shuffle=True,
        num_workers=arguments.workers,
        persistent_workers=True,
    )
    return {"epochs": _watch(PEER, lambda epoch: loader, arguments.epochs, say)}


def _memory() -> dict[str, Any]:
    """MB of the main process, and of each worker."""
    pids = [os.getpid(), *sorted(child.pid or 0 for child in multiprocessing.active_children())]
    found = [memory for pid in pids if (memory := memory_of(pid)) is not None]
    return {"main": found[0], "workers": found[1:], "pss_together": round(sum(one["pss"] for one in found), 2)}


def _describe(figures: dict[str, Any]) -> str:
    ours = figures[OURS]
    texts = [
        f"{figures['workers']} workers, {figures['listed_images']:,} images listed, batch {figures['batch_size']}; "
        f"first batch after {ours['seconds_to_first_batch']:.2f} s, of a later pass after "
        f"{ours['seconds_to_first_batch_of_a_later_pass'] * 1e3:.0f} ms"
    ]
    headers = ["epoch", "main rss", "main pss", "workers rss", "workers private", "pss together"]
    for name in (OURS, PEER):
        cells = []
        for number, one in enumerate(figures[name]["epochs"], start=1):
            main = [f"{one['main'][key]:.1f}" for key in ("rss", "pss")]
            workers = [" ".join(f"{worker[key]:.1f}" for worker in one["workers"]) for key in ("rss", "private")]
            cells.append([str(number), *main, *workers, f"{one['pss_together']:.1f}"])
        texts += ["", f"{name}: MB after each epoch (pss: shared pages by their part)", format_table(headers, cells)]
    return "\n".join(texts)


def _processes(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """What each of the processes of a machine has to itself, when all train on one set, and on a small one."""
    sets = [_share(arguments, size, say) for size in (min(_SMALL_SET, arguments.listed), arguments.listed)]
    figures = {"device": "cpu", "workers": arguments.workers, "sets": sets}
    return figures, _describe_processes(figures)


def _share(arguments: argparse.Namespace, num_images: int, say: Say) -> dict[str, Any]:
    number = arguments.processes
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        say(f"making annotations of {num_images:,} images")
        write_images(Path(name), [_SHARED_SIZE] * _NUM_FILES, seed=0)
        file, cache = Path(name) / "large.json", Path(name) / "cache"
        num_boxes = write_boxes(
            file,
            [_SHARED_SIZE] * num_images,
            arguments.boxes_per_image,
            file_name=lambda image: f"{image % _NUM_FILES + 1}.jpg",
        )
        say("reading them once")
        in_own_process(_read_into_cache, file, cache)
        context = multiprocessing.get_context("fork")
        said, barrier = context.SimpleQueue(), context.Barrier(number)
        with share_coco(file, cache) as (_, words):
            started = [
                context.Process(target=_one_of, args=(rank, arguments, file, words, barrier, said))
                for rank in range(number)
            ]
            for process in started:
                process.start()
            say(f"{number} processes with {arguments.workers} workers each")
            for process in started:
                process.join()
        if failed := [process.exitcode for process in started if process.exitcode]:
            raise BenchmarkError(f"{len(failed)} of {number} processes failed")
        return {"images": num_images, "boxes": num_boxes, "processes": [said.get() for _ in started]}


def _read_into_cache(file: Path, cache: Path) -> None:
    CocoDataset(file.parent, read_coco(file, cache_dir=cache), training=True)


def _one_of(rank: int, arguments: argparse.Namespace, file: Path, words: Any, barrier: Any, said: Any) -> None:
    annotations = shared_coco(file, words)
    assert annotations is not None
    dataset = CocoDataset(file.parent, annotations, training=True)
    loader = TrainLoader(
        dataset,
        min_size=64,
        max_size=96,
        batch_size=arguments.batch_size,
        seed=0,
        rank=rank,
        world_size=arguments.processes,
        workers=arguments.workers,
    )
    for _ in loader.batches(0, _BATCHES):
        pass
    gc.collect()
    barrier.wait()
    memory = _memory()
    barrier.wait()  # all have looked before one ends
    loader.close()
    said.put(memory)


def _describe_processes(figures: dict[str, Any]) -> str:
    headers = ["images", "boxes", "private, a process", "private, a worker", "pss of all together"]
    rows = []
    for one in figures["sets"]:
        processes = one["processes"]
        main = [each["main"]["private"] for each in processes]
        workers = [worker["private"] for each in processes for worker in each["workers"]]
        cells = [f"{min(of):.1f} to {max(of):.1f}" for of in (main, workers)]
        together = sum(each["pss_together"] for each in processes)
        rows.append([f"{one['images']:,}", f"{one['boxes']:,}", *cells, f"{together:,.0f}"])
    title = f"{len(processes)} processes with {figures['workers']} workers each, after {_BATCHES} batches, MB"
    return f"{title}\n{format_table(headers, rows)}"


def _polygons(instances: int, say: Say) -> tuple[dict[str, Any], str]:
    """The memory of the outlines of a whole set: packed, and as the list of dicts that a JSON parser makes."""
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        file = Path(name) / "annotations.json"
        say("writing annotations")
        num_images = _write(file, instances)
        say(f"{OURS}: packing {file.stat().st_size / 1e6:.0f} MB of JSON, once")
        packing = in_own_process(_read_packed, file)
        say(f"{OURS}: out of the cache")
        rows = {OURS: in_own_process(_read_packed, file)}
        say(PEER)
        rows[PEER] = in_own_process(_read_dicts, file)
    counts = {"instances": instances, "images": num_images}
    figures = {"device": "cpu", **counts, "first_read": packing, **rows}
    return figures, _describe_polygons(figures)


def _write(file: Path, instances: int) -> int:
    """As many instances, those of a few images over and over; the number of images."""
    content = write_annotations(file, draw_sizes(_DRAWN_IMAGES, 0), seed=0)
    annotations = content["annotations"]
    rounds = -(-instances // len(annotations))
    texts = [json.dumps({key: value for key, value in each.items() if key not in ("id", "image_id")})[1:]
             for each in annotations]  # fmt: skip
    images = [
        image | {"id": image["id"] + number * _DRAWN_IMAGES} for number in range(rounds) for image in content["images"]
    ]
    with file.open("w") as out:
        out.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(content["categories"])}, ')
        out.write('"annotations": [')
        for number in range(instances):
            repeat, place = divmod(number, len(annotations))
            image_id = annotations[place]["image_id"] + repeat * _DRAWN_IMAGES
            out.write(f'{", " if number else ""}{{"id": {number + 1}, "image_id": {image_id}, {texts[place]}')
        out.write("]}")
    return len(images)


def _read_packed(file: Path) -> dict[str, float]:
    def read() -> Any:
        return read_coco(file, masks=True, cache_dir=file.parent / "cache")

    figures, annotations = _grown(read)
    outlines = annotations.segmentations
    assert outlines is not None and bool(outlines.present.all())
    figures["arrays_mb"] = sum(array.nbytes for array in outlines.arrays().values()) / 1e6
    return figures


def _read_dicts(file: Path) -> dict[str, float]:
    return _grown(lambda: json.loads(file.read_bytes())["annotations"])[0]


def _grown(read: Any) -> tuple[dict[str, float], Any]:
    """What a process's memory has grown by when `read` has returned, in MB: all, and what it shares with no other."""
    before, start = memory_of(os.getpid()), time.process_time()
    result = read()
    seconds = time.process_time() - start
    gc.collect()
    after = memory_of(os.getpid())
    assert before is not None and after is not None
    return {
        "cpu_seconds": round(seconds, 2),
        "rss_mb": round(after["rss"] - before["rss"], 1),
        "private_mb": round(after["private"] - before["private"], 1),
    }, result


def _describe_polygons(figures: dict[str, Any]) -> str:
    cells = [
        [name, *(f"{figures[name][key]:,.1f}" for key in ("rss_mb", "private_mb", "cpu_seconds"))]
        for name in (OURS, PEER)
    ]
    ours, ratio = figures[OURS], figures[PEER]["private_mb"] / max(figures[OURS]["private_mb"], 0.1)
    return "\n".join(
        [
            f"{figures['instances']:,} instances with polygons of 24 vertices, in {figures['images']:,} images",
            "",
            format_table(["", "memory, MB", "of it private", "CPU s to read"], cells),
            "",
            f"outlines alone {ours['arrays_mb']:,.1f} MB; a list of dicts takes {ratio:.1f} times the private memory; "
            f"packed once in {figures['first_read']['cpu_seconds']:.1f} CPU s",
        ]
    )
