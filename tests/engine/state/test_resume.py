"""Going on after a stop: as if nothing had happened, or with a message that says why not."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import WorkerError
from detection.config import ConfigError, parse_arguments
from detection.engine import RunError, run
from detection.engine.evaluator import Evaluator
from detection.engine.metrics.logger import MetricLogger
from detection.engine.trainer import Trainer
from detection.evaluation import read_results
from detection.reporting import TensorBoardLog
from schedules import load_schedule, with_overrides
from tests.engine.tiny_model import Killed

MIXED = ["--max-epochs", "1", "--amp", "bf16", "--ema", "0.9", "--accumulate", "2", "--checkpoint-iterations", "1"]


def steps(output: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [point.step for point in events.Scalars(tag)]


@pytest.fixture
def same_run(records_of, load, same_state):
    """same_run(a, b): fails unless both ended with the same weights, states and records, bit for bit."""

    def compare(one: Path, other: Path) -> None:
        states = [load(folder / "checkpoints" / "last.pt") for folder in (one, other)]
        for state in states:
            del state["config"]  # has the output directory in it
        same_state(*states)
        assert records_of(one) == records_of(other)
        for folder in (one, other):
            iterations = states[0]["iteration"]
            assert steps(folder, "train/loss") == list(range(iterations))
            assert steps(folder, "val/mAP") == [r["iteration"] for r in records_of(folder, "val")]

    return compare


def test_a_cascade_records_the_losses_of_each_stage_and_resumes_to_the_same_bits(
    start, start_and_kill, tmp_path, same_run, records_of
):
    words = ["--model", "tiny_cascade", "--checkpoint-iterations", "1", "--set", "param_scheduler.0.end=2"]
    assert start(tmp_path / "whole", *words) == 0
    start_and_kill(4, tmp_path / "run", *words)
    assert run(parse_arguments(["--resume", str(tmp_path / "run")])) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    for record in records_of(tmp_path / "run", "train"):
        losses = {name: value for name, value in record.items() if name.startswith("loss_")}
        stages = [f"loss_{kind}_s{stage}" for stage in range(3) for kind in ("cls", "bbox")]
        assert list(losses) == ["loss_rpn_cls", "loss_rpn_bbox", *stages]
        assert record["loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
    assert "train/loss_bbox_s2" in EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Tags()["scalars"]


def test_a_model_with_masks_learns_and_is_judged_by_them_and_resumes_to_the_same_bits(
    start, start_and_kill, tmp_path, same_run, records_of
):
    words = ["--model", "tiny_mask", "--checkpoint-iterations", "1", "--set", "param_scheduler.0.end=2", "--val-loss"]
    words += ["--lsj", "128", "--lsj-boxes-of-masks", "--copy-paste"]
    assert start(tmp_path / "whole", *words, "--workers", "1") == 0
    start_and_kill(4, tmp_path / "run", *words)
    assert run(parse_arguments(["--resume", str(tmp_path / "run")])) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert all(record["loss_mask"] > 0 for record in records_of(tmp_path / "run", "train"))
    for record in records_of(tmp_path / "run", "val"):
        assert {"segm_mAP", "segm_AR_100", "segm_per_class", "loss_mask"} <= set(record)
    assert steps(tmp_path / "run", "val/segm_mAP") == [2, 5]
    boxes, masks = (read_results(tmp_path / "run" / f"detections_val{kind}.json") for kind in ("", "_segm"))
    assert np.array_equal(boxes.scores, masks.scores) and np.array_equal(boxes.image_ids, masks.image_ids)
    assert len(masks) > 0 and set(map(tuple, masks.masks.sizes.tolist())) <= {(96, 128), (128, 96)}


def test_a_training_with_masks_needs_outlines(start, shapes_set, tmp_path):
    for split in ("train", "val"):
        content = json.loads((shapes_set / "annotations" / f"instances_{split}2017.json").read_text())
        for record in content["annotations"]:
            record["segmentation"] = []
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    words = ["--train-images", shapes_set / "train2017", "--train-annotations", tmp_path / "train.json"]
    words += ["--val-images", shapes_set / "val2017", "--val-annotations", tmp_path / "val.json"]
    with pytest.raises(
        RunError, match=r"train\.json: no annotation has a mask.*\n.*val\.json: no annotation has a mask"
    ):
        start(tmp_path / "run", "--model", "tiny_mask", *words)


@pytest.mark.parametrize(
    ("killed_at", "saved_each", "resumed_at"),
    [(3, "9", 3), (5, "1", 5), (5, "2", 4)],
    ids=["after an epoch", "in mid-epoch", "an iteration after the last save"],
)
def test_a_killed_run_resumes_to_the_same_bits(
    killed_at, saved_each, resumed_at, start, start_and_kill, finished, tmp_path, same_run, capsys
):
    arguments = ["--checkpoint-iterations", saved_each]
    start_and_kill(killed_at, tmp_path / "run", *arguments)
    capsys.readouterr()
    assert start(tmp_path / "run", *arguments, "--resume") == 0
    assert f"resumed   at iteration {resumed_at} " in capsys.readouterr().out
    same_run(tmp_path / "run", finished)
    starts = json.loads((tmp_path / "run" / "config.json").read_text())["starts"]
    assert [begun["iteration"] for begun in starts] == [0, resumed_at]


def test_a_run_begun_in_an_earlier_order_of_images_goes_on_in_it(
    start, start_and_kill, finished, tmp_path, same_run, records_of, monkeypatch
):
    with monkeypatch.context() as earlier:
        earlier.setattr("detection.engine.train.NEWEST_ORDER", 1)
        assert start(tmp_path / "whole") == 0
        start_and_kill(4, tmp_path / "run", "--checkpoint-iterations", "1")
    assert start(tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert records_of(tmp_path / "run", "train") != records_of(finished, "train")


def test_mixed_precision_average_and_accumulation_resume_to_the_same_bits(start, start_and_kill, tmp_path, same_run):
    assert start(tmp_path / "whole", *MIXED) == 0
    start_and_kill(2, tmp_path / "run", *MIXED)
    assert start(tmp_path / "run", *MIXED, "--resume") == 0
    same_run(tmp_path / "run", tmp_path / "whole")


def test_a_kill_between_an_epochs_save_and_its_validation_is_made_up_for(
    start, finished, tmp_path, monkeypatch, same_run, load
):
    with monkeypatch.context() as context:
        context.setattr(Evaluator, "run", lambda self, model: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            start(tmp_path / "run")
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (state["iteration"], state["validation_due"]) == (3, True)
    assert start(tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "run", finished)


def test_a_kill_between_a_validations_record_and_its_save_repeats_no_record(
    start, finished, tmp_path, monkeypatch, same_run, records_of
):
    plain = MetricLogger.validation

    def validation(self, *arguments):
        plain(self, *arguments)
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(MetricLogger, "validation", validation)
        with pytest.raises(Killed):
            start(tmp_path / "run")
    assert len(records_of(tmp_path / "run", "val")) == 1
    assert start(tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "run", finished)


def test_an_automatic_resume_without_a_checkpoint_is_a_fresh_start(start, finished, tmp_path, same_run):
    assert start(tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "run", finished)


def test_a_finished_run_resumes_to_nothing_left_to_do(start, finished, tmp_path, same_run, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert start(tmp_path / "run", "--resume") == 0
    assert "nothing is left to train" in capsys.readouterr().out
    same_run(tmp_path / "run", finished)


def test_resuming_an_older_file_sets_the_later_future_aside(start, start_and_kill, finished, tmp_path, same_run, load):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    start_and_kill(4, output, "--resume", output / "checkpoints" / "epoch_0001.pt")
    # The abandoned future does not come back by itself, and is not lost.
    assert load(output / "checkpoints" / "last.pt")["iteration"] == 3
    (aside,) = (output / "checkpoints").glob("set_aside_*")
    assert load(aside / "epoch_0002.pt")["iteration"] == 6
    assert '"iteration": 5' in (aside / "metrics.jsonl").read_text()
    assert start(output, "--resume") == 0
    same_run(output, finished)


def test_a_checkpoint_of_another_folder_is_gone_on_with_in_a_new_one(start, finished, tmp_path, load, records_of):
    file = finished / "checkpoints" / "epoch_0001.pt"
    assert start(tmp_path / "run", "--resume", file) == 0
    assert [r["iteration"] for r in records_of(tmp_path / "run", "train")] == [3, 4, 5]
    assert load(file)["iteration"] == 3


def test_figures_of_other_validation_images_are_not_compared(start, finished, tmp_path, capsys, load):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    more = ["--resume", "--max-epochs", "3", "--limit-val-batches", "2"]
    assert start(output, *more) == 0
    said = capsys.readouterr().out
    assert re.search(r"validation: \d+ images before, now \d+; .* the best mAP is counted anew", said)
    closing = next(line for line in said.splitlines() if line.endswith("<- best"))
    assert closing.split()[0] == "3"
    assert "against the best" not in said
    state = load(output / "checkpoints" / "last.pt")
    assert (state["best_epoch"], load(output / "checkpoints" / "best.pt")["iteration"]) == (3, 9)
    (aside,) = (output / "checkpoints").glob("set_aside_*")
    assert [path.name for path in aside.glob("*.pt")] == ["best.pt"]
    assert start(output, *more) == 0
    assert "counted anew" not in capsys.readouterr().out


def test_a_validation_that_is_due_is_dropped_where_the_set_is_gone(
    start, shapes_set, tmp_path, monkeypatch, records_of
):
    with monkeypatch.context() as context:
        context.setattr(Evaluator, "run", lambda self, model: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            start(tmp_path / "run")
    train = [shapes_set / "train2017", "--train-annotations", shapes_set / "annotations" / "instances_train2017.json"]
    assert start(tmp_path / "run", "--resume", "--train-images", *train) == 0
    assert not records_of(tmp_path / "run", "val")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tiny_other"], "give --model tiny to resume"),
        (["--batch-size", "1"], "global batch of 2 images"),
        (["--accumulate", "2"], "global batch of 2 images"),
        (["--limit-train-batches", "2"], "3 iterations an epoch, this run 2"),
    ],
)
def test_a_resume_that_cannot_go_on_is_refused_with_the_way_out(words, said, start, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = sorted((path, path.stat().st_mtime) for path in (tmp_path / "run").rglob("*.pt"))
    with pytest.raises(RunError, match=said):
        start(tmp_path / "run", "--resume", *words)
    assert before == sorted((path, path.stat().st_mtime) for path in (tmp_path / "run").rglob("*.pt"))


def test_a_resume_with_other_classes_is_refused(start, finished, shapes_set, tmp_path):
    other = tmp_path / "set"
    shutil.copytree(shapes_set, other)
    for file in (other / "annotations").iterdir():
        file.write_text(file.read_text().replace('"circle"', '"disc"'))
    with pytest.raises(RunError, match=r"trained on the classes \[circle.*the data set has \[disc"):
        start(tmp_path / "run", "--data-path", other, "--resume", finished / "checkpoints" / "last.pt")


def test_other_annotations_of_the_same_classes_are_named(start, finished, shapes_set, tmp_path, capsys):
    other = tmp_path / "set"
    shutil.copytree(shapes_set, other)
    file = other / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] += 1
    file.write_text(json.dumps(content))
    shutil.copytree(finished, tmp_path / "run")
    assert start(tmp_path / "run", "--data-path", other, "--resume", "--dry-run") == 0
    assert "their content is not that of the checkpoint" in capsys.readouterr().out


def test_a_resume_completes_what_tensorboard_lacks_before_its_checkpoint(
    start, start_and_kill, finished, tmp_path, monkeypatch, same_run
):
    """Its files could not be written for a while, and the process was killed before they could again."""
    plain = TensorBoardLog.train

    def full_at_iteration_4(self, record):
        if record["iteration"] == 4:
            raise OSError(28, "No space left on device")
        plain(self, record)

    with monkeypatch.context() as context:
        context.setattr(TensorBoardLog, "train", full_at_iteration_4)
        start_and_kill(5, tmp_path / "run", "--checkpoint-iterations", "1")
    assert steps(tmp_path / "run", "train/loss") == [0, 1, 2, 3]
    assert start(tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "run", finished)


def test_a_killed_loader_process_ends_the_run_with_one_message_and_the_resume_is_equal(
    start, tmp_path, monkeypatch, finished, same_run
):
    plain = Trainer.train_step

    def train_step(self, batches):
        plain(self, batches)
        if self.state.progress.iteration == 4:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "train_step", train_step)
        with pytest.raises(WorkerError, match=r"images ended: .*pid.* use fewer --workers"):
            start(tmp_path / "run", "--workers", "1", "--checkpoint-iterations", "1")
    assert "error: a process that loads images ended" in (tmp_path / "run" / "train.log").read_text()
    assert start(tmp_path / "run", "--resume") == 0
    same_run(tmp_path / "run", finished)


def test_patience_ends_a_run_after_the_same_validation_whether_it_was_killed_or_not(
    start, start_and_kill, tmp_path, same_run, capsys, records_of
):
    words = ["--max-epochs", "30", "--lr", "1e-9", "--patience", "2", "--best-metric", "AR_100"]
    assert start(tmp_path / "whole", *words) == 0
    values = [record["AR_100"] for record in records_of(tmp_path / "whole", "val")]
    assert len(values) == 3 + values.index(max(values)) < 30
    said = f"2 validations gave no better AR_100 than epoch {len(values) - 2}"
    assert f"the run ends here: {said}" in capsys.readouterr().out
    start_and_kill(3 * len(values) - 2, tmp_path / "run", *words)
    assert run(parse_arguments(["--resume", str(tmp_path / "run")])) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert run(parse_arguments(["--resume", str(tmp_path / "run")])) == 0
    assert f"nothing is left to train: {said}" in capsys.readouterr().out


def test_the_best_weights_by_the_loss_are_those_of_the_lowest(
    start, start_and_kill, tmp_path, load, records_of, same_run
):
    words = ["--max-epochs", "4", "--lr", "0.3", "--set", "param_scheduler.0.end=1", "--best-metric", "loss"]
    assert start(tmp_path / "whole", *words) == 0
    losses = [record["loss"] for record in records_of(tmp_path / "whole", "val")]
    best = load(tmp_path / "whole" / "checkpoints" / "best.pt")
    assert best["iteration"] == 3 * (1 + losses.index(min(losses))) and losses.index(min(losses)) < 3
    start_and_kill(8, tmp_path / "run", *words)
    assert run(parse_arguments(["--resume", str(tmp_path / "run")])) == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert load(tmp_path / "run" / "checkpoints" / "best.pt")["iteration"] == best["iteration"]


def test_a_run_that_is_out_of_time_validates_saves_and_goes_on_with_more_hours(
    start, tmp_path, load, capsys, records_of
):
    assert start(tmp_path / "run", "--max-hours", "1e-9") == 0
    assert "2 iterations are done in the hours given" in capsys.readouterr().out
    assert [(each["epoch"], each["iteration"]) for each in records_of(tmp_path / "run", "val")] == [(0, 1)]
    assert load(tmp_path / "run" / "checkpoints" / "best.pt")["iteration"] == 2
    assert start(tmp_path / "run", "--resume", "--max-hours", "9") == 0
    schedule, _ = with_overrides(load_schedule("1x"), {"max_epochs": "2"})
    assert [each["lr"] for each in records_of(tmp_path / "run", "train")][2:] == [
        schedule.learning_rate(iteration, 3) for iteration in range(2, 6)
    ]


def test_figures_that_no_validation_has_are_refused(start, tmp_path):
    with pytest.raises(ConfigError, match="did you mean AP/circle"):
        start(tmp_path / "run", "--best-metric", "AP/cirle", "--dry-run")
