"""Images and boxes on their way from one format to another, and what was wrong with them on the way.

Between reading and writing, corners are decimal fractions: adding and taking away the pixel that formats count
differently then changes no digit, so that a box comes back from a round trip as it was.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Literal

from PIL import Image

from data.coco.annotations import CocoAnnotations
from data.coco.findings import MAX_PLACES, Finding
from data.errors import DataError

EXIF_ORIENTATION = 0x0112
FORMATS_WITH_ORIENTATION = {"JPEG", "MPO", "TIFF", "WEBP"}
INVERSE_ORIENTATION = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
SWAPS_SIDES = {5, 6, 7, 8}

ROUNDING = Decimal("0.02")  # pixels that a box may stick out by the rounding of its file; not worth a remark
SLIGHT = Decimal(1)  # pixels that a box may stick out by another way of counting them

RARE_SHARE = 0.02  # of another class's boxes: so rare, a name that is nearly the other's may be a slip
ALIKE = 0.8  # difflib's ratio: "WBCs" and "WBC" have 0.86

Exif = Literal["auto", "stored", "displayed"]
Progress = Callable[[int], object]
Corners = tuple[Decimal, Decimal, Decimal, Decimal]
"""x1, y1, x2, y2 of a box: edges in pixels, the image's left upper corner being (0, 0)."""


Ring = tuple[Decimal, ...]
"""x, y, x, y, ... of a polygon, in pixels as Corners."""
HUNDREDTH = Decimal("0.01")


class ConversionError(DataError):
    """A conversion that cannot be done; the message says why, where, and how to mend it."""


class LeftOut(ConversionError):
    """An image or an object that is left out; `code` is the finding's, the message the place."""

    def __init__(self, code: str, place: str) -> None:
        super().__init__(place)
        self.code = code


def _doubled_area(ring: Ring) -> float:
    """By the shoelace formula, negative for one direction."""
    xs, ys = ring[0::2], ring[1::2]
    return float(sum((xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs))), Decimal(0)))


@dataclass(frozen=True)
class LabeledBox:
    """One object: the name of its class, its box, and its outline where the source has one."""

    name: str
    corners: Corners
    crowd: bool = False
    """Neither trained on nor counted in evaluation (COCO's iscrowd, VOC's difficult)."""
    rings: tuple[Ring, ...] = ()

    @property
    def box_xywh(self) -> list[float]:
        """x, y, width and height in pixels, as COCO has them."""
        x1, y1, x2, y2 = self.corners
        return [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]

    @property
    def area(self) -> float:
        """Of its rings, or of the box, square pixels."""
        if not self.rings:
            _, _, width, height = self.box_xywh
            return width * height
        return sum(abs(_doubled_area(ring)) for ring in self.rings) / 2


@dataclass
class LabeledImage:
    """An image file with its boxes, which refer to the pixels as stored."""

    key: str
    """What split lists call it: the path of its label file (or its own) below the source, without suffix."""
    path: Path
    width: int
    height: int
    boxes: list[LabeledBox] = field(default_factory=list)


class Remarks:
    """What a conversion found, by kind, with every place counted and the first ones named."""

    def __init__(self, texts: dict[str, str]) -> None:
        """texts: for each code "severity: what is wrong and what helps", as data.coco.findings.RULES."""
        self._texts = texts
        self._places: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()
        self.num_errors = 0

    def add(self, code: str, place: str) -> None:
        """One more occurrence, at `place`: a file, with line or object where there is one."""
        self._counts[code] += 1
        self.num_errors += self._texts[code].startswith("error: ")
        places = self._places.setdefault(code, [])
        if len(places) < MAX_PLACES:
            places.append(place)

    def leave_out(self, reason: LeftOut) -> None:
        self.add(reason.code, str(reason))

    def count(self, code: str) -> int:
        return self._counts[code]

    @property
    def findings(self) -> list[Finding]:
        """In the order of the table of texts."""
        return [
            Finding.by_rule(rule, code, self._places[code], self._counts[code])
            for code, rule in self._texts.items()
            if self._counts[code]
        ]


