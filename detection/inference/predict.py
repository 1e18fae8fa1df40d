"""A trained detector run over image files."""

from __future__ import annotations

import dataclasses
import difflib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import CocoAnnotations, ImageError, read_image
from data.coco.run_lengths import RunLengths
from detection.errors import DetectionError
from detection.inference.exif import AS_STORED, orientation_of, upright
from detection.inference.tta import View, predict_views
from detection.models import Detector, paste_masks

READERS = 4  # threads that decode images ahead of the model


class PredictionError(DetectionError):
    """A wish that the detector or the annotation file cannot meet."""


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image file, best first.

    index: place of the file in the list. pixels: uint8 RGB [H, W, 3], as stored or turned upright. boxes_xyxy: float32
    [N, 4] in these pixels. scores: float32 [N]. labels: int64 [N]. is_turned: whether they are not as stored.
    mask_probabilities: float32 [N, 28, 28], within the boxes; None without masks. run_lengths: N masks of the image's
    size, in what `without_pixels` keeps of a detector's with masks.
    """

    index: int
    pixels: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    is_turned: bool = False
    mask_probabilities: np.ndarray | None = None
    run_lengths: RunLengths | None = None

    def select(self, min_score: float, labels: Iterable[int] | None, max_boxes: int | None) -> ImageDetections:
        """Those with at least min_score, of these classes (None: all), and of them the max_boxes best."""
        wanted = self.scores >= min_score
        if labels is not None:
            wanted &= np.isin(self.labels, list(labels))
        rows = np.flatnonzero(wanted)[:max_boxes]
        return dataclasses.replace(
            self,
            boxes_xyxy=self.boxes_xyxy[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            mask_probabilities=None if self.mask_probabilities is None else self.mask_probabilities[rows],
            run_lengths=None if self.run_lengths is None else self.run_lengths.take(rows),
        )

    def without_pixels(self) -> ImageDetections:
        """The same boxes and masks for keeping; pixels: uint8 [0, 0, 3]."""
        run_lengths = None
        if self.mask_probabilities is not None:
            run_lengths = RunLengths.concatenate(RunLengths.encode(mask[None].view(np.uint8)) for mask in self.masks())
        pixels = np.zeros((0, 0, 3), np.uint8)
        return dataclasses.replace(self, pixels=pixels, mask_probabilities=None, run_lengths=run_lengths)

    def masks(self, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """bool [height, width]: the mask of each detection in the whole image, or in it resized to `size`; one at a
        time, because a hundred of a large photo take a gigabyte."""
        height, width = self.pixels.shape[:2] if size is None else size
        factors = np.array([width / self.pixels.shape[1], height / self.pixels.shape[0]] * 2, np.float32)
        boxes = torch.from_numpy(self.boxes_xyxy * factors)
        probabilities = torch.from_numpy(self.mask_probabilities) if self.mask_probabilities is not None else boxes[:0]
        for number in range(len(probabilities)):
            one = slice(number, number + 1)
            yield paste_masks(probabilities[one], boxes[one], (height, width))[0].numpy()

    def crops(self) -> Iterator[tuple[int, np.ndarray]]:
        """Label and pixels (uint8 RGB, a view) of each box, whole pixels outwards; none of a box without area."""
        height, width = self.pixels.shape[:2]
        corners = np.concatenate([np.floor(self.boxes_xyxy[:, :2]), np.ceil(self.boxes_xyxy[:, 2:])], axis=1)
        corners = corners.clip(0, (width, height, width, height)).astype(int)
        for (left, top, right, bottom), label in zip(corners.tolist(), self.labels.tolist(), strict=True):
            if left < right and top < bottom:
                yield label, self.pixels[top:bottom, left:right]


def predict_files(
    detector: Detector,
    files: Sequence[Path],
    *,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    on_broken: Callable[[Path, ImageError], None],
    turn_upright: bool = False,
    views: Sequence[View] = (),
) -> Iterator[ImageDetections]:
    """The detections of each file, lying and standing images in batches of their own (they would pad each other).

    Threads read ahead. Files that cannot be read are given to on_broken and left out. The order is that in which
    batches fill up, not that of the files. turn_upright: images are turned as their EXIF orientation says. views: of
    test-time augmentation; none: images are looked at once, as they are.
    """
    for batch in _batches(files, batch_size, on_broken, turn_upright):
        images = [image.pixels for image in batch]
        with autocast():
            if views:
                results = predict_views(detector, images, views, batch_size=batch_size)
            else:
                results = detector.predict(images, batch_size=batch_size)
        for image, found in zip(batch, results, strict=True):
            boxes, scores, labels = (found[key].numpy() for key in ("boxes_xyxy", "scores", "labels"))
            masks = found["mask_probabilities"].numpy() if "mask_probabilities" in found else None
            yield ImageDetections(image.index, image.pixels, boxes, scores, labels, image.is_turned, masks)


def find_labels(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """The labels of classes by name. Raises PredictionError, with the nearest name, for one that does not exist."""
    labels = []
    for name in (name.strip() for name in names):
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(class_names)}"
            raise PredictionError(f"the detector knows no class {name!r}; {hint}")
        labels.append(list(class_names).index(name))
    return labels


def match_image_ids(files: Sequence[Path], annotations: CocoAnnotations) -> list[int]:
    """The image id of each file, by file name: the annotated name is the file's path or the end of it.

    Raises PredictionError for files that are not annotated or are the same image.
    """
    id_of = {annotations.file_name(place): int(annotations.image_ids[place]) for place in range(len(annotations))}
    ids: list[int] = []
    file_of: dict[int, Path] = {}
    unknown = []
    for file in files:
        parts = file.absolute().parts[1:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        image_id = next((id_of[end] for end in ends if end in id_of), None)
        if image_id is None:
            unknown.append(file)
            continue
        if image_id in file_of:
            raise PredictionError(f"{file_of[image_id]} and {file} are both image {image_id} of {annotations.source}")
        file_of[image_id] = file
        ids.append(image_id)
    if unknown:
        raise PredictionError(
            f"{len(unknown)} of {len(files)} images are not in {annotations.source}, {unknown[0]} among them; "
            "leave them out, or --annotations, and the images are numbered"
        )
    return ids


def match_category_ids(detector: Detector, annotations: CocoAnnotations) -> list[int | None]:
    """The file's category id of each of the detector's labels, by name; None for those it does not have.

    Raises PredictionError where it has none of them.
    """
    id_of = dict(zip(annotations.class_names, annotations.category_ids, strict=True))
    ids = [id_of.get(name) for name in detector.class_names]
    if all(number is None for number in ids):
        raise PredictionError(
            f"{annotations.source} has none of the detector's classes ({', '.join(detector.class_names[:5])}, ...): "
            "its categories are " + ", ".join(annotations.class_names[:5])
        )
    return ids


@dataclass(frozen=True)
class _Image:
    index: int
    pixels: np.ndarray
    is_turned: bool


def _batches(
    files: Sequence[Path], batch_size: int, on_broken: Callable[[Path, ImageError], None], turn_upright: bool
) -> Iterator[list[_Image]]:
    batches: dict[bool, list[_Image]] = {False: [], True: []}
    for file, future in _read_ahead(files, READERS + batch_size, turn_upright):
        try:
            image = future.result()
        except ImageError as error:
            on_broken(file, error)
            continue
        is_standing = image.pixels.shape[0] > image.pixels.shape[1]
        batches[is_standing].append(image)
        if len(batches[is_standing]) == batch_size:
            yield batches[is_standing]
            batches[is_standing] = []
    yield from filter(None, batches.values())


def _read_ahead(files: Sequence[Path], depth: int, turn_upright: bool) -> Iterator[tuple[Path, Future[_Image]]]:
    def read(index: int) -> _Image:
        pixels = read_image(files[index])
        orientation = orientation_of(files[index]) if turn_upright else AS_STORED
        return _Image(index, upright(pixels, orientation), orientation != AS_STORED)

    pending: deque[Future[_Image]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as pool:
        try:
            for index, file in enumerate(files):
                while len(pending) < depth and index + len(pending) < len(files):
                    pending.append(pool.submit(read, index + len(pending)))
                yield file, pending.popleft()
        finally:
            for future in pending:
                future.cancel()
