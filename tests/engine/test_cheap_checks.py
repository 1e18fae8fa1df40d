"""What is wrong with the command line shows before data are looked for, and once."""

import json
import shutil
import sys

import pytest

from detection.engine import RunError, build


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


def test_a_backend_that_is_not_installed_is_told_by_a_dry_run(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(RunError, match="needs the package hotcoco"):
        start(tmp_path / "run", "--eval-backend", "hotcoco", "--data-path", tmp_path / "nothing", "--dry-run")


def test_cuda_graphs_on_a_cpu_are_refused_before_missing_data(start, tmp_path):
    with pytest.raises(RunError, match="--cuda-graphs is for GPUs: leave it away on a CPU"):
        start(tmp_path / "run", "--cuda-graphs", "--data-path", tmp_path / "nothing")


def test_float16_on_a_cpu_is_warned_of(start, tmp_path, capsys):
    assert start(tmp_path / "run", "--amp", "fp16", "--dry-run") == 0
    assert (
        "warning: float16 on a CPU takes some forty times as long as float32: use --amp bf16" in capsys.readouterr().out
    )


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_without_instructions_for_it_is_warned_of(start, tmp_path, capsys, monkeypatch, has_instructions):
    monkeypatch.setattr(build, "multiplies_bfloat16", lambda device: has_instructions)
    assert start(tmp_path / "run", "--amp", "bf16", "--dry-run") == 0
    said = "warning: this device has no instructions for bfloat16" in capsys.readouterr().out
    assert said is not has_instructions


def test_images_too_small_to_be_trained_on_are_told_with_the_other_faults_of_the_data(start, shapes_set, tmp_path):
    shutil.copytree(shapes_set, tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["width"] = image["height"] = 8
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"cannot be used as they are:(?s:.*)no image can be trained on"):
        start(tmp_path / "run", "--data-path", tmp_path / "set", "--dry-run")
