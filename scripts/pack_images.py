"""A folder of images as a few large tar shards, which train.py takes in its place.

    python3 scripts/pack_images.py pack datasets/coco/train2017 packed/train2017
    python3 scripts/pack_images.py check packed/train2017
    python3 scripts/pack_images.py locate packed/train2017 s3://bucket/coco/train2017

pack writes the images, sorted by name, and an index. check reads everything and compares checksums. locate notes
where the tar files are, if they do not stay beside the index: another folder, or an object store's address for fsspec.

Exit status: 0 done or sound, 1 something is wrong, 2 a wrong command.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

import checkout  # noqa: F401
from data.images.files import IMAGE_SUFFIXES, walk
from data.images.shards import ShardsError, open_shards, pack_images, relocate


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write the shards of a folder of images")
    pack.add_argument("images", type=Path, help="folder of images; those in folders below are taken too")
    pack.add_argument("folder", type=Path, help="a new folder for the shards")
    pack.add_argument("--shard-mb", type=int, default=1024, help="megabytes of a shard, about [1024]")
    check = commands.add_parser("check", help="read all shards and compare their checksums")
    check.add_argument("folder", type=Path)
    locate = commands.add_parser("locate", help="note where the tar files are")
    locate.add_argument("folder", type=Path, help="the folder with the index")
    locate.add_argument("location", help="a folder, an address for fsspec, or 'here'")
    arguments = parser.parse_args(argv)
    try:
        return {"pack": _pack, "check": _check, "locate": _locate}[arguments.command](arguments)
    except (ShardsError, OSError) as error:
        print(f"pack_images: {error}", file=sys.stderr)
        return 1


def _pack(arguments: argparse.Namespace) -> int:
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


def _check(arguments: argparse.Namespace) -> int:
    shards = open_shards(arguments.folder)
    if shards is None:
        raise ShardsError(f"{arguments.folder}: no shards were packed into it")
    with tqdm(unit="piece", disable=None, leave=False) as bar:
        damaged = shards.damaged(bar.update)
    for line in damaged:
        print(f"error: {line}")
    print(f"{arguments.folder}: {len(shards):,} images in {shards.count} shards, {len(damaged)} faults")
    return 1 if damaged else 0


def _locate(arguments: argparse.Namespace) -> int:
    relocate(arguments.folder, None if arguments.location == "here" else arguments.location)
    shards = open_shards(arguments.folder)
    assert shards is not None
    for line in shards.faults():
        print(f"error: {line}")
    return 1 if shards.faults() else 0


if __name__ == "__main__":
    sys.exit(main())
