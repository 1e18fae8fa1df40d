"""YOLO's label files to a COCO-format set, and back.

    python3 scripts/convert_yolo.py to-coco my_yolo datasets/mine
    python3 scripts/convert_yolo.py from-coco my_yolo --train-images DIR --train-annotations FILE.json ...

to-coco takes a folder with data.yaml, obj.data or classes.txt, with labels in "labels" folders or beside the
images, and writes annotations/instances_train.json and instances_val.json. Images stay where they are.

Exit status: 0 done, 1 nothing was written because something is wrong, 2 a wrong command.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import checkout  # noqa: F401
from convert_cli import bar, build_parsers, from_coco, run, split_images, stop_for_errors, to_coco
from data.convert.conversion import ConversionError, Remarks
from data.convert.write import write_yolo_set
from data.convert.yolo import YOLO_TEXTS, check_orphans, find_yolo, read_yolo


def main(argv: list[str] | None = None) -> int:
    return run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    exif_help = (
        "which way up boxes were drawn on images that EXIF turns. auto: displayed, as the programs have it that "
        "train on such files [auto]"
    )
    parser, there, back = build_parsers(
        __doc__, "YOLO", "label files", "the folder with images and label files", exif_help, _to_coco, _from_coco
    )
    names = there.add_mutually_exclusive_group()
    names.add_argument("--data", type=Path, metavar="FILE", help="data.yaml or obj.data [that of YOLO_DIR]")
    names.add_argument("--classes", type=Path, metavar="FILE", help="class names, one a line, instead")
    there.add_argument("--images", type=Path, metavar="DIR", help="only the images below this folder")
    back.add_argument(
        "--exif", choices=["auto", "stored", "displayed"], default="auto", help="see to-coco [auto: displayed]"
    )
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
    stop_for_errors(remarks, arguments)
    by_path = {image.path: image for image in images}
    splits = {name: [by_path[path] for path in split if path in by_path] for name, split in found.splits.items()}
    line = found.origin
    if "all" in splits or arguments.val_fraction is not None:
        test = splits.get("test", [])
        apart = {image.path for image in test}
        splits, line = split_images([image for image in images if image.path not in apart], arguments)
        splits |= {"test": test} if test else {}
    facts = {"splits": line, "classes": f"{len(class_names)} ({found.settings.source})"}
    description = f"converted from the YOLO files of {arguments.source}"
    return to_coco(arguments, splits, class_names, remarks, facts, description=description)


def _from_coco(arguments: argparse.Namespace) -> int:
    return from_coco(arguments, partial(write_yolo_set, exif=arguments.exif), "images{}, labels, data.yaml")


if __name__ == "__main__":
    sys.exit(main())
