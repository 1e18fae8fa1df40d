"""What LVIS says of its images besides boxes: the classes that each was searched for, and how rare a class is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data.coco.columns import Section

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
    def read(images: Section, image_ids: np.ndarray, categories: Section, category_ids: np.ndarray) -> Federated | None:
        """That of a file; None where no image has "neg_category_ids".

        Raises AnnotationError for an image without one of the two lists, and for what is no list of integers.
        """
        if not images.has(NEGATIVE, list):
            return None
        known = {letter: place for place, letter in enumerate(FREQUENCIES)}
        rows = [
            (number, known[letter])
            for number, letter in zip(category_ids.tolist(), categories.take("frequency"), strict=True)
            if isinstance(letter, str) and letter in known
        ]
        negative, not_exhaustive = (
            np.stack([np.repeat(image_ids, lengths), ids], axis=1)
            for ids, lengths in (images.take(key) for key in (NEGATIVE, NOT_EXHAUSTIVE))
        )
        return Federated(negative, not_exhaustive, np.array(rows, dtype=np.int64).reshape(-1, 2))

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))
