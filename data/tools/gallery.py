"""A data set as one HTML page that needs nothing beside it: images are inside, boxes are drawn by the browser.

The page is made of gallery.html, gallery.css and gallery.js. The script builds everything from the data with
textContent and attributes, so no name is ever taken for markup; the policy in the head keeps the page from fetching
anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.coco.annotations import CocoAnnotations
from data.errors import DataError
from data.images.decode import ImageError, read_image

GENERATOR = "detection harness: gallery of a data set"
BIN_EDGES = tuple(2.0 ** (power / 2) for power in range(0, 23))  # sides of 1 to 2,048 pixels, two bins an octave
CHUNK = 64  # images handed to the threads at a time, so that memory stays small and progress shows


class GalleryError(DataError):
    """A gallery that cannot be written; the message says why and what to do."""


@dataclass(frozen=True)
class GallerySummary:
    """What was written."""

    num_shown: int
    num_images: int
    num_problems: int
    num_bytes: int


def write_gallery(
    file: Path,
    images_dir: Path,
    annotations: CocoAnnotations,
    *,
    colors: Sequence[str],
    count: int = 200,
    seed: int = 0,
    longest_side: int = 480,
    title: str = "",
    progress: Callable[[int], object] = lambda _: None,
) -> GallerySummary:
    """Writes a page with `count` images at most, and with the figures of all.

    colors: CSS colors by label. seed: which images, where not all are shown (see `choose`). longest_side: of the
    thumbnails, in pixels; smaller images stay as they are. Images that cannot be read have a card that says why.

    Raises GalleryError where `file` exists and is not a gallery, which a new one would replace.
    """
    if file.exists() and not (file.is_file() and GENERATOR.encode() in file.read_bytes()[:2000]):
        raise GalleryError(f"{file} exists and is not a gallery: choose another name for it")
    indices = choose(annotations, count, seed)
    cards: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            for card in pool.map(_card, repeat(images_dir), repeat(annotations), chunk, repeat(longest_side)):
                cards.append(card)
                progress(1)
    content = {
        "classes": _class_figures(annotations, colors),
        "edges": [round(edge, 2) for edge in BIN_EDGES],
        "images": cards,
        "numImages": len(annotations),
        "numEmpty": int((np.diff(annotations.offsets) == 0).sum()),
    }
    parts = files("data.tools")
    values = {
        "generator": html.escape(GENERATOR),
        "title": html.escape(title or str(annotations.source)),
        "style": parts.joinpath("gallery.css").read_text(encoding="utf-8"),
        "script": parts.joinpath("gallery.js").read_text(encoding="utf-8"),
        # Nothing in a data set's names may end the script element or begin another.
        "data": json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = parts.joinpath("gallery.html").read_text(encoding="utf-8")
    encoded = re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], page).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        staged.write_bytes(encoded)
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)
    return GallerySummary(len(cards), len(annotations), sum("problem" in card for card in cards), len(encoded))


def choose(annotations: CocoAnnotations, count: int, seed: int) -> list[int]:
    """`count` images at most, in the file's order: one with each class first, then any, drawn by seed and name."""
    names = [annotations.file_name(index) for index in range(len(annotations))]
    if count >= len(names):
        return list(range(len(names)))
    turns = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}\0{names[i]}".encode()).digest())
    wanted = set(annotations.labels.tolist())
    with_new_class = []
    for index in turns:
        here = set(annotations.labels[annotations.rows(index)].tolist())
        if here & wanted:
            with_new_class.append(index)
            wanted -= here
    return sorted(list(dict.fromkeys(with_new_class + turns))[:count])


def _card(images_dir: Path, annotations: CocoAnnotations, index: int, longest_side: int) -> dict[str, Any]:
    width, height = int(annotations.widths[index]), int(annotations.heights[index])
    rows = annotations.rows(index)
    boxes = [
        [*(round(value, 2) for value in box), label, int(no_target)]
        for box, label, no_target in zip(
            annotations.boxes_xywh[rows].tolist(),
            annotations.labels[rows].tolist(),
            (annotations.crowd[rows] | annotations.ignore[rows]).tolist(),
            strict=True,
        )
    ]
    name = annotations.file_name(index)
    card: dict[str, Any] = {"name": name, "id": int(annotations.image_ids[index]), "w": width, "h": height}
    card["boxes"] = boxes
    try:
        pixels = read_image(images_dir / name)
    except ImageError as error:
        return card | {"problem": str(error)}
    if pixels.shape[:2] != (height, width):
        card["problem"] = (
            f"the image is {pixels.shape[1]}x{pixels.shape[0]} pixels and annotated as {width}x{height}: its boxes "
            "are misplaced"
        )
    image = Image.fromarray(pixels)
    image.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=80)
    card["src"] = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return card


def _class_figures(annotations: CocoAnnotations, colors: Sequence[str]) -> list[dict[str, Any]]:
    """Name, color, number of boxes, of images and of crowds of each class, and its boxes by size."""
    target = ~(annotations.crowd | annotations.ignore)
    sides = np.sqrt(np.clip(annotations.boxes_xywh[:, 2:], 0, None).prod(axis=1))
    bins = np.clip(np.searchsorted(BIN_EDGES, sides, side="right") - 1, 0, len(BIN_EDGES) - 1)
    of_class = [annotations.labels == label for label in range(len(annotations.class_names))]
    return [
        {
            "name": name,
            "color": color,
            "boxes": int((mine & target).sum()),
            "images": len(np.unique(annotations.image_indices[mine])),
            "crowds": int((mine & ~target).sum()),
            "sizes": np.bincount(bins[mine & target], minlength=len(BIN_EDGES)).tolist(),
        }
        for name, color, mine in zip(annotations.class_names, colors, of_class, strict=True)
    ]
