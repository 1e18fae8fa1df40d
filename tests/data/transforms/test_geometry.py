"""Geometry and pixels equal MMDetection's, on the recorded cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.transforms.geometry import (
    flip_boxes,
    padded_size,
    resize_boxes,
    resize_pixels,
    resized_sizes,
    scale_factors,
)

REFERENCE = Path(__file__).parents[2] / "reference" / "pipeline"
SIZES = json.loads((REFERENCE / "resize_sizes.json").read_text())
BOXES = json.loads((REFERENCE / "boxes_resize_flip.json").read_text())


def test_sizes_factors_and_padding_equal_the_reference() -> None:
    assert SIZES["scale"] == [1333, 800]
    rows = SIZES["rows"]
    assert len(rows) >= 40
    widths, heights = np.array([row["w"] for row in rows]), np.array([row["h"] for row in rows])
    sizes = resized_sizes(widths, heights, min_size=800, max_size=1333)
    factors = scale_factors(np.stack([heights, widths], axis=1), sizes)
    for i, row in enumerate(rows):
        assert sizes[i].tolist() == [row["new_h"], row["new_w"]]
        assert padded_size(sizes[i : i + 1]).tolist() == [row["pad32_h"], row["pad32_w"]]
        assert factors[i].tolist() == [np.float32(row["scale_factor_w"]), np.float32(row["scale_factor_h"])]


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_resized_images_keep_within_the_limits_and_touch_one(width: int, height: int) -> None:
    (sides,) = resized_sizes(np.array([width]), np.array([height]), min_size=800, max_size=1333).tolist()
    assert 1 <= min(sides) <= 800 and max(sides) <= 1333
    assert min(sides) == 800 or max(sides) == 1333


def test_a_batch_is_padded_to_its_largest_sides() -> None:
    assert padded_size(np.array([[800, 1067], [801, 32]])).tolist() == [832, 1088]
    several = padded_size(np.array([[[32, 32]], [[33, 64]]]))
    assert several.tolist() == [[32, 32], [64, 64]]


@pytest.mark.parametrize("case", BOXES, ids=lambda case: f"{case['w']}x{case['h']}")
def test_boxes_equal_the_reference_after_resize_and_flip(case: dict) -> None:
    native, size = np.array([case["h"], case["w"]]), np.array(case["img_shape_hw"])
    boxes = np.array(case["boxes"], dtype=np.float32)
    resized, valid = resize_boxes(boxes, scale_factors(native, size), tuple(size.tolist()))
    assert resized.dtype == np.float32
    assert np.array_equal(resized, np.array(case["after_resize"], dtype=np.float32))
    assert np.array_equal(flip_boxes(resized, int(size[1]), axis=0), np.array(case["after_flip"], dtype=np.float32))
    assert valid.all()


def test_boxes_that_are_empty_after_the_clip_are_kept_but_not_valid() -> None:
    boxes = np.array([[-5, 2, 0, 8], [100, 2, 110, 8], [2, 2, 2.0001, 8], [2, 2, 3, 3]], dtype=np.float32)
    resized, valid = resize_boxes(boxes, np.array([1, 1], dtype=np.float32), (100, 100))
    assert len(resized) == 4
    assert valid.tolist() == [False, False, False, True]


def test_no_boxes_pass_through() -> None:
    none = np.zeros((0, 4), dtype=np.float32)
    resized, valid = resize_boxes(none, np.array([2, 2], dtype=np.float32), (10, 10))
    assert resized.shape == (0, 4) and valid.shape == (0,)
    assert flip_boxes(resized, 10, axis=0).shape == (0, 4)


@pytest.mark.parametrize(("axis", "flipped"), [(0, [34, 2, 63, 40]), (1, [1, 24, 30, 62])])
def test_a_flip_mirrors_the_boxes_and_a_second_one_gives_them_back(axis: int, flipped: list[int]) -> None:
    boxes = np.array([[1, 2, 30, 40], [0, 0, 64, 64]], dtype=np.float32)
    assert flip_boxes(boxes, 64, axis=axis).tolist() == [flipped, [0, 0, 64, 64]]
    assert np.array_equal(flip_boxes(flip_boxes(boxes, 64, axis=axis), 64, axis=axis), boxes)


def as_batch(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("kind", ["up", "down"])
def test_pixels_equal_opencvs_within_rounding(kind: str, device: str) -> None:
    with np.load(REFERENCE / "resize_pixels.npz") as arrays:
        native, expected = arrays[f"{kind}_in"], arrays[f"{kind}_out"]
    resized = resize_pixels(as_batch(native).to(device), expected.shape[:2])
    assert resized.dtype == torch.uint8
    difference = np.abs(resized[0].permute(1, 2, 0).cpu().numpy().astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert difference.mean() <= 0.5
