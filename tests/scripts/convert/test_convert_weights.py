"""scripts/convert_weights.py: exact there and back, and careful with files that exist."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from detection.models import build_model, export_state_dict, load_detector, load_weights
from detection.models.weights.stored import stripped_file

ROOT = Path(__file__).parents[3]
CATEGORIES = {"categories": [{"id": 9, "name": "bird"}, {"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]}


def settings(model):
    return {
        "model_config": asdict(model.config),
        "class_names": ["cat", "dog", "bird"],
        "category_ids": [1, 5, 9],
        "preprocessing": {"min_size": 64, "max_size": 96},
    }


def built(name, seed=0):
    torch.manual_seed(seed)
    return build_model(name, 3, fpn_channels=32, roi_hidden_channels=16)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "layout"), [("faster_rcnn_r18_fpn", "mmdet"), ("fasterrcnn_resnet18_fpn", "torchvision")]
)
def test_a_checkpoint_goes_out_and_the_same_comes_back(name, layout, convert, tmp_path):
    model, average = built(name), built(name, seed=1)
    checkpoint = {"format": "detection-checkpoint", "version": 1, "model": model.state_dict(), "iteration": 3}
    checkpoint |= {"ema": average.state_dict(), **settings(model)}
    torch.save(checkpoint, tmp_path / "last.pt")

    assert convert(tmp_path / "last.pt", "--to", "ours", "--output", tmp_path / "detector.pt") == 0
    stripped = torch.load(tmp_path / "detector.pt", weights_only=True)
    assert set(stripped) == {"format", "version", "model", *settings(model)}
    assert stripped["format"] == "detector-weights" and same(stripped["model"], checkpoint["ema"])

    assert convert(tmp_path / "detector.pt", "--to", layout, "--output", tmp_path / "new" / "theirs.pth") == 0
    theirs = torch.load(tmp_path / "new" / "theirs.pth", weights_only=True)
    if layout == "mmdet":
        assert theirs["meta"]["dataset_meta"]["classes"] == ("cat", "dog", "bird")
    assert same(theirs["state_dict"] if layout == "mmdet" else theirs, export_state_dict(average, layout))
    report = load_weights(model, tmp_path / "new" / "theirs.pth")
    assert not report.missing and not report.unexpected and same(model.state_dict(), average.state_dict())


@pytest.mark.parametrize(
    ("name", "layout"), [("faster_rcnn_r18_fpn", "mmdet"), ("fasterrcnn_resnet18_fpn", "torchvision")]
)
def test_foreign_weights_become_a_detector_and_the_same_weights_again(name, layout, convert, tmp_path):
    torch.manual_seed(0)
    model = build_model(name, 3)
    state = export_state_dict(model, layout)
    torch.save({"state_dict": state} if layout == "mmdet" else state, tmp_path / "theirs.pth")
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))

    options = ("--to", "ours", "--model", name, "--categories", tmp_path / "categories.json", "--min-size", "320")
    assert convert(tmp_path / "theirs.pth", *options, "--output", tmp_path / "detector.pt") == 0
    detector = load_detector(tmp_path / "detector.pt")
    assert detector.class_names == ("cat", "dog", "bird") and detector.category_ids == (1, 5, 9)
    assert (detector.min_size, detector.max_size) == (320, 1333)
    assert detector.model.config == model.config
    assert same(detector.model.state_dict(), model.state_dict())

    assert convert(tmp_path / "detector.pt", "--to", layout, "--output", tmp_path / "again.pth") == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert same(again["state_dict"] if layout == "mmdet" else again, state)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mask_rcnn_r50_fpn", "mmdet"),
        ("cascade_mask_rcnn_r50_fpn", "mmdet"),
        ("maskrcnn_resnet50_fpn", "torchvision"),
    ],
)
def test_the_masks_of_foreign_weights_stay_where_no_model_is_named(name, layout, convert, tmp_path):
    model = build_model(name, 3)
    torch.save(export_state_dict(model, layout), tmp_path / "theirs.pth")
    (tmp_path / "categories.json").write_text(json.dumps(CATEGORIES))
    options = ("--to", "ours", "--categories", tmp_path / "categories.json", "--output", tmp_path / "detector.pt")
    assert convert(tmp_path / "theirs.pth", *options) == 0
    assert same(load_detector(tmp_path / "detector.pt").model.state_dict(), model.state_dict())


def test_weights_of_a_model_with_other_settings_become_a_detector_with_these(convert, tmp_path, capsys):
    model = build_model("faster_rcnn_r18_fpn", 3, fpn_channels=64, roi_hidden_channels=16, fpn_norm="gn")
    state = export_state_dict(model, "mmdet")
    torch.save({"state_dict": state, "meta": {"CLASSES": ("cat", "dog", "bird")}}, tmp_path / "gn.pth")
    words = [tmp_path / "gn.pth", "--to", "ours", "--output", tmp_path / "a.pt", "--model", "faster_rcnn_r18_fpn"]
    words += ["--model-set", "fpn_channels=64", "--model-set", "roi_hidden_channels=16"]
    assert convert(*words) == 2
    assert "--model-set what is different, such as norm=gn" in capsys.readouterr().err
    assert convert(*words, "--model-set", "fpn_norm=gn") == 0
    assert same(load_detector(tmp_path / "a.pt").model.state_dict(), model.state_dict())


def test_an_existing_file_is_kept_unless_told_otherwise(convert, tmp_path, capsys):
    model = built("faster_rcnn_r18_fpn")
    torch.save(stripped_file(model.state_dict(), **settings(model)), tmp_path / "detector.pt")
    (tmp_path / "out.pth").write_text("precious")
    command = (tmp_path / "detector.pt", "--to", "mmdet", "--output", tmp_path / "out.pth")
    assert convert(*command) == 2
    assert (tmp_path / "out.pth").read_text() == "precious"
    assert "--overwrite" in capsys.readouterr().err
    assert convert(*command, "--overwrite") == 0
    assert "state_dict" in torch.load(tmp_path / "out.pth", weights_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector.pt", "out.pth"]


def test_a_folder_that_cannot_be_made_is_one_line(convert, tmp_path, capsys):
    model = built("faster_rcnn_r18_fpn")
    torch.save(stripped_file(model.state_dict(), **settings(model)), tmp_path / "detector.pt")
    assert convert(tmp_path / "detector.pt", "--to", "mmdet", "--output", tmp_path / "detector.pt" / "out.pth") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_file_can_be_converted_in_place(convert, tmp_path):
    model = built("faster_rcnn_r18_fpn")
    torch.save(stripped_file(model.state_dict(), **settings(model)), tmp_path / "detector.pt")
    assert convert(tmp_path / "detector.pt", "--to", "ours", "--output", tmp_path / "detector.pt", "--overwrite") == 0
    assert same(load_detector(tmp_path / "detector.pt").model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "give --categories"),
        ({"meta": {"CLASSES": ("cat", "dog")}}, "2 class names for a head of 3"),
        ({"meta": {"CLASSES": ("cat", "dog", "bird")}}, "not the whole of a faster_rcnn_r50_fpn"),
    ],
)
def test_what_a_detector_lacks_is_named(change, message, convert, tmp_path, capsys):
    torch.save(
        {"state_dict": export_state_dict(built("faster_rcnn_r18_fpn"), "mmdet"), **change}, tmp_path / "theirs.pth"
    )
    assert convert(tmp_path / "theirs.pth", "--to", "ours", "--output", tmp_path / "out.pt") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.slow
def test_it_runs_as_a_program_uninstalled(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "convert_weights.py"), "nowhere.pth", "--to", "mmdet"]
    result = subprocess.run([*command, "--output", "out.pth"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: there is no weight file nowhere.pth\n"
