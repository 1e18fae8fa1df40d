"""The splits of a folder in any known layout, as COCO files: the folder's own, or files in the user's cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.cache.packed_file import one_builder
from data.coco.layout import MissingDataset, SplitFiles, coco_layout, standard_layout
from data.convert.conversion import ConversionError, LabeledImage, Progress, Remarks
from data.convert.files import read_class_file
from data.convert.imagefolder import IMAGEFOLDER_TEXTS, imagefolder_set
from data.convert.labeled_set import LabeledSet
from data.convert.labelme import LABELME_TEXTS, labelme_set
from data.convert.voc import VOC_TEXTS, VocReader, find_voc, voc_set
from data.convert.write import write_coco_set
from data.convert.yolo import YOLO_TEXTS, find_yolo, yolo_set
from data.images.files import IMAGE_SUFFIXES, walk
from data.layouts.coco_folder import coco_set, write_contents
from data.layouts.packed_set import read_set
from data.layouts.recognition import CONVERTERS, FORMATS, ROBOFLOW_FILE, LayoutError, Reading, inner_folder, recognize

VERSION = 2  # another number whenever equal folders would give other files
RECORD = "set.json"
LISTED = "listed"
PLACES_SHOWN = 3
KEY_SHOWN = 16  # hexadecimal digits of a folder's key in its name in the cache
LABEL_SUFFIXES = {".json", ".jsonl", ".xml", ".txt", ".yaml", ".yml", ".data", ".names", ".labels", ".md"}


@dataclass(frozen=True)
class Wanted:
    """What of a folder is wanted."""

    data_format: str | None = None
    """A key of FORMATS where several would do; None: the one that it has."""
    classes: tuple[str, ...] = ()
    """The classes to keep; all where empty. Files of COCO's own layout are used as they are all the same: whoever reads
    them chooses the classes."""
    val_fraction: float | None = None
    """Share of the images to validate on where the folder does not say which; None: a tenth."""
    split_seed: int = 0
    voc_list: Path | None = None
    """Of a VOC folder: the images of this list of ImageSets alone, as the split LISTED, with all of `classes`"""


@dataclass(frozen=True)
class FoundSet:
    """What a folder holds."""

    title: str
    """Its layout, and where."""
    splits: dict[str, SplitFiles]
    """train, val and test, as far as there are any."""
    remarks: tuple[str, ...] = ()
    """Where the splits are from, what was left out, and what was changed."""


def find_set(
    folder: str | Path, cache_dir: str | Path, wanted: Wanted = Wanted(), progress: Progress = lambda _: None
) -> FoundSet:
    """The splits of a folder in any known layout.

    A packed set serves as it is, and so do COCO files, unless classes or splits have to change. Everything else is
    converted as scripts/convert_*.py do, into a folder of the cache that is named for the content: the same again costs
    only reading the labels, and a changed label or image is converted anew. Of several programs that start at once, one
    converts.

    Raises LayoutError, ConversionError, AnnotationError, PackedSetError or MissingDataset: what was found, and what to
    do.
    """
    root = Path(folder)
    if (packed := read_set(root)) is not None:
        if wanted.val_fraction is not None:
            raise ConversionError(f"{root} is packed with its splits: give --val-fraction to scripts/pack_dataset.py")
        if wanted.data_format is not None:
            raise ConversionError(f"{root} is a packed set: leave --data-format away")
        return FoundSet(f"a packed set in {root}", packed)
    incomplete: MissingDataset | None = None
    standard = standard_layout(root)
    if standard.train_annotations.is_file() or standard.val_annotations.is_file():
        try:
            layout = coco_layout(root)
            if replace(wanted, classes=()) == Wanted():
                splits = {
                    "train": SplitFiles(layout.train_images, layout.train_annotations),
                    "val": SplitFiles(layout.val_images, layout.val_annotations),
                }
                return FoundSet(f"COCO's own layout in {root}", splits)
        except MissingDataset as error:
            incomplete = error
    try:
        return _in_any_layout(root, Path(cache_dir), wanted, progress)
    except LayoutError:
        if incomplete is not None:
            raise incomplete from None
        raise


def _in_any_layout(root: Path, cache_dir: Path, wanted: Wanted, progress: Progress) -> FoundSet:
    if not root.is_dir():
        raise LayoutError(f"{root}: there is no such folder. Give --data-path the folder of the set")
    root = _voc_year(inner_folder(root))
    reading = recognize(root, wanted.data_format)
    key = _key(root, reading, wanted)
    target = cache_dir / "sets" / f"{key[:KEY_SHOWN]}_{root.absolute().name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _read_record(target)
        if found is None:
            with one_builder(root, target, "converts"):
                found = _read_record(target)
                if found is None:
                    shutil.rmtree(target, ignore_errors=True)  # damaged, if there
                    _build(target, lambda staging: _converted(root, reading, wanted, staging, progress))
                    found = _read_record(target)
    except OSError as error:
        raise LayoutError(
            f"{root}: what is read of it cannot be kept under {target.parent}: {error}. Set XDG_CACHE_HOME to a folder "
            "that can be written to"
        ) from error
    assert found is not None
    return found


def _converted(root: Path, reading: Reading, wanted: Wanted, staging: Path, progress: Progress) -> FoundSet:
    """Writes what has to be written under `staging`; paths there are relative to it."""
    if reading.format == "coco":
        contents, lines = coco_set(root, wanted.classes, wanted.val_fraction, wanted.split_seed)
        kind = "Roboflow's COCO export" if reading.evidence.name == ROBOFLOW_FILE else "COCO JSON"
        return FoundSet(f"{kind} in {root}", write_contents(contents, staging), tuple(lines))
    labeled = _labeled(root, reading, wanted, progress)
    _stop_for_errors(labeled.remarks, root, reading)
    if wanted.voc_list is not None:
        files = write_coco_set(
            staging,
            _listed(labeled, wanted.classes),
            labeled.class_names,
            images_root=labeled.images_root,
            description=labeled.description,
        )
        return FoundSet(f"Pascal VOC's list {wanted.voc_list}", files)
    if wanted.classes:
        labeled.keep_classes(wanted.classes)
    has_splits = bool(labeled.found.get("train")) and bool(labeled.found.get("val") or labeled.found.get("test"))
    if wanted.val_fraction is not None and has_splits:
        raise ConversionError(f"{root} has a validation split of its own: leave --val-fraction away")
    splits = labeled.splits(wanted.val_fraction, wanted.split_seed)
    written = write_coco_set(
        staging, splits, labeled.class_names, images_root=labeled.images_root, description=labeled.description
    )
    lines = [labeled.facts["splits"]]
    if "not there" in labeled.facts:
        lines.append(f"named and not there: {labeled.facts['not there']}")
    for finding in labeled.remarks.findings:
        times = f"{finding.count:,} x " if finding.count > 1 else ""
        lines.append(f"{times}{finding.text.split('. ')[0]}, such as {finding.places[0]}")
    return FoundSet(f"{FORMATS[reading.format]} in {root}", written, tuple(lines))


def _listed(labeled: LabeledSet, classes: Sequence[str]) -> dict[str, list[LabeledImage]]:
    """The images of a list. The set gets these classes, also those of which the list has no object."""
    images = labeled.found[LISTED]
    if classes:
        for image in images:
            image.boxes = [box for box in image.boxes if box.name in classes]
        labeled.class_names = list(classes)
    return {LISTED: images}


def _labeled(root: Path, reading: Reading, wanted: Wanted, progress: Progress) -> LabeledSet:
    if reading.format == "yolo":
        return yolo_set(find_yolo(root), root, Remarks(YOLO_TEXTS), progress=progress)
    if reading.format == "imagefolder":
        return imagefolder_set(root, Remarks(IMAGEFOLDER_TEXTS), meant=wanted.classes, progress=progress)
    if reading.format == "labelme":
        return labelme_set(root, Remarks(LABELME_TEXTS), meant=wanted.classes, progress=progress)
    folders = find_voc(root)
    classes = None if folders.classes is None else read_class_file(folders.classes)
    reader = VocReader(folders, Remarks(VOC_TEXTS), classes)
    lists = folders.sets if wanted.voc_list is None else {LISTED: wanted.voc_list}
    return voc_set(reader, lists, folders.classes, meant=wanted.classes, progress=progress)


def _stop_for_errors(remarks: Remarks, root: Path, reading: Reading) -> None:
    if not remarks.num_errors:
        return
    lines = [f"{root}: {remarks.num_errors:,} errors in its labels:"]
    for finding in remarks.findings:
        if finding.severity == "error":
            lines.append(f"  {finding.count:,}: {finding.text} [{finding.code}]")
            lines += [f"    {place}" for place in finding.places[:PLACES_SHOWN]]
    if reading.format in CONVERTERS:
        lines.append(
            f"python3 {CONVERTERS[reading.format]} to-coco {root} OUTPUT_DIR lists every place; with --skip-errors it "
            "leaves these images out"
        )
    raise ConversionError("\n".join(lines))


def _voc_year(root: Path) -> Path:
    """VOCdevkit's folder of a year, where there is one; `root` elsewhere."""
    nested = root / "VOCdevkit"
    years = sorted((nested if nested.is_dir() else root).glob("VOC20[0-9][0-9]"))
    if len(years) > 1:
        lines = [f"{root} holds the sets of {len(years)} years. Say which:", *(f"  --data-path {one}" for one in years)]
        raise LayoutError("\n".join(lines))
    return years[0] if years else root


