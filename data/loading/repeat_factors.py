"""Repeat-factor sampling: images of rare classes are seen several times an epoch.

The factors are those of LVIS (Gupta, Dollar and Girshick 2019, "LVIS: A dataset for large vocabulary instance
segmentation", appendix B.2). How they become whole numbers of copies is made so that every epoch has the same
length, on which the learning rate depends.
"""

import numpy as np

from data.transforms.hash_rng import REPEAT_STREAM, hash_words

FRACTION_BITS = 32
"""Fractional parts of the factors are whole multiples of 2**-32, so that their sums are exact."""


def repeat_factors(image_indices: np.ndarray, labels: np.ndarray, num_images: int, threshold: float) -> np.ndarray:
    """How often each image is wanted in an epoch: float64 [num_images], 1 at least.

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
