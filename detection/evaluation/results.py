"""Detections of a data set as flat arrays, and as a COCO results file."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.coco.run_lengths import RunLengths, compressed
from detection.errors import DetectionError

RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
ROWS_PER_WRITE = 4096


class EvaluationError(DetectionError):
    """Annotations or detections that cannot be evaluated; the message says what, where, and how to mend it."""


class ResultsError(EvaluationError):
    """A results file, or detections in memory, that cannot be used; the message says where and the remedy."""


@dataclass(frozen=True)
class Detections:
    """n detections over any number of images, one row each, in no required order.

    Rows of one image and class that tie in score are ranked in the order given here, as COCO's evaluation
    does.

    Attributes:
        image_ids: int64 [n], ids of the annotation file's images.
        category_ids: int64 [n], ids of the annotation file's categories (not labels 0..K-1).
        boxes_xywh: float32 or float64 [n, 4]: left, top, width, height in pixels of the stored image.
        scores: float32 or float64 [n], higher is more certain.
        masks: of each detection, at the size of its stored image; None for a detector of boxes.

    Models give float32. Files read with `read_results` give float64, so that scores which another program
    wrote with more digits than float32 holds do not become ties.
    """

    image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    boxes_xywh: npt.NDArray[np.floating[Any]]
    scores: npt.NDArray[np.floating[Any]]
    masks: RunLengths | None = None

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        shapes = (self.image_ids.shape, self.category_ids.shape, self.boxes_xywh.shape, self.scores.shape)
        assert shapes == ((n,), (n,), (n, 4), (n,)), f"shapes of the four arrays do not fit together: {shapes}"
        assert self.image_ids.dtype == self.category_ids.dtype == np.int64, "ids are int64"
        assert self.boxes_xywh.dtype in (np.float32, np.float64), self.boxes_xywh.dtype
        assert self.scores.dtype in (np.float32, np.float64), self.scores.dtype
        assert self.masks is None or len(self.masks) == n, "a mask for each detection"

    def __len__(self) -> int:
        return len(self.image_ids)

    @staticmethod
    def empty() -> Detections:
        """No detection at all, in the dtypes that a model's detections have."""
        ids = np.zeros(0, np.int64)
        return Detections(ids, ids, np.zeros((0, 4), np.float32), np.zeros(0, np.float32))

    @staticmethod
    def from_lists(
        image_ids: Sequence[int],
        boxes_xyxy: Sequence[npt.ArrayLike],
        scores: Sequence[npt.ArrayLike],
        labels: Sequence[npt.ArrayLike],
        *,
        category_ids: Sequence[int],
        masks: Sequence[RunLengths] | None = None,
    ) -> Detections:
        """Flattens one entry per image, as a detector returns them, scaled back to the image's own pixels.

        Args:
            image_ids: id of each of the B images.
            boxes_xyxy: B times float [n_b, 4] (left, top, right, bottom); arrays or tensors on the CPU.
            scores: B times float [n_b].
            labels: B times int [n_b] in 0..K-1.
            category_ids: length K, the category id of each label.
            masks: B times n_b masks of the image's size.
        """
        assert len(image_ids) == len(boxes_xyxy) == len(scores) == len(labels), "one entry per image in each list"
        if not len(image_ids):
            return Detections.empty()
        counts = [len(np.asarray(s)) for s in scores]
        corners = np.concatenate([np.asarray(b, dtype=np.float32).reshape(-1, 4) for b in boxes_xyxy])
        flat_labels = np.concatenate([np.asarray(x, dtype=np.int64) for x in labels])
        return Detections(
            image_ids=np.repeat(np.asarray(image_ids, dtype=np.int64), counts),
            category_ids=np.asarray(category_ids, dtype=np.int64)[flat_labels],
            boxes_xywh=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
            scores=np.concatenate([np.asarray(s, dtype=np.float32) for s in scores]),
            masks=None if masks is None else RunLengths.concatenate(masks),
        )

    @staticmethod
    def concatenate(parts: Iterable[Detections]) -> Detections:
        """All rows of `parts`, which all have masks or all have none, in turn; no part at all gives `empty()`."""
        parts = list(parts) or [Detections.empty()]
        masks = [part.masks for part in parts if part.masks is not None]
        images, categories, boxes, scores = map(np.concatenate, zip(*(part.columns() for part in parts), strict=True))
        return Detections(images, categories, boxes, scores, RunLengths.concatenate(masks) if masks else None)

    def columns(self) -> tuple[npt.NDArray[Any], ...]:
        """Image ids, category ids, boxes and scores."""
        return self.image_ids, self.category_ids, self.boxes_xywh, self.scores

    def as_arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.floating[Any]]]:
        """The detections as two plain arrays that travel between processes without pickling.

        Returns:
            ids int64 [n, 2] (image, category) and values float32 (float64 where the detections are) [n, 5]
            (left, top, width, height, score); both C-contiguous. `from_arrays` is the inverse.
        """
        ids = np.stack([self.image_ids, self.category_ids], axis=1)
        return ids, np.concatenate([self.boxes_xywh, self.scores[:, None]], axis=1)

    @staticmethod
    def from_arrays(ids: npt.NDArray[np.int64], values: npt.NDArray[np.floating[Any]]) -> Detections:
        """Inverse of `as_arrays`."""
        columns: tuple[npt.NDArray[Any], ...] = (ids[:, 0], ids[:, 1], values[:, :4], values[:, 4])
        images, categories, boxes, scores = map(np.ascontiguousarray, columns)
        return Detections(images, categories, boxes, scores)

    def take(self, rows: npt.NDArray[Any]) -> Detections:
        """The rows that an index or bool array [n] names."""
        images, categories, boxes, scores = (column[rows] for column in self.columns())
        return Detections(images, categories, boxes, scores, self.masks and self.masks.take(rows))

    def check_finite(self) -> None:
        """Raises ResultsError if a box or a score is NaN or infinite: no ranking is defined then."""
        bad = ~(np.isfinite(self.scores) & np.isfinite(self.boxes_xywh).all(axis=1))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ResultsError(
                f"{int(bad.sum())} of {len(self)} detections hold NaN or infinity, the first on image"
                f" {self.image_ids[row]}: box {self.boxes_xywh[row].tolist()}, score {self.scores[row]}."
                " The model that made them has diverged: look at its loss and lower the learning rate."
            )


