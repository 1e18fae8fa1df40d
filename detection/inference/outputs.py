"""What comes of detections in image files: images with boxes, a COCO results file, crops."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.images.files import ProtectedFiles, distinct_names
from detection.evaluation import Detections, write_mask_results, write_results
from detection.inference.predict import ImageDetections, PredictionError
from detection.models import Detector
from detection.models.detector import ImageInput, load_pixels
from detection.reporting import check_writable, draw_boxes, write_whole

LEGIBLE_SIDE = 640
"""Smaller images are drawn enlarged to it, so that names do not hide what they name."""
JPEG_QUALITY = 92
WRITERS = 4  # threads that draw and compress behind the model


def draw_detections(
    image: ImageInput, found: Mapping[str, Any], *, min_score: float = 0.3, longest_side: int | None = None
) -> Image.Image:
    """The image with boxes, masks, class names and scores in percent, as an image that a notebook shows by itself.

    image: as it was given to `Detector.predict`, and found: what that returned for it. min_score: 0..1, boxes below
    are left out. longest_side: pixels to scale to first; default: the image's own size, but at least 640, so that
    names can be read. Raises DetectorError for what is no image.
    """
    pixels = load_pixels(image).permute(1, 2, 0).contiguous().numpy()
    boxes, scores, labels = (found[key].numpy() for key in ("boxes_xyxy", "scores", "labels"))
    name_of = dict(zip(labels.tolist(), found["names"], strict=True))
    class_names = [name_of.get(label, "") for label in range(max(name_of, default=-1) + 1)]
    masks = found["mask_probabilities"].numpy() if "mask_probabilities" in found else None
    shown = ImageDetections(0, pixels, boxes, scores, labels, mask_probabilities=masks).select(min_score, None, None)
    return Image.fromarray(_drawn(shown, class_names, longest_side))


def _drawn(found: ImageDetections, class_names: Sequence[str], longest_side: int | None = None) -> np.ndarray:
    side = longest_side or max(LEGIBLE_SIDE, *found.pixels.shape[:2])
    height, width = (max(1, round(length * side / max(found.pixels.shape[:2]))) for length in found.pixels.shape[:2])
    masks = list(found.masks((height, width)))
    return draw_boxes(
        found.pixels, found.boxes_xyxy, found.labels, class_names, found.scores, masks=masks, longest_side=side
    )


class PredictionOutputs(AbstractContextManager["PredictionOutputs"]):
    """Writes while the detector runs. A context manager; leaving it waits for what is still being written.

    Raises ImageFilesError, at once where it can be known, for an output that would replace one of the inputs, and
    PredictionError, before anything is written, for one that exists already, unless `overwrite`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        class_names: Sequence[str],
        *,
        image_folder: Path | None,
        crop_folder: Path | None,
        mask_folder: Path | None = None,
        protected: ProtectedFiles,
        overwrite: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """Boxes written of each class."""
        self._class_names, self._names, self._protected = class_names, distinct_names(files), protected
        self._crop_folder, self._mask_folder = crop_folder, mask_folder
        self._image_paths: list[Path] = []
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()
        for option, folder in (
            *(("--output-dir", image_folder), ("--save-crops", crop_folder)),
            ("--save-masks", mask_folder),
        ):
            try:
                if folder is not None:
                    check_writable(folder)
            except OSError as error:
                raise PredictionError(f"{option} {folder}: nothing can be written there: {error}") from error
        if image_folder is not None:
            for name, file in zip(self._names, files, strict=True):
                suffix = ".jpg" if file.suffix.lower() in (".jpg", ".jpeg") else ".png"
                self._image_paths.append(image_folder / (name + suffix))
        for path in self._image_paths:
            protected.check(path)
            if not overwrite:
                refuse_existing(path)
        # Which of them there will be is not known yet, and those of two calls in one folder could not be told apart.
        for what, folder in (("crops", crop_folder), ("masks", mask_folder)):
            if folder is not None and not overwrite and folder.is_dir() and any(folder.iterdir()):
                raise PredictionError(f"{folder} holds files already; choose another folder for {what}, or --overwrite")

    def add(self, found: ImageDetections) -> None:
        """Writes the image and the crops of one file soon."""
        self.counts.update(self._class_names[label] for label in found.labels.tolist())
        self._pending.append(self._pool.submit(self._write, found))
        if len(self._pending) > 2 * WRITERS:  # images must not pile up in memory
            self._pending.popleft().result()

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=exception[0] is not None)
        if exception[0] is None:
            for future in self._pending:
                future.result()

    def _write(self, found: ImageDetections) -> None:
        if self._image_paths:
            _save(self._image_paths[found.index], _drawn(found, self._class_names))
        if self._crop_folder is not None:
            for number, (label, pixels) in enumerate(found.crops(), start=1):
                self._save_object(self._crop_folder, found, label, number, pixels)
        if self._mask_folder is not None:
            for number, (label, mask) in enumerate(zip(found.labels.tolist(), found.masks(), strict=True), start=1):
                self._save_object(self._mask_folder, found, label, number, mask.astype(np.uint8) * 255)

    def _save_object(self, folder: Path, found: ImageDetections, label: int, number: int, pixels: np.ndarray) -> None:
        class_folder = re.sub(r"[^\w-]+", "_", self._class_names[label])
        path = folder / class_folder / f"{self._names[found.index]}_{number:03}.png"
        self._protected.check(path)
        _save(path, pixels)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)


