"""A run on a folder of another layout: said at the start, found again by a resume, without traces of a dry run."""

import shutil

import pytest

from detection.config import ConfigError, parse_arguments
from detection.engine import RunError
from tests.data.layouts import exports


@pytest.fixture
def yolo_set(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    exports.yolo_class_list(tmp_path / "things")
    return tmp_path / "things"


def test_a_resume_finds_the_same_data_after_the_cache_is_gone(
    yolo_set, start, start_and_kill, load, same_state, tmp_path, capsys
):
    words = ["--data-path", yolo_set, "--min-size", "33", "--max-size", "64", "--checkpoint-iterations", "1"]
    assert start(tmp_path / "whole", *words) == 0
    said = capsys.readouterr().out.splitlines()
    first = next(place for place, line in enumerate(said) if line.startswith("found: "))
    assert said[first] == f"found: YOLO in {yolo_set}: train 9 images, 18 boxes; val 1 image, 2 boxes; 2 classes"
    assert said[first + 1] == "       by seed 0 and file name, 0.1 of the images to validate on"
    start_and_kill(4, tmp_path / "run", *words)
    shutil.rmtree(tmp_path / "cache")
    assert start(tmp_path / "run", *words, "--resume") == 0
    assert "content is not that of the checkpoint" not in capsys.readouterr().out
    one, other = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "run"))
    same_state(one["model"], other["model"])


def test_copies_of_training_images_in_the_validation_split_are_a_warning(start, tmp_path, capsys):
    exports.yolo_roboflow(tmp_path / "set")
    (train, *_), (val, *_) = (sorted((tmp_path / "set" / name / "images").iterdir()) for name in ("train", "valid"))
    shutil.copy(train, val)
    start(tmp_path / "run", "--data-path", tmp_path / "set", "--min-size", "33", "--max-size", "64", "--dry-run")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "[copy-in-val]" in line]
    assert train.name in warning and val.name in warning


def test_a_dry_run_makes_no_shapes_set_and_plans_with_it(start, tmp_path, capsys):
    start(tmp_path / "run", "--dataset", "shapes", "--data-path", tmp_path / "shapes", "--dry-run")
    said = capsys.readouterr().out
    assert "val: 150 images" in said and "found:" not in said
    assert not (tmp_path / "shapes").exists()


def test_a_folder_without_the_split_that_is_needed_names_those_there_are(yolo_set, start, tmp_path):
    with pytest.raises(RunError, match=r"no images of a test split, only of train, val\. Give --test-images"):
        start(tmp_path / "run", "--data-path", yolo_set, "--test-only", "--weights", "FasterRCNN")


@pytest.mark.parametrize("words", ["--val-fraction 0.2", "--split-seed 1", "--data-format voc"])
def test_options_of_the_folder_without_effect_are_refused(words):
    with pytest.raises(ConfigError, match=f"{words.split()[0]} is for the folder of --data-path"):
        parse_arguments(["--train-images", "a", "--train-annotations", "b", *words.split()])
