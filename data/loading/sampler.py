"""Which images make up which batch: pure functions of the seed and the epoch.

The order is a property of (seed, epoch, global batch size): the same on any number of processes, each of
which takes its slice of every global batch. With repeat factors, images of rare classes are seen several times an
epoch; every epoch still has the same length, on which the learning rate depends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.transforms.hash_rng import ORDER_STREAM, REPEAT_STREAM, hash_words, image_words

FRACTION_BITS = 32
"""Fractional parts of the factors are whole multiples of 2**-32, so that their sums are exact."""


def epoch_order(seed: int, epoch: int, num_images: int, copies: np.ndarray | None = None) -> np.ndarray:
    """The images 0 to num_images - 1 in the order of `epoch`: int64, each once, or as often as `copies` (int64
    [num_images]) says.

    Images are sorted by a hash of (seed, epoch, image, copy), so the copies of an image lie anywhere.
    """
    if copies is None:
        return np.argsort(hash_words(seed, ORDER_STREAM, epoch, np.arange(num_images)), kind="stable")
    images = np.repeat(np.arange(num_images), copies)
    keys = hash_words(seed, ORDER_STREAM, epoch, image_words(images, repeat_numbers(images)))
    return images[np.argsort(keys, kind="stable")]


def repeat_numbers(images: np.ndarray) -> np.ndarray:
    """How many times each entry's image occurs before it: int64, of the shape of `images` (int64, read row by
    row); 0 for the first occurrence."""
    flat = images.reshape(-1)
    by_image = np.argsort(flat, kind="stable")
    ordered = flat[by_image]
    numbers = np.empty_like(flat)
    numbers[by_image] = np.arange(len(flat)) - np.searchsorted(ordered, ordered)
    return numbers.reshape(images.shape)


def iterations_per_epoch(num_images: int, global_batch_size: int) -> int:
    """Global batches of an epoch: ceil(num_images / global_batch_size)."""
    return -(-num_images // global_batch_size)


def plan_epoch(
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    factors: np.ndarray | None = None,
) -> np.ndarray:
    """The global batches of an epoch: image indices, int64 [ceil(N / global_batch_size), global_batch_size].

    widths and heights are int64 [N]. Images are taken in epoch_order and grouped by shape, see
    group_by_aspect. End of the epoch: every image is in it at least once. Where N is no multiple of the
    global batch size, the last batch is filled up with the first images of the epoch's order (again from the
    start of it, if it is shorter than what is missing); these are seen twice in the epoch.

    With repeat factors (float64 [N], see repeat_factors) an image is in the epoch as often as its factor
    says on average, and N is their sum, rounded up; the rest is the same. So all epochs have the
    same number of batches.
    """
    if factors is None:
        order, length = epoch_order(seed, epoch, len(widths)), len(widths)
    else:
        copies = epoch_copies(factors, seed=seed, epoch=epoch)
        order, length = epoch_order(seed, epoch, len(widths), copies), epoch_length(factors)
    grouped = group_by_aspect(order, widths < heights, global_batch_size)
    missing = iterations_per_epoch(length, global_batch_size) * global_batch_size - len(order)
    return np.concatenate([grouped, np.resize(order, missing)]).reshape(-1, global_batch_size)


def group_by_aspect(order: np.ndarray, portrait: np.ndarray, batch_size: int) -> np.ndarray:
    """`order` rearranged so that cutting it every batch_size images gives batches of one shape.

    The rule is that of MMDetection's AspectRatioBatchSampler: there are two groups, portrait (width < height)
    and the rest. Images are taken as `order` (int64 [N], image indices) has them, and as soon as a group has
    batch_size of them they form a batch. The left-overs of the portrait group, then of the other, come last:
    at most one batch holds both shapes.

    portrait is bool, indexed by image. Returns int64 [N].
    """
    members = [np.flatnonzero(portrait[order]), np.flatnonzero(~portrait[order])]
    complete = [positions[: len(positions) // batch_size * batch_size] for positions in members]
    batches = np.concatenate([positions.reshape(-1, batch_size) for positions in complete])
    # A batch is formed when its last image comes up.
    batches = batches[np.argsort(batches[:, -1])]
    left_over = [positions[len(whole) :] for positions, whole in zip(members, complete, strict=True)]
    return order[np.concatenate([batches.reshape(-1), *left_over])]


def evaluation_batches(padded_sizes: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of an evaluation: every image exactly once, images of like padded size together.

    padded_sizes is int64 [N, 2] (height, width) of each image padded alone. Returns index arrays of
    batch_size images (the last may be shorter), the largest images first, so that what does not fit into
    memory shows at once. The batches do not depend on the number of processes.
    """
    heights, widths = padded_sizes.T
    # lexsort sorts by its last key first; images of equal shape stay in the order of the file.
    order = np.lexsort((-heights, -widths, -heights * widths))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def repeat_factors(image_indices: np.ndarray, labels: np.ndarray, num_images: int, threshold: float) -> np.ndarray:
    """How often each image is wanted in an epoch: float64 [num_images], 1 at least.

    The factors are those of LVIS (Gupta, Dollar and Girshick 2019, "LVIS: A dataset for large vocabulary instance
    segmentation", appendix B.2).

    image_indices and labels are int64 [M], one entry a box. With f(c) the fraction of the images that have a box
    of class c, r(c) = max(1, sqrt(threshold / f(c))); an image has the largest r of its classes, and 1 when it has
    no box.
    """
    factors = np.ones(num_images)
    if len(labels) == 0:
        return factors
    num_classes = int(labels.max()) + 1
    images, classes = np.divmod(np.unique(image_indices * num_classes + labels), num_classes)
    fractions = np.bincount(classes, minlength=num_classes) / num_images
    class_factors = np.maximum(1.0, np.sqrt(threshold / np.where(fractions > 0, fractions, 1.0)))
    np.maximum.at(factors, images, class_factors[classes])
    return factors


