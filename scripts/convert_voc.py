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
from convert_cli import bar, build_parsers, from_coco, report, run, split_images, stop_for_errors, to_coco
from data.convert.conversion import ConversionError, LabeledImage, Remarks, derived_classes
from data.convert.files import read_class_file
from data.convert.splits import split_by_folder, split_by_lists
from data.convert.voc import VOC_TEXTS, VocFolders, VocReader, VocSet, find_voc
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
        "class names, one a line, in the order wanted [VOC_DIR/classes.txt, labels.txt or labelmap.txt; else the names "
        "found, by alphabet]"
    )
    add("--classes", type=Path, metavar="FILE", help=text)
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
    class_file = arguments.classes or folders.classes
    classes = None if class_file is None else read_class_file(class_file)
    remarks = Remarks(VOC_TEXTS)
    reader = VocReader(folders, remarks, classes, arguments.coordinates, arguments.difficult, arguments.exif)
    with bar(len(walk(folders.xml, {".xml"})), "XML files") as progress:
        found = reader.read(progress.update)
    class_names = classes if classes is not None else derived_classes(found.images, remarks)
    stop_for_errors(remarks, arguments)
    splits, line = _split(found, lists, arguments)
    if not class_names:
        report(remarks, arguments)
        raise ConversionError(f"{folders.xml}: no object in any XML file: there is nothing to train on")
    conventions = ", ".join(f"{kind} in {count:,} files" for kind, count in sorted(found.coordinates.items()))
    facts = {
        "splits": line,
        "classes": f"{len(class_names)} ({'as found, by alphabet' if class_file is None else class_file})",
        "coordinates": f"{conventions} (--coordinates {arguments.coordinates})",
    }
    description = f"converted from the Pascal VOC files of {folders.xml}"
    return to_coco(arguments, splits, class_names, remarks, facts, description=description, images_root=folders.images)


def _lists(arguments: argparse.Namespace, folders: VocFolders) -> dict[str, Path]:
    """Lists of the splits: those given, or those of ImageSets where nothing else is asked for."""
    given = {split: getattr(arguments, f"{split}_list") for split in ("train", "val", "test")}
    given = {split: file for split, file in given.items() if file is not None}
    if given and not {"train", "val"} <= given.keys():
        raise ConversionError("--train-list and --val-list go together: give both")
    if given and arguments.val_fraction is not None:
        raise ConversionError("lists and --val-fraction are two ways to split: give one of them")
    return given if given else {} if arguments.val_fraction is not None else folders.sets


def _split(
    found: VocSet, lists: dict[str, Path], arguments: argparse.Namespace
) -> tuple[dict[str, list[LabeledImage]], str]:
    if lists:
        splits, unlisted = split_by_lists(found.images, lists, found.left_out)
        line = ", ".join(str(file) for file in lists.values())
        if unlisted:
            line += f"; {len(unlisted):,} images are in none of them and were left out, the first {unlisted[0]}"
        return splits, line
    by_folder = split_by_folder(found.images) if arguments.val_fraction is None else None
    if by_folder is not None:
        return by_folder, f"by the folders of {arguments.source} (--val-fraction would split anew)"
    return split_images(found.images, arguments)


def _from_coco(arguments: argparse.Namespace) -> int:
    write = partial(write_voc_set, coordinates=arguments.coordinates, whole_pixels=arguments.whole_pixels)
    return from_coco(arguments, write, "Annotations, ImageSets/Main, JPEGImages{}, classes.txt")


if __name__ == "__main__":
    sys.exit(main())
