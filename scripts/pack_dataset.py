"""A data set as a few large files, which train.py opens in its place.

    python3 scripts/pack_dataset.py pack datasets/coco packed/coco
    python3 scripts/pack_dataset.py check packed/coco
    python3 train.py --schedule 1x --data-path packed/coco

pack takes any folder that train.py --data-path takes. It writes the annotations of each split as one file, which is
opened at once whatever its size, and the images as tar shards with an index. The folder can be moved. images packs a
folder of images alone. unpack writes Hugging Face's Parquet files as a folder that pack and train.py take. check reads
everything and compares checksums. locate notes where the tar files are, if they do not stay beside the index: another
folder, or an object store's address for fsspec.

Exit status: 0 done or sound, 1 something is wrong, 2 a wrong command.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

import checkout  # noqa: F401
from data import read_coco
from data.cache.packed_file import cache_folder
from data.coco.checks import check_split
from data.convert.parquet import unpack_parquet
from data.errors import DataError
from data.images.files import IMAGE_SUFFIXES, walk
from data.images.shards import ShardsError, open_shards, pack_images, relocate
from data.layouts.packed_set import PackedSetError, damaged, write_set
from data_path import add_data_path, described, found_set


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write annotations and images of a set")
    pack.add_argument("data_path", metavar="set", type=Path, help="a folder as train.py --data-path takes it")
    pack.add_argument("--annotations-only", action="store_true", help="the images stay where they are")
    add_data_path(pack, without=("data_path", "classes"))
    images = commands.add_parser("images", help="write the shards of a folder of images")
    images.add_argument("images", type=Path, help="folder of images; those in folders below are taken too")
    unpack = commands.add_parser("unpack", help="write the images and boxes of Parquet files as an imagefolder")
    unpack.add_argument("parquet", type=Path, help="folder of Parquet files, as Hugging Face has them")
    for command in (pack, images, unpack):
        command.add_argument("folder", type=Path, help="a new folder for what is written")
    for command in (pack, images):
        command.add_argument("--shard-mb", type=int, default=1024, help="megabytes of a shard, about [1024]")
    check = commands.add_parser("check", help="read a packed set, or a folder of shards, and compare checksums")
    check.add_argument("folder", type=Path)
    locate = commands.add_parser("locate", help="note where the tar files are")
    locate.add_argument("folder", type=Path, help="the folder with the index")
    locate.add_argument("location", help="a folder, an address for fsspec, or 'here'")
    arguments = parser.parse_args(argv)
    does = {"pack": _pack, "images": _images, "unpack": _unpack, "check": _check, "locate": _locate}
    try:
        return does[arguments.command](arguments)
    except (DataError, OSError) as error:
        print(f"pack_dataset: {error}", file=sys.stderr)
        return 1


def _pack(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    found = found_set(arguments)
    assert found is not None
    print(described(found))
    splits, errors = {}, []
    for name, files in found.splits.items():
        annotations = read_coco(files.annotations, masks=True, cache_dir=cache_folder())
        findings = check_split(annotations, files.images, training=name == "train", needs_boxes=name != "test")
        errors += [f"  {name}: {finding}" for finding in findings if finding.severity == "error"]
        splits[name] = annotations, files.images
    if errors:
        remedy = f"scripts/check_dataset.py --data-path {arguments.data_path} lists every place"
        raise PackedSetError("\n".join([f"{arguments.data_path}: cannot be trained on as it is:", *errors, remedy]))
    with_images = not arguments.annotations_only
    with tqdm(total=sum(len(one) for one, _ in splits.values()), unit="image", disable=None, leave=False) as bar:
        write_set(
            arguments.folder,
            splits,
            with_images=with_images,
            shard_bytes=arguments.shard_mb << 20,
            progress=bar.update,
        )
    parts = [f"{name} {len(one):,} images, {one.num_boxes:,} boxes" for name, (one, _) in splits.items()]
    print(f"{arguments.folder}: {'; '.join(parts)} ({time.monotonic() - start:.1f} s)")
    print(f"python3 train.py --data-path {arguments.folder}")
    return 0


def _images(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    names = [path.relative_to(arguments.images).as_posix() for path in walk(arguments.images, IMAGE_SUFFIXES)]
    if not names:
        raise ShardsError(f"{arguments.images}: no images there ({' '.join(sorted(IMAGE_SUFFIXES))})")
    with tqdm(total=len(names), unit="image", disable=None, leave=False) as bar:
        shards = pack_images(
            arguments.images, names, arguments.folder, shard_bytes=arguments.shard_mb << 20, progress=bar.update
        )
    print(f"{arguments.folder}: {len(shards):,} images in {shards.count} shards ({time.monotonic() - start:.1f} s)")
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    with tqdm(unit="image", disable=None, leave=False) as bar:
        counts = unpack_parquet(arguments.parquet, arguments.folder, bar.update)
    parts = [f"{split} {count:,} images" for split, count in counts.items()]
    print(f"{arguments.folder}: {'; '.join(parts)} ({time.monotonic() - start:.1f} s)")
    print(f"python3 scripts/check_dataset.py --data-path {arguments.folder}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    shards = open_shards(arguments.folder)
    with tqdm(unit="piece", disable=None, leave=False) as bar:
        lines = damaged(arguments.folder, bar.update) if shards is None else shards.damaged(bar.update)
    for line in lines:
        print(f"error: {line}")
    print(f"{arguments.folder}: {len(lines)} faults")
    return 1 if lines else 0


def _locate(arguments: argparse.Namespace) -> int:
    relocate(arguments.folder, None if arguments.location == "here" else arguments.location)
    shards = open_shards(arguments.folder)
    assert shards is not None
    for line in shards.faults():
        print(f"error: {line}")
    return 1 if shards.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
