"""Shards and files are the same images: bytes, checks, a set's pixels; faults of shards are named before a training."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import CocoDataset, make_shapes, read_coco
from data.coco.checks import check_files, check_split
from data.images.decode import read_image
from data.images.files import IMAGE_SUFFIXES, walk
from data.images.shards import Shards, ShardsError, open_shards, pack_images, relocate


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of images with one that is deep in folders, and has a name beyond tar's 100 characters."""
    folder = (
        make_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=12, num_val=1, size=(64, 64)) / "train2017"
    )
    deep = folder / "ü" / ("x" * 120)
    deep.mkdir(parents=True)
    (deep / "a.png").write_bytes(next(folder.glob("0*")).read_bytes() + b"more")
    return folder


def names_of(images: Path) -> list[str]:
    return [path.relative_to(images).as_posix() for path in walk(images, IMAGE_SUFFIXES)]


@pytest.fixture
def packed(images, tmp_path) -> Path:
    size = sum((images / name).stat().st_size for name in names_of(images))
    pack_images(images, names_of(images), tmp_path / "packed", shard_bytes=size // 3)
    return tmp_path / "packed"


def test_every_image_is_there_to_the_byte_for_us_and_for_tar(images, packed, tmp_path):
    shards = open_shards(packed)
    assert shards is not None and shards.count >= 3 and len(shards) == 13
    with_tar = {}
    for file in sorted(packed.glob("shard-*.tar")):
        with tarfile.open(file) as tar:
            with_tar |= {member.name: tar.extractfile(member).read() for member in tar}
    assert list(with_tar) == names_of(images)
    for name in names_of(images):
        assert shards.content(name) == (images / name).read_bytes() == with_tar[name]
    assert shards.content(f"./{names_of(images)[0]}") == with_tar[names_of(images)[0]]
    assert shards.find(["no", names_of(images)[0]])[0] == -1
    with pytest.raises(FileNotFoundError):
        shards.content("no.jpg")
    again = tmp_path / "again"
    pack_images(images, names_of(images), again, shard_bytes=sum(map(len, with_tar.values())) // 3)
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in packed.iterdir()
    }
    assert shards.damaged() == []


def test_a_set_of_shards_gives_the_pixels_of_the_files_and_passes_the_checks(images, packed):
    annotations = read_coco(images.parent / "annotations" / "instances_train2017.json")
    assert check_split(annotations, packed, training=True) == check_split(annotations, images, training=True)
    files, shards = (CocoDataset(folder, annotations, training=True) for folder in (images, packed))
    for index in range(len(files)):
        assert np.array_equal(files.image(index), shards.image(index))
        assert np.array_equal(files.image(index), read_image(shards.path(index)))


def test_many_shards_and_forked_processes_read_at_once(images, tmp_path, monkeypatch):
    monkeypatch.setattr("data.images.shards.MAX_OPEN", 2)
    shards = pack_images(images, names_of(images), tmp_path / "packed", shard_bytes=1)
    assert shards.count == 13
    expected = [(images / name).read_bytes() for name in names_of(images)]
    assert [shards.content(name) for name in names_of(images)] == expected
    child = os.fork()
    if child == 0:
        os._exit(0 if [shards.content(name) for name in reversed(names_of(images))] == expected[::-1] else 1)
    assert [shards.content(name) for name in names_of(images)] == expected
    assert os.waitpid(child, 0)[1] == 0


def test_shards_are_read_from_an_object_store(images, packed):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for file in packed.glob("*.tar"):
        store.pipe_file(f"/bucket/set/{file.name}", file.read_bytes())
        file.unlink()
    relocate(packed, "memory://bucket/set")
    shards = open_shards(packed)
    assert shards is not None and shards.faults() == []
    assert [shards.content(name) for name in names_of(images)] == [(images / n).read_bytes() for n in names_of(images)]
    store.rm("/bucket/set/shard-000001.tar")
    assert shards.faults() == ["shard-000001.tar is missing in memory://bucket/set"]
    relocate(packed, None)
    assert len(open_shards(packed).faults()) == shards.count


def test_lost_and_damaged_shards_are_findings_that_name_them(images, packed):
    annotations = read_coco(images.parent / "annotations" / "instances_train2017.json")
    first, second, *_ = sorted(packed.glob("*.tar"))
    content = first.read_bytes()
    first.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    assert check_files(annotations, packed) == []  # what a look at sizes cannot see
    assert ["is damaged" in line for line in open_shards(packed).damaged()] == [True]
    first.write_bytes(content[:-1])
    second.unlink()
    (finding,) = check_files(annotations, packed)
    assert finding.code == "lost-shard" and finding.count == 2
    assert "shard-000000.tar has" in str(finding) and "shard-000001.tar is missing" in str(finding)


CHANGED_FACTS = {
    "another version": {"version": 9},
    "shards without size": {"shards": [{"name": "shard-000000.tar"}]},
    "shards that are none": {"shards": [1]},
    "location that is none": {"location": 5},
}


@pytest.mark.parametrize("damage", ["no index", "short index", "empty index", "no facts", *CHANGED_FACTS])
def test_an_index_that_cannot_be_read_is_a_finding(images, packed, damage):
    if damage == "no index":
        (packed / "shards.npy").unlink()
    elif damage == "short index":
        (packed / "shards.npy").write_bytes((packed / "shards.npy").read_bytes()[:-30])
    elif damage == "empty index":
        (packed / "shards.npy").write_bytes(b"")
    elif damage in CHANGED_FACTS:
        (packed / "shards.json").write_text(
            json.dumps(json.loads((packed / "shards.json").read_text()) | CHANGED_FACTS[damage])
        )
    else:
        (packed / "shards.json").write_text("[]")
    annotations = read_coco(images.parent / "annotations" / "instances_train2017.json")
    (finding,) = check_files(annotations, packed)
    assert finding.code == "unusable-shards" and "shards" in str(finding)
    assert ("Copy both again" in str(finding)) == (damage != "another version")


def test_an_index_that_names_a_shard_too_many_fails_where_it_is_read(images, packed):
    rows = np.load(packed / "shards.npy")
    rows["shard"] = 99
    np.save(packed / "shards.npy", rows)
    shards = open_shards(packed)
    with pytest.raises(OSError, match="the index of .* is damaged: copy it again"):
        shards.content(names_of(images)[0])
    assert list(shards.entries(names_of(images)[:2])) == [None, None]


def test_nothing_is_overwritten_and_an_unfinished_pack_is_no_set(images, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").touch()
    with pytest.raises(ShardsError, match="not empty"):
        pack_images(images, names_of(images), tmp_path / "used")
    with pytest.raises(ShardsError, match=r"gone\.jpg.*No such file"):
        pack_images(images, [*names_of(images), "gone.jpg"], tmp_path / "new")
    assert open_shards(tmp_path / "new") is None
    with pytest.raises(ShardsError, match="twice"):
        pack_images(images, names_of(images) * 2, tmp_path / "twice")
    with pytest.raises(ShardsError, match="no shards"):
        relocate(tmp_path / "new", None)
    with pytest.raises(ShardsError, match="cannot be read"):
        Shards(tmp_path / "new")
