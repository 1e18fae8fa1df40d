"""Images of a global batch in groups of like shape, each padded by itself, whatever processes there are.

Padded as a whole, nearly every batch of 128 images is as wide as the widest image that occurs.
"""

import numpy as np

from data.transforms.geometry import padded_size

GROUP_SIZE = 16
"""Images of a group at most: the batch that the schedules are meant for. Up to so many a batch is one group."""
FIRST_GROUPED_ORDER = 3
"""Runs in an older image order have the whole batch as one group, in the order that the batch has."""


def group_size(global_batch_size: int) -> int:
    """Images of a group: the largest divisor of the global batch size up to GROUP_SIZE."""
    return max(number for number in range(1, GROUP_SIZE + 1) if global_batch_size % number == 0)


def grouped(sizes: np.ndarray, number: int, turn: int | np.ndarray) -> np.ndarray:
    """The places of images in their batches, rearranged so that `number` neighbors are of like shape.

    sizes: int64 [..., B, 2], height and width in the batch. turn: a number for each batch, int64 [...]: groups go round
    by so many, so that no process has the same shapes in every batch. Returns int64 [..., B], a permutation in each.

    Portraits and others are apart, but for one group at most; in each, images go by the longer padded side.
    """
    heights, widths = np.moveaxis(padded_size(sizes[..., None, :]), -1, 0)
    keys = np.minimum(heights, widths), np.maximum(heights, widths), sizes[..., 0] > sizes[..., 1]
    order = np.lexsort(keys, axis=-1)
    batch_size = order.shape[-1]
    start = np.asarray(turn)[..., None] % (batch_size // number) * number
    return np.take_along_axis(order, (np.arange(batch_size) + start) % batch_size, axis=-1)