def refuse_existing(path: Path) -> None:
    """Raises PredictionError where the file exists."""
    if path.exists():
        raise PredictionError(f"{path} exists; choose another place for the output, or --overwrite")


def write_coco_results(
    path: Path, found: Sequence[ImageDetections], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> None:
    """A COCO results file in the order of the files; of masks another one beside it, see mask_results_path.

    image_ids: one a file. category_ids: one a label; detections of labels with None are left out.
    """
    known = [label for label, number in enumerate(category_ids) if number is not None]
    kept = [entry.select(0.0, known, None) for entry in sorted(found, key=lambda entry: entry.index)]
    masks = [entry.run_lengths for entry in kept if entry.run_lengths is not None]
    detections = Detections.from_lists(
        [image_ids[entry.index] for entry in kept],
        [entry.boxes_xyxy for entry in kept],
        [entry.scores for entry in kept],
        [entry.labels for entry in kept],
        category_ids=[-1 if number is None else number for number in category_ids],
        masks=masks if len(masks) == len(kept) else None,
    )
    write_results(detections, path)
    if detections.masks is not None:
        write_mask_results(detections, mask_results_path(path))


def mask_results_path(path: Path) -> Path:
    """Where the masks of a results file stand: FILE_segm.json beside FILE.json."""
    return path.with_name(f"{path.stem}_segm.json")


def write_images_list(
    path: Path,
    detector: Detector,
    files: Sequence[Path],
    sizes: dict[int, tuple[int, int]],
    *,
    turned_upright: bool = False,
) -> None:
    """A COCO file of images and categories without boxes, which says what the ids in a results file mean.

    The image id is the place in `files`, from 1. File names are relative to the deepest folder that holds all files,
    which stands under info.image_folder. sizes: (height, width) by place from 0; places not in it are left out.
    turned_upright: whether these and the boxes are those of images turned by EXIF, as info.turned_upright then says.
    """
    root = os.path.commonpath([file.absolute().parent for file in files])
    images = []
    for index, (height, width) in sorted(sizes.items()):
        name = files[index].absolute().relative_to(root).as_posix()
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
    pairs = zip(detector.category_ids, detector.class_names, strict=True)
    categories = [{"id": number, "name": name} for number, name in pairs]
    info = {"image_folder": root, "turned_upright": turned_upright}
    write_whole(path, json.dumps({"info": info, "images": images, "categories": categories}).encode())
