"""A training from beginning to end: what it does, what it leaves behind, how it fails."""

import gc
import json
import math
import multiprocessing
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import TrainLoader
from detection.engine import RunError
from detection.engine.distributed.comm import Processes
from detection.engine.evaluator import Evaluator
from detection.engine.state.checkpoint import load_checkpoint
from detection.engine.trainer import Trainer
from detection.models import FasterRCNN
from detection.reporting.event_files import EventWriter
from schedules import ScheduleError, load_schedule, with_overrides

TRAIN_TAGS = (
    *("train/lr", "train/loss", "train/loss_rpn_cls", "train/loss_rpn_bbox", "train/loss_cls", "train/loss_bbox"),
    *("train/grad_norm", "train/images_per_second", "train/data_seconds"),
)
VAL_TAGS = ("val/mAP", "val/mAP_50", "val/mAP_75", "val/AR_100", "val/loss", "val/loss_rpn_cls", "val/loss_bbox")


def curves(output: Path) -> EventAccumulator:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def test_a_run_leaves_the_files_it_promises(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert names >= {
        *("config.json", "train.log", "metrics.jsonl", "detections_val.json"),
        *("checkpoints/last.pt", "checkpoints/best.pt", "checkpoints/epoch_0001.pt", "checkpoints/epoch_0002.pt"),
    }
    assert not [name for name in names if ".new" in name or ".writing" in name]
    record = json.loads((finished / "config.json").read_text())
    assert record["config"]["model"]["model"] == "tiny"
    assert record["schedule"]["train_cfg"]["max_epochs"] == 2
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [start["iteration"] for start in record["starts"]] == [0]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in record["validated"].values())


def test_each_iteration_is_logged_once_with_the_learning_rate_of_the_schedule(finished, records_of):
    schedule, _ = with_overrides(load_schedule("1x"), {"max_epochs": "2"})
    records = records_of(finished, "train")
    assert [record["iteration"] for record in records] == list(range(6))
    assert [record["epoch"] for record in records] == [0, 0, 0, 1, 1, 1]
    assert [record["lr"] for record in records] == [schedule.learning_rate(i, 3) for i in range(6)]
    for record in records:
        parts = [record[name] for name in ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert record["grad_norm"] > 0


def test_validations_stand_at_the_last_iteration_of_their_epoch(finished, records_of):
    assert [(r["epoch"], r["iteration"]) for r in records_of(finished, "val")] == [(0, 2), (1, 5)]


def test_tensorboard_shows_every_curve_from_the_first_iteration_on_one_axis(finished, records_of):
    events = curves(finished)
    for tag in TRAIN_TAGS:
        assert [point.step for point in events.Scalars(tag)] == list(range(6)), tag
    for tag in VAL_TAGS:
        assert [point.step for point in events.Scalars(tag)] == [2, 5], tag
    assert any(tag.startswith("val/AP/") for tag in events.Tags()["scalars"])
    assert any(tag.startswith("val/detections") for tag in events.Tags()["images"])
    drawn = [point.value for point in events.Scalars("train/lr")]
    assert drawn == pytest.approx([record["lr"] for record in records_of(finished, "train")], rel=1e-6)


def test_auto_scale_lr_multiplies_by_the_global_batch_over_the_base(start, tmp_path, records_of):
    assert start(tmp_path / "run", "--max-epochs", "1", "--auto-scale-lr", "--accumulate", "2") == 0
    expected = load_schedule("1x").scaled(4)
    assert [r["lr"] for r in records_of(tmp_path / "run", "train")] == [expected.learning_rate(i, 3) for i in range(3)]


def test_the_optimizer_sees_the_learning_rate_that_is_logged_and_the_gradient_after_clipping(
    start, tmp_path, records_of, monkeypatch
):
    rates, norms = [], []
    plain = torch.optim.SGD.step

    def step(self, *arguments, **keywords):
        rates.append({group["lr"] for group in self.param_groups})
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return plain(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert start(tmp_path / "run", "--max-epochs", "1", "--clip-grad", "0.5") == 0
    records = records_of(tmp_path / "run", "train")
    assert rates == [{record["lr"]} for record in records]
    assert min(record["grad_norm"] for record in records) > 0.5  # before clipping
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_an_adamw_schedule_of_a_file_trains(start, tmp_path, load, records_of):
    file = tmp_path / "mine.py"
    file.write_text(
        "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)\n"
        "param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=1, T_max=1, eta_min=1e-6,\n"
        "                        convert_to_iter_based=True)]\n"
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),\n"
        "    clip_grad=dict(max_norm=0.1, norm_type=2), accumulative_counts=2,\n"
        "    paramwise_cfg=dict(norm_decay_mult=0, custom_keys={'backbone': dict(lr_mult=0.1)}))\n"
    )
    arguments = ["--schedule", file, "--limit-train-batches", "2", "--set", "max_epochs=1", "--max-epochs", "1"]
    assert start(tmp_path / "run", *arguments) == 0
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["optimizer"]["type"] == "AdamW"
    assert {"exp_avg", "exp_avg_sq", "step"} == set(state["optimizer"]["state"]["fpn.output.0.weight"])
    assert state["run"]["global_batch_size"] == 4
    assert len(records_of(tmp_path / "run", "train")) == 2


def test_a_learning_rate_that_cannot_be_computed_ends_the_run_before_it_begins(start, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)\n"
        "param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=50),\n"
        "    dict(type='CosineAnnealingLR', by_epoch=True, begin=0.2, end=0.3, T_max=1, convert_to_iter_based=True)]\n"
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))\n"
    )
    with pytest.raises((RunError, ScheduleError)):
        start(tmp_path / "run", "--schedule", file, "--dry-run")


