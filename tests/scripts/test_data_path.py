"""The programs take the folder that train.py takes."""

import json

import pytest

from tests.data.layouts import exports


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    exports.roboflow_coco(tmp_path / "set")
    return tmp_path / "set"


def test_check_dataset_says_what_it_found_and_looks_at_every_split(folder, program, capsys):
    assert program("check_dataset", "--data-path", folder) == 0
    said = capsys.readouterr().out
    assert f"found: Roboflow's COCO export in {folder}: train, val, test" in said and "category 0 'things'" in said
    assert all(f"{split:<8}{count} images" in said for split, count in (("train", 4), ("val", 2), ("test", 2)))
    assert program("check_dataset", "--data-path", folder, "--classes", "key") == 0
    assert "4 annotations (0 crowd), 1 class;" in capsys.readouterr().out
    assert program("check_dataset", "--data-path", folder / "absent") == 1
    assert "no such folder" in capsys.readouterr().err


def test_browse_dataset_shows_a_split_and_its_classes(folder, program, capsys, tmp_path):
    words = ["--data-path", folder, "--split", "test", "--html", tmp_path / "gallery.html"]
    assert program("browse_dataset", *words) == 0
    assert "2 images" in capsys.readouterr().out
    page = (tmp_path / "gallery.html").read_text()
    assert "coin" in page and "things" not in page


def test_benchmarks_read_the_training_images(folder, program, capsys, tmp_path):
    words = ["--data-path", folder, "--batch-size", "2", "--repeats", "1", "--json", tmp_path / "figures.json"]
    words += ["--min-size", "64", "--max-size", "64"]
    assert program("benchmark", "data", *words) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["images"] == 4


@pytest.mark.parametrize(("words", "said"), [((), "give IMAGES, or --data-path"), (("--split", "val"), "give IMAGES")])
def test_predict_needs_images_or_a_folder(words, said, folder, program, capsys):
    assert program("predict", "--weights", "none.pt", *words) == 2
    assert said in capsys.readouterr().err
