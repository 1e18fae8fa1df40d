"""scripts/plot_schedule.py: the table, the image, its errors."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from schedules import load_schedule

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_schedule.py"


def run(*arguments, cwd):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_the_table_holds_every_iteration_exactly_and_the_image_opens(tmp_path):
    pytest.importorskip("matplotlib")
    done = run(
        "--schedule", "20e", "--iterations-per-epoch", 30, "--batch-size-total", 8,
        "--csv", "out/lr.csv", "--png", "out/lr.png", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = list(csv.reader((tmp_path / "out" / "lr.csv").open()))
    schedule = load_schedule("20e").scaled(8)
    assert rows[0] == ["iteration", "epoch", "lr"]
    assert rows[1:] == [[str(i), str(i // 30), repr(schedule.learning_rate(i, 30))] for i in range(600)]
    with Image.open(tmp_path / "out" / "lr.png") as image:
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_a_wrong_schedule_ends_with_one_line(tmp_path):
    done = run("--schedule", "4x", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 4x: does not exist")
    assert "Traceback" not in done.stderr
    done = run("--png", "lr.svg", cwd=tmp_path)
    assert done.returncode == 2 and "lr.svg does not end in .png: an image is written as PNG" in done.stderr
    done = run("--iterations-per-epoch", 10**9, cwd=tmp_path)
    assert done.returncode == 2 and "give a smaller --iterations-per-epoch" in done.stderr
    done = run("--set", "param_scheduler.0.begin=600", cwd=tmp_path)
    assert done.returncode == 2
    assert "param_scheduler.0" in done.stderr


def test_overrides_are_printed_and_used(tmp_path):
    done = run("--iterations-per-epoch", 5, "--set", "max_epochs=2", "--csv", "lr.csv", cwd=tmp_path)
    assert "train_cfg.max_epochs: 12 -> 2" in done.stdout
    assert len((tmp_path / "lr.csv").read_text().splitlines()) == 11
