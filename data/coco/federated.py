"""What LVIS says of its images besides boxes: the classes that each was searched for, and how rare a class is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data.coco.columns import Records

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
    def read(images: Records, categories: Records) -> Federated | None:
        """That of a file whose ids were checked; None where no image has "neg_category_ids".

        Raises AnnotationError for an image without one of the two lists, and for what is no list of integers.
        """
        if not images.contains(NEGATIVE, list).any():
            return None
        image_ids = images.integers("id")
        known = {letter: place for place, letter in enumerate(FREQUENCIES)}
        letters = categories.values("frequency")
        rows = [
            (number, known[letter])
            for number, letter in zip(categories.integers("id").tolist(), letters, strict=True)
            if isinstance(letter, str) and letter in known
        ]
        negative, not_exhaustive = (_pairs(images, key, image_ids) for key in (NEGATIVE, NOT_EXHAUSTIVE))
        return Federated(negative, not_exhaustive, np.array(rows, dtype=np.int64).reshape(-1, 2))

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))


def _pairs(images: Records, key: str, image_ids: np.ndarray) -> np.ndarray:
    remedy = f'LVIS gives every image a list of category ids under "{key}", which may be empty.'
    lists = images.column(key, {list}, "a list of category ids", remedy)
    for index, values in enumerate(lists):
        if not all(type(value) is int and abs(value) < 2**63 for value in values):
            images.fail(index, f'"{key}" holds what is no category id', remedy)
    counts = [len(values) for values in lists]
    flat = np.array([value for values in lists for value in values], dtype=np.int64)
    return np.stack([np.repeat(image_ids, counts), flat], axis=1)
