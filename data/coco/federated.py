"""What LVIS says of its images besides boxes: the classes that each was searched for, and how rare a class is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FREQUENCIES = ("r", "c", "f")
"""LVIS's names of rare, common and frequent classes: fewer than 10 training images, fewer than 100, and the others."""
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"


@dataclass(frozen=True, eq=False)
class Federated:
    """A federated data set's knowledge, by ids of the file: a part of its images or classes may share it.

    Gupta, Dollar, Girshick, "LVIS: A Dataset for Large Vocabulary Instance Segmentation", 2019, section 2.

    Attributes:
        negative: int64 [P, 2], (image id, category id): the image was searched for the class and has none.
        not_exhaustive: int64 [Q, 2], (image id, category id): the image may have more of the class than are annotated.
        frequencies: int64 [F, 2], (category id, place in FREQUENCIES), of the categories that have one.
    """

    negative: np.ndarray
    not_exhaustive: np.ndarray
    frequencies: np.ndarray

    @staticmethod
    def of(
        image_ids: np.ndarray,
        negative: tuple[np.ndarray, np.ndarray],
        not_exhaustive: tuple[np.ndarray, np.ndarray],
        frequencies: Iterable[tuple[int, object]],
    ) -> Federated:
        """That of images with these lists of category ids (all of them one after another, and the length of each
        image's) and of categories with these ids and letters; one that is no letter of FREQUENCIES does not count."""
        known = {letter: place for place, letter in enumerate(FREQUENCIES)}
        rows = [(number, known[one]) for number, one in frequencies if isinstance(one, str) and one in known]
        first, second = (
            np.stack([np.repeat(image_ids, lengths), ids], axis=1) for ids, lengths in (negative, not_exhaustive)
        )
        return Federated(first, second, np.array(rows, dtype=np.int64).reshape(-1, 2))

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))
