"""What stands in for an image that cannot be read: a pure function of the set and the image's place."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be used in a batch."""

    image_id: int
    """Of the annotation file."""
    message: str
    """Why; names the file and the remedy."""
    place: int | None
    """Place in the global batch that it was to fill; None for one that was only tried in place of another."""
    replacement_id: int | None
    """Image that is in the batch instead; None for a black image without boxes."""


def replacement_candidates(
    index: int, widths: np.ndarray, heights: np.ndarray, box_counts: np.ndarray, num_box_rows: int
) -> Iterator[int]:
    """Which images to try in place of image `index`, best first.

    They are the next ones of the file, its end followed by its start: first those of the same group (portrait, or
    not, see group_by_aspect), then the others; images with more than num_box_rows boxes have no room.
    Nothing of it depends on processes, workers or earlier faults, so a resume finds the same one.

    widths, heights and box_counts are int64 [N].
    """
    order = (index + np.arange(1, len(widths))) % len(widths)
    order = order[box_counts[order] <= num_box_rows]
    portrait = widths < heights
    same_group = portrait[order] == portrait[index]
    yield from order[same_group].tolist()
    yield from order[~same_group].tolist()


def fitted_size(width: int, height: int, room: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) with the ratio width : height inside `room` (height, width), at least 1 each."""
    factor = min(room[0] / height, room[1] / width)
    return (
        min(max(int(height * factor + 0.5), 1), room[0]),
        min(max(int(width * factor + 0.5), 1), room[1]),
    )
