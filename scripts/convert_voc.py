"""Pascal VOC's XML files to a COCO-format set, and back.

    python3 scripts/convert_voc.py to-coco my_voc datasets/mine
    python3 scripts/convert_voc.py from-coco my_voc --train-images DIR --train-annotations FILE.json ...

to-coco takes VOC's own folders (Annotations, JPEGImages, ImageSets/Main) and any folder with XML files and images
in it, and writes annotations/instances_train.json and instances_val.json. Images stay where they are.

Exit status: 0 done, 1 nothing was written because something is wrong, 2 a wrong command.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import checkout  # noqa: F401
from convert_cli import bar, build_parsers, classes_of, from_coco, run, to_coco
from data.convert.conversion import ConversionError, Remarks
from data.convert.files import read_class_file
from data.convert.voc import VOC_TEXTS, VocFolders, VocReader, find_voc, voc_set
from data.convert.write import write_voc_set
from data.images.files import walk


def main(argv: list[str] | None = None) -> int:
    return run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    exif_help = (
        "which way up boxes were drawn on images that EXIF turns. auto: by the size in the XML, stored where that "
        "does not tell [auto]"
    )
    parser, there, back = build_parsers(
        __doc__, "VOC", "XML files", "the folder with XML files and images", exif_help, _to_coco, _from_coco
    )
    add = there.add_argument
    add("--xml", type=Path, metavar="DIR", help="the XML files [VOC_DIR/Annotations, or VOC_DIR]")
    add("--images", type=Path, metavar="DIR", help="the images [VOC_DIR/JPEGImages, or VOC_DIR]")
    text = (
        "a file of class names, one a line, in the order wanted; or names: boxes of others are left out "
        "[VOC_DIR/classes.txt, labels.txt or labelmap.txt; else the names found, by alphabet]"
    )
    add("--classes", metavar="FILE|A,B", help=text)
    text = (
        "one-based: VOC's own, pixels from 1, the last included. zero-based: edges from 0, as LabelImg and CVAT write "
        "them. auto: one-based for files that name VOC under <source><database>, else zero-based [auto]"
    )
    add("--coordinates", choices=["auto", "one-based", "zero-based"], default="auto", help=text)
    text = (
        "objects marked difficult. ignore: not trained on, and not counted in evaluation (iscrowd). keep: like all "
        "others. drop: as if they were not there [ignore]"
    )
    add("--difficult", choices=["ignore", "keep", "drop"], default="ignore", help=text)
    for split in ("train", "val", "test"):
        text = f"names of the {split} set [ImageSets/Main/{split}.txt]"
        add(f"--{split}-list", type=Path, metavar="FILE", help=text)
    add = back.add_argument
    add("--coordinates", choices=["one-based", "zero-based"], default="one-based", help="see to-coco [one-based]")
    add("--whole-pixels", action="store_true", help="round boxes, for readers that need integers")
    return parser


def _to_coco(arguments: argparse.Namespace) -> int:
    folders = find_voc(arguments.source, xml=arguments.xml, images=arguments.images)
    lists = _lists(arguments, folders)
    given, wanted = classes_of(arguments)
    class_file = given or folders.classes
    classes = None if class_file is None else read_class_file(class_file)
    remarks = Remarks(VOC_TEXTS)
    reader = VocReader(folders, remarks, classes, arguments.coordinates, arguments.difficult, arguments.exif)
    with bar(len(walk(folders.xml, {".xml"})), "XML files") as progress:
        labeled = voc_set(reader, lists, class_file, meant=wanted, progress=progress.update)
    return to_coco(arguments, labeled, wanted)


def _lists(arguments: argparse.Namespace, folders: VocFolders) -> dict[str, Path]:
    """Lists of the splits: those given, or those of ImageSets where nothing else is asked for."""
    given = {split: getattr(arguments, f"{split}_list") for split in ("train", "val", "test")}
    given = {split: file for split, file in given.items() if file is not None}
    if given and not {"train", "val"} <= given.keys():
        raise ConversionError("--train-list and --val-list go together: give both")
    if given and arguments.val_fraction is not None:
        raise ConversionError("lists and --val-fraction are two ways to split: give one of them")
    return given if given else {} if arguments.val_fraction is not None else folders.sets


def _from_coco(arguments: argparse.Namespace) -> int:
    write = partial(write_voc_set, coordinates=arguments.coordinates, whole_pixels=arguments.whole_pixels)
    return from_coco(arguments, write, "Annotations, ImageSets/Main, JPEGImages{}, classes.txt")


if __name__ == "__main__":
    sys.exit(main())
