"""YOLO's label files to a COCO-format set, and back.

    python3 scripts/convert_yolo.py to-coco my_yolo datasets/mine
    python3 scripts/convert_yolo.py from-coco my_yolo --train-images DIR --train-annotations FILE.json ...

to-coco takes a folder with data.yaml, obj.data or classes.txt, with labels in "labels" folders or beside the
images, and writes annotations/instances_train.json and instances_val.json. Images stay where they are.

Exit status: 0 done, 1 nothing was written because something is wrong, 2 a wrong command.
"""

import argparse
import sys
from pathlib import Path

import checkout  # noqa: F401
from convert_cli import (
    Parser,
    bar,
    class_table,
    coco_remarks,
    convert,
    from_coco_options,
    next_commands,
    read_coco_splits,
    report,
    split_images,
    to_coco_options,
)
from data.convert.conversion import ConversionError, Remarks
from data.convert.write import write_coco_set, write_yolo_set
from data.convert.yolo import YOLO_TEXTS, check_orphans, find_yolo, read_yolo


def main(argv: list[str] | None = None) -> int:
    return convert(_parser().parse_args(argv), _to_coco, _from_coco)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ways = parser.add_subparsers(dest="way", required=True, parser_class=Parser, metavar="to-coco | from-coco")
    to_coco = ways.add_parser("to-coco", help="label files to a COCO-format set", allow_abbrev=False)
    to_coco.add_argument("source", type=Path, metavar="YOLO_DIR", help="the folder with images and label files")
    to_coco.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where annotations/ goes")
    names = to_coco.add_mutually_exclusive_group()
    names.add_argument("--data", type=Path, metavar="FILE", help="data.yaml or obj.data [that of YOLO_DIR]")
    names.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, instead")
    to_coco.add_argument("--images", type=Path, metavar="DIR", help="only the images below this folder")
    to_coco_options(
        to_coco,
        "which way up boxes were drawn on images that EXIF turns. auto: displayed, as the programs have it that "
        "train on such files [auto]",
    )
    from_coco = ways.add_parser("from-coco", help="a COCO-format set to label files", allow_abbrev=False)
    from_coco.add_argument("output_dir", type=Path, metavar="YOLO_DIR", help="folder to make")
    from_coco.add_argument(
        "--exif", choices=["auto", "stored", "displayed"], default="auto", help="see to-coco [auto: displayed]"
    )
    from_coco_options(from_coco)
    return parser


def _to_coco(arguments: argparse.Namespace) -> int:
    settings_file = arguments.data or arguments.classes
    found = find_yolo(arguments.source, settings_file=settings_file, images=arguments.images)
    class_names = found.settings.class_names
    paths = sorted({path for split in found.splits.values() for path in split})
    remarks = Remarks(YOLO_TEXTS)
    with bar(len(paths), "images") as progress:
        images = read_yolo(
            paths, class_names, remarks, root=arguments.source, exif=arguments.exif, progress=progress.update
        )
    check_orphans(paths, remarks)
    if paths and remarks.count("no-label-file") == len(paths):
        raise ConversionError(
            f"{arguments.source}: none of the {len(paths):,} images has a label file. They are searched for in "
            '"labels" instead of the last "images" of the path, and beside the image'
        )
    if remarks.num_errors and not arguments.skip_errors:
        report(remarks, arguments)
    by_path = {image.path: image for image in images}
    splits = {name: [by_path[path] for path in split if path in by_path] for name, split in found.splits.items()}
    line = found.origin
    if "all" in splits or arguments.val_fraction is not None:
        apart = {image.path for image in splits.get("test", [])}
        chosen, line = split_images([image for image in images if image.path not in apart], arguments)
        splits = chosen | ({"test": splits["test"]} if splits.get("test") else {})
    table = class_table(splits, class_names, remarks)
    report(remarks, arguments)

    with bar(len(images), "writing") as progress:
        written = write_coco_set(
            arguments.output_dir,
            splits,
            class_names,
            copy=arguments.copy,
            overwrite=arguments.overwrite,
            description=f"converted from the YOLO files of {arguments.source}",
            progress=progress.update,
        )
    print(f"\nsplits       {line}")
    print(f"classes      {len(class_names)} ({found.settings.source})")
    print(f"written      {', '.join(str(split.annotations) for split in written.values())}\n")
    print(table + "\n")
    print(next_commands(written, arguments.output_dir))
    return 0


def _from_coco(arguments: argparse.Namespace) -> int:
    remarks = coco_remarks()
    splits, folders, class_names = read_coco_splits(arguments, remarks)
    table = class_table(splits, class_names, remarks)
    with bar(sum(map(len, splits.values())), "writing") as progress:
        if remarks.num_errors and not arguments.skip_errors:
            report(remarks, arguments)
        write_yolo_set(
            arguments.output_dir,
            splits,
            folders,
            class_names,
            remarks,
            exif=arguments.exif,
            copy=arguments.copy,
            overwrite=arguments.overwrite,
            progress=progress.update,
        )
    report(remarks, arguments)
    print(table)
    print(f"\nwritten to {arguments.output_dir}: images", end="")
    print(" (copies)" if arguments.copy else " (links)", end="")
    print(", labels, data.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
