"""The options of what is done to training images at random. See docs/augmentation.md."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from detection.config.arg_types import fraction, positive_int
from detection.config.errors import ConfigError

LSJ_SIZE_DEFAULT = 1024
LSJ_RANGE_DEFAULT = (0.1, 2.0)


@dataclass(frozen=True)
class AugmentationConfig:
    """Scale, crop, flips and colors of training images, and how often an image comes in an epoch."""

    train_min_sizes: tuple[int, ...] | None = None
    """Shorter sides to choose from, with --max-size for the longer one. None: --min-size."""
    train_scales: tuple[tuple[int, int], ...] | None = None
    """Scales to choose from, two sides each: the larger limits the longer side, the smaller the shorter."""
    train_scale_sampling: str = "choice"
    """choice: one of them; range: anything between two of them."""
    lsj: int | None = None
    """Large-scale jitter to a square of so many pixels. None: off."""
    lsj_range: tuple[float, float] = LSJ_RANGE_DEFAULT
    """Factors between which the scale is drawn."""
    lsj_min_visibility: float = 0.0
    """Part of a box's area that the crop must leave of it."""
    flip_probability: float = 0.5
    vertical_flip_probability: float = 0.0
    photometric_distortion: bool = False
    """SSD's brightness, contrast, saturation, hue and channel order, each with probability 1/2."""
    color_jitter: tuple[float, float, float, float] | None = None
    """torchvision's brightness, contrast, saturation, hue. None: off."""
    repeat_threshold: float | None = None
    """Images of classes that are in a smaller part of the images come several times an epoch. None: once each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for checkpoints."""

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def add_augmentation_options(parser: argparse.ArgumentParser) -> None:
    """The options as a group of their own; augmentation_config reads what they were given."""
    group = parser.add_argument_group("training images at random (docs/augmentation.md)")
    group.add_argument(
        "--train-min-sizes",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="multi-scale training: shorter sides, one drawn for each image [--min-size]",
    )
    group.add_argument(
        "--train-scales",
        type=_scale,
        nargs="+",
        metavar="WxH",
        help="multi-scale training: scales such as 1333x640 1333x800, one drawn for each image",
    )
    group.add_argument(
        "--train-scale-sampling",
        choices=["choice", "range"],
        help="choice: one of the sizes or scales; range: anything between two of them [choice]",
    )
    group.add_argument(
        "--lsj",
        type=positive_int,
        nargs="?",
        const=LSJ_SIZE_DEFAULT,
        metavar="SIZE",
        help=f"large-scale jitter, cropped or padded to SIZE x SIZE pixels [without a value {LSJ_SIZE_DEFAULT}]",
    )
    group.add_argument(
        "--lsj-range", type=float, nargs=2, metavar=("MIN", "MAX"), help="factors of SIZE to draw from [0.1 2.0]"
    )
    group.add_argument(
        "--lsj-min-visibility",
        type=fraction,
        metavar="P",
        help="drop boxes of which the crop leaves a smaller part of the area [0]",
    )
    group.add_argument("--flip-probability", type=fraction, default=0.5, metavar="P", help="left to right [0.5]")
    group.add_argument("--vertical-flip-probability", type=fraction, default=0.0, metavar="P", help="upside down [0]")
    group.add_argument(
        "--photometric-distortion",
        action="store_true",
        help="SSD's brightness, contrast, saturation, hue and channel order",
    )
    group.add_argument(
        "--color-jitter",
        type=float,
        nargs=4,
        metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"),
        help="torchvision's ColorJitter, e.g. 0.4 0.4 0.4 0.1",
    )
    group.add_argument(
        "--repeat-threshold",
        type=fraction,
        metavar="T",
        help="repeat-factor sampling: images of classes in fewer than this part of the images come "
        "sqrt(T / part) times an epoch",
    )


def augmentation_config(options: argparse.Namespace) -> AugmentationConfig:
    """What the options of add_augmentation_options say; `options` has max_size too.

    Raises ConfigError where they contradict each other.
    """
    given = [
        name
        for name, value in (
            ("--train-min-sizes", options.train_min_sizes),
            ("--train-scales", options.train_scales),
            ("--lsj", options.lsj),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} each decide the scale of the training images: give one of them")
    _check_scales(options)
    _check_jitter(options)
    if options.photometric_distortion and options.color_jitter is not None:
        raise ConfigError("--photometric-distortion and --color-jitter both change the colors: give one of them")
    if options.color_jitter is not None:
        *factors, hue = options.color_jitter
        if not (all(0 <= factor < float("inf") for factor in factors) and 0 <= hue <= 0.5):
            raise ConfigError(
                f"--color-jitter {' '.join(f'{value:g}' for value in options.color_jitter)}: brightness, contrast and "
                "saturation are 0 or above, and the hue, in turns, is from 0 to 0.5"
            )
    if options.repeat_threshold == 0:
        raise ConfigError(
            "--repeat-threshold 0 repeats nothing: leave it away, or give a part of the images, e.g. 0.01"
        )
    return AugmentationConfig(
        train_min_sizes=_tuple(options.train_min_sizes),
        train_scales=_tuple(options.train_scales),
        train_scale_sampling=options.train_scale_sampling or "choice",
        lsj=options.lsj,
        lsj_range=_tuple(options.lsj_range) or LSJ_RANGE_DEFAULT,
        lsj_min_visibility=options.lsj_min_visibility or 0.0,
        flip_probability=options.flip_probability,
        vertical_flip_probability=options.vertical_flip_probability,
        photometric_distortion=options.photometric_distortion,
        color_jitter=_tuple(options.color_jitter),
        repeat_threshold=options.repeat_threshold,
    )


def _check_scales(options: argparse.Namespace) -> None:
    too_large = [size for size in options.train_min_sizes or () if size > options.max_size]
    if too_large:
        raise ConfigError(
            f"--train-min-sizes {too_large[0]} is above --max-size {options.max_size}, which limits the longer side: "
            "choose a larger --max-size"
        )
    if options.train_scale_sampling is None:
        return
    name = "--train-min-sizes" if options.train_min_sizes is not None else "--train-scales"
    chosen = options.train_min_sizes or options.train_scales
    if chosen is None:
        raise ConfigError(
            "--train-scale-sampling has no effect by itself: give --train-min-sizes or --train-scales as well"
        )
    if options.train_scale_sampling == "range" and len(chosen) != 2:
        raise ConfigError(
            f"--train-scale-sampling range goes from one value of {name} to another, and {len(chosen)} were given: "
            "give two"
        )


def _check_jitter(options: argparse.Namespace) -> None:
    if options.lsj is None:
        for name in ("lsj_range", "lsj_min_visibility"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} has no effect without --lsj: give --lsj as well")
    elif options.lsj_range is not None:
        low, high = options.lsj_range
        if not 0 < low <= high < float("inf"):
            raise ConfigError(f"--lsj-range {low:g} {high:g}: the first must be above 0, and not above the second")


def _scale(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(-?\d+)x(-?\d+)", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no scale: write two sides in pixels, e.g. 1333x800")
    return positive_int(match[1]), positive_int(match[2])


def _tuple(values: list[Any] | None) -> Any:
    return None if values is None else tuple(values)
