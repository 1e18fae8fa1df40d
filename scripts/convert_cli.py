"""What convert_voc.py and convert_yolo.py have in common: options, the report, the next commands."""

import argparse
import os
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from checkout import ROOT, exit_status
from data import read_coco
from data.coco.findings import by_severity
from data.coco.layout import SplitFiles
from data.convert.conversion import (
    COCO_TEXTS,
    ConversionError,
    LabeledImage,
    Remarks,
    check_classes,
    images_of_coco,
)
from data.convert.labeled_set import LabeledSet
from data.convert.splits import DEFAULT_VAL_FRACTION
from data.convert.write import write_coco_set
from data.errors import DataError
from data.layouts.recognition import other_tool
from detection.config.arg_types import inner_fraction
from detection.reporting.tables import aligned

Way = Callable[[argparse.Namespace], int]
MAX_CLASSES_SHOWN = 40


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists every option)\n")


def run(arguments: argparse.Namespace) -> int:
    """Goes the way that was asked for; the exit status."""

    def convert() -> int:
        try:
            return arguments.convert(arguments)
        except ConversionError as error:
            tool = other_tool(arguments.source, arguments.format) if "source" in arguments else ""
            raise ConversionError(f"{error}{tool}") from None

    return exit_status(convert, DataError, OSError, status=1, stopped="stopped; nothing was written")


