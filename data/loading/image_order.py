"""Which images make up which batch of an epoch, batch by batch: no array of all images is made or sorted.

The order is a property of (seed, epoch, global batch size): the same on any number of processes, each of which takes
its slice of every global batch. A batch takes the same time whatever it is the batch of, so a resume anywhere costs
nothing, and neither does the beginning of an epoch.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from data.loading.sampler import FRACTION_BITS, epoch_length, iterations_per_epoch, plan_epoch, repeat_numbers
from data.transforms.hash_rng import BATCH_STREAM, PLACE_STREAM, REPEAT_STREAM, hash_permutation, hash_uniform

_Groups = list[tuple[int, int]]
"""First place and number of places of the portraits, and of the others."""


class ImageOrder:
    """The batches of every epoch: versions 2 and 3 of the order.

    Images have the places 0 to n - 1 of an epoch: first the portraits (width < height), then the others, an image that
    is wanted several times having several places. Each of the two groups is shuffled and cut into batches, and these
    are shuffled. What is left over of both comes last: at most one batch holds both shapes, as with MMDetection's
    AspectRatioBatchSampler. The last batch is filled up with images that the epoch has had.

    factors (float64 [N], see sampler.repeat_factors): an image is in the epoch as often as its factor says on average,
    and as the factor rounded down or up in each (systematic sampling: places lie at equal distances along the
    factors, laid end to end, from a start that is a hash of the epoch).
    """

    def __init__(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        factors: np.ndarray | None = None,
    ) -> None:
        portrait = widths < heights
        dtype = np.int32 if len(widths) < 1 << 31 else np.int64
        self._images = np.concatenate([np.flatnonzero(portrait), np.flatnonzero(~portrait)]).astype(dtype)
        self._num_portraits = int(portrait.sum())
        self._seed, self._batch_size = seed, global_batch_size
        self._ends: np.ndarray | None = None
        """int64 [N + 1]: where images begin on the line of the factors, in units of 2**-FRACTION_BITS"""
        self.length = len(widths)
        """Images of an epoch, before its last batch is filled up."""
        if factors is not None:
            units = np.rint(factors[self._images] * 2.0**FRACTION_BITS).astype(np.int64)
            self._ends = np.concatenate([[0], np.cumsum(units)])
            self.length = -(-int(self._ends[-1]) // (1 << FRACTION_BITS))

    @property
    def num_batches(self) -> int:
        return iterations_per_epoch(self.length, self._batch_size)

    def batches(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The global batches of these numbers (int64 [K], 0 to num_batches - 1): the images, int64 [K, B], and for each
        the number of its repeat in the epoch (int64 [K, B], 0 for one, another for each other)."""
        size, length = self._batch_size, self.length
        start = float(hash_uniform(self._seed, REPEAT_STREAM, epoch))
        num_portraits = self._num_portraits
        if self._ends is not None:
            edge = int(self._ends[num_portraits])
            num_portraits = bisect_left(range(length), edge, key=lambda place: int(self._line(place, start)))
        groups = [(0, num_portraits), (num_portraits, length - num_portraits)]
        num_whole = [count // size for _, count in groups]
        places = np.empty((len(numbers), size), dtype=np.int64)
        again = np.zeros_like(places)
        rows = np.flatnonzero(numbers < sum(num_whole))
        drawn = hash_permutation(numbers[rows], sum(num_whole), self._seed, BATCH_STREAM, epoch)
        for group, of_group in enumerate((drawn < num_whole[0], drawn >= num_whole[0])):
            first = (drawn[of_group] - group * num_whole[0])[:, None] * size
            places[rows[of_group]] = self._shuffled(epoch, groups, group, first + np.arange(size))
        if len(rows) < len(numbers):
            rows = np.flatnonzero(numbers >= sum(num_whole))
            tail, tail_again = self._tail(epoch, groups, num_whole)
            of_tail = (numbers[rows, None] - sum(num_whole)) * size + np.arange(size)
            places[rows], again[rows] = tail[of_tail], tail_again[of_tail]
        return self._images_at(places, again, start)

    def _tail(self, epoch: int, groups: _Groups, num_whole: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The places behind the whole batches, and how often the epoch had each of them before."""
        left_over = [
            self._shuffled(epoch, groups, group, np.arange(num_whole[group] * self._batch_size, count))
            for group, (_, count) in enumerate(groups)
        ]
        # Filled up in the shape of the last image.
        group = 1 if len(left_over[1]) or not groups[0][1] else 0
        missing = np.arange(self.num_batches * self._batch_size - self.length)
        rounds, numbers = np.divmod(missing, groups[group][1])
        tail = np.concatenate([*left_over, self._shuffled(epoch, groups, group, numbers)])
        return tail, np.concatenate([np.zeros(len(tail) - len(missing), dtype=np.int64), 1 + rounds])

    def _shuffled(self, epoch: int, groups: _Groups, group: int, numbers: np.ndarray) -> np.ndarray:
        """The places that stand at `numbers` of a group after it was shuffled."""
        first, count = groups[group]
        return first + hash_permutation(numbers, count, self._seed, PLACE_STREAM, epoch, group)

    def _line(self, places: int | np.ndarray, start: float) -> np.ndarray:
        """Where places lie on the line of the factors: int64, below its end."""
        assert self._ends is not None
        total = int(self._ends[-1])
        return np.minimum((np.asarray(places) + start) * (total / self.length), total - 1).astype(np.int64)

    def _images_at(self, places: np.ndarray, again: np.ndarray, start: float) -> tuple[np.ndarray, np.ndarray]:
        if self._ends is None:
            return self._images[places].astype(np.int64), again
        images = np.searchsorted(self._ends, self._line(places, start), side="right") - 1
        first, end = self._first_place(self._ends[images], start), self._first_place(self._ends[images + 1], start)
        return self._images[images].astype(np.int64), places - first + again * (end - first)

    def _first_place(self, edges: np.ndarray, start: float) -> np.ndarray:
        """The first places at these edges of the line, or beyond."""
        assert self._ends is not None
        places = np.ceil(edges / (int(self._ends[-1]) / self.length) - start).astype(np.int64).clip(0, self.length)
        # The quotient is rounded; the line itself decides.
        for _ in range(2):
            places -= (places > 0) & (self._line(places - 1, start) >= edges)
        for _ in range(2):
            places += (places < self.length) & (self._line(places, start) < edges)
        return places


class WholeEpochOrder:
    """Version 1, which plans and sorts an epoch as a whole; see sampler.plan_epoch."""

    def __init__(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        factors: np.ndarray | None = None,
    ) -> None:
        self._sides = widths, heights
        self._seed, self._batch_size, self._factors = seed, global_batch_size, factors
        self._epoch, self._plan, self._repeats = -1, np.empty(0), np.empty(0)
        self.length = len(widths) if factors is None else epoch_length(factors)

    @property
    def num_batches(self) -> int:
        return iterations_per_epoch(self.length, self._batch_size)

    def batches(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ImageOrder's."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._plan = plan_epoch(
                *self._sides,
                seed=self._seed,
                epoch=epoch,
                global_batch_size=self._batch_size,
                factors=self._factors,
            )
            self._repeats = repeat_numbers(self._plan)
        return self._plan[numbers], self._repeats[numbers]


ORDERS: dict[int, type[ImageOrder] | type[WholeEpochOrder]] = {1: WholeEpochOrder, 2: ImageOrder, 3: ImageOrder}
"""By version. A checkpoint says which one is its run's. Version 3 has the batches of version 2, grouped by shape: see
padding_groups.py."""
NEWEST_ORDER = max(ORDERS)
