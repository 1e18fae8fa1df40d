"""What the command line says about training images at random, as the data path has it."""

from __future__ import annotations

from data import Augmentation, ColorJitter, LargeScaleJitter, PhotometricDistortion, ScaleSampling, TrainLoader
from data.loading.sampler import Sampling
from detection.config import RunConfig
from detection.config.augmentation import AugmentationConfig
from detection.models import imported


def augmentation_of(config: AugmentationConfig, max_size: int) -> Augmentation:
    """The augmentation that the options ask for; max_size limits the longer side with --train-min-sizes."""
    scales = jitter = None
    if config.train_min_sizes is not None:
        pairs = tuple((max_size, size) for size in config.train_min_sizes)
        scales = ScaleSampling(pairs, config.train_scale_sampling)
    elif config.train_scales is not None:
        scales = ScaleSampling(config.train_scales, config.train_scale_sampling)
    if config.lsj is not None:
        jitter = LargeScaleJitter(config.lsj, *config.lsj_range, config.lsj_min_visibility, config.lsj_boxes_of_masks)
    color: PhotometricDistortion | ColorJitter | None = None
    if config.photometric_distortion:
        color = PhotometricDistortion()
    elif config.color_jitter is not None:
        color = ColorJitter(*config.color_jitter)
    return Augmentation(
        scales=scales,
        jitter=jitter,
        flip_probability=config.flip_probability,
        vertical_flip_probability=config.vertical_flip_probability,
        color=color,
        copy_paste=config.copy_paste,
        own=imported(config.augmentation) if config.augmentation is not None else None,
    )


def sampling_of(config: AugmentationConfig) -> Sampling:
    """How often images come in an epoch, as the options ask for it."""

    def shares(given: tuple[str, ...] | None) -> dict[str, float] | None:
        return None if given is None else {name: float(w) for name, _, w in (each.rpartition("=") for each in given)}

    return Sampling(
        config.repeat_threshold,
        rounds_up=config.repeat_rounds_up,
        repeat_times=config.repeat_times,
        class_shares=shares(config.class_shares),
        set_shares=shares(config.set_shares),
    )


def describe_augmentation(config: RunConfig, loader: TrainLoader) -> list[str]:
    """What is done to training images, a line each part, for the start screen."""
    min_size, max_size = config.data.min_size, config.data.max_size
    augmentation = augmentation_of(config.augmentation, max_size)
    lines = augmentation.describe()
    if augmentation.scales is None and augmentation.jitter is None:
        lines.insert(0, f"scale {max_size}x{min_size}")
    else:
        lines[0] += f" (validation: {max_size}x{min_size})"
    factors, times, chosen = loader.repeat_factors, config.augmentation.repeat_times, config.augmentation
    for what, given in (("sets", chosen.set_shares), ("classes", chosen.class_shares)):
        if given is not None and factors is not None:
            lines.append(
                f"{what} sampled by shares ({', '.join(given) or 'all alike'}): an image comes {factors.min():.2f} to "
                f"{factors.max():.2f} times in an epoch of {loader.images_per_epoch:,} images"
            )
    if times > 1:
        lines.append(f"the train set comes {times} times an epoch: {loader.images_per_epoch:,} images")
    if factors is not None and config.augmentation.repeat_threshold is not None:
        lines.append(
            f"repeat factors for classes in less than {config.augmentation.repeat_threshold:.3g} of the images: "
            f"{int((factors > 1).sum()):,} of {len(factors):,} images come more often than once, up to "
            f"{factors.max():.2f} times on average; {loader.images_per_epoch:,} images an epoch"
        )
    return lines
