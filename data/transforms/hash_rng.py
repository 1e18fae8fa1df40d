"""Stateless random numbers: a 64-bit hash of where in the training they are used.

Nothing is drawn from a generator that has a state, so a number depends neither on ranks and workers nor on
what happened before, and needs nothing to be stored for a resume. The hash is defined here rather than taken
from numpy or torch, whose generators may change between versions.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

# One number per use, so that the order of the images and their flips, both hashes of (seed, epoch, image),
# have nothing to do with each other.
ORDER_STREAM = 1
FLIP_STREAM = 2
SAMPLING_STREAM = 3
VERTICAL_FLIP_STREAM = 16
SCALE_STREAM = 17
CROP_STREAM = 18
COLOR_STREAM = 19
REPEAT_STREAM = 20
OWN_STREAM = 21
PLACE_STREAM = 22
BATCH_STREAM = 23
PASTE_STREAM = 24
GROUP_STREAM = 25

SORTED_PLACES = 4096
"""Up to as many are sorted by a hash: a network over few places shuffles them badly."""
PERMUTATION_ROUNDS = 8
"""With six, the differences of neighbors are still uneven in 400 permutations of 5,003 places (z = 1.8)."""
REPEAT_SHIFT = 40
"""Bits of an image's word below the number of its repeat."""

_MASK = (1 << 64) - 1


def splitmix64(values: ArrayLike) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
    from each state: uint64 array of any shape -> uint64 array of that shape. A bijection."""
    z = np.asarray(values, dtype=np.uint64)
    with np.errstate(over="ignore"):  # wrapping around at 2**64 is meant; numpy warns for 0-d arrays
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """uint64 hash of a sequence of integers: h = 0, then h = splitmix64(h ^ word) for each word.

    Words are integers (taken modulo 2**64) or integer arrays, which are broadcast against each other.
    """
    state = np.zeros((), dtype=np.uint64)
    for word in words:
        if isinstance(word, np.ndarray):
            state = splitmix64(state ^ word.astype(np.uint64))
        else:
            state = splitmix64(state ^ np.uint64(int(word) & _MASK))
    return state


def hash_uniform(*words: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits of hash_words."""
    return (hash_words(*words) >> np.uint64(11)) * 2.0**-53


def hash_permutation(places: np.ndarray, number: int, *words: int) -> np.ndarray:
    """Where a permutation of 0 to `number` - 1, which is a hash of `words`, takes `places`: int64, of their shape.

    Beyond SORTED_PLACES a place is computed by itself, from no list of all: by a Feistel network over pairs
    (left, right), whose ranges multiply to a little more than `number` (the generalized Feistel cipher of Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). What falls outside is sent through again, as there.
    """
    if number <= SORTED_PLACES:
        return np.argsort(hash_words(*words, np.arange(number)), kind="stable")[places]
    left_range = math.isqrt(number - 1) + 1
    left_size, right_size = np.uint64(left_range), np.uint64(-(-number // left_range))
    keys = hash_words(*words, np.arange(PERMUTATION_ROUNDS))
    found = places.astype(np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        left, right = np.divmod(found[outside], right_size)
        for one, other in keys.reshape(-1, 2):
            left = (left + splitmix64(one ^ right) % left_size) % left_size
            right = (right + splitmix64(other ^ left) % right_size) % right_size
        found[outside] = left * right_size + right
        outside = found >= number
    return found.astype(np.int64)


def image_words(indices: np.ndarray, repeats: np.ndarray) -> np.ndarray:
    """int64 words that stand for images in the hash: `indices` (below 2**40) seen for the first (repeats 0),
    second (1), ... time in an epoch. The first time, the word is the index itself."""
    return indices + (repeats << REPEAT_SHIFT)


def hash_key(seed: int, iteration: int | np.ndarray, place: int | np.ndarray) -> np.ndarray:
    """int64 key from which a model draws all its random numbers for the image at `place` of the global batch
    of `iteration` (arrays are broadcast)."""
    return hash_words(seed, SAMPLING_STREAM, iteration, place).view(np.int64)