def test_a_dry_run_checks_everything_and_writes_nothing(start, tmp_path, capsys):
    assert start(tmp_path / "run", "--dry-run") == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "dry run" in said
    assert "6 iterations, 3 an epoch" in said
    assert "--auto-scale-lr would use 0.0025" in said


def test_a_dry_run_refuses_a_used_output_directory_as_the_run_would(start, finished):
    with pytest.raises(RunError, match="--overwrite"):
        start(finished, "--dry-run")


def test_a_loss_that_is_not_finite_ends_the_run_with_where_and_which_and_advice(
    start, tmp_path, monkeypatch, load, records_of
):
    plain, calls = FasterRCNN._losses, []

    def losses(self, images, targets, *features):
        found = plain(self, images, targets, *features)
        calls.append(None)
        if len(calls) == 5:
            found["loss_cls"] = found["loss_cls"] * math.nan
        return found

    ids = []
    plain_batches = TrainLoader.batches

    def batches(self, first, last):
        for batch in plain_batches(self, first, last):
            ids.append(batch.image_ids.tolist())
            yield batch

    monkeypatch.setattr(FasterRCNN, "_losses", losses)
    monkeypatch.setattr(TrainLoader, "batches", batches)
    with pytest.raises(RunError) as failed:
        start(tmp_path / "run", "--checkpoint-iterations", "1")
    message = str(failed.value)
    assert "iteration 4 (epoch 2, learning rate " in message and "grad_norm " in message
    assert "loss_cls = nan" in message and "loss_rpn_cls" not in message
    assert f"image ids {ids[-1]}" in message
    assert "checkpoints/last.pt is from before it (after 4 iterations)" in message
    assert all(option in message for option in ("--clip-grad", "--lr", "--skip-nonfinite", "--resume"))
    # The curves lead up to it.
    assert [record["iteration"] for record in records_of(tmp_path / "run", "train")] == [0, 1, 2, 3, 4]
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 4
    assert all(value.isfinite().all() for value in load(tmp_path / "run" / "checkpoints" / "last.pt")["model"].values())
    assert "loss_cls = nan" in (tmp_path / "run" / "train.log").read_text()


