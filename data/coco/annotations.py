"""COCO annotations, validated once and packed into flat numpy arrays.

A list of dicts would be copied page by page into every worker process; the arrays here are shared by all of
them.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cache.known_files import KnownFiles
from data.cache.packed_file import (
    Packed,
    UnusableFile,
    is_packed,
    keep_built,
    load_or_build,
    open_packed,
    read_packed,
    write_packed,
)
from data.coco.columns import AnnotationError, unreadable
from data.coco.federated import Federated
from data.coco.fields import OF_ANNOTATIONS, offsets_of, read_fields
from data.coco.findings import MAX_PLACES, Finding, examples
from data.coco.segmentations import FAULTS, Segmentations

MIN_TRAINED_SIDE = 32  # pixels; the min_size of MMDetection's COCO configurations
_IMAGES_AT_ONCE = 1 << 16
Words = tuple[str, str, str]
"""By which a process of this machine finds annotations that another one has: file, key, and the cache's folder."""
_TRAINED = "trained"
"""Marks the cache file of a training view."""
_WITH_MASKS = ".masks"
"""Marks the cache file of annotations with outlines. Runs without masks have another, without them."""
_SET = "set"
"""The key of a file that stands in for a JSON file, wherever it is: write_annotations."""
_WITHOUT_OUTLINES = "without_outlines"
_OUTLINES, _FEDERATED = "segmentations.", "federated."
_OF_IMAGES = ("image_ids", "widths", "heights")


class Stored(NamedTuple):
    """A file of the cache: its folder, its key, and the digest of the annotations in it."""

    folder: Path
    key: str
    digest: str


