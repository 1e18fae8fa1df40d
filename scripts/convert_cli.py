"""What convert_voc.py and convert_yolo.py have in common: options, the report, the next commands."""

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

import checkout
from data import read_coco
from data.coco.findings import by_severity
from data.convert.conversion import (
    COCO_TEXTS,
    ConversionError,
    LabeledImage,
    Remarks,
    check_classes,
    images_of_coco,
)
from data.convert.splits import split_by_seed
from data.convert.write import WrittenSplit, write_coco_set
from data.errors import DataError
from detection.config.arg_types import inner_fraction

Way = Callable[[argparse.Namespace], int]
DEFAULT_VAL_FRACTION = 0.1
MAX_CLASSES_SHOWN = 40


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists every option)\n")


def run(arguments: argparse.Namespace) -> int:
    """Goes the way that was asked for; the exit status."""
    try:
        return arguments.convert(arguments)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


def build_parsers(
    doc: str | None, kind: str, files: str, source_help: str, exif_help: str, to_coco: Way, from_coco: Way
) -> tuple[Parser, Parser, Parser]:
    """The program's parser and those of its two ways, with the options that both programs have.

    kind: VOC or YOLO. files: "XML files", "label files". to_coco, from_coco: what to do, given the arguments.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ways = parser.add_subparsers(required=True, parser_class=Parser, metavar="to-coco | from-coco")
    there = ways.add_parser("to-coco", help=f"{files} to a COCO-format set", allow_abbrev=False)
    there.set_defaults(convert=to_coco)
    there.add_argument("source", type=Path, metavar=f"{kind}_DIR", help=source_help)
    there.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where annotations/ goes")
    group = there.add_argument_group("splits")
    group.add_argument(
        "--val-fraction",
        type=inner_fraction,
        metavar="X",
        help=f"share of the images to validate on, chosen by seed and file name [{DEFAULT_VAL_FRACTION} where the "
        "source has no splits of its own]",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="another seed chooses others [0]")
    back = ways.add_parser("from-coco", help=f"a COCO-format set to {files}", allow_abbrev=False)
    back.set_defaults(convert=from_coco)
    back.add_argument("output_dir", type=Path, metavar=f"{kind}_DIR", help="folder to make")
    source = back.add_argument_group("source, any COCO-format set")
    for split in ("train", "val", "test"):
        source.add_argument(f"--{split}-images", type=Path, metavar="DIR", help=f"image folder of the {split} set")
        source.add_argument(f"--{split}-annotations", type=Path, metavar="FILE", help="its COCO JSON")
    making = there.add_argument_group("what to make of the source")
    making.add_argument("--exif", choices=["auto", "stored", "displayed"], default="auto", help=exif_help)
    for group in (making, source):
        group.add_argument(
            "--skip-errors", action="store_true", help="leave images with errors out instead of stopping"
        )
    for way in (there, back):
        group = way.add_argument_group("output")
        group.add_argument("--copy", action="store_true", help="copy the images [they stay where they are]")
        group.add_argument(
            "--overwrite", action="store_true", help="move what is there aside (NAME.before_TIME) and write"
        )
        group.add_argument("--places", type=int, default=5, metavar="N", help="places shown for each finding [5]")
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


def to_coco(
    arguments: argparse.Namespace,
    splits: dict[str, list[LabeledImage]],
    class_names: list[str],
    remarks: Remarks,
    facts: dict[str, str],
    *,
    description: str,
    images_root: Path | None = None,
) -> int:
    """Reports, writes the COCO-format set, and says what was written and what to run next; the exit status.

    facts: lines about what was read, by name.
    """
    table = class_table(splits, class_names, remarks)
    report(remarks, arguments)
    with bar(sum(map(len, splits.values())), "writing") as progress:
        written = write_coco_set(
            arguments.output_dir,
            splits,
            class_names,
            images_root=images_root,
            copy=arguments.copy,
            overwrite=arguments.overwrite,
            description=description,
            progress=progress.update,
        )
    facts |= {"written": ", ".join(str(split.annotations) for split in written.values())}
    print("\n" + "\n".join(f"{name:<13}{fact}" for name, fact in facts.items()) + "\n")
    print(table + "\n")
    print(next_commands(written, arguments.output_dir))
    return 0


def split_images(
    images: list[LabeledImage], arguments: argparse.Namespace
) -> tuple[dict[str, list[LabeledImage]], str]:
    """Splits by seed, and a line that says so."""
    fraction = arguments.val_fraction or DEFAULT_VAL_FRACTION
    line = f"by seed {arguments.seed} and file name, {fraction:g} of the images to validate on"
    return split_by_seed(images, fraction, arguments.seed), line


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
            print(
                f"    and {finding.count - min(arguments.places, len(finding.places)):,} more (--places N shows more)"
            )
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
    width = max(len(name) for name in ("images", *class_names)) + 2
    head = f"{'':<{width}}" + "".join(f"{split:>10}" for split in splits)
    images = f"{'images':<{width}}" + "".join(f"{len(found):>10,}" for found in splits.values())
    lines = [head, images]
    totals: Counter[str] = sum(counts.values(), Counter())
    shown = list(class_names)
    if len(shown) > MAX_CLASSES_SHOWN:
        often = {name for name, _ in totals.most_common(MAX_CLASSES_SHOWN)}
        shown = [name for name in shown if name in often][:MAX_CLASSES_SHOWN]
    for name in shown:
        lines.append(f"{name:<{width}}" + "".join(f"{counts[split][name]:>10,}" for split in splits))
    if len(class_names) > len(shown):
        lines.append(f"and {len(class_names) - len(shown)} classes with fewer boxes")
    return "\n".join(lines)


def next_commands(written: dict[str, WrittenSplit], output_dir: Path) -> str:
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
    python3 {_program("train.py")} --schedule 1x --auto-scale-lr --output-dir {run} {sets}"""


def _program(name: str) -> str:
    near = os.path.relpath(checkout.ROOT / name)
    return _quoted(checkout.ROOT / name if near.startswith("..") else Path(near))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
