"""Changes of brightness, contrast, saturation and hue: drawn on the host, carried out on the training device.

Arithmetic is in float32 and rounds once, to whole gray levels, at the end.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from data.transforms.hash_rng import COLOR_STREAM, hash_uniform

GREY_WEIGHTS = (0.2989, 0.587, 0.114)
"""Parts of red, green and blue in a gray level, as torchvision has them (ITU-R BT.601)"""

_CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_JITTER_ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))


@dataclass(frozen=True)
class Distortion:
    """One draw of PhotometricDistortion. The steps are taken in the order of the fields."""

    shift: float = 0.0
    """added to every channel, gray levels"""
    early_contrast: float = 1.0
    """factor of every channel"""
    saturation: float = 1.0
    """factor of the saturation of the HSV color, which is limited to 1"""
    hue: float = 0.0
    """added to the hue, in turns"""
    late_contrast: float = 1.0
    channels: tuple[int, int, int] = (0, 1, 2)
    """which channel comes first, second, third"""

    def apply(self, rgb: torch.Tensor) -> torch.Tensor:
        """float32 [3, H, W], 0 to 255, to float32 that may lie outside."""
        if self.shift != 0:
            # Below zero a color has no hue; above 255 a later factor may bring it back.
            rgb = (rgb + self.shift).clamp_(min=0)
        if self.early_contrast != 1:
            rgb = rgb * self.early_contrast
        if self.saturation != 1 or self.hue != 0:
            rgb = change_hue_and_saturation(rgb, self.saturation, self.hue)
        if self.late_contrast != 1:
            rgb = rgb * self.late_contrast
        return rgb if self.channels == (0, 1, 2) else torch.stack([rgb[channel] for channel in self.channels])


@dataclass(frozen=True)
class PhotometricDistortion:
    """The distortion of SSD (Liu et al. 2016) with the ranges of MMDetection's PhotoMetricDistortion; each step is
    taken with probability 1/2."""

    shift: float = 32.0
    """gray levels up or down at most"""
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 0.05
    """turns either way at most; 18 degrees"""

    def sample(self, seed: int, epoch: int, words: np.ndarray) -> tuple[Distortion, ...]:
        """One draw for each image (words int64 [N], see data.transforms.hash_rng.image_words)."""
        # One number each for: five decisions to take a step, contrast early or late, and the five values.
        drawn = hash_uniform(seed, COLOR_STREAM, epoch, words[:, None], np.arange(11))
        return tuple(map(self._draw, drawn.tolist()))

    def _draw(self, drawn: list[float]) -> Distortion:
        shifts, contrasts, saturates, turns, swaps, early, shift, contrast, saturation, hue, channels = drawn
        factor = _between(self.contrast, contrast) if contrasts < 0.5 else 1.0
        return Distortion(
            shift=_between((-self.shift, self.shift), shift) if shifts < 0.5 else 0.0,
            early_contrast=factor if early < 0.5 else 1.0,
            saturation=_between(self.saturation, saturation) if saturates < 0.5 else 1.0,
            hue=_between((-self.hue, self.hue), hue) if turns < 0.5 else 0.0,
            late_contrast=1.0 if early < 0.5 else factor,
            channels=_CHANNEL_ORDERS[int(channels * len(_CHANNEL_ORDERS))] if swaps < 0.5 else (0, 1, 2),
        )

    def describe(self) -> str:
        """A line for people."""
        return "photometric distortion: brightness, contrast, saturation, hue, channel order"


@dataclass(frozen=True)
class Jitter:
    """One draw of ColorJitter."""

    brightness: float
    """factor of every channel"""
    contrast: float
    """factor of the distance to the image's mean gray level"""
    saturation: float
    """factor of the distance to the pixel's own gray level"""
    hue: float
    """added to the hue, in turns"""
    order: tuple[str, ...]
    """the names of the four, as they follow each other"""

    def apply(self, rgb: torch.Tensor) -> torch.Tensor:
        """float32 [3, H, W], 0 to 255, to the same."""
        for step in self.order:
            value = getattr(self, step)
            if step == "hue":
                rgb = change_hue_and_saturation(rgb, 1.0, value) if value != 0 else rgb
            elif value != 1:
                rgb = (self._neutral(step, rgb) * (1 - value) + rgb * value).clamp_(0, 255)
        return rgb

    @staticmethod
    def _neutral(step: str, rgb: torch.Tensor) -> torch.Tensor:
        if step == "brightness":
            return rgb.new_zeros(())
        red, green, blue = GREY_WEIGHTS
        gray = rgb[0] * red + rgb[1] * green + rgb[2] * blue
        return gray.mean() if step == "contrast" else gray


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter: factors are drawn between 1 - x and 1 + x (not below 0), the hue between -hue and hue
    turns; the four steps follow each other in a random order."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """turns either way at most, 0 to 0.5"""

    def sample(self, seed: int, epoch: int, words: np.ndarray) -> tuple[Jitter, ...]:
        """One draw for each image (words int64 [N], see data.transforms.hash_rng.image_words)."""
        drawn = hash_uniform(seed, COLOR_STREAM, epoch, words[:, None], np.arange(5))
        return tuple(
            Jitter(
                brightness=self._factor(self.brightness, brightness),
                contrast=self._factor(self.contrast, contrast),
                saturation=self._factor(self.saturation, saturation),
                hue=_between((-self.hue, self.hue), hue),
                order=_JITTER_ORDERS[int(order * len(_JITTER_ORDERS))],
            )
            for brightness, contrast, saturation, hue, order in drawn.tolist()
        )

    def describe(self) -> str:
        """A line for people."""
        return (
            f"color jitter: brightness {self.brightness:g}, contrast {self.contrast:g}, saturation "
            f"{self.saturation:g}, hue {self.hue:g}"
        )

    @staticmethod
    def _factor(width: float, drawn: float) -> float:
        return _between((max(0.0, 1 - width), 1 + width), drawn)


ColorChange = Distortion | Jitter


def change_colors(image: torch.Tensor, change: ColorChange) -> torch.Tensor:
    """The image after `change`: uint8 [3, H, W] RGB -> uint8 [3, H, W], limited to 0 to 255 and rounded."""
    # Planes rather than pixels side by side: every step works on whole planes.
    rgb = image.to(torch.float32, memory_format=torch.contiguous_format)
    return change.apply(rgb).clamp(0, 255).round_().to(torch.uint8)


def change_hue_and_saturation(rgb: torch.Tensor, saturation: float, hue: float) -> torch.Tensor:
    """float32 [3, H, W], not negative: the HSV saturation multiplied (and limited to 1), the hue turned by `hue` turns;
    the value, which is the largest channel, stays."""
    red, green, blue = rgb
    value = rgb.amax(dim=0)
    chroma = value - rgb.amin(dim=0)
    # A gray pixel has no hue; any number serves, as it is multiplied by the chroma, which is zero.
    divisor = chroma.clamp(min=torch.finfo(rgb.dtype).tiny)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths += 6 * hue
    chroma = torch.minimum(chroma * saturation, value)
    # Distance of a channel from the value, as a part of the chroma, by the hue: 0 for a third of the circle, 1 for
    # another, and straight lines between. The offsets put red, green and blue a third apart.
    channels = []
    for offset in (5, 3, 1):
        place = (sixths + offset).remainder_(6)
        part = torch.minimum(place, 4 - place).clamp_(0, 1)
        channels.append(value - chroma * part)
    return torch.stack(channels)


def _between(ends: tuple[float, float], drawn: float) -> float:
    return ends[0] + drawn * (ends[1] - ends[0])
