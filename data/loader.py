"""Batches for training and evaluation, decoded by worker processes.

The main process plans (which images, which sizes, which flips: a few hundred bytes a batch, computed from the
annotations alone), workers read and decode, and the training device does the rest (data/batches.py).
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.augmentations import Augmentation
from data.batches import RawBatch, pad_boxes
from data.colours import ColourChange
from data.dataset import CocoDataset
from data.hand_over import Delivery, LoadFailure, MainSide, Order, WorkerSide
from data.pictures import ImageError
from data.randomness import hash_key, image_words
from data.repeat_factors import epoch_length, repeat_factors
from data.replacements import UnreadableImage, fitted_size, replacement_candidates
from data.samplers import evaluation_batches, iterations_per_epoch, plan_epoch, repeat_numbers
from data.shape_buckets import bucket_of, shape_buckets
from data.shared_buffers import SharedBuffers
from data.transforms import (
    crop_boxes,
    flip_boxes,
    flip_boxes_vertically,
    padded_size,
    resize_boxes,
    resized_sizes,
    scale_factors,
)

BOX_ROWS_MULTIPLE = 16
"""Rows for boxes are a multiple of this, so that only a few shapes occur (COCO has at most 93 boxes)."""

PLANS_AHEAD_PER_WORKER = 2
"""One that a worker is at, and one that waits, decoded, for its turn."""

BATCHES_IN_USE = 3
"""Decoded batches beyond those that workers are at: one being assembled, one before and one after it."""

LARGEST_BUFFER = 4.0
"""A buffer holds a batch of the largest pictures, but no more than so many times a batch of average ones: a few huge
pictures shall not make every buffer huge, and take a slower way instead."""


@dataclass(frozen=True)
class BatchPlan:
    """What a worker has to load: b images of one process and micro-step."""

    iteration: int
    epoch: int
    indices: np.ndarray
    """int64 [b], images of the dataset"""
    places: np.ndarray
    """int64 [b], places in the global batch"""
    sample_keys: np.ndarray
    """int64 [b]"""
    sizes: np.ndarray
    """int64 [b, 2] (height, width) after resize and crop"""
    scaled_sizes: np.ndarray
    """int64 [b, 2] (height, width) of the whole picture after the resize"""
    offsets: np.ndarray
    """int64 [b, 2] (top, left) of the crop"""
    flips: np.ndarray
    """bool [b], left to right"""
    vertical_flips: np.ndarray
    """bool [b]"""
    padded_size: tuple[int, int]
    """(height, width)"""
    num_box_rows: int
    colours: tuple[ColourChange, ...] | None = None
    """[b]; None: the colours stay"""
    min_visibility: float = 0.0
    """Part of a box's area that a crop must leave of it"""


OnUnreadable = Literal["fail", "replace", "blank"]
"""What becomes of a picture that cannot be used: the stream ends; the next of its group takes its place; or a black
picture without boxes does, so that it is still counted among the images."""

_BLANK = np.zeros((1, 1, 3), dtype=np.uint8)


