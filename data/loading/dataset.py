"""The images of a set and their boxes, ready to be put into batches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.coco.annotations import CocoAnnotations
from data.coco.checks import image_entries
from data.coco.fields import offsets_of
from data.coco.merge import concatenate
from data.coco.segmentations import Bitmap, Segmentations
from data.errors import DataError
from data.images.decode import ImageError, decode_image, read_image
from data.images.shards import open_shards

_BOXES_AT_ONCE = 1 << 20


class DatasetError(DataError):
    """A set that cannot be used; the message says why, where, and how to mend it."""


def kept_boxes(annotations: CocoAnnotations, masks: bool) -> dict[str, np.ndarray]:
    """The boxes of a CocoDataset as flat arrays: those of neither crowd regions nor ignored annotations, with
    masks=True of annotations with an outline. Of annotations out of the cache they are kept there, for all processes.

    Returns:
        boxes_xyxy float32 [B, 4], labels int64 [B], box_counts int64 [N], first_box int64 [N + 1]; with masks also
        starts and counts [B] of `Segmentations`.
    """

    def make() -> dict[str, np.ndarray]:
        usable = ~(annotations.crowd | annotations.ignore)
        rows = {}
        if masks and annotations.segmentations is not None:
            usable &= annotations.segmentations.present
            taken = annotations.segmentations.take(usable)
            rows = {"starts": taken.starts, "counts": taken.counts}
        places = offsets_of(usable)
        boxes_xyxy = np.empty((int(places[-1]), 4), dtype=np.float32)
        for start in range(0, len(usable), _BOXES_AT_ONCE):
            rows_here = slice(start, min(start + _BOXES_AT_ONCE, len(usable)))
            corners = annotations.boxes_xywh[rows_here][usable[rows_here]]
            corners[:, 2:] += corners[:, :2]
            # float64 sums rounded once, as MMDetection has them.
            boxes_xyxy[places[rows_here.start] : places[rows_here.stop]] = corners
        first_box = places[annotations.offsets]
        return rows | {
            "boxes_xyxy": boxes_xyxy,
            "labels": annotations.labels[usable],
            "box_counts": np.diff(first_box),
            "first_box": first_box,
        }

    return annotations.kept_arrays("masks" if masks else "boxes", make)


class CocoDataset:
    """A folder of images and its annotations.

    training: images and boxes are those of annotations.training_view (MMDetection's rules); otherwise every
    image of the file, and the boxes serve to be shown. Crowd regions and ignored annotations are never among
    the boxes. Image indices are those of `annotations`, which is the view.

    masks=True, for annotations that were read with them: boxes come with bitmaps, and those without an outline are left
    out.

    All data lie in flat arrays, which worker processes share rather than copy. look_for_images=False: another process
    has listed the folder, which takes seconds on a network's file system.

    Raises DatasetError when the folder or some image is missing, or when no image is left.
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotations: CocoAnnotations,
        *,
        training: bool,
        masks: bool = False,
        look_for_images: bool = True,
    ) -> None:
        self.images_dir = Path(images_dir)
        self.annotations = annotations.training_view() if training else annotations
        self.image_ids = self.annotations.image_ids
        """int64 [N]"""
        self.widths, self.heights = self.annotations.widths, self.annotations.heights
        """int64 [N] each, pixels as stored"""
        self.class_names = self.annotations.class_names
        """By label"""
        self._shards = open_shards(self.images_dir)
        if look_for_images:
            self._require_files()
        if len(self) == 0:
            raise DatasetError(
                f"{annotations.source}: none of its {len(annotations)} images can be trained on: training "
                "takes images with at least one annotation and no side below 32 pixels."
            )
        boxes = kept_boxes(self.annotations, masks)
        self.boxes_xyxy, self.labels, self.box_counts = boxes["boxes_xyxy"], boxes["labels"], boxes["box_counts"]
        self._first_box = boxes["first_box"]
        self._segmentations: Segmentations | None = None
        if masks:
            assert self.annotations.segmentations is not None, "the annotations were read without masks"
            rows = {name: boxes[name] for name in ("starts", "counts")}
            self._segmentations = replace(self.annotations.segmentations, **rows)

    def __len__(self) -> int:
        return len(self.annotations)

    def num_bytes(self, indices: int | slice | np.ndarray) -> np.ndarray:
        """int64 [n] (or a scalar): the pixels of images as uint8."""
        return self.heights[indices] * self.widths[indices] * 3

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.images_dir / self.annotations.file_name(index)

    def image(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Pixels of image `index`, uint8 [height, width, 3] RGB; in `out`, uint8 [height * width * 3], where given.

        Raises ImageError, also when the file does not have the size that the annotations say.
        """
        pixels = self._pixels(index, out)
        height, width = pixels.shape[:2]
        expected = (int(self.widths[index]), int(self.heights[index]))
        if (width, height) != expected:
            if (height, width) == expected:
                remedy = (
                    "The sides are exchanged: boxes refer to the pixels as stored; orientation tags (EXIF) "
                    "are ignored. Store the image turned (Pillow's ImageOps.exif_transpose does that), or "
                    "annotate it as it is stored."
                )
            else:
                remedy = "Use the images that were annotated, or scale the annotations to these."
            raise ImageError(
                f"{self.path(index)}: is {width}x{height} pixels, but {self.annotations.source} says "
                f"{expected[0]}x{expected[1]} for image id {self.image_ids[index]}, so its boxes would be "
                f"wrong. {remedy}"
            )
        return pixels

    def _pixels(self, index: int, out: np.ndarray | None) -> np.ndarray:
        path = self.path(index)
        if self._shards is None:
            return read_image(path, out)
        try:
            content = self._shards.content(self.annotations.file_name(index))
        except OSError as error:
            raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
        return decode_image(content, path, out)

    def boxes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of image `index`, float32 [n, 4] xyxy in stored pixels (unclipped), and labels int64 [n]."""
        rows = slice(self._first_box[index], self._first_box[index + 1])
        return self.boxes_xyxy[rows], self.labels[rows]

    @property
    def has_masks(self) -> bool:
        """Whether `bitmaps` can be asked for."""
        return self._segmentations is not None

    def bitmaps(self, index: int) -> list[Bitmap]:
        """The masks of image `index`, in the order of its boxes, each cut to the bounds of its outline."""
        assert self._segmentations is not None
        height, width = int(self.heights[index]), int(self.widths[index])
        rows = range(self._first_box[index], self._first_box[index + 1])
        return [self._segmentations.bitmap(row, height, width) for row in rows]

    def whole_masks(self, index: int) -> list[np.ndarray]:
        """The masks of the boxes of image `index` at its stored size, to be shown: bool [height, width] each; none
        where the annotations were read without masks."""
        outlines = self.annotations.segmentations
        if outlines is None:
            return []
        height, width = int(self.heights[index]), int(self.widths[index])
        found = []
        for row in range(*self.annotations.offsets[index : index + 2].tolist()):
            if not (self.annotations.crowd[row] or self.annotations.ignore[row]):
                left, top, bits = outlines.bitmap(row, height, width)
                found.append(np.zeros((height, width), dtype=bool))
                found[-1][top : top + bits.shape[0], left : left + bits.shape[1]] = bits
        return found

    def _require_files(self) -> None:
        source = self.annotations.source
        if not self.images_dir.is_dir():
            raise DatasetError(
                f"{self.images_dir}: there is no such folder. It should hold the images named in {source}."
            )
        missing = [name for name, entry in image_entries(self.annotations, self.images_dir) if entry is None]
        if missing:
            first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise DatasetError(
                f"{self.images_dir}: {len(missing):,} of the {len(self):,} images named in {source} are missing: "
                f"{first}. Is this the right folder, and was everything unpacked?"
            )


class ConcatDataset(CocoDataset):
    """The images of several sets behind each other; like a set of one annotation file, `merge.concatenate`'s.

    parts: sets with one class list. names: what each is called.
    """

    def __init__(self, parts: Sequence[CocoDataset], names: Sequence[str]) -> None:
        self.parts, self.names = tuple(parts), tuple(names)
        assert len(self.parts) == len(self.names)
        self.first_images = np.cumsum([0, *map(len, parts)])
        """int64 [parts + 1]: index of each part's first image"""
        self.images_dir = parts[0].images_dir
        self.annotations = concatenate([part.annotations for part in parts])
        self.image_ids = self.annotations.image_ids
        self.widths, self.heights = self.annotations.widths, self.annotations.heights
        self.class_names = self.annotations.class_names
        self.boxes_xyxy, self.labels, self.box_counts = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes_xyxy", "labels", "box_counts")
        )

    def _place(self, index: int) -> tuple[CocoDataset, int]:
        number = int(np.searchsorted(self.first_images, index, side="right")) - 1
        return self.parts[number], index - int(self.first_images[number])

    def path(self, index: int) -> Path:
        part, place = self._place(index)
        return part.path(place)

    def image(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        part, place = self._place(index)
        return part.image(place, out)

    def boxes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part, place = self._place(index)
        return part.boxes(place)

    @property
    def has_masks(self) -> bool:
        return all(part.has_masks for part in self.parts)

    def bitmaps(self, index: int) -> list[Bitmap]:
        part, place = self._place(index)
        return part.bitmaps(place)

    def whole_masks(self, index: int) -> list[np.ndarray]:
        part, place = self._place(index)
        return part.whole_masks(place)


def sets_of(dataset: CocoDataset) -> dict[str, slice]:
    """The images of each part by its name; of a set alone none."""
    if not isinstance(dataset, ConcatDataset):
        return {}
    edges = dataset.first_images.tolist()
    return {name: slice(edges[i], edges[i + 1]) for i, name in enumerate(dataset.names)}