def _key(root: Path, reading: Reading, wanted: Wanted) -> str:
    """SHA-256 of all that the result depends on: labels by content, images by name, size and time of change."""
    sha = hashlib.sha256(repr((VERSION, reading.format, str(root.absolute()), wanted)).encode())
    for file in walk(root, LABEL_SUFFIXES | IMAGE_SUFFIXES):
        name = file.relative_to(root).as_posix()
        if file.suffix.lower() in LABEL_SUFFIXES:
            sha.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as opened:
                while chunk := opened.read(1 << 20):
                    sha.update(chunk)
        else:
            status = file.stat()
            sha.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return sha.hexdigest()


def _build(target: Path, convert: Callable[[Path], FoundSet]) -> None:
    """Makes the folder and its record whole or not at all; one that another process has made meanwhile stays."""
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)  # mkdtemp's folder is for its owner alone
        found = convert(staging)
        record = {
            "title": found.title,
            "remarks": found.remarks,
            "splits": {
                split: [str(files.images.absolute()), _inside(files.annotations, staging)]
                for split, files in found.splits.items()
            },
        }
        (staging / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        try:
            staging.rename(target)
        except OSError:
            if _read_record(target) is None:
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _inside(file: Path, staging: Path) -> str:
    return file.relative_to(staging).as_posix() if file.is_relative_to(staging) else str(file.absolute())


def _read_record(target: Path) -> FoundSet | None:
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    splits = {
        split: SplitFiles(Path(images), target / annotations)
        for split, (images, annotations) in record["splits"].items()
    }
    if not all(files.annotations.is_file() for files in splits.values()):
        return None
    return FoundSet(record["title"], splits, tuple(record["remarks"]))