class _BatchReader(Dataset):
    """Carries out plans, in a worker process or in place.

    max_faults: with "replace", as many unreadable pictures in a row are passed over; after that a black one is taken
    (a folder that has gone away must not be searched from end to end).
    """

    def __init__(self, dataset: CocoDataset, on_unreadable: OnUnreadable, max_faults: int) -> None:
        self.dataset = dataset
        self._on_unreadable = on_unreadable
        self._max_faults = max_faults

    def __getitem__(self, plan: BatchPlan) -> RawBatch | LoadFailure:
        return self.read(plan, None)

    def read(self, plan: BatchPlan, room: np.ndarray | None) -> RawBatch | LoadFailure:
        """The plan's batch; its pixels are the start of `room` (uint8) where they fit in."""
        start, cpu_start = time.perf_counter(), time.thread_time()
        if room is None:
            room = np.empty(self.dataset.num_bytes(plan.indices).sum(), dtype=np.uint8)
        try:
            plan, pictures, unreadable = self._read(plan, room)
        except ImageError as error:
            return LoadFailure(str(error))
        native_sizes = np.array([picture.shape[:2] for picture in pictures], dtype=np.int64)
        if all(np.may_share_memory(picture, room) for picture in pictures):
            flat = room[: sum(picture.size for picture in pictures)]
        else:
            flat = np.concatenate([picture.reshape(-1) for picture in pictures])
        blank = [picture is _BLANK for picture in pictures]

        factors = scale_factors(native_sizes, plan.scaled_sizes)
        targets = map(self._targets, itertools.repeat(plan), range(len(pictures)), factors, blank)
        boxes, labels, valid = zip(*targets, strict=True)
        boxes_xyxy, padded_labels, padded_valid = pad_boxes(boxes, labels, valid, plan.num_box_rows)
        return RawBatch(
            pixels=torch.from_numpy(flat),
            native_sizes=_pairs(native_sizes),
            scaled_sizes=_pairs(plan.scaled_sizes),
            offsets=_pairs(plan.offsets),
            resized_sizes=_pairs(plan.sizes),
            flips=plan.flips.tolist(),
            vertical_flips=plan.vertical_flips.tolist(),
            colours=plan.colours,
            padded_size=plan.padded_size,
            sizes=torch.from_numpy(plan.sizes),
            boxes_xyxy=boxes_xyxy,
            labels=padded_labels,
            valid=padded_valid,
            image_ids=torch.from_numpy(self.dataset.image_ids[plan.indices]),
            places=torch.from_numpy(plan.places),
            sample_keys=torch.from_numpy(plan.sample_keys),
            scale_factors=torch.from_numpy(factors),
            iteration=plan.iteration,
            epoch=plan.epoch,
            unreadable=tuple(unreadable),
            load_seconds=time.perf_counter() - start,
            load_cpu_seconds=time.thread_time() - cpu_start,
        )

    def _read(self, plan: BatchPlan, room: np.ndarray) -> tuple[BatchPlan, list[np.ndarray], list[UnreadableImage]]:
        """The pictures of `plan`, and the plan as it was carried out. The one place where pictures are read, and so
        where it is decided what to do about a broken one. They lie in `room` one after another, as far as they fit.

        A replacement is resized to fit into what was planned for its place, so that the batch keeps its shape on
        every process.
        """
        indices, sizes = plan.indices.copy(), plan.sizes.copy()
        scaled_sizes, offsets = plan.scaled_sizes.copy(), plan.offsets.copy()
        pictures: list[np.ndarray] = []
        unreadable: list[UnreadableImage] = []
        used = 0
        for number, planned in enumerate(plan.indices.tolist()):
            faults: dict[int, str] = {}
            index, picture = planned, None
            for index in self._attempts(planned, plan.num_box_rows):
                try:
                    picture = self.dataset.picture(index, room[used : used + self.dataset.num_bytes(index)])
                    break
                except ImageError as error:
                    if self._on_unreadable == "fail":
                        raise
                    faults[index] = str(error)
                if len(faults) > self._max_faults:
                    break
            if picture is None:
                index, picture = planned, _BLANK
            if index != planned:
                indices[number] = index
                sizes[number] = fitted_size(picture.shape[1], picture.shape[0], tuple(sizes[number].tolist()))
                scaled_sizes[number], offsets[number] = sizes[number], 0
            pictures.append(picture)
            used += picture.size
            ids = self.dataset.image_ids
            unreadable += [
                UnreadableImage(
                    image_id=int(ids[fault]),
                    message=message,
                    place=int(plan.places[number]) if fault == planned else None,
                    replacement_id=None if picture is _BLANK else int(ids[index]),
                )
                for fault, message in faults.items()
            ]
        done = replace(plan, indices=indices, sizes=sizes, scaled_sizes=scaled_sizes, offsets=offsets)
        return done, pictures, unreadable

    def _attempts(self, planned: int, num_box_rows: int) -> Iterator[int]:
        yield planned
        if self._on_unreadable == "replace":
            dataset = self.dataset
            yield from replacement_candidates(
                planned, dataset.widths, dataset.heights, dataset.box_counts, num_box_rows
            )

    def _targets(
        self, plan: BatchPlan, place: int, factors: np.ndarray, blank: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        boxes, labels = self.dataset.boxes(plan.indices[place])
        if blank:
            boxes, labels = boxes[:0], labels[:0]
        height, width = plan.scaled_sizes[place].tolist()
        boxes, valid = resize_boxes(boxes, factors, (height, width))
        if (plan.sizes[place] != plan.scaled_sizes[place]).any():
            top, left = plan.offsets[place].tolist()
            height, width = plan.sizes[place].tolist()
            boxes, shown = crop_boxes(boxes, (top, left), (height, width), min_visibility=plan.min_visibility)
            valid = valid & shown
        if plan.flips[place]:
            boxes = flip_boxes(boxes, width)
        if plan.vertical_flips[place]:
            boxes = flip_boxes_vertically(boxes, height)
        return boxes, labels, valid


class _Plans(Sampler[BatchPlan | Order]):
    """The plans that the DataLoader is to work off next; set before each pass."""

    def __init__(self) -> None:
        self.upcoming: Iterator[BatchPlan | Order] = iter(())

    def __iter__(self) -> Iterator[BatchPlan | Order]:
        return self.upcoming


class _BatchStream:
    """One DataLoader, and so one set of worker processes, for as many passes as are wanted."""

    def __init__(
        self,
        dataset: CocoDataset,
        batch_size: int,
        workers: int,
        pin: bool,
        on_unreadable: OnUnreadable,
        max_faults: int = 0,
    ) -> None:
        self._plans = _Plans()
        self._pin = pin
        reader = _BatchReader(dataset, on_unreadable, max_faults)
        self._hand_over: MainSide | None = None
        worker_side: Dataset = reader
        if workers > 0 and _worker_context() == "fork":
            buffers = SharedBuffers(
                workers * PLANS_AHEAD_PER_WORKER + BATCHES_IN_USE, _buffer_size(dataset, batch_size)
            )
            self._hand_over, worker_side = MainSide(buffers), WorkerSide(reader, buffers)
        # A generator of its own: a DataLoader draws from the global one at each pass otherwise.
        self._loader: DataLoader | None = DataLoader(
            worker_side,
            batch_size=None,
            sampler=self._plans,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PLANS_AHEAD_PER_WORKER if workers > 0 else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=_worker_context() if workers > 0 else None,
            generator=torch.Generator(),
        )

    def run(self, plans: Iterator[BatchPlan]) -> Iterator[RawBatch]:
        if self._loader is None:
            raise RuntimeError("The loader is closed.")
        self._plans.upcoming = plans if self._hand_over is None else self._hand_over.orders(plans)
        for result in self._loader:
            if isinstance(result, LoadFailure):
                raise ImageError(result.message)
            batch = result
            if isinstance(result, Delivery):
                assert self._hand_over is not None
                batch = self._hand_over.batch(result)
            # Pinned here and not by the DataLoader, whose thread would have to know the buffers: a copy of 0.1 ms an
            # image, after which the buffer is free.
            yield batch.pin_memory() if self._pin else batch

    def close(self) -> None:
        # The workers end with the loader's iterator.
        self._loader = None


_FLIPS_ONLY = Augmentation()


class TrainLoader:
    """Batches of one process of a training.

    A global batch is world_size * batch_size * accumulate images; in micro-step a process r gets places
    (a * world_size + r) * batch_size onward. What a global batch holds, its order, augmentation, padded size and
    number of box rows depend on (seed, iteration, global batch size) only, so 1 process with batch 4 and 2
    processes with batch 2 see the same tensors. For the order and the end of an epoch see
    data.samplers.plan_epoch. With limit_batches an epoch has that many iterations at most (the first of it).

    min_size, max_size: the keep-ratio resize, see data.transforms, where augmentation chooses no other. augmentation:
    what is done at random, an image that comes again in an epoch being another draw. repeat_threshold: images of
    classes that are in a smaller part of the images come several times an epoch, see data.repeat_factors.

    few_shapes: padded sizes are those of data.shape_buckets, for code that is compiled for each size. pin: hand over
    page-locked memory (for GPUs). workers: worker processes; 0 decodes in this one. max_bad_images: a picture that
    cannot be used is replaced (see data.replacements) and named in the batch's `unreadable`; after more than so many
    in a row a black picture without boxes stands in, and the caller is to end the run. None: it ends the stream.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        min_size: int,
        max_size: int,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        augmentation: Augmentation = _FLIPS_ONLY,
        repeat_threshold: float | None = None,
        limit_batches: int | None = None,
        few_shapes: bool = False,
        pin: bool = False,
        max_bad_images: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size and min(batch_size, accumulate) >= 1
        self.dataset = dataset
        self.global_batch_size = world_size * batch_size * accumulate
        self.repeat_factors = None if repeat_threshold is None else _repeat_factors(dataset, repeat_threshold)
        """float64 [N] of the images, where there is a threshold"""
        self.images_per_epoch = len(dataset) if self.repeat_factors is None else epoch_length(self.repeat_factors)
        """Before the last batch is filled up; limit_batches has no part in it"""
        self.iterations_per_epoch = iterations_per_epoch(self.images_per_epoch, self.global_batch_size)
        if limit_batches is not None:
            self.iterations_per_epoch = min(self.iterations_per_epoch, limit_batches)
        self.min_size, self.max_size = min_size, max_size
        self._buckets = shape_buckets(min_size, max_size) if few_shapes else []
        self.num_workers = workers
        self._batch_size, self._accumulate = batch_size, accumulate
        self._rank, self._world_size = rank, world_size
        self._seed, self._augmentation = seed, augmentation
        on_unreadable: OnUnreadable = "fail" if max_bad_images is None else "replace"
        self._stream = _BatchStream(dataset, batch_size, workers, pin, on_unreadable, max_bad_images or 0)

    def batches(self, first_iteration: int, last_iteration: int) -> Iterator[RawBatch]:
        """Batches of the iterations first_iteration to last_iteration - 1 (0-based over the whole run),
        `accumulate` for each; epochs follow each other without a pause. No image of an earlier iteration is
        loaded. One iterator at a time: the workers are shared.

        Raises ImageError for a picture that cannot be used, where max_bad_images is None.
        """
        return self._stream.run(self.plans(first_iteration, last_iteration))

    def plans(self, first_iteration: int, last_iteration: int) -> Iterator[BatchPlan]:
        """What `batches` loads, without loading it."""
        epoch, order = -1, np.empty((0, 0), dtype=np.int64)
        repeats = order
        for iteration in range(first_iteration, last_iteration):
            if iteration // self.iterations_per_epoch != epoch:
                epoch = iteration // self.iterations_per_epoch
                order = plan_epoch(
                    self.dataset.widths,
                    self.dataset.heights,
                    seed=self._seed,
                    epoch=epoch,
                    global_batch_size=self.global_batch_size,
                    factors=self.repeat_factors,
                )
                repeats = repeat_numbers(order)
            within = iteration % self.iterations_per_epoch
            yield from self._plans_of(iteration, epoch, order[within], repeats[within])

    def close(self) -> None:
        """Ends the worker processes."""
        self._stream.close()

    def _plans_of(self, iteration: int, epoch: int, images: np.ndarray, repeats: np.ndarray) -> Iterator[BatchPlan]:
        words = image_words(images, repeats)
        geometry = self._augmentation.geometry(
            self.dataset.widths[images],
            self.dataset.heights[images],
            words=words,
            seed=self._seed,
            epoch=epoch,
            min_size=self.min_size,
            max_size=self.max_size,
        )
        num_box_rows = _box_rows(self.dataset.box_counts[images])
        for micro_step in range(self._accumulate):
            start = (micro_step * self._world_size + self._rank) * self._batch_size
            places = np.arange(start, start + self._batch_size)
            indices = images[places]
            yield BatchPlan(
                iteration=iteration,
                epoch=epoch,
                indices=indices,
                places=places,
                sample_keys=hash_key(self._seed, iteration, places),
                sizes=geometry.sizes[places],
                scaled_sizes=geometry.scaled_sizes[places],
                offsets=geometry.offsets[places],
                flips=geometry.flips[places],
                vertical_flips=geometry.vertical_flips[places],
                padded_size=bucket_of(geometry.padded_size, self._buckets),
                num_box_rows=num_box_rows,
                colours=self._augmentation.colours(words[places], seed=self._seed, epoch=epoch),
                min_visibility=self._augmentation.min_visibility,
            )


class EvalLoader:
    """Batches of one process of an evaluation: every image exactly once over all processes.

    Images of like shape are batched together and batch i goes to process i mod world_size, so processes may
    have different numbers of images, or none; what a batch holds does not depend on the number of processes.
    A batch is padded for its own images. limit_batches: only the first limit_batches * batch_size *
    world_size images of the file are evaluated. max_bad_images: with a number, a picture that cannot be used is named
    in the batch's `unreadable` and given as a black one without boxes; the caller counts them. None: it ends the
    stream.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        *,
        min_size: int,
        max_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        limit_batches: int | None = None,
        pin: bool = False,
        max_bad_images: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size and batch_size >= 1
        self.dataset = dataset
        num_images = len(dataset)
        if limit_batches is not None:
            num_images = min(num_images, limit_batches * batch_size * world_size)
        self.image_ids = dataset.image_ids[:num_images]
        """int64: the images evaluated by all processes together"""
        self._sizes = resized_sizes(
            dataset.widths[:num_images], dataset.heights[:num_images], min_size=min_size, max_size=max_size
        )
        every_batch = evaluation_batches(padded_size(self._sizes[:, None]), batch_size)
        self._numbers = range(rank, len(every_batch), world_size)
        self._batches = [every_batch[number] for number in self._numbers]
        self._stream = _BatchStream(dataset, batch_size, workers, pin, "fail" if max_bad_images is None else "blank")

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._batches)

    @property
    def num_images(self) -> int:
        """Images of this process."""
        return sum(map(len, self._batches))

    def batches(self) -> Iterator[RawBatch]:
        """This process's batches. `iteration` is a batch's number among those of all processes; flips, epoch
        and sample_keys are zero; boxes (without crowd regions) are those of the annotations, to be shown.

        Raises ImageError for a picture that cannot be used, where max_bad_images is None.
        """
        return self._stream.run(map(self._plan, self._numbers, self._batches))

    def close(self) -> None:
        """Ends the worker processes."""
        self._stream.close()

    def _plan(self, number: int, indices: np.ndarray) -> BatchPlan:
        height, width = padded_size(self._sizes[indices]).tolist()
        return BatchPlan(
            iteration=number,
            epoch=0,
            indices=indices,
            places=np.arange(len(indices)),
            sample_keys=np.zeros(len(indices), dtype=np.int64),
            sizes=self._sizes[indices],
            scaled_sizes=self._sizes[indices],
            offsets=np.zeros((len(indices), 2), dtype=np.int64),
            flips=np.zeros(len(indices), dtype=bool),
            vertical_flips=np.zeros(len(indices), dtype=bool),
            padded_size=(height, width),
            num_box_rows=_box_rows(self.dataset.box_counts[indices]),
        )


def _repeat_factors(dataset: CocoDataset, threshold: float) -> np.ndarray:
    images = np.repeat(np.arange(len(dataset)), dataset.box_counts)
    return repeat_factors(images, dataset.labels, len(dataset), threshold)


def _box_rows(box_counts: np.ndarray) -> int:
    return max(-(-int(box_counts.max()) // BOX_ROWS_MULTIPLE), 1) * BOX_ROWS_MULTIPLE


def _buffer_size(dataset: CocoDataset, batch_size: int) -> int:
    sizes = dataset.num_bytes(slice(None))
    return batch_size * int(min(sizes.max(), LARGEST_BUFFER * sizes.mean()))


def _pairs(sizes: np.ndarray) -> list[tuple[int, int]]:
    return [(height, width) for height, width in sizes.tolist()]


def _worker_context() -> str | None:
    # A forked worker has the annotations at once and shares their pages; it never touches a GPU.
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group, and so does the SIGTERM of torchrun or a batch system. The main process
    # decides what becomes of the run, and may still want batches: only its own SIGTERM counts here. A worker whose
    # parent is gone ends by itself (torch's worker loop watches it).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, daemon=True, name="sigterm").start()


def _end_when_parent_says() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)