SHARED_TEXTS = {
    "unreadable-image": "error: images cannot be read. Replace the files",
    "duplicate-stem": "error: images differ in nothing but the suffix, so their labels cannot be told apart. Rename or "
    "remove one of each",
    "unknown-class": "error: classes are not in the class list. Correct the name, or add it to the list",
    "box-dropped": "warning: boxes without area, or outside of their image, were left out. Correct them if the object "
    "is there",
    "box-clipped": "warning: boxes stuck out of their image and were cut off at its edge",
    "box-trimmed": "info: boxes stuck out by a pixel at most and were cut off at the edge",
    "duplicate-box": "warning: boxes repeat class and corners of another of the same image and were left out",
    "exif-turned": "warning: images ask viewers to turn them (EXIF), and the label file does not tell which way up it "
    "was drawn; see --exif, and look at these in the gallery",
    "exif-mapped": "info: images ask viewers to turn them (EXIF); their boxes, drawn on the turned image, were turned "
    "to the pixels as stored",
    "class-names-equal": "error: class names differ only in case or blanks. Correct the labels, or tell the classes "
    "apart by naming all of them: --classes A,a",
    "class-names-alike": "warning: the name of a rare class is nearly another's. Are they one class? Then correct the "
    "name",
    "class-not-in-val": "warning: classes without a box to validate on: their AP will be undefined",
    "class-not-in-train": "warning: classes without a box to train on",
    "class-left-out": "info: boxes of classes that --classes does not name were left out",
    "class-unused": "info: classes of the class list have no box at all",
    "empty": "info: images have no object; they are kept as background, which training leaves out",
}


@dataclass(frozen=True)
class ImageFacts:
    """What the head of an image file says."""

    width: int
    height: int
    """Pixels as stored."""
    orientation: int
    """EXIF's 1 to 8; 1 where there is none."""

    @property
    def displayed_size(self) -> tuple[int, int]:
        """Width and height in a viewer that heeds EXIF."""
        return (self.height, self.width) if self.orientation in SWAPS_SIDES else (self.width, self.height)


def image_facts(path: Path) -> ImageFacts:
    """Reads the head of an image file only. Raises LeftOut where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                orientation = 1
                if image.format in FORMATS_WITH_ORIENTATION:
                    with suppress(Exception):  # broken EXIF data beside sound pixels raise nearly anything
                        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
                return ImageFacts(image.width, image.height, orientation if orientation in range(1, 9) else 1)
    except Exception as error:  # Pillow raises nearly anything on files that are broken
        raise LeftOut("unreadable-image", f"{path}: {error}") from error


def to_stored(corners: Corners, facts: ImageFacts) -> Corners:
    """A box drawn on the image as displayed, in the pixels as stored."""
    return _turned(corners, facts.orientation, facts.width, facts.height)


def to_displayed(corners: Corners, facts: ImageFacts) -> Corners:
    """A box in the pixels as stored, on the image as displayed."""
    return _turned(corners, INVERSE_ORIENTATION[facts.orientation], *facts.displayed_size)


def ring_to_stored(ring: Ring, facts: ImageFacts) -> Ring:
    """A polygon drawn on the image as displayed, in the pixels as stored."""
    points = zip(ring[0::2], ring[1::2], strict=True)
    return tuple(value for x, y in points for value in to_stored((x, y, x, y), facts)[:2])


def box_of_rings(rings: Sequence[Ring]) -> Corners:
    """The box round polygons."""
    xs, ys = ([value for ring in rings for value in ring[axis::2]] for axis in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def rounded(values: Iterable[Decimal]) -> tuple[Decimal, ...]:
    """To hundredths of a pixel, COCO's own precision."""
    return tuple(value.quantize(HUNDREDTH, ROUND_HALF_EVEN) for value in values)


def _turned(corners: Corners, orientation: int, width: int, height: int) -> Corners:
    """The box undone by `orientation` (EXIF 2.32, section 4.6.4), onto an image of width x height."""
    x1, y1, x2, y2 = corners
    if orientation in SWAPS_SIDES:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    return x1, y1, x2, y2


def fit_box(corners: Corners, width: int, height: int, remarks: Remarks, place: str) -> Corners | None:
    """The box cut off at the image's edges, remarked on where that changes it; None where nothing is left."""
    x1, y1, x2, y2 = corners
    fitted = max(x1, Decimal(0)), max(y1, Decimal(0)), min(x2, Decimal(width)), min(y2, Decimal(height))
    if fitted[0] >= fitted[2] or fitted[1] >= fitted[3]:
        remarks.add("box-dropped", f"{place}: {describe(corners)} in {width}x{height}")
        return None
    overhang = max(abs(new - old) for new, old in zip(fitted, corners, strict=True))
    if overhang > ROUNDING:
        code = "box-trimmed" if overhang <= SLIGHT else "box-clipped"
        remarks.add(code, f"{place}: {describe(corners)} in {width}x{height}")
    return fitted


