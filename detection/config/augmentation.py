"""The settings of what is done to training images at random. See docs/augmentation.md."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detection.config.arg_types import Number, fraction, share, side, whole
from detection.config.settings import COMMAND_LINE, COMPATIBLE, ConfigError, add_options, plain, setting

TITLE = "training images at random (docs/augmentation.md)"


def _scale(text: str) -> tuple[int, int]:
    """two sides in pixels, e.g. 1333x800"""
    match = re.fullmatch(r"(-?\d+)x(-?\d+)", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no scale: write two sides in pixels, e.g. 1333x800")
    return side(match[1]), side(match[2])


@dataclass(frozen=True)
class AugmentationConfig:
    """Scale, crop, flips and colors of training images, and how often an image comes in an epoch.

    Raises ConfigError, which names the options, for values that contradict each other.
    """

    train_min_sizes: tuple[int, ...] | None = setting(
        None,
        COMMAND_LINE,
        "multi-scale training: shorter sides, one drawn for each image",
        shown="--min-size",
        type=side,
        nargs="+",
    )
    """--max-size limits the longer side."""
    train_scales: tuple[tuple[int, int], ...] | None = setting(
        None,
        COMMAND_LINE,
        "multi-scale training: scales such as 1333x640 1333x800, one drawn for each image",
        type=_scale,
        nargs="+",
        metavar="WxH",
    )
    """Two sides each: the larger limits the longer side, the smaller the shorter."""
    train_scale_sampling: str = setting(
        "choice",
        COMMAND_LINE,
        "choice: one of the sizes or scales; range: anything between two of them",
        choices=("choice", "range"),
    )
    lsj: int | None = setting(
        None,
        COMMAND_LINE,
        "large-scale jitter, cropped or padded to SIZE x SIZE pixels",
        type=side,
        nargs="?",
        const=1024,
        metavar="SIZE",
    )
    lsj_range: tuple[float, float] = setting(
        (0.1, 2.0),
        COMMAND_LINE,
        "factors of SIZE to draw from",
        type=Number(float, 0.01, 100.0),
        nargs=2,
        metavar=("MIN", "MAX"),
    )
    lsj_min_visibility: float = setting(
        0.0, COMMAND_LINE, "drop boxes of which the crop leaves a smaller part of the area", type=fraction
    )
    lsj_boxes_of_masks: bool = setting(
        False, COMMAND_LINE, "boxes are the bounds of the cropped masks, of models with masks"
    )
    """MMDetection's recompute_bbox."""
    copy_paste: bool = setting(
        False, COMMAND_LINE, "objects of another image on top of each image, with --lsj, of models with masks"
    )
    """Those of another image of the train set, a random part of them."""
    flip_probability: float = setting(0.5, COMMAND_LINE, "left to right", type=fraction)
    vertical_flip_probability: float = setting(0.0, COMMAND_LINE, "upside down", type=fraction)
    photometric_distortion: bool = setting(
        False, COMMAND_LINE, "SSD's brightness, contrast, saturation, hue and channel order"
    )
    """Each with probability 1/2."""
    color_jitter: tuple[float, float, float, float] | None = setting(
        None,
        COMMAND_LINE,
        "torchvision's ColorJitter, e.g. 0.4 0.4 0.4 0.1",
        type=Number(float, 0.0, 10.0),
        nargs=4,
        metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"),
    )
    augmentation: str | None = setting(
        None,
        COMMAND_LINE,
        "a function of your own on each batch, after everything else (docs/extend.md)",
        metavar="package.module:function",
    )
    repeat_threshold: float | None = setting(
        None,
        COMPATIBLE,
        "repeat-factor sampling: images of classes in fewer than this part of the images come sqrt(T / part) times an "
        "epoch",
        type=fraction,
        metavar="T",
    )

    repeat_rounds_up: bool = setting(
        False, COMPATIBLE, "round these numbers up, as MMDetection's ClassBalancedDataset does"
    )
    class_shares: tuple[str, ...] | None = setting(
        None,
        COMPATIBLE,
        "class-aware sampling: an image is drawn by drawing a class and then one of its images; all classes alike, or "
        "by weights (1 where none is given)",
        type=share,
        nargs="*",
        metavar="NAME=WEIGHT",
    )
    set_shares: tuple[str, ...] | None = setting(
        None,
        COMPATIBLE,
        "of several sets: what part of an epoch's images each gives, as weights",
        type=share,
        nargs="+",
        metavar="NAME=WEIGHT",
    )
    repeat_times: int = setting(
        1, COMPATIBLE, "how often the whole train set comes in an epoch, each time as another draw", type=whole(1, 1000)
    )

    def __post_init__(self) -> None:
        scales = {
            "--train-min-sizes": self.train_min_sizes,
            "--train-scales": self.train_scales,
            "--lsj": self.lsj,
        }
        given = [name for name, value in scales.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} each decide the scale of the training images: give one of them")
        chosen = self.train_min_sizes or self.train_scales
        if self.train_scale_sampling == "range" and chosen is not None and len(chosen) != 2:
            raise ConfigError(
                f"--train-scale-sampling range goes from one value of {given[0]} to another, and {len(chosen)} were "
                "given: give two"
            )
        low, high = self.lsj_range
        if low > high:
            raise ConfigError(f"--lsj-range {low:g} {high:g}: the first must not be above the second")
        if self.photometric_distortion and self.color_jitter is not None:
            raise ConfigError("--photometric-distortion and --color-jitter both change the colors: give one of them")
        if self.color_jitter is not None and self.color_jitter[3] > 0.5:
            raise ConfigError(f"--color-jitter: the last, the hue, is {self.color_jitter[3]:g} turns: give 0 to 0.5")
        if self.repeat_threshold == 0:
            raise ConfigError(
                "--repeat-threshold 0 repeats nothing: leave it away, or give a part of the images, e.g. 0.01"
            )

        if self.class_shares is not None and self.repeat_threshold is not None:
            raise ConfigError("--class-shares and --repeat-threshold both say how often classes come: give one of them")

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints."""
        return plain(self)


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """The options as a group of their own."""
    group = parser.add_argument_group(TITLE)
    for field in dataclasses.fields(AugmentationConfig):
        add_options(group, field)


def check_effect(config: AugmentationConfig, given: Mapping[str, Any], max_size: int) -> None:
    """Raises ConfigError for an option that was given and has no effect beside the others."""
    too_large = [size for size in config.train_min_sizes or () if size > max_size]
    if too_large:
        raise ConfigError(
            f"--train-min-sizes {too_large[0]} is above --max-size {max_size}, which limits the longer side: "
            "choose a larger --max-size"
        )
    if "train_scale_sampling" in given and config.train_min_sizes is config.train_scales is None:
        raise ConfigError(
            "--train-scale-sampling has no effect by itself: give --train-min-sizes or --train-scales as well"
        )
    if "repeat_rounds_up" in given and config.repeat_threshold is None:
        raise ConfigError("--repeat-rounds-up has no effect without --repeat-threshold: give that as well")
    for name in ("lsj_range", "lsj_min_visibility", "lsj_boxes_of_masks", "copy_paste"):
        if name in given and config.lsj is None:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --lsj: give --lsj as well")
