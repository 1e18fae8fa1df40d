"""scripts/pack_dataset.py: packs sets and folders of images, checks, and notes where the shards are."""

import shutil

from PIL import Image

from data import read_coco
from data.images.shards import open_shards
from data.layouts.found_set import find_set
from tests.data.convert.test_parquet import write_file
from tests.data.layouts import exports
from tests.data.layouts.exports import image


def test_images_are_packed_checked_and_located(program, tmp_path, capsys):
    images, packed, elsewhere = tmp_path / "images", tmp_path / "packed", tmp_path / "elsewhere"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(images / f"{number}.png")
    assert program("pack_dataset", "images", images, packed, "--shard-mb", 1) == 0
    assert "5 images in 1 shards" in capsys.readouterr().out
    assert program("pack_dataset", "images", images, packed) == 1
    assert "not empty" in capsys.readouterr().err
    assert program("pack_dataset", "check", packed) == 0
    elsewhere.mkdir()
    assert program("pack_dataset", "locate", packed, elsewhere) == 1
    assert "shard-000000.tar is missing" in capsys.readouterr().out
    shutil.move(packed / "shard-000000.tar", elsewhere)
    assert program("pack_dataset", "locate", packed, elsewhere) == 0
    assert open_shards(packed).content("3.png") == (images / "3.png").read_bytes()
    (elsewhere / "shard-000000.tar").write_bytes(b"\1" + (elsewhere / "shard-000000.tar").read_bytes()[1:])
    assert program("pack_dataset", "check", packed) == 1
    assert "error: shard-000000.tar is damaged" in capsys.readouterr().out
    assert program("pack_dataset", "check", images) == 1


def test_a_set_of_another_layout_is_packed_checked_and_opened_where_it_is_moved(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exports.yolo_ultralytics(tmp_path / "set")
    found = find_set(tmp_path / "set", tmp_path / "cache" / "detection-harness").splits
    expected = {name: read_coco(files.annotations).digest() for name, files in found.items()}
    content = (found["train"].images / read_coco(found["train"].annotations).file_name(0)).read_bytes()
    assert program("pack_dataset", "pack", tmp_path / "set", tmp_path / "packed") == 0
    assert "train 4 images, 8 boxes; val 2 images, 4 boxes" in capsys.readouterr().out
    assert program("pack_dataset", "pack", tmp_path / "set", tmp_path / "packed") == 1
    assert "not empty" in capsys.readouterr().err

    for folder in ("set", "cache"):
        shutil.rmtree(tmp_path / folder)
    moved = (tmp_path / "packed").rename(tmp_path / "moved")
    assert program("pack_dataset", "check", moved) == 0
    opened = find_set(moved, tmp_path / "cache").splits
    assert {name: read_coco(files.annotations).digest() for name, files in opened.items()} == expected
    train = read_coco(opened["train"].annotations)
    assert open_shards(opened["train"].images).content(train.file_name(0)) == content
    assert program("check_dataset", "--data-path", moved) == 0

    (moved / "train" / "shard-000000.tar").write_bytes(b"")
    (moved / "val.packed").write_bytes((moved / "val.packed").read_bytes()[:-1])
    capsys.readouterr()
    assert program("pack_dataset", "check", moved) == 1
    out = capsys.readouterr().out
    assert "error: train: shard-000000.tar has 0 bytes" in out and "val.packed: is cut off or damaged" in out


def test_a_set_with_errors_is_not_packed(program, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exports.coco_own(tmp_path / "set")
    next((tmp_path / "set" / "val2017").iterdir()).unlink()
    assert program("pack_dataset", "pack", tmp_path / "set", tmp_path / "packed") == 1
    assert "image files are missing" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_parquet_files_are_unpacked(program, tmp_path, capsys):
    assert program("pack_dataset", "unpack", tmp_path, tmp_path / "folder") == 1
    assert f"{tmp_path}: no Parquet files there" in capsys.readouterr().err
    content = [image(tmp_path / "source" / "0.png", 0).read_bytes()]
    write_file(tmp_path / "set" / "train.parquet", content)
    assert program("pack_dataset", "unpack", tmp_path / "set", tmp_path / "folder") == 0
    assert "folder: train 1 images" in capsys.readouterr().out