def add_box(image: LabeledImage, box: LabeledBox, remarks: Remarks, place: str) -> None:
    """Gives the image one more box unless it has that one already."""
    if box in image.boxes:
        remarks.add("duplicate-box", f"{place}: {box.name} {describe(box.corners)}")
    else:
        image.boxes.append(box)


def describe(corners: Corners) -> str:
    """The box for a message."""
    return "(" + ", ".join(f"{float(value):g}" for value in corners) + ")"


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' where a known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def counted(number: int, one: str, several: str | None = None) -> str:
    """ "1 image", "2 images"; `several` where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def derived_classes(images: Sequence[LabeledImage], remarks: Remarks, meant: Sequence[str] = ()) -> list[str]:
    """The names of all boxes in alphabetical order.

    Names that differ only in case or blanks are an error, unless all of them are `meant`.
    """
    counts = Counter(box.name for image in images for box in image.boxes)
    names = sorted(counts)
    bare = {name: "".join(name.casefold().split()) for name in names}
    for spelling in dict.fromkeys(bare.values()):
        alike = [name for name in names if bare[name] == spelling]
        if len(alike) > 1 and not set(alike) <= set(meant):
            remarks.add("class-names-equal", ", ".join(map(repr, alike)))
    for rare in names:
        often = [name for name in names if counts[name] * RARE_SHARE >= counts[rare]]
        for name in difflib.get_close_matches(rare, often, n=1, cutoff=ALIKE):
            if bare[rare] != bare[name]:
                found = f"{rare!r} ({counts[rare]:,} boxes), {name!r} ({counts[name]:,} boxes)"
                remarks.add("class-names-alike", found)
    return names


def check_classes(
    splits: dict[str, list[LabeledImage]], class_names: Sequence[str], remarks: Remarks
) -> dict[str, Counter[str]]:
    """Boxes of each class in each split (crowds not counted); remarks on classes that a split lacks."""
    counts = {
        split: Counter(box.name for image in images for box in image.boxes if not box.crowd)
        for split, images in splits.items()
    }
    for name in class_names:
        if not any(count[name] for count in counts.values()):
            remarks.add("class-unused", name)
            continue
        for split, code in (("train", "class-not-in-train"), ("val", "class-not-in-val")):
            if split in counts and not counts[split][name]:
                remarks.add(code, name)
    return counts


COCO_TEXTS = {
    "missing-image": "error: image files are missing. Check the image folder",
    "size-differs": "error: images have another size than the annotation file says, so their boxes are misplaced. Use "
    "the images that were annotated",
    **SHARED_TEXTS,
    "crowd-left-out": "warning: crowd regions and ignored objects were left out: the format cannot mark them",
}


def images_of_coco(
    images_dir: Path, annotations: CocoAnnotations, remarks: Remarks, progress: Progress = lambda _: None
) -> list[LabeledImage]:
    """The images of a COCO-format set with their boxes (those with `ignore` as crowds)."""
    images = []
    for index in range(len(annotations)):
        progress(1)
        try:
            images.append(_image_of_coco(images_dir, annotations, index, remarks))
        except LeftOut as reason:
            remarks.leave_out(reason)
    return images


def _image_of_coco(images_dir: Path, annotations: CocoAnnotations, index: int, remarks: Remarks) -> LabeledImage:
    name = annotations.file_name(index)
    path = images_dir / name
    size = int(annotations.widths[index]), int(annotations.heights[index])
    if not path.is_file():
        raise LeftOut("missing-image", str(path))
    facts = image_facts(path)
    if (facts.width, facts.height) != size:
        said = f"{facts.width}x{facts.height}, annotated as {size[0]}x{size[1]}"
        raise LeftOut("size-differs", f"{path}: {said}")
    image = LabeledImage(str(Path(name).with_suffix("")), path, *size)
    rows = annotations.rows(index)
    for row in range(rows.start, rows.stop):
        place = f"{path}, annotation id {annotations.annotation_ids[row]}"
        x, y, w, h = (Decimal(repr(value)) for value in annotations.boxes_xywh[row].tolist())
        corners = fit_box((x, y, x + w, y + h), *size, remarks, place)
        if corners is not None:
            crowd = bool(annotations.crowd[row] or annotations.ignore[row])
            box = LabeledBox(annotations.class_names[annotations.labels[row]], corners, crowd)
            add_box(image, box, remarks, place)
    if not image.boxes:
        remarks.add("empty", str(path))
    return image
