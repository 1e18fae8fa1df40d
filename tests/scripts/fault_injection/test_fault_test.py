"""scripts/fault_test.py would notice: a changed bit, a doubled point, a lost checkpoint, an unnamed damage.

The whole program, with real kills, is a step of .ci/run.
"""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from detection.engine.state.checkpoint import FORMAT, VERSION, CheckpointError, load_checkpoint
from tests.engine.state.checkpoint_states import state_at


def state(iteration: int, weight: float, output_dir: str) -> dict:
    config = {"model": {"weights": "none"}, "output": {"output_dir": output_dir, "resume": None}, "train": {"seed": 0}}
    weights = {"weight": torch.tensor([weight, float("nan")]), "many": torch.zeros(5000)}
    return {"format": FORMAT, "version": VERSION, **state_at(iteration, config=config, model=weights)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What a training of two iterations might leave."""
    folder = tmp_path / "one"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(state(2, 1.0, "one"), folder / "checkpoints" / "last.pt")
    (folder / "checkpoints" / "epoch_0001.pt").hardlink_to(folder / "checkpoints" / "last.pt")
    torch.save(state(1, 0.5, "one"), folder / "checkpoints" / "previous.pt")
    records = [{"kind": "train", "iteration": i, "loss": 1.0 - i / 3, "data_seconds": i * 0.1} for i in range(2)]
    records.append({"kind": "val", "iteration": 1, "mAP": 0.25, "seconds": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "detections_val.json").write_text("[]")
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for record in records[:2]:
            board.add_scalar("train/loss", record["loss"], record["iteration"])
    return folder


@pytest.fixture
def twin(output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(output, tmp_path / "other"))


def test_equal_trainings_differ_in_nothing_whatever_the_clock_and_the_folder_were(script, output, twin):
    compare = script("fault_injection.comparison").differences
    torch.save(state(2, 1.0, "other"), twin / "checkpoints" / "last.pt")
    text = (twin / "metrics.jsonl").read_text()
    (twin / "metrics.jsonl").write_text(text.replace('"data_seconds": 0.1', '"data_seconds": 7.5'))
    assert compare(output, twin) == []


def changed_weight(folder: Path) -> None:
    value = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    torch.save(state(2, value, "other"), folder / "checkpoints" / "last.pt")


def missing_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "epoch_0001.pt").unlink()


def changed_record(folder: Path) -> None:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("0.25", "0.26"))


def doubled_record(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], lines[1], lines[2]]))


def doubled_point(folder: Path) -> None:
    with SummaryWriter(str(folder / "tensorboard"), filename_suffix=".later") as board:
        board.add_scalar("train/loss", 1.0 - 1 / 3, 1)


def other_detections(folder: Path) -> None:
    (folder / "detections_val.json").write_text("[ ]")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_weight, "last.pt/model/weight"),
        (missing_checkpoint, "epoch_0001.pt"),
        (changed_record, "metrics.jsonl/2/mAP"),
        (doubled_record, "metrics.jsonl: 3 entries and 4 entries"),
        (doubled_point, "train/loss has step 1 twice"),
        (other_detections, "detections_val.json"),
    ],
)
def test_whatever_differs_is_found_and_named(script, output, twin, change, named):
    change(twin)
    assert any(named in line for line in script("fault_injection.comparison").differences(output, twin))


@pytest.mark.parametrize(
    ("iterations", "before", "after", "is_lost"),
    [
        (7, (4, True), (6, True), False),
        (7, (4, True), (4, True), False),  # the save at 6 was under way
        (8, (4, True), (4, True), False),  # iteration 7 is recorded, its save not begun
        (9, (4, True), (4, True), True),
        (7, (6, True), (4, True), True),
        (10, (10, True), (10, False), True),  # the validated one is gone
        (1, (0, False), (0, False), False),
    ],
)
def test_a_kill_is_lost_where_less_is_on_the_disk_than_must_be(script, iterations, before, after, is_lost):
    kill = interruption(script, reached=iterations)
    assert bool(script("fault_injection.interruptions").loss(kill, before, after, 2)) == is_lost


def test_every_kind_of_damage_hits_all_names_of_the_newest_file_and_makes_it_unreadable(script, output, tmp_path):
    corruptions = script("fault_injection.corruptions")
    for number, kind in enumerate(corruptions.KINDS * 3):
        copy = tmp_path / f"copy_{number}"
        corruptions.copy_run(output, copy)
        assert load_checkpoint(copy / "checkpoints" / "last.pt").state["iteration"] == 2
        damage = corruptions.damage(copy, kind, random.Random(number))
        assert damage.names == ["epoch_0001.pt", "last.pt"]
        assert corruptions.newest_on_disk(copy, damage.names)[0] == 1
        for name in damage.names:
            with pytest.raises(CheckpointError):
                load_checkpoint(copy / "checkpoints" / name)
    assert load_checkpoint(output / "checkpoints" / "last.pt").state["iteration"] == 2


def interruption(script, **fields):
    return script("fault_injection.interruptions").Interruption("1 process", "SIGKILL", "save", "all", **fields)


@pytest.fixture
def record(script) -> dict:
    """One training that was killed once."""
    training = script("fault_injection.interruptions").InterruptedTraining(
        "1 process", [interruption(script, reached=5, saved=4, half_written=True, resumed_at=4)]
    )
    return {
        "command": "python x",
        "date": "2026-01-01",
        "minutes": 2.0,
        "git": {"commit": "abc", "modified": False},
        "hardware": {"cpu": "a CPU", "cpu_cores": 2, "load_average": [1.0]},
        "versions": {"torch": "2.8"},
        "device": "cpu",
        "settings": {"seed": 0},
        "trainings": [asdict(training)],
        "interrupted_twice": [],
        "corruptions": [],
        "all_broken": "",
        "disk": [],
    }


def test_the_report_counts_every_fault(script, record):
    report, interruptions = script("fault_injection.report"), script("fault_injection.interruptions")
    assert report.faults(record) == []
    bad = interruptions.InterruptedTraining("1 process", [interruption(script, reached=9, fault="gone")])
    bad.interruptions.append(interruptions.Interruption("1 process", "SIGHUP", "training", "rank 0", 3, 4))
    bad.differences = ["last.pt/model/weight: another tensor"]
    record["trainings"].append(asdict(bad))
    assert len(report.faults(record)) == 2
    text = report.page(record, "a machine")
    assert "## 2 kills: 1 lost, 1 different" in text
    assert "another tensor" in text
    assert "## 1 signals: 0 faults" in text


def part(record: dict, seed: int, **other) -> dict:
    return {**record, "settings": {"seed": seed}, **other}


def test_parts_of_one_commit_add_up(script, record, tmp_path, capsys):
    files = [tmp_path / f"{seed}.json" for seed in range(3)]
    for seed, file in enumerate(files):
        file.write_text(json.dumps(part(record, seed)))
    assert script("fault_test").main(["--merge", *map(str, files), "--report", str(tmp_path / "report.md")]) == 0
    assert "## 3 kills: 0 lost, 0 different" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"git": {"commit": "def", "modified": False}}, "different commit"),
        ({"git": {"commit": "abc", "modified": True}}, "different commit"),
        ({"hardware": {"cpu": "another", "cpu_cores": 2}}, "different hardware"),
        ({"versions": {"torch": "2.9"}}, "different versions"),
        ({"settings": {"seed": 1}}, "the same seed"),
    ],
)
def test_parts_that_do_not_belong_together_are_not_merged(script, record, other, named):
    report = script("fault_injection.report")
    with pytest.raises(report.MergeError, match=named):
        report.merged([part(record, 1), part(record, 2, **other)])


def test_a_folder_that_holds_something_is_not_used(script, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="2"):
        script("fault_test").main(["--work-dir", str(tmp_path)])
    assert "not empty" in capsys.readouterr().err
