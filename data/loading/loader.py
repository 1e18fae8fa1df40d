"""Batches for training and evaluation, decoded by worker processes.

The main process plans (which images, which sizes, which flips: a few hundred bytes a batch, computed from the
annotations alone), workers read and decode, and the training device does the rest (data/loading/batch.py).
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data.loading.batch import BatchPlan, RawBatch
from data.loading.dataset import CocoDataset, sets_of
from data.loading.image_order import NEWEST_ORDER, ORDERS
from data.loading.largest_batch import largest_batch
from data.loading.padding_groups import FIRST_GROUPED_ORDER, group_size, grouped
from data.loading.read_batch import OnUnreadable
from data.loading.sampler import Sampling, evaluation_batches, image_factors
from data.loading.shape_buckets import bucket_of, shape_buckets
from data.loading.workers import WorkerPool
from data.transforms.augmentation import Augmentation
from data.transforms.copy_paste import partners, paste_seed
from data.transforms.geometry import Geometry, padded_size, resized_sizes
from data.transforms.hash_rng import GROUP_STREAM, hash_key, hash_words, image_words

BOX_ROWS_MULTIPLE = 16
"""Rows for boxes are a multiple of this, so that only a few shapes occur (COCO has at most 93 boxes)."""

EPOCHS_LOOKED_AT = 24
"""By then scales that are drawn at random, and images that meet by chance, have made their largest batch, or nearly."""

ITERATIONS_LOOKED_AT = 16_384
"""Of an epoch: all of COCO's, evenly spread ones of a set of millions."""

_EACH_ONCE = Sampling()
_FLIPS_ONLY, _UNCHANGED = Augmentation(), Augmentation(flip_probability=0.0)


