"""scripts/export.py: what is written, what it is compared with, and what is refused."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection.models import load_detector

SCRIPTS = Path(__file__).parents[2] / "scripts"
CLASS_NAMES = ["person", "race car", "cat"]

# Runs an exported program in a process that knows torch and torchvision alone.
STRANGER = """
import json, sys
import numpy as np, torch, torchvision
assert not any(name.split(".")[0] in ("detection", "data") for name in sys.modules)
files = {"detector.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files).module()
boxes, scores, labels, counts = program(torch.from_numpy(np.load(sys.argv[2]))[None])
count = int(counts[0])
names = json.loads(files["detector.json"])["class_names"]
print(json.dumps([names, boxes[0, :count].tolist(), scores[0, :count].tolist()]))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory, detector_content):
    """A checkpoint with an average, of torchvision's recipe."""
    small = {"fpn_channels": 32, "roi_hidden_channels": 64, "rpn_nms_pre_test": 100, "rpn_proposals_test": 50}
    content = detector_content("fasterrcnn_resnet18_fpn", 0, CLASS_NAMES, [1, 3, 17], detections_per_image=20, **small)
    average = {name: value * 1.01 if value.is_floating_point() else value for name, value in content["model"].items()}
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    torch.save({**content, "format": "detection-checkpoint", "ema": average, "optimizer": {"state": {}}}, path)
    return path


@pytest.fixture
def export(program, weights):
    return lambda *arguments: program("export", "--weights", weights, *arguments)


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """A .pt2 for images of 60 x 80 pixels, and what was said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        main = importlib.import_module("export").main
    path = tmp_path_factory.mktemp("program") / "detector.pt2"
    options = ["--format", "torch", "--size", "60", "80", "--batch-size", "1", "--no-compare"]
    assert main(["--weights", str(weights), "--output", str(path), *options]) == 0
    return path


@pytest.fixture
def reuse_program(script, exported, monkeypatch):
    """Exporting again would take seconds and give the same file."""
    monkeypatch.setattr(script("export"), "save_program", lambda detector, shape, path: shutil.copy(exported, path))


@pytest.mark.slow
def test_a_program_runs_without_this_project_and_finds_the_same(exported, weights, tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-I", "-W", "ignore", "-c", STRANGER, exported, tmp_path / "pixels.npy"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    names, boxes, scores = json.loads(output.splitlines()[-1])
    expected = load_detector(weights).predict(pixels)
    assert names == CLASS_NAMES and len(scores) > 3
    np.testing.assert_allclose(scores, expected["scores"], atol=1e-4)
    np.testing.assert_allclose(boxes, expected["boxes_xyxy"], atol=1e-2)


def test_the_difference_is_printed_and_too_large_a_one_is_exit_status_1(export, reuse_program, tmp_path, capsys):
    options = ["--format", "torch", "--output", tmp_path / "d.pt2", "--size", 60, 80, "--batch-size", 1, "--overwrite"]
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(image)
    assert export(*options, image) == 0
    output = capsys.readouterr().out
    assert "against PyTorch on 1 images" in output and "scores differ by" in output
    assert export(*options, "--box-tolerance", -1) == 1
    captured = capsys.readouterr()
    assert "against PyTorch on 3 images" in captured.out and "more than" in captured.err
    assert (tmp_path / "d.pt2").exists()


def test_a_weights_file_is_all_that_is_needed_and_keeps_the_settings(export, weights, tmp_path, capsys):
    output = tmp_path / "new" / "detector.pt"
    settings = ["--score-threshold", 0.25, "--nms-iou", 0.4, "--max-detections", 7, "--min-size", 48]
    assert export("--format", "weights", "--output", output, *settings) == 0
    assert "3 classes" in capsys.readouterr().out
    detector, source = load_detector(output), load_detector(weights)
    config = detector.model.config
    assert (config.score_threshold, config.nms_iou, config.detections_per_image) == (0.25, 0.4, 7)
    assert (detector.min_size, detector.max_size, detector.class_names) == (48, 96, tuple(CLASS_NAMES))
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(tensor, detector.model.state_dict()[name])
    assert output.stat().st_size < 0.6 * weights.stat().st_size
    assert [path.name for path in output.parent.iterdir()] == ["detector.pt"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_packages_names_the_remedy(export, tmp_path, monkeypatch, capsys, package):
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None if name == package else type(sys)(name))
    assert export("--format", "onnx", "--output", tmp_path / "d.onnx", "--no-compare") == 2
    error = capsys.readouterr().err
    assert f"the package {package}, which is not installed" in error and "[export]" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--output", "d.pt"], "end in .onnx"),
        (["--format", "weights", "--output", "there.pt"], "there.pt exists"),
        (["--format", "weights", "--output", "d.pt", "--batch-size", "2"], "no graph"),
        (["--format", "weights", "--output", "d.pt", "there.pt"], "no graph"),
        (["--format", "weights", "--output", "d.pt", "--min-size", "500"], "above the limit of the longer"),
        (["--format", "torch", "--output", "d.pt2", "--no-compare", "there.pt"], "--no-compare forbids"),
        (["--format", "torch", "--output", "d.pt2", "absent.jpg"], "absent.jpg: no such file"),
        (["--format", "torch", "--output", "d.pt2", "there.pt"], "there.pt"),
        (["--format", "onnx", "--output", "d.onnx", "--device", "cuda"], "--device goes with --format torch"),
        (["--format", "weights", "--output", "d.pt", "--weights", "there.pt"], "there.pt"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(export, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt").write_bytes(b"something")
    assert export(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]
