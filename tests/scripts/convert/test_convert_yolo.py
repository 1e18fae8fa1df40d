"""scripts/convert_yolo.py: there and back again, splits, and what it never does."""

from pathlib import Path

import pytest
from PIL import Image

from tests.scripts.convert.conversion_sets import content_of, make_set, names_in


def plain_set(root: Path, count: int = 10) -> Path:
    """Images and label files in images and labels, names in classes.txt."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("dog\ncat\n")
    for number in range(count):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(root / "images" / f"p{number}.jpg")
        (root / "labels" / f"p{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.25 0.5\n")
    return root


@pytest.mark.parametrize("options", [[], ["--copy"]])
def test_coco_to_yolo_to_coco_is_exact_for_boxes_in_hundredths_of_a_pixel(options, convert, tmp_path):
    sets = make_set(tmp_path / "set", crowds=False)
    assert convert("from-coco", tmp_path / "yolo", *sets, *options) == 0
    assert (tmp_path / "yolo" / "images" / "train" / "train_0.png").is_symlink() == (not options)
    assert convert("to-coco", tmp_path / "yolo", tmp_path / "back") == 0
    for split in ("train", "val"):
        before = content_of(tmp_path / "set" / f"{split}.json")
        assert content_of(tmp_path / "back" / "annotations" / f"instances_{split}.json") == before


def test_yolo_to_coco_to_yolo_gives_back_the_label_files(convert, tmp_path):
    source = plain_set(tmp_path / "a")
    assert convert("to-coco", source, tmp_path / "coco") == 0
    options = []
    for split in ("train", "val"):
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        options += [f"--{split}-images", source / "images", f"--{split}-annotations", file]
    assert convert("from-coco", tmp_path / "b", *options) == 0
    back = {file.name: file.read_text() for file in (tmp_path / "b" / "labels").rglob("*.txt")}
    assert back == {file.name: file.read_text() for file in (source / "labels").iterdir()}
    assert '0: "dog"' in (tmp_path / "b" / "data.yaml").read_text()


def test_crowds_are_left_out_and_counted(convert, tmp_path, capsys):
    sets = make_set(tmp_path / "set")
    assert convert("from-coco", tmp_path / "yolo", *sets) == 0
    assert "WARNING [crowd-left-out] 1:" in capsys.readouterr().out


def test_splits_of_the_source_stay_unless_a_fraction_is_given(convert, tmp_path):
    sets = make_set(tmp_path / "set", crowds=False)
    assert convert("from-coco", tmp_path / "yolo", *sets) == 0
    assert convert("to-coco", tmp_path / "yolo", tmp_path / "out", "--val-fraction", 0.5) == 0
    names = [names_in(tmp_path / "out" / "annotations" / f"instances_{split}.json") for split in ("train", "val")]
    assert [len(part) for part in names] == [5, 4]  # round() goes to the even of 4.5
    assert all("/" in name for part in names for name in part)  # both folders, below the one that holds them


def test_errors_stop_the_conversion_unless_they_are_to_be_skipped(convert, tmp_path, capsys):
    source = plain_set(tmp_path / "a")
    (source / "labels" / "p1.txt").write_text("7 0.5 0.5 0.1 0.1")
    (source / "labels" / "p99.txt").write_text("0 0.5 0.5 0.1 0.1")
    (source / "images" / "p2.jpg").write_bytes(b"no image")
    assert convert("to-coco", source, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert all(word in said.out for word in ("p1.txt, line 1", "p99.txt", "p2.jpg"))
    assert "3 errors" in said.err and not (tmp_path / "out").exists()
    assert convert("to-coco", source, tmp_path / "out", "--skip-errors") == 0


def test_a_folder_without_any_label_file_is_refused(convert, tmp_path, capsys):
    source = plain_set(tmp_path / "a")
    for file in (source / "labels").iterdir():
        file.unlink()
    assert convert("to-coco", source, tmp_path / "out") == 1
    assert "none of the 10 images has a label file" in capsys.readouterr().err
