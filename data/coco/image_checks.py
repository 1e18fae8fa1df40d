"""Faults that show only when every image is decoded."""

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.coco.annotations import CocoAnnotations
from data.coco.findings import Finding
from data.images.decode import ImageError, image_content, read_image

EXIF_ORIENTATION = 0x0112
CHUNK = 256  # images handed to the threads at a time, so that memory stays small and progress shows


@dataclass(frozen=True)
class DecodedImage:
    """What decoding one image file showed."""

    problem: str | None
    """Why it cannot be used; None where it can."""
    width: int = 0
    height: int = 0
    rotated: bool = False
    """Its EXIF data ask viewers to turn or mirror it."""
    digest: bytes = b""
    """SHA-256 of size and pixels"""
    has_content: bool = True
    """The file is there and is not empty."""


def inspect_image(path: Path) -> DecodedImage:
    """Decodes one image file as training does."""
    try:
        pixels = read_image(path)
    except ImageError as error:
        return DecodedImage(problem=str(error), has_content=_has_content(path))
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(f"{width}x{height}".encode())
    digest.update(pixels.data)
    return DecodedImage(None, width, height, _is_rotated(path), digest.digest())


def inspect_images(
    annotations: CocoAnnotations,
    images_dir: str | Path,
    *,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[DecodedImage]:
    """Decodes every image of a split on `workers` threads (default: one a core), in the annotations' order.

    progress is called with the number of images done since the last call. Threads serve because the decoders
    release the interpreter's lock.
    """
    paths = [Path(images_dir) / annotations.file_name(index) for index in range(len(annotations))]
    facts: list[DecodedImage] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for start in range(0, len(paths), CHUNK):
            for fact in pool.map(inspect_image, paths[start : start + CHUNK]):
                facts.append(fact)
                if progress is not None:
                    progress(1)
    return facts


def check_images(annotations: CocoAnnotations, images_dir: str | Path, facts: list[DecodedImage]) -> list[Finding]:
    """Faults of the images of one split."""
    unreadable, differs, rotated = [], [], []
    for index, fact in enumerate(facts):
        place = annotations.place(index)
        if fact.problem is not None:
            if fact.has_content:  # a missing or empty file is a finding already
                unreadable.append(f"{place}: {fact.problem}")
            continue
        expected = (int(annotations.widths[index]), int(annotations.heights[index]))
        if (fact.width, fact.height) != expected:
            turned = ", sides exchanged" if (fact.height, fact.width) == expected else ""
            size = f"{fact.width}x{fact.height}"
            differs.append(f"{place}: {size}, annotated as {expected[0]}x{expected[1]}{turned}")
        if fact.rotated:
            rotated.append(place)
    findings = [
        Finding.of(code, places, images=images_dir, source=annotations.source)
        for code, places in (
            ("unreadable-image", unreadable),
            ("size-differs", differs),
            ("exif-rotated", rotated),
            ("duplicate-image", list(_twins(annotations, facts))),
        )
    ]
    return [finding for finding in findings if finding.count]


def check_leaks(
    train: CocoAnnotations, val: CocoAnnotations, train_facts: list[DecodedImage], val_facts: list[DecodedImage]
) -> list[Finding]:
    """Images of the validation split whose pixels are those of a training image, whatever their names."""
    trained = {fact.digest: index for index, fact in enumerate(train_facts) if fact.problem is None}
    leaks = [
        f"{val.place(index)} is {train.place(trained[fact.digest])} of training"
        for index, fact in enumerate(val_facts)
        if fact.problem is None and fact.digest in trained
    ]
    return [Finding.of("train-image-in-val", leaks, source=val.source, train=train.source)] if leaks else []


def _twins(annotations: CocoAnnotations, facts: list[DecodedImage]) -> Iterator[str]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if fact.problem is None:
            groups[fact.digest].append(index)
    for first, *others in groups.values():
        for other in others:
            yield f"{annotations.place(other)} is {annotations.place(first)}"


def _has_content(path: Path) -> bool:
    try:
        return bool(image_content(path))
    except ImageError:
        return False


def _is_rotated(path: Path) -> bool:
    try:
        with Image.open(io.BytesIO(image_content(path))) as image:
            return image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1)
    except Exception:  # broken EXIF data beside sound pixels raise nearly anything, and ask for nothing
        return False
