"""A fault, or a remark, about a data set: what is wrong, where, and how to mend it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
NUM_EXAMPLES = 5
MAX_PLACES = 1000  # named per finding; the rest is counted

RULES = {
    # Of the annotation file.
    "unusable-annotations": "error: {message}",
    "no-annotations": "{severity}: {source}: no annotations at all: it can neither be trained on nor scored. Give a "
    "file with boxes",
    "only-crowds": "{severity}: {source}: no annotation but crowd regions and other categories: nothing to "
    "{purpose}. Give a file with boxes of single objects",
    "unused-category": "warning: {source}: categories that no annotation uses; their AP is undefined. Fine if it is "
    "meant so",
    "class-names-alike": "warning: {source}: classes whose names differ only in case or blanks are different classes "
    "here. Are they one? Then give them one name",
    "no-cache": "info: {folder}: packed annotations cannot be kept here, so each start parses {source} ({problem})",
    # Of annotations.
    "annotation-id-0": "info: {source}: annotation id 0, which plain pycocotools takes for unmatched, counts like any "
    "other here",
    "no-area": 'warning: {source}: annotations have no "area", for which the area of the box stands in',
    "no-iscrowd": 'info: {source}: annotations have no "iscrowd" and are taken for single objects',
    "crowd-without-rle": "warning: {source}: crowd annotations have no run-length mask, for which the box stands in",
    "no-outline": "warning: {source}: annotations without a usable mask are not trained on by a model with masks; draw "
    "their outline, or delete them",
    "polygon-points": "warning: {source}: polygons with fewer than three points, or an odd number of coordinates, are "
    "left out of their mask; correct or delete them",
    "polygon-numbers": "warning: {source}: polygons that are no lists of finite numbers in pixels are left "
    "out of their mask; correct or delete them",
    "polygon-outside": "warning: {source}: polygons that lie outside their image fill nothing; correct or delete them",
    "polygon-without-area": "warning: {source}: polygons without area fill next to nothing; correct or delete them",
    "rle-unusable": "warning: {source}: run-length masks that do not fill their image are left out; write them at the "
    "image's height and width",
    "no-masks": "error: {source}: no annotation has a mask, which a model with masks learns from. Give a file with "
    "polygons or run lengths, or train a model without masks",
    "degenerate-box": "warning: {source}: boxes with a side below 1 pixel are not trained on; correct or delete them",
    "no-area-of-object": 'warning: {source}: annotations with an "area" of 0 or less are not trained on; correct or '
    "delete them",
    "box-outside-image": "warning: {source}: boxes that lie outside their image are not trained on; correct or delete "
    "them",
    "box-sticks-out": "warning: {source}: boxes that stick out of their image are clipped for training",
    "duplicate-box": "warning: {source}: annotations repeat box and class of another; delete them",
    "xyxy-boxes": "warning: {source}: the boxes look like corners [x1, y1, x2, y2], and COCO has [x, y, width, "
    "height]: most have width > x and height > y and many leave their image. Convert them, or training learns wrong "
    "boxes",
    # Of images.
    "no-trained-image": "error: {source}: no image can be trained on: training takes images with an annotation and no "
    "side below 32 pixels. Give larger images, or their annotations",
    "small-image": "info: {source}: images with a side below 32 pixels are not trained on",
    "image-without-annotation": "info: {source}: images without an annotation are not trained on",
    "no-image-folder": "error: {images}: no such folder; it should hold the images of {source}. Check the path",
    "lost-shard": "error: {images}: shards are missing or damaged. Copy them again from where the set was packed",
    "unusable-shards": "error: {message}",
    "missing-image": "error: {images}: image files are missing. Add them, or take the images out of {source}",
    "empty-image": "error: {images}: image files are empty (0 bytes). Fetch them again, or take them out of {source}",
    "link-out": "warning: {images}: image files are links that leave the folder. Is that meant? Named in {source}",
    "repeated-file": "warning: {images}: image files are listed under several image ids, which counts them several "
    "times. Join them in {source}",
    "unreadable-image": "error: {images}: images cannot be decoded. Replace them, or take them out of {source}",
    "size-differs": "error: {images}: images of another size than {source} says, so their boxes are misplaced. Use "
    "the images that were annotated (stored as they were annotated: EXIF orientation is ignored), or correct the sizes",
    "exif-rotated": "info: {images}: images whose EXIF data ask viewers to turn them. Boxes are taken to refer to the "
    "pixels as stored: make sure that they were drawn so",
    "duplicate-image": "warning: {source}: images with the pixels of another image of the split, counted twice. Take "
    "one of each out",
    # Between the splits.
    "classes-differ": "error: the categories differ: {differences}. Give both files the same category names",
    "category-ids-differ": "info: {train} and {source} give the same classes different ids; classes are matched by "
    "name",
    "shared-image": "error: {source} lists image files that {train} lists too: validation would measure what was "
    "trained on. Take them out of one of the two",
    "copy-in-val": "warning: {source}: images are copies of images that {train} trains on, so validation flatters. "
    "Take them out of one of the two",
    "train-image-in-val": "error: {source}: images that {train} trains on (equal pixels), so validation would "
    "flatter. Take them out of one of the two",
}
"""Severity and text of each finding, by its code."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault of one file, with the number of times it occurs.

    severity: "error" (breaks or biases training or its figures), "warning" (handled, but worth a look) or
    "info". code: stable identifier such as "box-outside-image". text: one line that names the file and the
    remedy. places: where it occurs, with ids; not all of them where there are very many (count has them all).
    """

    severity: Severity
    code: str
    text: str
    count: int = 1
    places: tuple[str, ...] = ()

    @staticmethod
    def of(code: str, places: Sequence[str] | None = None, *, count: int | None = None, **names: Any) -> "Finding":
        """That of a code of RULES, with what its text names. count: where not all places are given; without places it
        is 1."""
        if count is None:
            count = 1 if places is None else len(places)
        return Finding.by_rule(RULES[code].format(**names), code, places or (), count)

    @staticmethod
    def by_rule(rule: str, code: str, places: Sequence[str], count: int) -> "Finding":
        """That of a rule, "severity: text"."""
        severity, text = rule.split(": ", 1)
        return Finding(cast(Severity, severity), code, text, count, tuple(places[:MAX_PLACES]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        times = f" ({self.count:,} times)" if self.count > 1 else ""
        where = f": {examples(self.places, self.count)}" if self.places else ""
        return f"{self.severity}: {self.text}{times}{where} [{self.code}]"


def examples(values: Iterable[Any], total: int | None = None, *, shown: int = NUM_EXAMPLES) -> str:
    """The first few of `values` as text: "3, 7, 12 and 40 more"; total counts those that `values` leaves out."""
    values = list(values)
    rest = (len(values) if total is None else total) - len(values[:shown])
    return ", ".join(map(str, values[:shown])) + (f" and {rest:,} more" if rest > 0 else "")


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, errors first; the order within a severity stays."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
