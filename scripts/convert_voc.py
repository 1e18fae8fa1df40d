"""Pascal VOC's XML files to a COCO-format set, and back.

    python3 scripts/convert_voc.py to-coco my_voc datasets/mine
    python3 scripts/convert_voc.py from-coco my_voc --train-images DIR --train-annotations FILE.json ...

to-coco takes VOC's own folders (Annotations, JPEGImages, ImageSets/Main) and any folder with XML files and images
in it, and writes annotations/instances_train.json and instances_val.json. Images stay where they are.

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
from data.convert.conversion import ConversionError, LabeledImage, Remarks, derived_classes
from data.convert.splits import split_by_folder, split_by_lists
from data.convert.voc import VOC_TEXTS, VocSet, read_voc
from data.convert.voc_folders import VocFolders, find_voc, read_class_file, xml_files
from data.convert.write import write_coco_set, write_voc_set


def main(argv: list[str] | None = None) -> int:
    return convert(_parser().parse_args(argv), _to_coco, _from_coco)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    ways = parser.add_subparsers(dest="way", required=True, parser_class=Parser, metavar="to-coco | from-coco")
    to_coco = ways.add_parser("to-coco", help="XML files to a COCO-format set", allow_abbrev=False)
    to_coco.add_argument("source", type=Path, metavar="VOC_DIR", help="the folder with XML files and images")
    to_coco.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where annotations/ goes")
    to_coco.add_argument("--xml", type=Path, metavar="DIR", help="the XML files [VOC_DIR/Annotations, or VOC_DIR]")
    to_coco.add_argument("--images", type=Path, metavar="DIR", help="the images [VOC_DIR/JPEGImages, or VOC_DIR]")
    to_coco.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names, one a line, in the order wanted [VOC_DIR/classes.txt, labels.txt or labelmap.txt; else the "
        "names found, by alphabet]",
    )
    to_coco.add_argument(
        "--coordinates",
        choices=["auto", "one-based", "zero-based"],
        default="auto",
        help="one-based: VOC's own, pixels from 1, the last included. zero-based: edges from 0, as LabelImg and CVAT "
        "write them. auto: one-based for files that name VOC under <source><database>, else zero-based [auto]",
    )
    to_coco.add_argument(
        "--difficult",
        choices=["ignore", "keep", "drop"],
        default="ignore",
        help="objects marked difficult. ignore: not trained on, and not counted in evaluation (iscrowd). keep: like "
        "all others. drop: as if they were not there [ignore]",
    )
    for split in ("train", "val", "test"):
        to_coco.add_argument(
            f"--{split}-list", type=Path, metavar="FILE", help=f"names of the {split} set [ImageSets/Main/{split}.txt]"
        )
    to_coco_options(
        to_coco,
        "which way up boxes were drawn on images that EXIF turns. auto: by the size in the XML, stored where that "
        "does not tell [auto]",
    )
    from_coco = ways.add_parser("from-coco", help="a COCO-format set to XML files", allow_abbrev=False)
    from_coco.add_argument("output_dir", type=Path, metavar="VOC_DIR", help="folder to make")
    from_coco.add_argument(
        "--coordinates", choices=["one-based", "zero-based"], default="one-based", help="see to-coco [one-based]"
    )
    from_coco.add_argument("--whole-pixels", action="store_true", help="round boxes, for readers that need integers")
    from_coco_options(from_coco)
    return parser


def _to_coco(arguments: argparse.Namespace) -> int:
    folders = find_voc(arguments.source, xml=arguments.xml, images=arguments.images)
    lists = _lists(arguments, folders)
    class_file = arguments.classes or folders.classes
    classes = None if class_file is None else read_class_file(class_file)
    remarks = Remarks(VOC_TEXTS)
    with bar(len(xml_files(folders.xml)), "XML files") as progress:
        found = read_voc(
            folders,
            remarks,
            classes=classes,
            coordinates=arguments.coordinates,
            difficult=arguments.difficult,
            exif=arguments.exif,
            progress=progress.update,
        )
    class_names = classes if classes is not None else derived_classes(found.images, remarks)
    if remarks.num_errors and not arguments.skip_errors:
        report(remarks, arguments)
    splits, line = _split(found, lists, arguments)
    table = class_table(splits, class_names, remarks)
    report(remarks, arguments)
    if not class_names:
        raise ConversionError(f"{folders.xml}: no object in any XML file: there is nothing to train on")

    with bar(len(found.images), "writing") as progress:
        written = write_coco_set(
            arguments.output_dir,
            splits,
            class_names,
            images_root=folders.images,
            copy=arguments.copy,
            overwrite=arguments.overwrite,
            description=f"converted from the Pascal VOC files of {folders.xml}",
            progress=progress.update,
        )
    origin = "as found, by alphabet" if class_file is None else str(class_file)
    conventions = ", ".join(f"{kind} in {count:,} files" for kind, count in sorted(found.coordinates.items()))
    print(f"\nsplits       {line}")
    print(f"classes      {len(class_names)} ({origin})")
    print(f"coordinates  {conventions} (--coordinates {arguments.coordinates})")
    print(f"written      {', '.join(str(split.annotations) for split in written.values())}\n")
    print(table + "\n")
    print(next_commands(written, arguments.output_dir))
    return 0


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
    remarks = coco_remarks()
    splits, folders, class_names = read_coco_splits(arguments, remarks)
    table = class_table(splits, class_names, remarks)
    report(remarks, arguments)
    with bar(sum(map(len, splits.values())), "writing") as progress:
        write_voc_set(
            arguments.output_dir,
            splits,
            folders,
            class_names,
            coordinates=arguments.coordinates,
            whole_pixels=arguments.whole_pixels,
            copy=arguments.copy,
            overwrite=arguments.overwrite,
            progress=progress.update,
        )
    print(table)
    print(f"\nwritten to {arguments.output_dir}: Annotations, ImageSets/Main, JPEGImages", end="")
    print(" (copies)" if arguments.copy else " (links)", end="")
    print(", classes.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
