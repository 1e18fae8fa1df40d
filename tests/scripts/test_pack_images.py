"""scripts/pack_images.py: packs, checks, and notes where the shards are."""

import shutil

from PIL import Image

from data.images.shards import open_shards


def test_images_are_packed_checked_and_located(program, tmp_path, capsys):
    images, packed, elsewhere = tmp_path / "images", tmp_path / "packed", tmp_path / "elsewhere"
    images.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(images / f"{number}.png")
    assert program("pack_images", "pack", images, packed, "--shard-mb", 1) == 0
    assert "5 images in 1 shards" in capsys.readouterr().out
    assert program("pack_images", "pack", images, packed) == 1
    assert "not empty" in capsys.readouterr().err
    assert program("pack_images", "check", packed) == 0
    elsewhere.mkdir()
    assert program("pack_images", "locate", packed, elsewhere) == 1
    assert "shard-000000.tar is missing" in capsys.readouterr().out
    shutil.move(packed / "shard-000000.tar", elsewhere)
    assert program("pack_images", "locate", packed, elsewhere) == 0
    assert open_shards(packed).content("3.png") == (images / "3.png").read_bytes()
    (elsewhere / "shard-000000.tar").write_bytes(b"\1" + (elsewhere / "shard-000000.tar").read_bytes()[1:])
    assert program("pack_images", "check", packed) == 1
    assert "error: shard-000000.tar is damaged" in capsys.readouterr().out
    assert program("pack_images", "check", images) == 1
