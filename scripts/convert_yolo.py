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
from convert_cli import bar, build_parsers, classes_of, from_coco, run, to_coco
from data.convert.conversion import Remarks
from data.convert.write import write_yolo_set
from data.convert.yolo import YOLO_TEXTS, find_yolo, yolo_set


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
    there.add_argument("--data", type=Path, metavar="FILE", help="data.yaml or obj.data [that of YOLO_DIR]")
    text = "a file of class names, one a line, instead; or names: boxes of others are left out"
    there.add_argument("--classes", metavar="FILE|A,B", help=text)
    there.add_argument("--images", type=Path, metavar="DIR", help="only the images below this folder")
    back.add_argument(
        "--exif", choices=["auto", "stored", "displayed"], default="auto", help="see to-coco [auto: displayed]"
    )
    return parser


def _to_coco(arguments: argparse.Namespace) -> int:
    class_file, wanted = classes_of(arguments)
    found = find_yolo(arguments.source, settings_file=arguments.data or class_file, images=arguments.images)
    remarks = Remarks(YOLO_TEXTS)
    with bar(sum(map(len, found.splits.values())), "images") as progress:
        labeled = yolo_set(found, arguments.source, remarks, exif=arguments.exif, progress=progress.update)
    return to_coco(arguments, labeled, wanted)


def _from_coco(arguments: argparse.Namespace) -> int:
    return from_coco(arguments, partial(write_yolo_set, exif=arguments.exif), "images{}, labels, data.yaml")


if __name__ == "__main__":
    sys.exit(main())
