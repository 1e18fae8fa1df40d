"""A training on shards, found in a folder as the images would be, has the bits of the one on files."""

import shutil
from pathlib import Path

import pytest

from data.images.files import IMAGE_SUFFIXES, walk
from data.images.shards import pack_images
from detection.engine import RunError


@pytest.fixture
def packed_set(shapes_set, tmp_path) -> Path:
    root = tmp_path / "shapes"
    shutil.copytree(shapes_set / "annotations", root / "annotations")
    for split in ("train2017", "val2017"):
        images = shapes_set / split
        names = [path.relative_to(images).as_posix() for path in walk(images, IMAGE_SUFFIXES)]
        pack_images(images, names, root / split, shard_bytes=20_000)
    return root


def test_shards_train_as_files_do_bit_for_bit(start, finished, packed_set, tmp_path, records_of, load, same_state):
    assert start(tmp_path / "run", "--data-path", packed_set, "--workers", 2) == 0
    assert records_of(tmp_path / "run") == records_of(finished)
    first, second = (load(folder / "checkpoints" / "last.pt") for folder in (finished, tmp_path / "run"))
    same_state(first["model"], second["model"])
    same_state(first["optimizer"], second["optimizer"])


def test_a_lost_shard_ends_the_start(start, packed_set, tmp_path):
    (packed_set / "train2017" / "shard-000001.tar").unlink()
    with pytest.raises(RunError, match=r"shard-000001\.tar is missing"):
        start(tmp_path / "run", "--data-path", packed_set)