class TrainLoader:
    """Batches of one process of a training.

    A global batch is world_size * batch_size * accumulate images; in micro-step a process r gets places
    (a * world_size + r) * batch_size onward. What a global batch holds, its order, augmentation, padded sizes and
    number of box rows depend on (seed, iteration, global batch size) only, so 1 process with batch 4 and 2
    processes with batch 2 see the same tensors. Of more than 16 images groups are padded apart (padding_groups.py),
    which is as independent, but that a process with several groups at a time pads them as the largest. For the order
    and the end of an epoch see data.loading.image_order, of which image_order is a version. With limit_batches an epoch
    has that many iterations at most (the first of it).
    epoch_iterations: what counts as an epoch of the training, whatever the set's size; passes over the set follow each
    other as ever, and end and begin inside of epochs.

    min_size, max_size: the keep-ratio resize, see geometry.py, where augmentation chooses no other. augmentation:
    what is done at random, an image that comes again in an epoch being another draw. sampling: how often images come in
    an epoch. Raises DataError where a share is for what is not there.

    few_shapes: padded sizes are of shape_buckets.py, for code that is compiled for each size. pin: hand over
    page-locked memory (for GPUs). workers: worker processes; 0 decodes in this one. max_bad_images: an image that
    cannot be used is replaced (see unreadable.py) and named in the batch's `unreadable`; after more than so many
    in a row a black image without boxes stands in, and the caller is to end the run. None: it ends the stream.
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
        sampling: Sampling = _EACH_ONCE,
        image_order: int = NEWEST_ORDER,
        limit_batches: int | None = None,
        epoch_iterations: int | None = None,
        few_shapes: bool = False,
        pin: bool = False,
        max_bad_images: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size and min(batch_size, accumulate) >= 1
        self.dataset = dataset
        self.global_batch_size = world_size * batch_size * accumulate
        factors = image_factors(sampling, dataset.box_counts, dataset.labels, dataset.class_names, sets_of(dataset))
        self.repeat_factors = factors
        """float64 [N]: how often each image comes in an epoch on average, where not once each"""
        self.image_order = image_order
        self._order = ORDERS[image_order](
            dataset.widths, dataset.heights, seed=seed, global_batch_size=self.global_batch_size, factors=factors
        )
        self.images_per_epoch = self._order.length
        """Before the last batch is filled up; limit_batches has no part in it"""
        self._pass_iterations = self._order.num_batches
        self.iterations_per_epoch = epoch_iterations or self._pass_iterations
        if limit_batches is not None:
            self._pass_iterations = min(self._pass_iterations, limit_batches)
            self.iterations_per_epoch = min(self.iterations_per_epoch, limit_batches)
        number = group_size(self.global_batch_size)
        is_grouped = image_order >= FIRST_GROUPED_ORDER and number > 1 and augmentation.jitter is None
        self._group_size = number if is_grouped else self.global_batch_size
        self.min_size, self.max_size = min_size, max_size
        # Large-scale jitter has one size as it is.
        self._buckets = shape_buckets(min_size, max_size) if few_shapes and augmentation.jitter is None else []
        self.num_workers = workers
        self._batch_size, self._accumulate = batch_size, accumulate
        self._rank, self._world_size = rank, world_size
        self._seed, self._augmentation = seed, augmentation
        on_unreadable: OnUnreadable = "fail" if max_bad_images is None else "replace"
        assert dataset.has_masks and augmentation.jitter is not None if augmentation.copy_paste else True
        num_read = 2 * batch_size if augmentation.copy_paste else batch_size
        self._stream = WorkerPool(dataset, num_read, workers, pin, on_unreadable, max_bad_images or 0)

    def batches(self, first_iteration: int, last_iteration: int) -> Iterator[RawBatch]:
        """Batches of the iterations first_iteration to last_iteration - 1 (0-based over the whole run),
        `accumulate` for each; epochs follow each other without a pause. No image of an earlier iteration is
        loaded. One iterator at a time: the workers are shared.

        Raises ImageError for an image that cannot be used, where max_bad_images is None.
        """
        return self._stream.run(self.plans(first_iteration, last_iteration))

    def read_iteration(self, iteration: int, rank: int) -> Iterator[RawBatch]:
        """The batches of process `rank` in one iteration, as `batches` has them there: read in this process, whatever
        the workers are at."""
        return map(self._stream.read, self.plans(iteration, iteration + 1, rank))

    def plans(self, first_iteration: int, last_iteration: int, rank: int | None = None) -> Iterator[BatchPlan]:
        """What `batches` loads, without loading it; of process `rank` where one is given."""
        for iteration in range(first_iteration, last_iteration):
            epoch, number = divmod(iteration, self._pass_iterations)
            images, repeats = self._order.batches(epoch, np.array([number]))
            yield from self._plans_of(iteration, epoch, images[0], repeats[0], self._rank if rank is None else rank)

    def start(self) -> None:
        """Starts the worker processes, which otherwise begin with the first batch."""
        self._stream.start()

    def close(self) -> None:
        """Ends the worker processes."""
        self._stream.close()

    def largest_batch(self, num_epochs: int) -> RawBatch:
        """A made-up batch of this process: its padded size has the most pixels of any in the first `num_epochs` epochs
        (at most EPOCHS_LOOKED_AT), among them the one that mixes the shapes left over at an epoch's end; it has the
        most rows of boxes, and the largest stored images."""
        sizes: set[tuple[int, int]] = set()
        num_box_rows = 0
        for epoch in range(min(num_epochs, EPOCHS_LOOKED_AT)):
            order, repeats = self._order.batches(epoch, _spread(self._pass_iterations, ITERATIONS_LOOKED_AT))
            images = order.reshape(-1)
            words = image_words(images, repeats.reshape(-1))
            every = self._geometry(epoch, images, words)
            num_box_rows = max(num_box_rows, self._num_box_rows(images, self._partners(epoch, words)))
            if self._augmentation.jitter is not None:
                sizes.add(every.padded_size)
            else:
                by_batch = every.sizes.reshape(*order.shape, 2)
                if self._group_size < self.global_batch_size:
                    places = grouped(by_batch, self._group_size, np.zeros(len(order), dtype=np.int64))
                    by_batch = np.take_along_axis(by_batch, places[..., None], axis=1)
                # Where what a process has at a time does not lie in one group, any groups may meet.
                is_in_one = self._group_size % self._batch_size == 0
                at_once = self._group_size if is_in_one else self.global_batch_size
                padded = np.unique(padded_size(by_batch.reshape(-1, at_once, 2)), axis=0)
                sizes |= {bucket_of((height, width), self._buckets) for height, width in padded.tolist()}
            # Without random scales no epoch has a larger batch than one of all images would be.
            can_grow = order.size < self.images_per_epoch or self._augmentation.scales is not None
            if not can_grow and bucket_of(every.padded_size, self._buckets) in sizes:
                break
        return largest_batch(
            self.dataset,
            self._augmentation,
            padded_size=max(sizes, key=lambda size: (size[0] * size[1], size)),
            num_box_rows=num_box_rows,
            num_images=self._batch_size,
        )

    def _partners(self, epoch: int, words: np.ndarray) -> np.ndarray | None:
        if not self._augmentation.copy_paste:
            return None
        return partners(self._seed, epoch, words, len(self.dataset))

    def _num_box_rows(self, images: np.ndarray, sources: np.ndarray | None) -> int:
        counts = self.dataset.box_counts[images]
        return _box_rows(counts if sources is None else counts + self.dataset.box_counts[sources])

    def _geometry(self, epoch: int, images: np.ndarray, words: np.ndarray, seed: int | None = None) -> Geometry:
        return self._augmentation.geometry(
            self.dataset.widths[images],
            self.dataset.heights[images],
            words=words,
            seed=self._seed if seed is None else seed,
            epoch=epoch,
            min_size=self.min_size,
            max_size=self.max_size,
        )

    def _plans_of(
        self, iteration: int, epoch: int, images: np.ndarray, repeats: np.ndarray, rank: int
    ) -> Iterator[BatchPlan]:
        words = image_words(images, repeats)
        whole = self._geometry(epoch, images, words)
        if self._group_size < self.global_batch_size:
            turn = int(hash_words(self._seed, GROUP_STREAM, iteration) >> np.uint64(1))
            order = grouped(whole.sizes, self._group_size, turn)
            images, words, whole = images[order], words[order], whole.of_images(order)
        sources = self._partners(epoch, words)
        num_box_rows = self._num_box_rows(images, sources)
        for micro_step in range(self._accumulate):
            start = (micro_step * self._world_size + rank) * self._batch_size
            places = np.arange(start, start + self._batch_size)
            part = replace(whole.of_images(places), padded_size=self._padded_size(whole, places))
            plan = BatchPlan(
                **vars(part),
                iteration=iteration,
                epoch=epoch,
                indices=images[places],
                places=places,
                sample_keys=hash_key(self._seed, iteration, places),
                num_box_rows=num_box_rows,
                colors=self._augmentation.colors(words[places], seed=self._seed, epoch=epoch),
                own=self._augmentation.own_change(words[places], seed=self._seed, epoch=epoch),
            )
            if sources is not None:
                # Where it goes is drawn by the image that it is pasted onto: a source may be there twice.
                seed = paste_seed(self._seed)
                of_sources = self._geometry(epoch, sources[places], words[places], seed)
                plan = replace(
                    plan,
                    sources=replace(
                        plan,
                        **vars(of_sources),
                        indices=sources[places],
                        places=np.full(len(places), -1),
                        sample_keys=hash_key(seed, iteration, places),
                        colors=self._augmentation.colors(words[places], seed=seed, epoch=epoch),
                    ),
                )
            yield plan

    def _padded_size(self, whole: Geometry, places: np.ndarray) -> tuple[int, int]:
        """Of the groups that these places of a global batch lie in."""
        size = whole.padded_size
        if self._group_size < self.global_batch_size:
            first, last = (place // self._group_size for place in (int(places[0]), int(places[-1])))
            sizes = whole.sizes[first * self._group_size : (last + 1) * self._group_size]
            height, width = padded_size(sizes).tolist()
            size = height, width
        return bucket_of(size, self._buckets)


class EvalLoader:
    """Batches of one process of an evaluation: every image exactly once over all processes.

    Images of like shape are batched together and batch i goes to process i mod world_size, so processes may
    have different numbers of images, or none; what a batch holds does not depend on the number of processes.
    A batch is padded for its own images. limit_batches: only the first limit_batches * batch_size *
    world_size images of the file are evaluated. max_bad_images: with a number, an image that cannot be used is named
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
        self._min_size, self._max_size = min_size, max_size
        sizes = resized_sizes(
            dataset.widths[:num_images], dataset.heights[:num_images], min_size=min_size, max_size=max_size
        )
        every_batch = evaluation_batches(padded_size(sizes[:, None]), batch_size)
        self._numbers = range(rank, len(every_batch), world_size)
        self._batches = [every_batch[number] for number in self._numbers]
        self._stream = WorkerPool(dataset, batch_size, workers, pin, "fail" if max_bad_images is None else "blank")

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

        Raises ImageError for an image that cannot be used, where max_bad_images is None.
        """
        return self._stream.run(map(self._plan, self._numbers, self._batches))

    def start(self) -> None:
        """Starts the worker processes, which otherwise begin with the first batch."""
        self._stream.start()

    def close(self) -> None:
        """Ends the worker processes."""
        self._stream.close()

    def _plan(self, number: int, indices: np.ndarray) -> BatchPlan:
        dataset, none = self.dataset, np.zeros(len(indices), dtype=np.int64)
        geometry = _UNCHANGED.geometry(
            dataset.widths[indices],
            dataset.heights[indices],
            words=none,
            seed=0,
            epoch=0,
            min_size=self._min_size,
            max_size=self._max_size,
        )
        return BatchPlan(
            **vars(geometry),
            iteration=number,
            epoch=0,
            indices=indices,
            places=np.arange(len(indices)),
            sample_keys=none,
            num_box_rows=_box_rows(dataset.box_counts[indices]),
        )


def _spread(number: int, most: int) -> np.ndarray:
    """0 to `number` - 1, or `most` of them evenly spread, the first and the last among them: int64."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.int64))


def _box_rows(box_counts: np.ndarray) -> int:
    return max(-(-int(box_counts.max()) // BOX_ROWS_MULTIPLE), 1) * BOX_ROWS_MULTIPLE