@dataclass(frozen=True)
class Sampling:
    """How often images come in an epoch, where not once each."""

    repeat_threshold: float | None = None
    """Of repeat_factors"""
    rounds_up: bool = False
    """Those factors are rounded up, as MMDetection's ClassBalancedDataset has them"""
    repeat_times: int = 1
    """How often everything comes"""
    class_shares: Mapping[str, float] | None = None
    """Class-aware sampling: each image of an epoch is drawn by drawing a class, and one of its images. The weights of
    the classes, of 1 where none is given; empty: all alike"""
    set_shares: Mapping[str, float] | None = None
    """Weight of each set among the images of an epoch"""


def image_factors(
    sampling: Sampling,
    box_counts: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    sets: Mapping[str, slice],
) -> np.ndarray | None:
    """How often each image is wanted in an epoch: float64 [N]; None where each is wanted once.

    box_counts is int64 [N]. labels is int64 [M], image by image. sets: the images of each set.

    Shares leave the length of an epoch as it is: the number of images, or what the repeats make of it.

    Raises DataError for a name or a weight that cannot be.
    """
    if sampling == Sampling():
        return None
    num_images = len(box_counts)
    images = np.repeat(np.arange(num_images), box_counts)
    factors = np.ones(num_images)
    if sampling.repeat_threshold is not None:
        factors = repeat_factors(images, labels, num_images, sampling.repeat_threshold)
        factors = np.ceil(factors) if sampling.rounds_up else factors
    if sampling.class_shares is not None:
        factors = _class_aware(images, labels, num_images, _weights(sampling.class_shares, class_names, "class", 1.0))
    factors = factors * sampling.repeat_times
    if sampling.set_shares is not None:
        weights, total = _weights(sampling.set_shares, list(sets), "set", None), factors.sum()
        for weight, rows in zip(weights / weights.sum(), sets.values(), strict=True):
            if weight and not factors[rows].any():
                raise DataError("a set with a share has no image of a class that has one")
            factors[rows] *= weight * total / max(factors[rows].sum(), 1e-300)
    return factors


def _class_aware(images: np.ndarray, labels: np.ndarray, num_images: int, weights: np.ndarray) -> np.ndarray:
    """Factors that sum up to num_images: of each image the sum over its classes of share / images of the class, as
    drawing a class by its share and one of its images gives on average."""
    pairs = np.unique(images * len(weights) + labels)
    rows, classes = np.divmod(pairs, len(weights))
    counts = np.bincount(classes, minlength=len(weights))
    weights = np.where(counts > 0, weights, 0.0)
    if not weights.sum():
        raise DataError("no class with a share has a box")
    each = num_images * weights / weights.sum() / np.maximum(counts, 1)
    return np.bincount(rows, each[classes], minlength=num_images)


def _weights(shares: Mapping[str, float], names: Sequence[str], what: str, default: float | None) -> np.ndarray:
    if unknown := [name for name in shares if name not in names]:
        raise DataError(f"there is no {what} {unknown[0]!r}, but {', '.join(map(repr, names))}")
    if default is None and (lacking := [name for name in names if name not in shares]):
        raise DataError(f"the {what} {lacking[0]!r} has no share: give one to each, 0 to leave it out")
    weights = np.array([shares.get(name, default or 0.0) for name in names])
    if not weights.sum():
        raise DataError(f"every {what} has the share 0")
    return weights


def epoch_length(factors: np.ndarray) -> int:
    """Images of an epoch: the sum of the factors (float64 [N]), rounded up. No epoch's copies are more, and none
    are fewer by more than one."""
    whole, units = _split(factors)
    return int(whole.sum() + ((units.sum() + (1 << FRACTION_BITS) - 1) >> FRACTION_BITS))


def epoch_copies(factors: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """How often each image is seen in `epoch`: int64 [N], each factor rounded down or up.

    Rounded up with the probability of its fractional part, so over the epochs an image is seen as often as its
    factor says. The roundings of an epoch are tied to each other (systematic sampling: images are put in an order
    that is a hash of (seed, epoch, image), the fractional parts are laid end to end on a line in it, and those are
    rounded up on which the line crosses a whole number, counted from a start that is a hash of (seed, epoch)); so
    the sum is that of the factors, but for its own rounding, in every epoch.
    """
    whole, units = _split(factors)
    order = np.argsort(hash_words(seed, REPEAT_STREAM, epoch, np.arange(len(factors))), kind="stable")
    start = np.int64(hash_words(seed, REPEAT_STREAM, epoch) >> np.uint64(64 - FRACTION_BITS))
    line = np.cumsum(np.concatenate([[start], units[order]])) >> FRACTION_BITS
    copies = whole.copy()
    copies[order] += np.diff(line)
    return copies


def _split(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole parts and multiples of 2**-FRACTION_BITS of the fractional parts, int64 each."""
    whole = np.floor(factors)
    return whole.astype(np.int64), np.rint((factors - whole) * 2.0**FRACTION_BITS).astype(np.int64)
