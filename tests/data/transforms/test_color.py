"""Changes of color: those of colorsys and torchvision, drawn from their ranges without a state."""

import colorsys
import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from data.transforms.color import (
    ColorJitter,
    Distortion,
    Jitter,
    PhotometricDistortion,
    change_colors,
    change_hue_and_saturation,
)

WORDS = np.arange(4000)


def noise(seed: int = 0, height: int = 12, width: int = 17) -> torch.Tensor:
    """Noise with all corners of the cube and a gray, where a hue is hard to find."""
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    corners = torch.cartesian_prod(*[torch.tensor([0, 255])] * 3).T
    image[:, 0, :8], image[:, 0, 8] = corners, 77
    return image.to(torch.uint8)


@pytest.mark.parametrize(
    ("saturation", "hue"), [(1.0, 0.0), (1.0, 0.05), (1.0, -0.05), (1.0, 0.5), (0.5, 0.0), (1.5, 0.0), (1.3, -0.03)]
)
def test_hue_and_saturation_are_those_of_hsv(saturation: float, hue: float) -> None:
    image = noise().float()
    changed = change_hue_and_saturation(image, saturation, hue)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*image[:, y, x].tolist())
            expected = colorsys.hsv_to_rgb((h + hue) % 1.0, min(s * saturation, 1.0), v)
            assert changed[:, y, x].tolist() == pytest.approx(expected, abs=2e-3)


def test_the_steps_of_a_distortion_follow_each_other_as_described() -> None:
    image = noise()
    change = Distortion(shift=-20, early_contrast=1.4, saturation=1.2, hue=0.04, channels=(2, 0, 1))
    rgb = (image.double() - 20).clamp(min=0) * 1.4
    expected = torch.empty_like(rgb)
    for y in range(rgb.shape[1]):
        for x in range(rgb.shape[2]):
            h, s, v = colorsys.rgb_to_hsv(*rgb[:, y, x].tolist())
            expected[:, y, x] = torch.tensor(colorsys.hsv_to_rgb((h + 0.04) % 1.0, min(s * 1.2, 1.0), v))
    expected = expected[[2, 0, 1]].clamp(0, 255)
    changed = change_colors(image, change)
    assert changed.dtype == torch.uint8
    assert (changed.double() - expected).abs().max() <= 0.51


def test_contrast_comes_before_or_after_the_hue_and_nothing_is_cut_off_between() -> None:
    image = torch.full((3, 2, 2), 200, dtype=torch.uint8)
    assert change_colors(image, Distortion(shift=32, late_contrast=0.5)).unique().tolist() == [116]
    assert change_colors(image, Distortion(early_contrast=1.5, late_contrast=0.5)).unique().tolist() == [150]
    assert change_colors(image, Distortion(early_contrast=1.5)).unique().tolist() == [255]
    assert torch.equal(change_colors(noise(), Distortion()), noise())


@pytest.mark.parametrize(
    ("step", "value", "reference"),
    [
        ("brightness", 0.6, tv.adjust_brightness),
        ("brightness", 1.4, tv.adjust_brightness),
        ("contrast", 0.6, tv.adjust_contrast),
        ("contrast", 1.4, tv.adjust_contrast),
        ("saturation", 0.3, tv.adjust_saturation),
        ("saturation", 1.7, tv.adjust_saturation),
        ("hue", 0.1, tv.adjust_hue),
        ("hue", -0.4, tv.adjust_hue),
    ],
)
def test_the_steps_of_a_jitter_are_torchvisions(step: str, value: float, reference) -> None:
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    image = noise(1)
    changed = change_colors(image, Jitter(**(neutral | {step: value}), order=tuple(neutral)))
    # torchvision rounds down twice, the gray and the result; we round once, to the nearest.
    assert (changed.int() - reference(image, value).int()).abs().max() <= 2
    exact = reference(image.float() / 255, value) * 255
    assert (changed.float() - exact).abs().max() <= 0.51


def test_the_order_of_a_jitter_matters_and_is_followed() -> None:
    image = noise(2)
    values = {"brightness": 1.3, "contrast": 0.7, "saturation": 0.5, "hue": 0.2}
    orders = [("brightness", "contrast", "saturation", "hue"), ("hue", "saturation", "contrast", "brightness")]
    results = []
    for order in orders:
        expected = image.float() / 255
        for step in order:
            expected = getattr(tv, f"adjust_{step}")(expected, values[step])
        results.append(change_colors(image, Jitter(**values, order=order)))
        assert (results[-1].float() - expected * 255).abs().max() <= 0.6
    assert not torch.equal(*results)


def test_distortions_are_drawn_from_their_ranges_each_with_probability_one_half() -> None:
    drawn = PhotometricDistortion().sample(0, 0, WORDS)
    for values, neutral, low, high in (
        ([change.shift for change in drawn], 0, -32, 32),
        ([change.saturation for change in drawn], 1, 0.5, 1.5),
        ([change.hue for change in drawn], 0, -18 / 360, 18 / 360),
        ([change.early_contrast * change.late_contrast for change in drawn], 1, 0.5, 1.5),
    ):
        taken = np.array([value for value in values if value != neutral])
        assert abs(len(taken) - 2000) < 130
        assert low <= taken.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < taken.max() <= high
        assert abs(taken.mean() - (low + high) / 2) < 0.03 * (high - low)
    early = sum(change.early_contrast != 1 for change in drawn)
    late = sum(change.late_contrast != 1 for change in drawn)
    assert abs(early - 1000) < 110 and abs(late - 1000) < 110
    assert not any(change.early_contrast != 1 and change.late_contrast != 1 for change in drawn)
    orders = [change.channels for change in drawn]
    # Half of them are not swapped, and a sixth of the swaps is none.
    assert abs(orders.count((0, 1, 2)) / 4000 - (0.5 + 0.5 / 6)) < 0.03
    assert len(set(orders)) == 6


def test_jitters_are_drawn_from_torchvisions_ranges() -> None:
    drawn = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1).sample(0, 0, WORDS)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = np.array([getattr(change, name) for change in drawn])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
    orders = [change.order for change in drawn]
    assert len(set(orders)) == math.factorial(4)
    assert all(abs(orders.count(order) - 4000 / 24) < 60 for order in set(orders))


@pytest.mark.parametrize("color", [PhotometricDistortion(), ColorJitter(0.4, 0.4, 0.4, 0.1)], ids=str)
def test_a_draw_is_a_function_of_seed_epoch_and_image(color: PhotometricDistortion | ColorJitter) -> None:
    whole = color.sample(3, 5, WORDS[:50])
    assert color.sample(3, 5, WORDS[[17, 4]]) == (whole[17], whole[4])
    assert len(set(whole)) > 45
    for other in (color.sample(4, 5, WORDS[:50]), color.sample(3, 6, WORDS[:50])):
        assert sum(one == two for one, two in zip(whole, other, strict=True)) < 5


@pytest.mark.cuda
def test_a_gpu_changes_colors_as_the_host_does() -> None:
    for change in (
        Distortion(shift=12, early_contrast=1.3, saturation=0.7, hue=-0.04, channels=(1, 2, 0)),
        Jitter(1.2, 0.8, 1.3, 0.1, ("hue", "contrast", "brightness", "saturation")),
    ):
        on_gpu = change_colors(noise(3, 200, 300).cuda(), change).cpu()
        assert (on_gpu.int() - change_colors(noise(3, 200, 300), change).int()).abs().max() <= 1