def build_parsers(
    doc: str | None, kind: str, files: str, source_help: str, exif_help: str, to_coco: Way, from_coco: Way
) -> tuple[Parser, Parser, Parser]:
    """The program's parser and those of its two ways, with the options that both programs have.

    kind: VOC or YOLO. files: "XML files", "label files". to_coco, from_coco: what to do, given the arguments.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ways = parser.add_subparsers(required=True, parser_class=Parser, metavar="to-coco | from-coco")
    there = ways.add_parser("to-coco", help=f"{files} to a COCO-format set", allow_abbrev=False)
    there.set_defaults(convert=to_coco, format=kind.lower())
    there.add_argument("source", type=Path, metavar=f"{kind}_DIR", help=source_help)
    there.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where annotations/ goes")
    add = there.add_argument_group("splits").add_argument
    text = (
        f"share of the images to validate on, chosen by seed and file name [{DEFAULT_VAL_FRACTION} where the source "
        "has no splits of its own]"
    )
    add("--val-fraction", type=inner_fraction, metavar="X", help=text)
    add("--seed", type=int, default=0, metavar="N", help="another seed chooses others [0]")
    back = ways.add_parser("from-coco", help=f"a COCO-format set to {files}", allow_abbrev=False)
    back.set_defaults(convert=from_coco)
    back.add_argument("output_dir", type=Path, metavar=f"{kind}_DIR", help="folder to make")
    source = back.add_argument_group("source, any COCO-format set")
    for split in ("train", "val", "test"):
        source.add_argument(f"--{split}-images", type=Path, metavar="DIR", help=f"image folder of the {split} set")
        source.add_argument(f"--{split}-annotations", type=Path, metavar="FILE", help="its COCO JSON")
    making = there.add_argument_group("what to make of the source")
    making.add_argument("--exif", choices=["auto", "stored", "displayed"], default="auto", help=exif_help)
    for way, group in ((there, making), (back, source)):
        text = "leave images with errors out instead of stopping"
        group.add_argument("--skip-errors", action="store_true", help=text)
        add = way.add_argument_group("output").add_argument
        add("--copy", action="store_true", help="copy the images [they stay where they are]")
        text = "move what is there aside (NAME.before_TIME) and write"
        add("--overwrite", action="store_true", help=text)
        add("--places", type=int, default=5, metavar="N", help="places shown for each finding [5]")
    return parser, there, back


def from_coco(arguments: argparse.Namespace, write: Callable[..., None], parts: str) -> int:
    """Reads the splits that the options name and writes them; the exit status.

    write(output_dir, splits, image folders, class names, remarks, copy=, overwrite=, progress=). parts: what is
    written, "images{}, labels" with a place for "links" or "copies".
    """
    remarks = Remarks(COCO_TEXTS)
    splits: dict[str, list[LabeledImage]] = {}
    folders, class_names = {}, None
    for split in ("train", "val", "test"):
        images, file = getattr(arguments, f"{split}_images"), getattr(arguments, f"{split}_annotations")
        if (images is None) != (file is None):
            raise ConversionError(f"--{split}-images and --{split}-annotations go together: give both")
        if file is None:
            continue
        annotations = read_coco(file, class_names)
        class_names = annotations.class_names
        with bar(len(annotations), f"{split} images") as progress:
            splits[split] = images_of_coco(images, annotations, remarks, progress.update)
        folders[split] = images
    if class_names is None:
        raise ConversionError("no source: give --train-images DIR --train-annotations FILE, and the same for val")
    table = class_table(splits, class_names, remarks)
    stop_for_errors(remarks, arguments)
    choices = {"copy": arguments.copy, "overwrite": arguments.overwrite}
    with bar(sum(map(len, splits.values())), "writing") as progress:
        write(arguments.output_dir, splits, folders, class_names, remarks, **choices, progress=progress.update)
    report(remarks, arguments)
    print(table)
    print(f"\nwritten to {arguments.output_dir}: {parts.format(' (copies)' if arguments.copy else ' (links)')}")
    return 0


def classes_of(arguments: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """What --classes gives: a file of all class names, or the names of the classes to keep."""
    given = arguments.classes
    if given is None or Path(given).is_file():
        return None if given is None else Path(given), []
    if Path(given).suffix == ".txt":
        raise ConversionError(f"{given}: there is no such file")
    return None, [name.strip() for name in given.split(",") if name.strip()]


def to_coco(arguments: argparse.Namespace, labeled: LabeledSet, wanted: list[str]) -> int:
    """Reports, writes the COCO-format set, and says what was written and what to run next; the exit status.

    wanted: the classes to keep; all where empty.
    """
    remarks = labeled.remarks
    stop_for_errors(remarks, arguments)
    if wanted:
        labeled.keep_classes(wanted)
    splits = labeled.splits(arguments.val_fraction, arguments.seed)
    table = class_table(splits, labeled.class_names, remarks)
    report(remarks, arguments)
    with bar(sum(map(len, splits.values())), "writing") as progress:
        written = write_coco_set(
            arguments.output_dir,
            splits,
            labeled.class_names,
            images_root=labeled.images_root,
            copy=arguments.copy,
            overwrite=arguments.overwrite,
            description=labeled.description,
            progress=progress.update,
        )
    facts = labeled.facts | {"written": ", ".join(str(split.annotations) for split in written.values())}
    print("\n" + "\n".join(f"{name:<13}{fact}" for name, fact in facts.items()) + "\n")
    print(table + "\n")
    print(next_commands(written, arguments.output_dir))
    return 0


def bar(total: int, description: str) -> tqdm:
    """A progress bar, on a terminal only."""
    return tqdm(total=total, desc=description, unit="file", disable=None)


def report(remarks: Remarks, arguments: argparse.Namespace) -> None:
    """Prints the findings. Raises ConversionError where there are errors that nobody asked to skip."""
    for finding in by_severity(remarks.findings):
        print(f"{finding.severity.upper()} [{finding.code}] {finding.count:,}: {finding.text}.")
        for place in finding.places[: arguments.places]:
            print(f"    {place}")
        if finding.count > arguments.places:
            more = finding.count - min(arguments.places, len(finding.places))
            print(f"    and {more:,} more (--places N shows more)")
    if remarks.num_errors and not arguments.skip_errors:
        raise ConversionError(
            f"{remarks.num_errors:,} errors, listed above. Nothing was written. Mend them, or leave the images "
            "concerned out with --skip-errors"
        )


def stop_for_errors(remarks: Remarks, arguments: argparse.Namespace) -> None:
    """Reports and raises where there are errors that nobody asked to skip."""
    if remarks.num_errors and not arguments.skip_errors:
        report(remarks, arguments)


def class_table(
    splits: dict[str, list[LabeledImage]], class_names: list[str] | tuple[str, ...], remarks: Remarks
) -> str:
    """Images and boxes of each class, by split."""
    counts = check_classes(splits, class_names, remarks)
    totals: Counter[str] = sum(counts.values(), Counter())
    often = {name for name, _ in totals.most_common(MAX_CLASSES_SHOWN)}
    shown = [name for name in class_names if len(class_names) <= MAX_CLASSES_SHOWN or name in often]
    rows = [["", *splits], ["images", *(f"{len(found):,}" for found in splits.values())]]
    rows += [[name, *(f"{counts[split][name]:,}" for split in splits)] for name in shown]
    left_out = len(class_names) - len(shown)
    return "\n".join(aligned(rows, {0}) + ([f"and {left_out} classes with fewer boxes"] if left_out else []))


def next_commands(written: dict[str, SplitFiles], output_dir: Path) -> str:
    """What to run next: check, look, train."""
    sets = " ".join(
        f"--{name}-images {_quoted(written[name].images)} --{name}-annotations {_quoted(written[name].annotations)}"
        for name in ("train", "val")
        if name in written
    )
    first = written.get("train") or written["val"]
    gallery = _quoted(output_dir / "gallery.html")
    browse = f"--images {_quoted(first.images)} --annotations {_quoted(first.annotations)}"
    run = _quoted(Path("runs") / (output_dir.resolve().name or "own_data"))
    return f"""Next: check it, look at it, train.
    python3 {_program("scripts/check_dataset.py")} {sets}
    python3 {_program("scripts/browse_dataset.py")} --html {gallery} {browse}
    python3 {_program("train.py")} --schedule finetune --output-dir {run} {sets}"""


def _program(name: str) -> str:
    near = os.path.relpath(ROOT / name)
    return _quoted(ROOT / name if near.startswith("..") else Path(near))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
