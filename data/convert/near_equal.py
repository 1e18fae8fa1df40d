"""Images that are equal or nearly so: copies, other sizes or qualities of one photo, frames of a still camera."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32  # pixels of the gray thumbnails that are compared
MEAN_LIMIT, LARGEST_LIMIT, QUARTER_LIMIT = 2.0, 16.0, 8.0
"""Gray levels of 256 by which near-equal thumbnails differ at most: on average, anywhere, and in the averages of their
quarters. JPEG's loss and another size change an average by less than one; the largest limit tells apart frames in which
something small has moved. A quarter's average is at most four times the whole's."""
COPY_OF_ROBOFLOW = re.compile(r"\.rf\.[0-9A-Za-z]+$")
"""What Roboflow adds to the name of each augmented copy of an image."""


def near_equal_groups(paths: Sequence[Path]) -> list[int]:
    """A number for each image; equal numbers for images that are near-equal, or connected by such.

    Copies that Roboflow made of one image count by their names. A file that cannot be read is a group of its own.
    """
    leader = list(range(len(paths)))

    def lead(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    def join(one: int, other: int) -> None:
        first, second = sorted((lead(one), lead(other)))
        leader[second] = first

    copies: dict[str, int] = {}
    for index, path in enumerate(paths):
        name = COPY_OF_ROBOFLOW.sub("", path.stem)
        if name != path.stem:
            join(copies.setdefault(name, index), index)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        read = list(pool.map(_thumbnail, paths))
    known = np.array([index for index, thumbnail in enumerate(read) if thumbnail is not None], dtype=np.int64)
    if len(known):
        thumbnails = np.stack([read[index] for index in known])  # type: ignore[misc]
        quarters = thumbnails.reshape(-1, 2, SIDE // 2, 2, SIDE // 2).mean(axis=(2, 4)).reshape(-1, 4)
        means = quarters.mean(axis=1)
        order = np.argsort(means, kind="stable")
        ends = np.searchsorted(means[order], means[order] + MEAN_LIMIT, side="right")
        for place, end in enumerate(ends.tolist()):
            this, others = order[place], order[place + 1 : end]
            others = others[(np.abs(quarters[others] - quarters[this]) <= QUARTER_LIMIT).all(axis=1)]
            differences = np.abs(thumbnails[others].astype(np.int16) - thumbnails[this])
            alike = (differences.mean(axis=(1, 2)) <= MEAN_LIMIT) & (differences.max(axis=(1, 2)) <= LARGEST_LIMIT)
            for other in others[alike].tolist():
                join(int(known[this]), int(known[other]))
    return [lead(index) for index in range(len(paths))]


def _thumbnail(path: Path) -> np.ndarray | None:
    """uint8 [SIDE, SIDE]; None where the file cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.draft("L", (2 * SIDE, 2 * SIDE))  # a JPEG is decoded at a fraction of its size
                return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))
    except Exception:  # Pillow raises nearly anything on files that are broken; reading them says so elsewhere
        return None
