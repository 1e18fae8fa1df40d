"""A training on a packed set, without the JSON files, has the bits of the one on files."""

from pathlib import Path

import pytest

from data import read_coco
from data.layouts.found_set import find_set
from data.layouts.packed_set import write_set
from detection.engine import RunError


@pytest.fixture
def packed_set(shapes_set, tmp_path) -> Path:
    found = find_set(shapes_set, tmp_path / "cache").splits
    splits = {name: (read_coco(files.annotations, masks=True), files.images) for name, files in found.items()}
    write_set(tmp_path / "packed", splits, shard_bytes=20_000)
    (tmp_path / "packed").rename(tmp_path / "shapes")
    return tmp_path / "shapes"


def test_a_packed_set_trains_as_files_do_to_the_bit(
    start, finished, packed_set, shapes_set, tmp_path, records_of, load, same_state
):
    assert start(tmp_path / "run", "--data-path", packed_set, "--workers", 2) == 0
    assert records_of(tmp_path / "run") == records_of(finished)
    first, second = (load(folder / "checkpoints" / "last.pt") for folder in (finished, tmp_path / "run"))
    same_state(first["model"], second["model"])
    same_state(first["optimizer"], second["optimizer"])
    # A resume takes either for the same data.
    assert start(tmp_path / "run", "--data-path", shapes_set, "--workers", 2, "--resume") == 0


def test_a_lost_shard_ends_the_start(start, packed_set, tmp_path):
    (packed_set / "train" / "shard-000001.tar").unlink()
    with pytest.raises(RunError, match=r"shard-000001\.tar is missing"):
        start(tmp_path / "run", "--data-path", packed_set)
