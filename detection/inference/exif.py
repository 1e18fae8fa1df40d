"""EXIF orientation: how a camera was held, and the pixels turned so that up is up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

AS_STORED = 1
_ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
_KINDS = ("JPEG", "MPO", "PNG", "WEBP")  # Pillow turns TIFF by itself while reading


def orientation_of(file: Path) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 (as stored) where it has none that can be read."""
    try:
        with Image.open(file) as image:
            # A PNG whose data come behind the pixels would have to be decoded for them; none is from a camera.
            if image.format not in _KINDS or (image.format == "PNG" and "exif" not in image.info):
                return AS_STORED
            orientation = image.getexif().get(_ORIENTATION_TAG, AS_STORED)
    except Exception:  # broken EXIF data beside sound pixels raise nearly anything, and ask for nothing
        return AS_STORED
    return orientation if orientation in range(1, 9) else AS_STORED


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, 3] as they are to be seen; a contiguous array, of the other size for orientations 5 to 8."""
    if orientation >= 5:  # rows and columns are exchanged first
        pixels = pixels.transpose(1, 0, 2)
    rows = slice(None, None, -1) if orientation in (3, 4, 7, 8) else slice(None)
    columns = slice(None, None, -1) if orientation in (2, 3, 6, 7) else slice(None)
    return np.ascontiguousarray(pixels[rows, columns])