def write_results(detections: Detections, path: str | os.PathLike[str]) -> None:
    """Writes a COCO results file of boxes: a JSON list of {"image_id", "category_id", "bbox": [x, y, w, h], "score"}.

    float32 numbers get 9 significant digits (float64: 17), which is what it takes to get the same number
    back. So the ranking with all its ties survives, and the file's metrics are those of the detections in
    memory; rounding to hundredths of a pixel would move a box across an IoU threshold now and then.

    The file appears whole or not at all: it is written beside its place and moved there.

    Raises:
        ResultsError: a box or score is not finite (JSON has no such numbers).
    """
    detections.check_finite()
    digits = [17 if a.dtype == np.float64 else 9 for a in (detections.boxes_xywh, detections.scores)]
    box, score = (f"%.{d}g" for d in digits)
    row = f'{{"image_id":%d,"category_id":%d,"bbox":[{box},{box},{box},{box}],"score":{score}}}'
    columns = (detections.image_ids, detections.category_ids, *detections.boxes_xywh.T, detections.scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    _write_rows(path, len(detections), (row % values for values in rows))


def write_mask_results(detections: Detections, path: str | os.PathLike[str]) -> None:
    """Writes a COCO results file of masks: a JSON list of {"image_id", "category_id", "segmentation": {"size": [height,
    width], "counts": compressed run lengths}, "score"}; otherwise as `write_results`."""
    detections.check_finite()
    assert detections.masks is not None
    digits = 17 if detections.scores.dtype == np.float64 else 9
    columns = (detections.image_ids, detections.category_ids, *detections.masks.sizes.T, detections.scores)
    row = '{"image_id":%d,"category_id":%d,"segmentation":{"size":[%d,%d],"counts":"%s"},"score":%.{digits}g}'
    row = row.replace("{digits}", str(digits))
    # The one character of run lengths that JSON writes otherwise.
    texts = (detections.masks.counts(i).decode("ascii").replace("\\", "\\\\") for i in range(len(detections)))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    _write_rows(path, len(detections), (row % (*v[:4], text, v[4]) for v, text in zip(rows, texts, strict=True)))


def _write_rows(path: str | os.PathLike[str], count: int, rows: Iterator[str]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # One name, so that what a killed process has left is written over.
    temporary = target.with_name(f".{target.name}.new")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write("[")
            for start in range(0, count, ROWS_PER_WRITE):
                lines = list(itertools.islice(rows, ROWS_PER_WRITE))
                file.write((",\n" if start else "\n") + ",\n".join(lines))
            file.write("\n]\n")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_results(path: str | os.PathLike[str]) -> Detections:
    """Reads a COCO results file of any program, of boxes or of masks; other keys are passed over.

    Entries may have a "segmentation" of run lengths; without "bbox", their boxes are those round the masks.

    Returns:
        Detections in float64, rows in the file's order.

    Raises:
        ResultsError: the file is missing, is not such a list, or a row of it is not a detection.
    """
    source = Path(path)
    try:
        rows = json.loads(source.read_bytes())
    except FileNotFoundError:
        raise ResultsError(f"{source}: there is no such results file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{source}: not JSON ({error}). A file cut short is usually one whose writer was killed: write it again."
        ) from error
    if not isinstance(rows, list):
        keys = f" with the keys {sorted(rows)[:6]}" if isinstance(rows, dict) else ""
        raise ResultsError(
            f"{source}: a results file is a list of detections, this one holds a {type(rows).__name__}{keys}."
            " Annotation files and result files are different formats; give the detector's output."
        )
    if not rows:
        return Detections.empty()
    masks = None
    first = rows[0] if isinstance(rows[0], dict) else {}
    if isinstance(first.get("segmentation"), dict) or ("segmentation" in first and "bbox" not in first):
        masks = _masks_of(source, rows)
        rows = [{"bbox": box} | row for row, box in zip(rows, masks.boxes_xywh().tolist(), strict=True)]
    try:
        arrays = [np.array([row[key] for row in rows]) for key in RESULT_KEYS]
        image_ids, category_ids, boxes, scores = (array.astype(np.float64) for array in arrays)
        well_formed = (
            all(array.dtype.kind in "iuf" for array in arrays)
            and boxes.shape == (len(rows), 4)
            and all(
                array.shape == (len(rows),) and np.isfinite(array).all() for array in (image_ids, category_ids, scores)
            )
            and bool(np.isfinite(boxes).all() and (boxes[:, 2:] >= 0).all())
            and all(((ids == np.floor(ids)) & (np.abs(ids) < 2**63)).all() for ids in arrays[:2])
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        well_formed = False
    if not well_formed:
        # The arrays are fast and the rows say more: the same rules.
        index, fault = next((i, fault) for i, row in enumerate(rows) if (fault := _fault_of_row(row)))
        raise ResultsError(f"{source}: entry {index} (counted from 0): {fault}")
    return Detections(arrays[0].astype(np.int64), arrays[1].astype(np.int64), boxes, scores, masks)


def _masks_of(source: Path, rows: list[Any]) -> RunLengths:
    counts: list[bytes] = []
    sizes: list[Any] = []
    for index, row in enumerate(rows):
        given = row.get("segmentation") if isinstance(row, dict) else None
        size = given.get("size") if isinstance(given, dict) else None
        text = None
        if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
            text = compressed(given, *size)
        if text is None:
            raise ResultsError(
                f"{source}: entry {index} (counted from 0): segmentation is {given!r:.80}, expected run lengths that "
                'fill the image: {"size": [height, width], "counts": ...}'
            )
        counts.append(text)
        sizes.append(size)
    return RunLengths.of(counts, sizes)


def _fault_of_row(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"expected an object with {', '.join(RESULT_KEYS)}, found {row!r:.80}"
    missing = [key for key in RESULT_KEYS if key not in row]
    if missing:
        return f"no {', '.join(missing)}; every entry needs {', '.join(RESULT_KEYS)}"
    for key in ("image_id", "category_id"):
        if not _is_number(row[key]) or row[key] != math.floor(row[key]) or abs(row[key]) >= 2**63:
            return f"{key} is {row[key]!r:.80}, expected a whole number of the annotation file's ids"
    if not _is_number(row["score"]):
        return f"score is {row['score']!r:.80}, expected a finite number"
    box = row["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        return f"bbox is {box!r:.80}, expected four finite numbers: left, top, width, height"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {box} has a negative size; it must be left, top, width, height, not two corners"
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63  # what an array of integers holds
    return isinstance(value, float) and math.isfinite(value)