@dataclass(frozen=True, eq=False)
class CocoAnnotations:
    """Images and boxes of one COCO file as flat arrays: N images in the file's order, M annotations.

    The annotations of image i are the rows offsets[i] to offsets[i + 1] of the arrays of length M, in the
    file's order. Boxes are (x, y, width, height) in pixels of the stored image, unclipped, in float64 so
    that corners computed from them round to the same float32 as those of other readers.
    """

    source: str
    """Path of the file the annotations came from."""
    image_ids: np.ndarray
    """int64 [N]"""
    widths: np.ndarray
    """int64 [N], pixels, from the file (not from the images)"""
    heights: np.ndarray
    """int64 [N], pixels"""
    file_name_bytes: np.ndarray
    """uint8 [bytes]: all file names in UTF-8, one after another"""
    file_name_offsets: np.ndarray
    """int64 [N + 1]"""
    offsets: np.ndarray
    """int64 [N + 1]: first row of each image's annotations"""
    boxes_xywh: np.ndarray
    """float64 [M, 4]"""
    areas: np.ndarray
    """float64 [M], square pixels of the object's mask (or of its box where the file gives none)"""
    labels: np.ndarray
    """int64 [M], index into class_names"""
    crowd: np.ndarray
    """bool [M]"""
    ignore: np.ndarray
    """bool [M]"""
    annotation_ids: np.ndarray
    """int64 [M]"""
    category_ids: tuple[int, ...]
    """Category id of each class, by label."""
    class_names: tuple[str, ...]
    """Name of each class, by label."""
    segmentations: Segmentations | None = None
    """Outlines of the M annotations, where they were asked for"""
    federated: Federated | None = None
    """Of LVIS's files: which classes each image was searched for"""
    unknown_classes: tuple[str, ...] = ()
    """Those of class_names that the file knows nothing of: its images may show them without a box"""
    findings: tuple[Finding, ...] = ()
    """What was read or left out but is worth a remark."""
    stored: Stored | None = field(default=None, init=False)
    """Where a cache has these arrays. dataclasses.replace leaves it out: what it changes is not what is there."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_boxes(self) -> int:
        return len(self.labels)

    @property
    def has_boxes(self) -> bool:
        """False for a list of images alone (as COCO's test-dev file), which can be run on but not scored."""
        return self.num_boxes > 0

    @property
    def image_indices(self) -> np.ndarray:
        """int64 [M]: index (not id) of the image of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def file_name(self, index: int) -> str:
        """File name of image `index`, relative to the image folder."""
        start, end = self.file_name_offsets[index], self.file_name_offsets[index + 1]
        return self.file_name_bytes[start:end].tobytes().decode()

    def rows(self, index: int) -> slice:
        """The rows of the annotation arrays that belong to image `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def place(self, index: int) -> str:
        """Image `index` for a message: file name and id."""
        return f"{self.file_name(index)} (image id {self.image_ids[index]})"

    def images_finding(self, code: str, indices: Sequence[int] | np.ndarray, **names: Any) -> Finding:
        """A finding about these images (indices, not ids), the first of them named."""
        places = [self.place(int(index)) for index in indices[:MAX_PLACES]]
        return Finding.of(code, places, count=len(indices), source=self.source, **names)

    def not_trained(self) -> dict[str, np.ndarray]:
        """Which annotations are not trained on, by reason: bool [M] each.

        The rules are those of MMDetection 3.3 (CocoDataset.parse_data_info): `ignore` is set, the box does not
        overlap the image, a side is below 1 pixel, the area is not positive.
        """
        outside, degenerate = np.zeros((2, self.num_boxes), dtype=bool)
        for first in range(0, len(self), _IMAGES_AT_ONCE):
            offsets = self.offsets[first : first + _IMAGES_AT_ONCE + 1]
            rows, counts = slice(int(offsets[0]), int(offsets[-1])), np.diff(offsets)
            widths, heights = (
                np.repeat(sides[first : first + len(counts)], counts) for sides in (self.widths, self.heights)
            )
            x, y, w, h = self.boxes_xywh[rows].T
            outside[rows] = np.minimum(x + w, widths) - np.maximum(x, 0) <= 0
            outside[rows] |= np.minimum(y + h, heights) - np.maximum(y, 0) <= 0
            degenerate[rows] = (w < 1) | (h < 1)
        return {
            "ignored-annotation": self.ignore,
            "box-outside-image": outside,
            "degenerate-box": degenerate,
            "no-area-of-object": self.areas <= 0,
        }

    def images_not_trained(self) -> dict[str, np.ndarray]:
        """Which images are not trained on, by reason: bool [N] each; MMDetection's rules (CocoDataset.filter_data).

        A side is below MIN_TRAINED_SIDE, or the file has no annotation of the image: one whose only annotation is
        not trained on stays, without a box.
        """
        small = np.minimum(self.widths, self.heights) < MIN_TRAINED_SIDE
        return {"small-image": small, "image-without-annotation": (np.diff(self.offsets) == 0) & ~small}

    def training_view(self) -> "CocoAnnotations":
        """The images and annotations that are trained on: without those of not_trained and images_not_trained.

        Crowd regions stay, marked. Of stored annotations it is stored as well, for all processes to map.
        """
        return self._kept(_TRAINED, self._training_view)

    def kept_arrays(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What make() computes of these annotations; of stored ones out of the cache, for all processes to map.

        name: of what is computed, which with the annotations determines it.
        """
        if self.stored is None:
            return make()
        key = f"{self.stored.key}.{name}"
        kept = keep_built(self.stored.folder, key, Path(self.source), lambda: Packed(make(), {}))
        with kept.file:
            return kept.packed.arrays

    def _kept(self, name: str, make: Callable[[], "CocoAnnotations"]) -> "CocoAnnotations":
        if self.stored is None:
            return make()
        folder, key = self.stored.folder, f"{self.stored.key}.{name}"
        kept = keep_built(folder, key, Path(self.source), lambda: _pack(make()))
        with kept.file:
            return _unpack(self.source, kept.packed, folder, key)

    def _training_view(self) -> "CocoAnnotations":
        keep_image, keep = (
            ~np.logical_or.reduce(list(reasons.values())) for reasons in (self.images_not_trained(), self.not_trained())
        )
        keep &= np.repeat(keep_image, np.diff(self.offsets))
        counts = np.diff(offsets_of(keep)[self.offsets])[keep_image]
        name_lengths = np.diff(self.file_name_offsets)
        return replace(
            self,
            **{name: getattr(self, name)[keep_image] for name in _OF_IMAGES},
            **{name: getattr(self, name)[keep] for name in OF_ANNOTATIONS},
            segmentations=self.segmentations and self.segmentations.take(keep),
            file_name_bytes=self.file_name_bytes[np.repeat(keep_image, name_lengths)],
            file_name_offsets=offsets_of(name_lengths[keep_image]),
            offsets=offsets_of(counts),
        )

    def ignoring_below(self, side: float) -> "CocoAnnotations":
        """The same with `ignore` set where a side of the box is below so many pixels."""
        small = (self.boxes_xywh[:, 2:] < side).any(axis=1)
        return replace(self, ignore=self.ignore | small) if small.any() else self

    def of_classes(self, wanted: Sequence[str]) -> "CocoAnnotations":
        """The annotations of these classes alone, which keep the file's order; every image stays.

        Raises AnnotationError where the file lacks one of them.
        """
        missing = [name for name in wanted if name not in self.class_names]
        if missing:
            raise AnnotationError(
                f"{self.source}: has no category {examples(map(repr, missing))}; it has "
                f"{examples(map(repr, self.class_names))}. Give names that it has: --classes, or "
                "metainfo=dict(classes=(...)) in the data sets of a configuration."
            )
        kept = [label for label, name in enumerate(self.class_names) if name in set(wanted)]
        if len(kept) == len(self.class_names):
            return self
        name = hashlib.sha256(repr([self.class_names[label] for label in kept]).encode()).hexdigest()[:16]
        return self._kept(name, lambda: self._of_labels(kept))

    def _of_labels(self, kept: list[int]) -> "CocoAnnotations":
        new_label = np.full(len(self.class_names), -1, dtype=np.int64)
        new_label[kept] = np.arange(len(kept))
        return replace(
            self.of_labels(new_label),
            category_ids=tuple(self.category_ids[label] for label in kept),
            class_names=tuple(self.class_names[label] for label in kept),
        )

    def of_labels(self, new_label: np.ndarray) -> "CocoAnnotations":
        """The annotations with other labels: new_label (int64 [K]) of each label, -1 for those to leave out."""
        keep = new_label[self.labels] >= 0
        arrays = {name: getattr(self, name)[keep] for name in OF_ANNOTATIONS}
        arrays["labels"] = new_label[arrays["labels"]]
        return replace(
            self,
            **arrays,
            segmentations=self.segmentations and self.segmentations.take(keep),
            offsets=offsets_of(np.bincount(self.image_indices[keep], minlength=len(self))),
        )

    def with_classes(self, wanted: Sequence[str]) -> "CocoAnnotations":
        """The same with the labels of another class list, matched by name.

        Raises AnnotationError where the categories are not just these.
        """
        if tuple(wanted) == self.class_names:
            return self
        label_of = {name: label for label, name in enumerate(self.class_names)}
        missing = [name for name in wanted if name not in label_of]
        other = [name for name in label_of if name not in set(wanted)]
        if missing or other:
            problems = [f"lacks {examples(map(repr, missing))}"] if missing else []
            problems += [f"has besides {examples(map(repr, other))}"] if other else []
            raise AnnotationError(
                f"{self.source}: the categories are not the {len(wanted)} classes asked for: it "
                f"{' and '.join(problems)}. Give all files of a run the same category names (ids may differ)."
            )
        new_label = np.argsort(np.array([label_of[name] for name in wanted], dtype=np.int64))
        return replace(
            self,
            labels=new_label[self.labels],
            category_ids=tuple(self.category_ids[label_of[name]] for name in wanted),
            class_names=tuple(wanted),
        )

    def digest(self) -> str:
        """SHA-256 of all that training depends on (not of the path): equal digests mean equal data, but for
        pixels."""
        if self.stored is not None:
            return self.stored.digest
        sha = hashlib.sha256()
        for name, value in _arrays(self).items():
            sha.update(name.encode() + str(value.shape).encode())
            sha.update(np.ascontiguousarray(value).data)
        sha.update(repr((self.category_ids, self.class_names)).encode())
        return sha.hexdigest()


def read_coco(
    file: str | Path,
    class_names: Sequence[str] | None = None,
    *,
    masks: bool = False,
    cache_dir: str | Path | None = None,
) -> CocoAnnotations:
    """Reads and validates a COCO annotation file; one without "annotations" (a list of images) is taken too.

    The classes are the file's categories by ascending id, with labels 0 to K-1 whatever the gaps between the
    ids. With class_names, classes are matched by name and take the labels of that list; the file's categories
    must be just these.

    Raises AnnotationError, which names file, record and remedy, for what cannot be used: a file that is no
    COCO file, ids that are missing, repeated, not whole numbers or refer to nothing, sizes that are missing
    or not positive, numbers that are not finite, file names that leave the image folder. Boxes without area,
    outside the image and the like are read as they are; training_view leaves them out and counts them.

    With masks=True, outlines (polygons and run lengths) are read too. Those that cannot be used are findings.

    With cache_dir, the packed arrays are kept in a file there, and later calls map it for any annotation file of the
    same content. A folder that cannot be written to is a finding, no error.

    A file of write_annotations is taken in place of the JSON file. It is mapped where it is.
    """
    path = Path(file)
    if cache_dir is not None and path.is_file():
        with share_coco(file, cache_dir, masks=masks) as (annotations, _):
            pass
    elif is_packed(path):
        annotations = _read_packed_set(path, masks)
    else:
        annotations = _read_file(path, masks)
    return annotations if class_names is None else annotations.with_classes(class_names)


@contextmanager
def share_coco(
    file: str | Path, cache_dir: str | Path, *, masks: bool = False
) -> Iterator[tuple[CocoAnnotations, Words]]:
    """What read_coco gives, and words for other processes of this machine.

    Inside the context, shared_coco maps the same memory with these words. So one process reads or parses for all.
    """
    path, folder = Path(file), Path(cache_dir)
    if is_packed(path):
        yield _read_packed_set(path, masks, folder), (str(path), _SET, str(folder))
        return
    try:
        variant = _WITH_MASKS if masks else ""
        packed = load_or_build(path, folder, lambda: _pack(_read_file(path, masks)), variant)
    except OSError as error:
        raise unreadable(path, error) from error
    with packed.file:
        annotations = _unpack(str(path), packed.packed, folder if packed.problem is None else None, packed.key)
        if packed.problem is not None:
            finding = Finding.of("no-cache", folder=cache_dir, source=path, problem=packed.problem)
            annotations = replace(annotations, findings=(*annotations.findings, finding))
        yield annotations, (str(packed.path), packed.key, "" if annotations.stored is None else str(cache_dir))


def shared_coco(file: str | Path, words: Words, *, masks: bool = False) -> CocoAnnotations | None:
    """The annotations of `file` that another process shares; None where it cannot be reached (another container).

    masks: as share_coco was given.
    """
    path, key, folder = words
    try:
        # Another container's process of that number may have a pipe there, which this shall not wait for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as shared:
            # The process that shares it has checked it.
            packed = read_packed(shared, key, is_sound=True)
    except OSError:
        return None
    return None if packed is None else _unpack(str(file), packed, Path(folder) if folder else None, key, masks)


def write_annotations(annotations: CocoAnnotations, path: Path) -> None:
    """Writes a file that read_coco takes in place of the JSON file. The same annotations give the same bytes;
    data/cache/packed_file.py has the layout.
    """
    annotations = replace(annotations, findings=tuple(one for one in annotations.findings if one.code != "no-cache"))
    packed = _pack(annotations)
    del packed.facts["source"]
    if annotations.segmentations is not None:
        findings = tuple(finding for finding in annotations.findings if finding.code not in FAULTS)
        without = _pack(replace(annotations, segmentations=None, findings=findings)).facts
        packed.facts[_WITHOUT_OUTLINES] = {key: without[key] for key in ("findings", "digest")}
    write_packed(path, packed, _SET)


def _read_packed_set(path: Path, masks: bool, cache_dir: Path | None = None) -> CocoAnnotations:
    try:
        packed, file = open_packed(path, _SET, None if cache_dir is None else KnownFiles(cache_dir))
        with file:
            return _unpack(str(path), packed, cache_dir, _SET, masks)
    except OSError as error:
        raise unreadable(path, error) from error
    except UnusableFile as error:
        raise AnnotationError(
            f"{path}: {error}. Copy it again from where the set was packed, or pack it again: scripts/pack_dataset.py"
        ) from error


def find_fatal(file: str | Path) -> list[Finding]:
    """Why read_coco refuses `file`: the first fault of every column, not only of the first faulty one. Empty for a
    file that it reads.
    """
    errors: Sequence[AnnotationError] = []
    if is_packed(Path(file)):
        try:
            _read_packed_set(Path(file), masks=False)
        except AnnotationError as error:
            errors = [error]
    else:
        _, errors = read_fields(Path(file), masks=False)
    messages = dict.fromkeys(str(error).rstrip(".") for error in errors)
    return [Finding.of("unusable-annotations", message=message) for message in messages]


def _read_file(path: Path, masks: bool) -> CocoAnnotations:
    fields, errors = read_fields(path, masks)
    if fields is None:
        raise errors[0]
    return CocoAnnotations(str(path), **fields)


def _pack(annotations: CocoAnnotations) -> Packed:
    # The texts name the file, which may have another path where the same content is read next.
    arrays = _arrays(annotations)
    apart = {*arrays, "segmentations", "federated", "stored"}
    facts = {name: value for name, value in vars(annotations).items() if name not in apart}
    if annotations.federated is not None:
        arrays |= {_FEDERATED + name: value for name, value in annotations.federated.arrays().items()}
    findings = [(f.code, f.places, f.count) for f in annotations.findings]
    return Packed(arrays, facts | {"findings": findings, "digest": annotations.digest()})


def _unpack(source: str, packed: Packed, cache_dir: Path | None, key: str, masks: bool = True) -> CocoAnnotations:
    """cache_dir, key: of the file that they are in, for what is computed of them to be kept there. masks: whether
    outlines are wanted, where they are."""
    given, arrays = dict(packed.facts), dict(packed.arrays)
    without = given.pop(_WITHOUT_OUTLINES, {})
    outlines, federated = (
        {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}
        for prefix in (_OUTLINES, _FEDERATED)
    )
    if not masks:
        outlines, given = {}, given | without
    facts: dict[str, Any] = {name: tuple(values) for name, values in given.items() if name not in ("source", "digest")}
    facts["findings"] = tuple(
        Finding.of(code, places, count=count, source=source) for code, places, count in facts["findings"]
    )
    annotations = CocoAnnotations(
        source=source,
        segmentations=Segmentations(**outlines) if outlines else None,
        federated=Federated(**federated) if federated else None,
        **(facts | arrays),
    )
    if key == _SET:
        key = packed.checksum + (_WITH_MASKS if masks else "")
    # A field that dataclasses.replace does not take along.
    stored = None if cache_dir is None else Stored(cache_dir, key, given["digest"])
    object.__setattr__(annotations, "stored", stored)
    return annotations


def _arrays(annotations: CocoAnnotations) -> dict[str, np.ndarray]:
    """All arrays by name, those of the outlines as well."""
    arrays = {name: value for name, value in vars(annotations).items() if isinstance(value, np.ndarray)}
    outlines = annotations.segmentations.arrays() if annotations.segmentations is not None else {}
    return arrays | {_OUTLINES + name: value for name, value in outlines.items()}
