"""Image files to pixels."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.errors import DataError
from data.images.shards import packed_content

try:
    import simplejpeg
except ImportError:  # an optional extra: the same pixels in less time
    simplejpeg = None


class ImageError(DataError):
    """An image that cannot be read or is not the one that was annotated; the message names the file."""


def read_image(path: str | Path, out: np.ndarray | None = None) -> np.ndarray:
    """Pixels of an image file as stored: uint8 [height, width, 3], RGB.

    - Orientation tags (EXIF) are ignored: COCO's sizes and boxes refer to the stored pixels.
    - Gray and black-and-white images get three equal channels, palettes and CMYK (also the inverted kind
      that Adobe programs write) become RGB without color management.
    - An alpha channel is dropped and not composited on a background, as OpenCV and so MMDetection do:
      transparent pixels keep the color that is stored beneath.
    - 16 bits per channel are cut to the upper 8.
    - Of several images in one file (GIF, TIFF, MPO) the first is taken.

    out: contiguous uint8 [height * width * 3] that the pixels are to be put into; the result is then a view of it. An
    image of another number of pixels is returned in memory of its own.

    Raises ImageError for files that are missing, broken, truncated, far too large or of another kind
    (32-bit gray, floating point).
    """
    return decode_image(image_content(path), path, out)


def image_content(path: str | Path) -> bytes:
    """The bytes of an image file, also of one that lies in a folder of shards under this name.

    Raises ImageError where it cannot be read.
    """
    try:
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            if (content := packed_content(Path(path))) is None:
                raise
            return content
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error


def decode_image(content: bytes, path: str | Path, out: np.ndarray | None = None) -> np.ndarray:
    """What read_image does with the content of a file, which `path` names in messages."""
    if simplejpeg is not None and content[:2] == b"\xff\xd8":
        pixels = _decode_plain_jpeg(content, out)
        if pixels is not None:
            return pixels
    pixels = _decode(path, content)
    if out is not None and out.size == pixels.size:
        out = out.reshape(pixels.shape)
        out[:] = pixels
        return out
    return pixels


def _decode_plain_jpeg(content: bytes, out: np.ndarray | None) -> np.ndarray | None:
    """Pixels of an ordinary color JPEG; None for other kinds, and for faulty ones, which Pillow judges."""
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        if color_space != "YCbCr" or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        # Without the two fast options, which trade exactness for speed, the pixels are Pillow's.
        buffer = out if out is not None and out.size == height * width * 3 else None
        return simplejpeg.decode_jpeg(content, colorspace="RGB", fastdct=False, fastupsample=False, buffer=buffer)
    except ValueError:
        return None


def _decode(path: str | Path, content: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # Transparency of a palette that is dropped anyway; images of 90 to 179 megapixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                image.load()
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path}: {error} If the image is meant to be that large, store a smaller copy of it."
        ) from error
    except Exception as error:  # broken files make Pillow's readers raise nearly anything
        kind = "is empty" if not content else "cannot be decoded (broken, truncated or no image)"
        # "cannot identify image file <_io.BytesIO object at 0x...>" says nothing more.
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise ImageError(f"{path}: {kind}{reason}. Replace the file or leave it out.") from error

    # Older Pillows open the 16-bit greys of PNG as 32-bit.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("I", "F", "LAB"):
        raise ImageError(
            f"{path}: pixels of Pillow's mode {image.mode!r} have no known range. Convert it to 8-bit RGB."
        )
    if image.mode != "RGB":
        if image.mode == "P" and "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
            image = image.convert("RGBA")
        image = image.convert("RGB")
    return np.array(image)
