"""From JPEG to batch: images per second of one worker, beside torchvision's and OpenCV's chains; workers' memory."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import checkout  # noqa: F401
from benchmark_inputs import add_picture_arguments, open_pictures
from benchmark_machine import add_common_arguments
from benchmark_timing import BenchmarkError, Samples, format_table, interleave, timing_rows, timing_table
from data import CocoDataset, TrainLoader, assemble, pictures, read_coco
from data.loader import BatchPlan

try:
    import cv2
except ImportError:  # optional, for its chain only
    cv2 = None  # type: ignore[assignment]

TORCHVISION_WORKER, TORCHVISION_CHAIN = "torchvision worker", "torchvision chain"
CV2_WORKER, CV2_CHAIN = "cv2 worker", "cv2 chain"
PEERS = (TORCHVISION_CHAIN, CV2_WORKER, CV2_CHAIN)
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_MB = 1e6

Say = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, repeats=5)
    add_picture_arguments(parser, num_pictures=24)
    parser.add_argument("--batch-size", type=int, default=2, help="[2]")
    parser.add_argument("--min-size", type=int, default=800, help="[800]")
    parser.add_argument("--max-size", type=int, default=1333, help="[1333]")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; figures a worker want 1 [1]")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU-seconds, for a busy machine")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the memory figures; 0: none [1]")
    parser.add_argument("--passes", type=int, default=6, help="passes over the set while memory is watched [6]")
    parser.add_argument(
        "--listed",
        type=int,
        default=20000,
        help="images listed in the memory run, a few files over and over [20000]",
    )


def run(arguments: argparse.Namespace, say: Say) -> tuple[dict[str, Any], str]:
    """The figures for the JSON file, and the tables."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        say("making pictures")
        dataset = open_pictures(arguments, folder)
        loader = _loader(dataset, arguments, workers=0)
        plans = list(loader.plans(0, max(1, len(dataset) // arguments.batch_size)))
        chains = _chains(dataset, loader, plans, arguments)
        samples = interleave(chains, arguments.repeats, say=say)
        num_images = sum(len(plan.indices) for plan in plans)
        rows = _rows(samples, num_images, arguments.clock)
        figures: dict[str, Any] = {
            "device": "cpu",
            "threads": arguments.threads,
            "clock": arguments.clock,
            "images": num_images,
            "jpeg_kilobytes": _mean_file_size(dataset) / 1e3,
            "chains": rows,
        }
        texts = [_describe(figures, arguments), "", timing_table(rows, clock=arguments.clock, rate="images/s")]
        if arguments.workers > 0:
            say("memory of workers")
            figures["workers"] = _worker_figures(arguments, dataset, folder)
            texts += ["", _worker_table(figures["workers"])]
    return figures, "\n".join(texts)


def _chains(
    dataset: CocoDataset, loader: TrainLoader, plans: Sequence[BatchPlan], arguments: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    last = plans[-1].iteration + 1
    chains: dict[str, Callable[[], None]] = {}
    for decoder in ("Pillow", "simplejpeg") if pictures.simplejpeg is not None else ("Pillow",):
        chains[f"our worker, {decoder}"] = partial(_ours, loader, last, decoder, whole=False)
    best = "simplejpeg" if pictures.simplejpeg is not None else "Pillow"
    chains[f"our chain, {best}"] = partial(_ours, loader, last, best, whole=True)
    sizes = (arguments.min_size, arguments.max_size)
    chains[TORCHVISION_WORKER] = partial(_torchvision, dataset, plans, sizes, whole=False)
    chains[TORCHVISION_CHAIN] = partial(_torchvision, dataset, plans, sizes, whole=True)
    if cv2 is not None:
        cv2.setNumThreads(arguments.threads)
        chains[CV2_WORKER] = partial(_opencv, dataset, plans, whole=False)
        chains[CV2_CHAIN] = partial(_opencv, dataset, plans, whole=True)
    return chains


def _ours(loader: TrainLoader, last: int, decoder: str, *, whole: bool) -> None:
    """What a worker does, and with `whole` what the training device does after it (here the CPU)."""
    with _decoder(decoder):
        for raw in loader.batches(0, last):
            if whole:
                assemble(raw, "cpu")


@contextlib.contextmanager
def _decoder(name: str) -> Iterator[None]:
    before = pictures.simplejpeg
    if name == "Pillow":
        pictures.simplejpeg = None
    try:
        yield
    finally:
        pictures.simplejpeg = before


def _torchvision(dataset: CocoDataset, plans: Sequence[BatchPlan], sizes: tuple[int, int], *, whole: bool) -> None:
    """torchvision's reference: Pillow, flip, tensor, float in its workers; normalise, resize and pad in its model."""
    transform = GeneralizedRCNNTransform(*sizes, [m / 255 for m in _MEAN], [s / 255 for s in _STD])
    for plan in plans:
        images, targets = [], []
        for index, flip in zip(plan.indices, plan.flips.tolist(), strict=True):
            with Image.open(dataset.path(index)) as file:
                image = TF.pil_to_tensor(file.convert("RGB"))
            boxes, labels = (torch.from_numpy(array) for array in dataset.boxes(index))
            if flip:
                image, boxes = TF.hflip(image), _flipped(boxes, image.shape[-1])
            images.append(TF.convert_image_dtype(image, torch.float))
            targets.append({"boxes": boxes, "labels": labels + 1})
        if whole:
            transform(images, targets)


def _opencv(dataset: CocoDataset, plans: Sequence[BatchPlan], *, whole: bool) -> None:
    """As MMDetection goes about it: OpenCV's decode, resize and flip and a channels-first copy in the workers;
    channel order, normalise and pad for the batch on the device."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    for plan in plans:
        images = []
        for index, flip, (height, width) in zip(plan.indices, plan.flips.tolist(), plan.sizes.tolist(), strict=True):
            pixels = cv2.imdecode(np.frombuffer(dataset.path(index).read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            assert pixels is not None
            boxes, _ = dataset.boxes(index)
            boxes = boxes * np.tile(np.array([width / pixels.shape[1], height / pixels.shape[0]], np.float32), 2)
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
            if flip:
                pixels, boxes = cv2.flip(pixels, 1), _flipped(torch.from_numpy(boxes), width).numpy()
            images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
        if whole:
            batch = torch.zeros(len(images), 3, *plan.padded_size)
            for target, image in zip(batch, images, strict=True):
                target[:, : image.shape[1], : image.shape[2]] = (image[[2, 1, 0]].float() - mean) / std


def _flipped(boxes_xyxy: Tensor, width: int) -> Tensor:
    return torch.stack([width - boxes_xyxy[:, 2], boxes_xyxy[:, 1], width - boxes_xyxy[:, 0], boxes_xyxy[:, 3]], dim=1)


def _rows(samples: dict[str, Samples], num_images: int, clock: str) -> list[dict[str, Any]]:
    rows = timing_rows(samples, PEERS, units=num_images, clock=clock)
    for row in rows:
        row["images_per_second"] = 1 / row["seconds" if clock == "wall" else "cpu_seconds"]["median"]
    return rows


def _worker_figures(arguments: argparse.Namespace, dataset: CocoDataset, folder: Path) -> dict[str, Any]:
    """Start-up, throughput and memory of real worker processes over a few passes."""
    listed = _long_set(dataset, folder, arguments.listed)
    loader = _loader(listed, arguments, workers=arguments.workers)
    per_pass = max(2 * arguments.workers, len(dataset) // arguments.batch_size)
    # Each "pass" takes other images of the list, so that workers touch more and more of the annotations.
    stride = max(per_pass, loader.iterations_per_epoch // arguments.passes)
    start = time.perf_counter()
    first_batch = 0.0
    passes = []
    for number in range(arguments.passes):
        begin = time.perf_counter()
        for _ in loader.batches(number * stride, number * stride + per_pass):
            first_batch = first_batch or time.perf_counter() - start
        seconds = time.perf_counter() - begin
        workers = [memory for child in multiprocessing.active_children() for memory in [memory_of(child.pid)] if memory]
        passes.append(
            {
                "images_per_second": per_pass * arguments.batch_size / seconds,
                "worker_rss_mb": [round(rss / _MB, 2) for rss, _ in workers],
                "worker_private_mb": [round(private / _MB, 2) for _, private in workers],
            }
        )
    loader.close()
    return {
        "workers": arguments.workers,
        "listed_images": len(listed),
        "seconds_to_first_batch": first_batch,
        "passes": passes,
    }


def memory_of(pid: int | None) -> tuple[int, int] | None:
    """Bytes a process has in memory, and those of them that it shares with nobody; None where Linux does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return fields["Rss"], fields["Private_Clean"] + fields["Private_Dirty"]


def _long_set(dataset: CocoDataset, folder: Path, num_images: int) -> CocoDataset:
    """A set of `num_images` entries that name the pictures of `dataset` over and over, as large sets' lists are."""
    folder.mkdir(exist_ok=True)
    links = folder / "links"
    links.mkdir()
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
            area = xywh[2] * xywh[3]
            own = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
            annotations.append({**own, "bbox": xywh, "area": area, "iscrowd": 0})
    file = folder / "listed.json"
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    file.write_text(json.dumps(content))
    return CocoDataset(links, read_coco(file), training=True)


def _loader(dataset: CocoDataset, arguments: argparse.Namespace, *, workers: int) -> TrainLoader:
    if len(dataset) < arguments.batch_size:
        raise BenchmarkError(f"--batch-size {arguments.batch_size} and only {len(dataset)} pictures")
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
        f"{figures['images']} JPEGs of {figures['jpeg_kilobytes']:.0f} kB on average, to {arguments.min_size} and "
        f"{arguments.max_size}, batch {arguments.batch_size}, {arguments.threads} threads; times an image"
    )


def _worker_table(figures: dict[str, Any]) -> str:
    cells = []
    for number, one in enumerate(figures["passes"], start=1):
        private, rss = one["worker_private_mb"], one["worker_rss_mb"]
        cells.append(
            [
                str(number),
                f"{one['images_per_second']:.1f}",
                " ".join(f"{value:.1f}" for value in private) or "-",
                " ".join(f"{value:.1f}" for value in rss) or "-",
            ]
        )
    head = (
        f"{figures['workers']} worker processes, {figures['listed_images']:,} images listed, "
        f"first batch after {figures['seconds_to_first_batch']:.2f} s"
    )
    return head + "\n" + format_table(["pass", "images/s", "private MB a worker", "resident MB"], cells)
