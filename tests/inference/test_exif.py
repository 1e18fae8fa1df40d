"""EXIF orientation: pixels turned as Pillow turns them, and files without a usable tag left as they are."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from detection.inference.exif import AS_STORED, orientation_of, upright

ORIENTATION_TAG = 0x0112


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)


def save(path, pixels, orientation):
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[ORIENTATION_TAG] = orientation
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_pillow_turns_them(orientation, photo, tmp_path):
    file = save(tmp_path / "photo.png", photo, orientation)
    assert orientation_of(file) == orientation
    turned = upright(photo, orientation)
    with Image.open(file) as stored:
        np.testing.assert_array_equal(turned, np.asarray(ImageOps.exif_transpose(stored)))
    assert turned.flags.c_contiguous


@pytest.mark.parametrize("value", [0, 9])
def test_a_tag_without_meaning_asks_for_nothing(value, photo, tmp_path):
    assert orientation_of(save(tmp_path / "photo.jpg", photo, value)) == AS_STORED


def test_a_tiff_is_not_turned_twice(photo, tmp_path):
    file = save(tmp_path / "photo.tiff", photo, 6)
    with Image.open(file) as stored:
        stored.load()
        turned_by_pillow = stored.size == (5, 8)
    assert turned_by_pillow and orientation_of(file) == AS_STORED


def test_broken_files_ask_for_nothing(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif\x00\x00garbage")
    assert orientation_of(tmp_path / "broken.jpg") == AS_STORED
    assert orientation_of(tmp_path / "absent.jpg") == AS_STORED
