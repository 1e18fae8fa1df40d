"""EXIF orientation: pixels turned as Pillow turns them, and files without a usable tag left as they are."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from detection.inference.exif import AS_STORED, orientation_of, upright

ORIENTATION_TAG = 0x0112


def photo():
    return np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_pillow_turns_them(orientation, tmp_path):
    image = Image.fromarray(photo())
    exif = image.getexif()
    exif[ORIENTATION_TAG] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    assert orientation_of(tmp_path / "photo.png") == orientation
    with Image.open(tmp_path / "photo.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    turned = upright(photo(), orientation)
    np.testing.assert_array_equal(turned, expected)
    assert turned.flags.c_contiguous


@pytest.mark.parametrize("value", [0, 9])
def test_a_tag_without_meaning_asks_for_nothing(value, tmp_path):
    image = Image.fromarray(photo())
    exif = image.getexif()
    exif[ORIENTATION_TAG] = value
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert orientation_of(tmp_path / "photo.jpg") == AS_STORED


def test_a_tiff_is_not_turned_twice(tmp_path):
    image = Image.fromarray(photo())
    exif = image.getexif()
    exif[ORIENTATION_TAG] = 6
    image.save(tmp_path / "photo.tiff", exif=exif)
    with Image.open(tmp_path / "photo.tiff") as stored:
        stored.load()
        turned_by_pillow = stored.size == (5, 8)
    assert turned_by_pillow and orientation_of(tmp_path / "photo.tiff") == AS_STORED


def test_broken_files_ask_for_nothing(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe1\x00\x10Exif\x00\x00garbage")
    assert orientation_of(tmp_path / "broken.jpg") == AS_STORED
    assert orientation_of(tmp_path / "absent.jpg") == AS_STORED
