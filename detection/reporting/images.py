"""Boxes drawn on images: what a model is fed, what it finds, and the truth beside it. Needs Pillow only."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GOLDEN_RATIO_FRACTION = 0.6180339887498949  # hues at multiples of it stay far apart, however many there are
LINE_FRACTION = 1 / 250  # line width and letter height, as parts of the image's mean side
LETTER_FRACTION = 1 / 40
MIN_LETTER_HEIGHT = 10
BACKGROUND = (255, 255, 255)
TINT = 0.45  # of a mask's color, the rest is the image's
DARK, LIGHT = (0, 0, 0), (255, 255, 255)

_Rectangle = tuple[int, int, int, int]


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB color of a class, 0..255: always the same for a label, and unlike its neighbors'."""
    hue = (0.02 + label * GOLDEN_RATIO_FRACTION) % 1.0
    saturation = (0.95, 0.65, 0.80)[label // 8 % 3]
    value = (1.0, 0.85)[label // 24 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    *,
    masks: Sequence[np.ndarray] = (),
    longest_side: int | None = None,
    letter_fraction: float = LETTER_FRACTION,
) -> np.ndarray:
    """A copy of the image with boxes and class names (and scores in percent) on it.

    image: uint8 RGB [H, W, 3]. boxes_xyxy: float [N, 4] in its pixels. labels: int [N] in
    0..len(class_names)-1. scores: float [N] in 0..1. masks: bool [h, w] each of the whole image in any resolution, or
    none; they are tinted, and rimmed, in the colors of their classes. longest_side: the image is scaled to it first, so
    that lines and letters stay sharp. letter_fraction: height of letters as a part of the image's mean side.
    Returns uint8 RGB [H', W', 3]. Every name lies inside the image, on a ground of its class's color.
    """
    boxes_xyxy = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    pixels = Image.fromarray(image)
    if longest_side is not None:
        pixels = _scaled(image, longest_side)
        boxes_xyxy = boxes_xyxy * np.array([pixels.width / image.shape[1], pixels.height / image.shape[0]] * 2)
    if len(masks):
        pixels = _tinted(pixels, masks, labels)
    draw = ImageDraw.Draw(pixels)
    mean_side = (pixels.width + pixels.height) / 2
    line_width = max(1, round(mean_side * LINE_FRACTION))
    font = ImageFont.load_default(max(MIN_LETTER_HEIGHT, round(mean_side * letter_fraction)))

    areas = np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1)
    for number in np.argsort(-areas, kind="stable"):  # small boxes on top of large ones
        _draw_frame(draw, boxes_xyxy[number], class_color(int(labels[number])), line_width)
    certainty = np.zeros(len(boxes_xyxy)) if scores is None else np.asarray(scores)
    rectangles = [(int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in boxes_xyxy.round()]
    taken: list[_Rectangle] = []
    places = {}
    for number in np.argsort(-certainty, kind="stable"):  # the surest names get the best places
        text = class_names[int(labels[number])]
        if scores is not None:
            text += f": {100 * float(scores[number]):.0f} %"
        place = _name_place(int(number), _name_size(font, text), pixels.size, rectangles, taken)
        taken.append(place)
        places[int(number)] = (place, text)
    for number, (place, text) in reversed(places.items()):
        _draw_name(draw, place, text, class_color(int(labels[number])), font)
    return np.asarray(pixels)


def side_by_side(truth: np.ndarray, detections: np.ndarray, *, letter_fraction: float = LETTER_FRACTION) -> np.ndarray:
    """Two images (uint8 RGB [H, W, 3], best of one size) in a row, with a title over each that says what it shows;
    uint8 RGB.

    letter_fraction: height of the titles as a part of the images' mean side.
    """
    return _grid([truth, detections], 2, ("ground truth", "detections"), letter_fraction)


def mosaic(images: Sequence[np.ndarray], *, columns: int | None = None, cell: int = 480) -> np.ndarray:
    """Images (uint8 RGB [H, W, 3], any sizes) in a grid, each scaled to fit a square of `cell` pixels; uint8 RGB."""
    if columns is None:
        columns = max(1, round(len(images) ** 0.5))
    return _grid([np.asarray(_scaled(image, cell)) for image in images], columns)


def save_png(path: str | Path, image: np.ndarray) -> None:
    """Writes a uint8 RGB [H, W, 3] array as PNG; makes the folder where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format="PNG")


def _scaled(image: np.ndarray, longest_side: int) -> Image.Image:
    ratio = longest_side / max(image.shape[:2])
    height, width = (max(1, round(side * ratio)) for side in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)


def _tinted(pixels: Image.Image, masks: Sequence[np.ndarray], labels: np.ndarray) -> Image.Image:
    """The image with masks on it, small ones on top."""
    tinted = np.array(pixels, dtype=np.float32)
    for number in sorted(range(len(masks)), key=lambda number: -float(np.mean(masks[number]))):
        mask = np.asarray(Image.fromarray(masks[number]).resize(pixels.size, Image.Resampling.NEAREST))
        color = np.array(class_color(int(labels[number])), dtype=np.float32)
        inner = mask.copy()
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= np.roll(mask, step, axis)
        tinted[mask] += TINT * (color - tinted[mask])
        tinted[mask & ~inner] = color
    return Image.fromarray(tinted.round().astype(np.uint8))


def _draw_frame(draw: ImageDraw.ImageDraw, box_xyxy: np.ndarray, color: tuple[int, int, int], width: int) -> None:
    x0, y0, x1, y1 = (float(value) for value in box_xyxy)
    x1, y1 = max(x0, x1 - 1), max(y0, y1 - 1)  # the box ends where its last pixel ends
    # A dark rim keeps a bright frame visible on a bright ground.
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=DARK, width=width + 2)
    draw.rectangle((x0, y0, x1, y1), outline=color, width=width)


def _name_size(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> tuple[int, int]:
    left, _, right, _ = font.getbbox(text)
    _, top, _, bottom = font.getbbox("Ag")  # one height for all names
    return round(right - left) + 4, round(bottom - top) + 4


def _name_place(
    number: int,
    size: tuple[int, int],
    pixels: tuple[int, int],
    boxes: Sequence[_Rectangle],
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Where the name of a box goes: the place round it that covers other names and small boxes least."""
    x0, y0, x1, y1 = boxes[number]
    width, height = size
    candidates = (
        *((x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1)),
        *((x1 - width, y1), (x1, y0), (x0 - width, y0), (x1 - width, y1 - height)),
    )

    def cost(place: _Rectangle) -> float:
        names = sum(_overlap(place, other) for other in taken)
        # An object counts by the part of it that is hidden: a corner of a large one does not matter.
        objects = sum(_overlap(place, box) ** 2 / max(_overlap(box, box), 1) for box in boxes)
        return names + objects

    places = []
    for x, y in candidates:
        x = max(0, min(x, pixels[0] - width))
        y = max(0, min(y, pixels[1] - height))
        places.append((x, y, x + width, y + height))
    return min(places, key=cost)


def _overlap(one: _Rectangle, other: _Rectangle) -> int:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _draw_name(
    draw: ImageDraw.ImageDraw,
    place: _Rectangle,
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    left, top = font.getbbox(text)[0], font.getbbox("Ag")[1]
    # Weights of ITU-R BT.601 luma: dark letters on a bright ground, bright ones on a dark ground.
    is_bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128
    draw.text((place[0] + 2 - left, place[1] + 2 - top), text, fill=DARK if is_bright else LIGHT, font=font)


def _grid(
    images: Sequence[np.ndarray],
    columns: int,
    titles: Sequence[str] | None = None,
    letter_fraction: float = LETTER_FRACTION,
) -> np.ndarray:
    """Images row by row; a column is as wide as its widest, a row as high as its highest."""
    if not images:
        raise ValueError("a grid of images needs at least one image")
    gap = 8
    mean_side = sum(image.shape[0] + image.shape[1] for image in images) / (2 * len(images))
    font = ImageFont.load_default(max(MIN_LETTER_HEIGHT, round(mean_side * letter_fraction)))
    title_height = _name_size(font, "Ag")[1] + 2 * gap if titles else 0
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    widths = [max(image.shape[1] for image in images[column::columns]) for column in range(min(columns, len(images)))]
    heights = [max(image.shape[0] for image in row) + title_height for row in rows]
    sheet = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1)), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    y = number = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for image, width in zip(row, widths, strict=False):
            if titles:
                draw.text((x + 2, y + gap // 2), titles[number], fill=DARK, font=font)
            sheet.paste(Image.fromarray(image), (x, y + title_height))
            x += width + gap
            number += 1
        y += height + gap
    return np.asarray(sheet)
