"""What is done to training images at random: scale, crop, flips and colors.

Every choice is a hash of (seed, epoch, image, which time the image is seen in the epoch), see hash_rng.py; the
choices are made by the process that plans a batch, and carried out on the training device (data/loading/batch.py).
"""

from dataclasses import dataclass

import numpy as np

from data.transforms.color import ColorChange, ColorJitter, PhotometricDistortion
from data.transforms.geometry import Geometry, padded_size, resized_sizes
from data.transforms.hash_rng import CROP_STREAM, FLIP_STREAM, SCALE_STREAM, VERTICAL_FLIP_STREAM, hash_uniform
from data.transforms.own_change import OwnChange, OwnFunction


@dataclass(frozen=True)
class ScaleSampling:
    """Multi-scale training: the keep-ratio resize of geometry.resized_sizes, its scale drawn for each image.

    choice: one of the scales, all alike likely. range: the longer and the shorter side are drawn each by itself
    from the whole numbers between those of the two scales, ends included.
    """

    scales: tuple[tuple[int, int], ...]
    """Two sides each, in pixels; the larger limits the image's longer side, the smaller the shorter."""
    sampling: str = "choice"
    """choice or range"""

    def sample(self, seed: int, epoch: int, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The (min_size, max_size) of the resize of each image (words int64 [N]): int64 [N] each."""
        sides = np.sort(np.array(self.scales, dtype=np.int64), axis=1)
        if self.sampling == "choice":
            chosen = sides[_below(len(sides), seed, SCALE_STREAM, epoch, words)]
            return chosen[:, 0], chosen[:, 1]
        low, high = sides.min(axis=0), sides.max(axis=0)
        short, long = (
            low[side] + _below(int(high[side] - low[side]) + 1, seed, SCALE_STREAM, epoch, words, np.array(side))
            for side in (0, 1)
        )
        return np.minimum(short, long), np.maximum(short, long)

    def describe(self) -> str:
        """A line for people."""
        listed = [f"{max(scale)}x{min(scale)}" for scale in self.scales]
        if self.sampling == "range":
            return f"scale between {listed[0]} and {listed[1]}"
        return "scale one of " + " ".join(listed) if len(listed) > 1 else f"scale {listed[0]}"


@dataclass(frozen=True)
class LargeScaleJitter:
    """A resize by a random factor, and a random crop where the result is larger than the target (Ghiasi et al. 2021,
    "Simple copy-paste is a strong data augmentation method for instance segmentation", without the pasting).

    The image is resized, its ratio kept, to fit into a square of int(size * factor) pixels. Where a side is longer
    than size, a window of size pixels is cut out, its place drawn uniformly; every batch is padded to a square of size
    pixels. Boxes follow data.transforms.geometry.crop_boxes.
    """

    size: int
    """Side of the target, pixels"""
    smallest: float
    largest: float
    """The factor is drawn uniformly between these."""
    min_visibility: float = 0.0
    """Part of a box's area that must be left by the crop, 0 to 1"""
    boxes_of_masks: bool = False
    """Boxes are the bounds of what the crop shows of the masks, as with MMDetection's recompute_bbox"""

    def edges(self, seed: int, epoch: int, words: np.ndarray) -> np.ndarray:
        """The side of the square that each image (words int64 [N]) is resized into: int64 [N]."""
        drawn = hash_uniform(seed, SCALE_STREAM, epoch, words)
        factors = self.smallest + drawn * (self.largest - self.smallest)
        return np.maximum((self.size * factors).astype(np.int64), 1)

    def crops(
        self, scaled_sizes: np.ndarray, seed: int, epoch: int, words: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where each resized image (int64 [N, 2] height, width) is cut: offsets (top, left) and sizes (height, width),
        int64 [N, 2] each."""
        sizes = np.minimum(scaled_sizes, self.size)
        places = hash_uniform(seed, CROP_STREAM, epoch, words[:, None], np.arange(2))
        return (places * (scaled_sizes - sizes + 1)).astype(np.int64), sizes

    def describe(self) -> str:
        """A line for people."""
        text = (
            f"large-scale jitter x{self.smallest:g} to x{self.largest:g} of {self.size} pixels, cropped or padded to it"
        )
        if self.min_visibility > 0:
            text += f"; boxes of which less than {self.min_visibility:.0%} is left are dropped"
        if self.boxes_of_masks:
            text += "; boxes are the bounds of the cropped masks"
        return text


@dataclass(frozen=True)
class Augmentation:
    """All that is done to training images at random. Each part is by itself; without scales and jitter the scale is the
    one of the evaluation. Values are checked where they are given: by the command line."""

    scales: ScaleSampling | None = None
    jitter: LargeScaleJitter | None = None
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    color: PhotometricDistortion | ColorJitter | None = None
    own: OwnFunction | None = None
    copy_paste: bool = False
    """Objects of another image on top, see copy_paste.py; with jitter, of sets with masks"""

    def geometry(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        *,
        words: np.ndarray,
        seed: int,
        epoch: int,
        min_size: int,
        max_size: int,
    ) -> Geometry:
        """Where the images of a global batch go.

        widths, heights: int64 [N], native. words: int64 [N], hash_rng.image_words of the images. min_size,
        max_size: the scale where none is drawn.
        """
        if self.jitter is not None:
            edges = self.jitter.edges(seed, epoch, words)
            scaled_sizes = resized_sizes(widths, heights, min_size=edges, max_size=edges)
            offsets, sizes = self.jitter.crops(scaled_sizes, seed, epoch, words)
            padded = padded_size(np.array([[self.jitter.size] * 2]))
        else:
            smallest, largest = (
                self.scales.sample(seed, epoch, words) if self.scales is not None else (min_size, max_size)
            )
            scaled_sizes = sizes = resized_sizes(widths, heights, min_size=smallest, max_size=largest)
            offsets, padded = np.zeros_like(sizes), padded_size(sizes)
        height, width = padded.tolist()
        return Geometry(
            scaled_sizes=scaled_sizes,
            offsets=offsets,
            sizes=sizes,
            flips=hash_uniform(seed, FLIP_STREAM, epoch, words) < self.flip_probability,
            vertical_flips=hash_uniform(seed, VERTICAL_FLIP_STREAM, epoch, words) < self.vertical_flip_probability,
            padded_size=(height, width),
            min_visibility=self.jitter.min_visibility if self.jitter is not None else 0.0,
            boxes_of_masks=self.jitter is not None and self.jitter.boxes_of_masks,
        )

    def colors(self, words: np.ndarray, *, seed: int, epoch: int) -> tuple[ColorChange, ...] | None:
        """How the colors of each image (words int64 [N]) change; None where they stay."""
        return self.color.sample(seed, epoch, words) if self.color is not None else None

    def own_change(self, words: np.ndarray, *, seed: int, epoch: int) -> OwnChange | None:
        """What the user's own function does to a batch of these images (words int64 [B]); None without one."""
        return OwnChange(self.own, seed, epoch, words) if self.own is not None else None

    def describe(self) -> list[str]:
        """What is on, a line each."""
        lines = [part.describe() for part in (self.scales, self.jitter) if part is not None]
        chances = {"horizontal": self.flip_probability, "vertical": self.vertical_flip_probability}
        flips = [f"{which} {chance:g}" for which, chance in chances.items() if chance > 0]
        lines += ["copy-paste: a random part of another image's objects on top"] if self.copy_paste else []
        lines.append("flip probability: " + ", ".join(flips) if flips else "no flips")
        lines += [self.color.describe()] if self.color is not None else []
        return lines + ([f"{self.own.__module__}:{self.own.__qualname__}"] if self.own is not None else [])


def _below(count: int, *words: int | np.ndarray) -> np.ndarray:
    """Uniform whole numbers 0 to count - 1, int64, of the shape of the words."""
    return (hash_uniform(*words) * count).astype(np.int64)
