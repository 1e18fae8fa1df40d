"""What a training tells trackers of one's own, and what they cannot do to it."""

import sys

import pytest

from detection.config import parse_arguments
from detection.engine import run
from detection.errors import DetectionError
from detection.reporting import points_of, read_metrics


class Recorder:
    def __init__(self):
        self.runs, self.figures, self.tags, self.ends = [], [], [], []

    def start(self, run):
        self.runs.append(run)
        return f"number {len(self.runs)}"

    def scalars(self, iteration, values):
        self.figures.append((iteration, dict(values)))

    def images(self, iteration, tag, images):
        self.tags.append((iteration, tag, {image.dtype.name for image in images}))

    def finish(self, is_done):
        self.ends.append(is_done)


class Broken:
    def __getattr__(self, name):
        def call(*words):
            raise RuntimeError(f"{name} does not work")

        return call


def test_trackers_get_all_that_is_logged_and_a_broken_one_changes_nothing(arguments, tmp_path, capsys, records_of):
    recorder, output = Recorder(), tmp_path / "run"
    assert run(parse_arguments(arguments(output, "--max-epochs", "1")), trackers=[recorder, Broken()]) == 0
    assert capsys.readouterr().err.count("tracker Broken: the run could not be begun") == 1
    assert run(parse_arguments(arguments(output, "--resume")), trackers=[recorder]) == 0
    first, second = recorder.runs
    assert (first.name, first.identifier, second.identifier) == ("run", None, "number 1")
    assert (first.iteration, second.iteration) == (0, 3)
    assert first.configuration["config"]["model"]["model"] == "tiny" and "starts" not in first.configuration
    records = read_metrics(output / "metrics.jsonl")
    assert recorder.figures == [(record["iteration"], points_of(record)) for record in records]
    assert recorder.figures[0][1]["train/lr"] > 0 and "val/mAP" in recorder.figures[3][1]
    tags = [(0, "train/batch"), (2, "val/detections"), (5, "val/detections")]
    assert recorder.tags == [(*each, {"uint8"}) for each in tags]
    assert recorder.ends == [True, True]


@pytest.mark.parametrize("ranks", [2, 3])
def test_of_several_processes_the_main_one_alone_tells_trackers(ranks, program, arguments, tmp_path, records_of):
    words = arguments(tmp_path / "run", "--max-epochs", "1")
    with program("metrics/tracked_ranks.py", tmp_path, *words, ranks=ranks) as processes:
        for process in processes:
            assert (process.wait(timeout=300), process.stderr.read()) == (0, "")
    assert sorted(file.name for file in tmp_path.glob("*.txt")) == ["0.txt"]
    lines = (tmp_path / "0.txt").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("start None", "finish True")
    told = [int(line.split()[1]) for line in lines if line.startswith("scalars")]
    assert told == [record["iteration"] for record in records_of(tmp_path / "run")]


def test_a_tracker_that_is_not_installed_ends_the_run_before_it_begins(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DetectionError, match="pip install wandb"):
        start(tmp_path / "run", "--tracker", "wandb")
    assert not (tmp_path / "run").exists()
