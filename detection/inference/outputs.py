"""What comes of detections in image files: images with boxes, a COCO results file, crops."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from data.images.files import ProtectedFiles, distinct_names
from detection.evaluation import Detections, write_results
from detection.inference.draw import LEGIBLE_SIDE
from detection.inference.predict import ImageDetections, PredictionError
from detection.models import Detector
from detection.reporting import check_writable, draw_boxes

JPEG_QUALITY = 92
WRITERS = 4  # threads that draw and compress behind the model


class PredictionOutputs:
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
        protected: ProtectedFiles,
        overwrite: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """Boxes written of each class."""
        self._names = distinct_names(files)
        self._class_names = class_names
        self._image_folder, self._crop_folder = image_folder, crop_folder
        self._protected = protected
        self._suffixes = [".jpg" if file.suffix.lower() in (".jpg", ".jpeg") else ".png" for file in files]
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()
        for option, folder in (("--output-dir", image_folder), ("--save-crops", crop_folder)):
            try:
                if folder is not None:
                    check_writable(folder)
            except OSError as error:
                raise PredictionError(f"{option} {folder}: nothing can be written there: {error}") from error
        if image_folder is not None:
            for index in range(len(files)):
                path = self._image_path(image_folder, index)
                protected.check(path)
                if not overwrite:
                    refuse_existing(path)
        # Which crops there will be is not known yet, and those of two calls in one folder could not be told apart.
        if crop_folder is not None and not overwrite and crop_folder.is_dir() and any(crop_folder.iterdir()):
            raise PredictionError(f"{crop_folder} holds files already; choose another folder for crops, or --overwrite")

    def add(self, found: ImageDetections) -> None:
        """Writes the image and the crops of one file soon."""
        self.counts.update(self._class_names[label] for label in found.labels.tolist())
        self._pending.append(self._pool.submit(self._write, found))
        if len(self._pending) > 2 * WRITERS:  # images must not pile up in memory
            self._pending.popleft().result()

    def __enter__(self) -> PredictionOutputs:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=exception[0] is not None)
        if exception[0] is None:
            for future in self._pending:
                future.result()

    def _write(self, found: ImageDetections) -> None:
        if self._image_folder is not None:
            drawn = draw_boxes(
                found.pixels,
                found.boxes_xyxy,
                found.labels,
                self._class_names,
                found.scores,
                longest_side=max(LEGIBLE_SIDE, *found.pixels.shape[:2]),
            )
            path = self._image_path(self._image_folder, found.index)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn).save(path, quality=JPEG_QUALITY)
        if self._crop_folder is not None:
            for number, (label, pixels) in enumerate(found.crops(), start=1):
                class_folder = re.sub(r"[^\w-]+", "_", self._class_names[label])
                path = self._crop_folder / class_folder / f"{self._names[found.index]}_{number:03}.png"
                self._protected.check(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)

    def _image_path(self, folder: Path, index: int) -> Path:
        return folder / (self._names[index] + self._suffixes[index])


def refuse_existing(path: Path) -> None:
    """Raises PredictionError where the file exists."""
    if path.exists():
        raise PredictionError(f"{path} exists; choose another place for the output, or --overwrite")


def write_coco_results(
    path: Path, found: Sequence[ImageDetections], image_ids: Sequence[int], category_ids: Sequence[int | None]
) -> None:
    """A COCO results file in the order of the files.

    image_ids: one a file. category_ids: one a label; detections of labels with None are left out.
    """
    known = [label for label, number in enumerate(category_ids) if number is not None]
    kept = [entry.select(0.0, known, None) for entry in sorted(found, key=lambda entry: entry.index)]
    detections = Detections.from_lists(
        [image_ids[entry.index] for entry in kept],
        [entry.boxes_xyxy for entry in kept],
        [entry.scores for entry in kept],
        [entry.labels for entry in kept],
        category_ids=[-1 if number is None else number for number in category_ids],
    )
    write_results(detections, path)


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
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"info": info, "images": images, "categories": categories}))
    partial.replace(path)