def test_a_gradient_that_is_not_finite_is_found_as_well(start, tmp_path, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    plain = FasterRCNN._losses

    def losses(self, images, targets, *features):
        found = plain(self, images, targets, *features)
        return {**found, "loss_bbox": Poison.apply(found["loss_bbox"])}

    monkeypatch.setattr(FasterRCNN, "_losses", losses)
    with pytest.raises(RunError, match="grad_norm"):
        start(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pt"))


def test_a_full_disk_does_not_end_a_run_for_the_sake_of_its_curves(start, tmp_path, monkeypatch, records_of, capsys):
    from detection.engine.metrics import logger

    plain, refused = logger.MetricsLog.write, []

    def write(self, record):
        if record["kind"] == "train" and record["iteration"] in (1, 2) and len(refused) < 3:
            refused.append(record["iteration"])
            raise OSError(28, "No space left on device")
        plain(self, record)

    monkeypatch.setattr(logger.MetricsLog, "write", write)
    assert start(tmp_path / "run") == 0
    assert "No space left on device" in capsys.readouterr().err
    # What could not be written was kept and came later.
    assert [r["iteration"] for r in records_of(tmp_path / "run", "train")] == list(range(6))


def test_tensorboards_files_are_completed_when_the_disk_has_room_again(
    start, tmp_path, monkeypatch, capsys, finished, records_of
):
    plain, full = EventWriter.write, threading.Event()
    train_step = Trainer.train_step

    def write(self, *arguments):
        if full.is_set():
            raise OSError(28, "No space left on device")
        plain(self, *arguments)

    def full_for_a_while(self, batches):
        iteration = self.state.progress.iteration
        if iteration == 1:
            full.set()
        if iteration == 4:  # the checkpoint of the first epoch comes while it is full
            full.clear()
        train_step(self, batches)

    monkeypatch.setattr(EventWriter, "write", write)
    monkeypatch.setattr(Trainer, "train_step", full_for_a_while)
    assert start(tmp_path / "run") == 0
    told = capsys.readouterr()
    assert told.err.count("TensorBoard's files cannot be written: [Errno 28]") == 1
    assert told.out.count("TensorBoard's files are complete again") == 1
    assert records_of(tmp_path / "run") == records_of(finished)
    events, whole = curves(tmp_path / "run"), curves(finished)
    for kind in ("scalars", "tensors"):  # tensors: texts and the layout
        assert set(events.Tags()[kind]) == set(whole.Tags()[kind])
    assert "train/batch/0" in events.Tags()["images"]
    for tag in (*TRAIN_TAGS, *VAL_TAGS):
        assert [point.step for point in events.Scalars(tag)] == [point.step for point in whole.Scalars(tag)], tag


def test_group_norm_and_frozen_stages_are_what_the_command_line_says(start, tmp_path, load):
    assert start(tmp_path / "run", "--norm", "gn", "--frozen-stages", "1", "--max-epochs", "1") == 0
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["model_config"]["norm"] == "gn"
    assert not any("running_mean" in name for name in state["model"])
    trained = set(state["optimizer"]["state"])
    assert "backbone.layer2.0.conv1.weight" in trained
    assert not any(name.startswith(("backbone.conv1", "backbone.layer1")) for name in trained)


def test_without_a_validation_set_the_run_trains_on_and_says_so(start, shapes_set, tmp_path, capsys, records_of):
    images, annotations = shapes_set / "train2017", shapes_set / "annotations" / "instances_train2017.json"
    assert start(tmp_path / "run", "--train-images", images, "--train-annotations", annotations) == 0
    assert "without validation" in capsys.readouterr().out
    assert not records_of(tmp_path / "run", "val")
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()


def test_a_image_that_cannot_be_read_ends_the_run_with_its_name(start, shapes_set, tmp_path):
    broken = tmp_path / "set"
    shutil.copytree(shapes_set, broken)
    for image in (broken / "train2017").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="train2017/0000000000"):
        start(tmp_path / "run", "--data-path", broken)


def test_a_network_that_detects_nothing_is_validated(start, tmp_path, records_of, monkeypatch):
    plain = Evaluator.validate

    def validate(self, iteration, model):
        object.__setattr__(model.config, "score_threshold", 1.1)
        return plain(self, iteration, model)

    monkeypatch.setattr(Evaluator, "validate", validate)
    assert start(tmp_path / "run", "--max-epochs", "1") == 0
    (record,) = records_of(tmp_path / "run", "val")
    assert record["mAP"] == 0
    assert json.loads((tmp_path / "run" / "detections_val.json").read_text()) == []


def test_a_warmup_that_the_run_does_not_outlast_is_told_with_a_shorter_one(start, tmp_path, capsys):
    assert start(tmp_path / "run", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "it never comes to the schedule's 0.02 in 6 iterations" in said
    assert "the warmup takes 6 of the 6 iterations" in said and "--set param_scheduler.0.end=2" in said
    assert "--schedule finetune is for small sets: 150 iterations here, the warmup 3;" in said
    assert start(tmp_path / "run", "--dry-run", "--schedule", "finetune") == 0
    said = capsys.readouterr().out
    assert "never comes to" not in said and "the warmup takes" not in said and "averaged weights, decay 0.998" in said


def test_a_schedules_averaged_weights_are_validated_and_saved(start, tmp_path):
    words = ("--schedule", "finetune", "--max-epochs", "2")
    assert start(tmp_path / "with", *words) == 0
    assert start(tmp_path / "without", *words, "--set", "ema=None") == 0
    assert start(tmp_path / "other", *words, "--ema", "0.05") == 0
    states = [
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt").state for name in ("with", "without", "other")
    ]
    assert states[1]["ema"] is None
    weights = [state["ema"] and state["ema"]["rpn.conv.weight"] for state in states]
    assert not torch.equal(weights[0], states[0]["model"]["rpn.conv.weight"])
    assert not torch.equal(weights[0], weights[2])
    assert all(
        torch.equal(states[0]["model"][name], state["model"][name]) for state in states for name in state["model"]
    )


@pytest.mark.parametrize("has_instructions", [True, False])
def test_the_start_says_where_bfloat16_would_be_faster(start, tmp_path, monkeypatch, capsys, has_instructions):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions, raising=False)
    assert start(tmp_path / "run", "--dry-run") == 0
    assert ("--amp bf16 halves the time of a step" in capsys.readouterr().out) == has_instructions
    assert start(tmp_path / "run", "--dry-run", "--amp", "bf16") == 0
    assert "halves the time" not in capsys.readouterr().out


def test_loader_processes_are_there_before_the_first_exchange_of_weights(start, tmp_path: Path, monkeypatch):
    """NCCL begins with it, and is not safe to fork under."""
    before = set(multiprocessing.active_children())
    plain, there = Processes.broadcast_weights, []

    def broadcast(self, module):
        there.append(len(set(multiprocessing.active_children()) - before))
        plain(self, module)

    monkeypatch.setattr(Processes, "broadcast_weights", broadcast)
    assert start(tmp_path / "run", "--workers", "1", "--max-epochs", "1", "--limit-train-batches", "1") == 0
    assert there == [2]  # of the training and of the validation
    gc.collect()  # the processes end with their loader, and other tests count processes
