import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.reporting import MetricsLog, RunsError, comparison_table, configuration_differences, read_runs

ROOT = Path(__file__).resolve().parents[2]


def make_run(directory, lr, maps, num_iterations=200):
    with closing(MetricsLog(directory / "metrics.jsonl")) as log:
        for iteration in range(num_iterations):
            loss = float("nan") if iteration == 3 else 2 / (1 + lr * iteration)
            log.write(
                {"kind": "train", "epoch": 0, "iteration": iteration, "lr": lr, "loss": loss, "images_per_second": 9.5}
            )
        for epoch, value in enumerate(maps, start=1):
            log.write({"kind": "val", "epoch": epoch, "iteration": 50 * epoch, "mAP": value, "mAP_s": -1.0})
    starts = [{"time": "2026-01-01 00:00:00", "command": ["train.py", "--lr", str(lr)]}]
    config = {
        "lr": lr,
        "seed": 0,
        "starts": starts,
        "model": {"name": "r50", "norm": "bn"} | ({"width": 2} if lr > 0.05 else {}),
        "sizes": [8, 16] if lr > 0.05 else [],
        "steps": [{"type": "LinearLR", "end": 500}, {"type": "MultiStepLR", "milestones": [8, round(100 * lr)]}],
        "settings": [["norm_eps", lr], ["a", [1, 2]]],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def directories(tmp_path):
    return [
        make_run(tmp_path / "a" / "run", 0.02, [0.1, 0.3, 0.25]),
        make_run(tmp_path / "b" / "run", 0.1, [-1.0, 0.2], num_iterations=120),
    ]


def test_the_table_shows_each_run_with_the_figures_of_its_best_validation(directories):
    header, first, second = [line.split() for line in comparison_table(read_runs(directories)).splitlines()]
    assert header[:4] == ["run", "iterations", "loss", "images/s"]
    mean_loss = np.mean([2 / (1 + 0.02 * iteration) for iteration in range(100, 200)])
    assert first[:6] == ["a/run", "200", f"{mean_loss:.4f}", "9.5", "3", "0.300"]
    assert first[-1] == "0.250"
    assert (second[0], second[1], second[4], second[5]) == ("b/run", "120", "3", "0.200")


def test_the_best_validation_goes_by_the_run_s_own_metric(directories):
    path = directories[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"train": {"best_metric": "loss"}}}))
    with closing(MetricsLog(directories[0] / "metrics.jsonl")) as log:
        for epoch, loss in enumerate((0.4, float("nan"), 0.2, 0.3), start=4):
            log.write({"kind": "val", "epoch": epoch, "iteration": 50 * epoch, "mAP": 0.1, "loss": loss})
    _, first, second, note = comparison_table(read_runs(directories)).splitlines()
    assert (first.split()[4], second.split()[4]) == ("7", "3")
    assert note == "note: the best epoch of a/run is that of loss (--best-metric)"


def test_only_settings_that_differ_are_listed_also_those_of_one_run_alone(directories):
    lines = configuration_differences(read_runs(directories)).splitlines()
    assert [line.split() for line in lines] == [
        ["setting", "a/run", "b/run"],
        ["lr", "0.02", "0.1"],
        ["sizes", "none", "8", "16"],
        ["steps.1.milestones", "8", "2", "8", "10"],
        ["settings.norm_eps", "0.02", "0.1"],
        ["model.width", "-", "2"],
    ]
    assert configuration_differences(read_runs(directories)[:1] * 2) == "no setting differs"


def test_a_run_without_a_validation_is_compared_too(directories, tmp_path):
    directories.append(make_run(tmp_path / "c" / "run", 0.3, []))
    line = comparison_table(read_runs(directories)).splitlines()[3].split()
    assert (line[0], line[1], line[-1]) == ("c/run", "200", "-")


def test_a_directory_that_is_no_run_and_one_given_twice_are_refused(directories, tmp_path):
    with pytest.raises(RunsError, match="no metrics.jsonl"):
        read_runs([directories[0], tmp_path])
    with pytest.raises(RunsError, match="twice"):
        read_runs([directories[0], directories[0]])


@pytest.mark.slow
def test_the_script_prints_table_and_differences_and_draws_the_image(directories, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "comparison.png"
    command = [sys.executable, "scripts/compare_runs.py", *map(str, directories), "--png", str(plot)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    command[-1] = "comparison.xyz"
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2 and "comparison.xyz does not end in .png" in refused.stderr
    assert "a/run" in result.stdout
    assert "model.width" in result.stdout
    with Image.open(plot) as image:
        assert image.width > 1000
        # Both runs' colors (matplotlib's first two) stand in all three panels.
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for color in ((31, 119, 180), (255, 127, 14)):
        columns = np.flatnonzero((abs(pixels - color).sum(axis=2) < 30).any(axis=0))
        panels = set((columns * 3 // pixels.shape[1]).tolist())
        assert panels == {0, 1, 2}


def test_figures_of_other_numbers_of_images_are_told_apart(directories):
    runs = read_runs(directories)
    assert "note:" not in comparison_table(runs)
    for run, number in zip(runs, (87, 20), strict=True):
        run.val[-1]["num_images"] = number
    last = comparison_table(runs).splitlines()[-1]
    assert last.startswith("note: figures of different numbers of validation images") and "a/run 87, b/run 20" in last
