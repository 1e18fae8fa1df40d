"""What is wrong with the command line shows before data are looked for, and once."""

import json
import shutil

import pytest

from detection.engine import RunError


def test_a_mistyped_model_is_told_before_missing_data(start, tmp_path):
    with pytest.raises(RunError, match="did you mean 'faster_rcnn_r50_fpn'"):
        start(tmp_path / "run", "--model", "faster_rcn_r50_fpn", "--data-path", tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_model_setting_of_another_kind_is_told_before_missing_data(resume, start, tmp_path):
    words = ["--data-path", tmp_path / "nothing", "--model-set", "anchor_sizes='x'", *resume]
    with pytest.raises(RunError, match="anchor_sizes is 'x', expected a list of numbers"):
        start(tmp_path / "run", *words)


def test_classes_that_differ_are_one_message(start, shapes_set, tmp_path):
    shutil.copytree(shapes_set, tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "disc"
    file.write_text(json.dumps(content))
    with pytest.raises(RunError) as failed:
        start(tmp_path / "run", "--data-path", tmp_path / "set")
    assert str(failed.value).count("categories differ") == 1
    assert "error:" not in str(failed.value)  # the program itself begins its message with it
