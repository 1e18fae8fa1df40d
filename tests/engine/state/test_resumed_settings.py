"""Of settings that a resume finds changed: which of the two holds, and that it is said."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from detection.config import RunConfig
from detection.config.run_config import TrainConfig
from detection.config.settings import CHECKPOINT, EACH_START, EQUAL, SCHEDULE, settings_of
from detection.engine import build
from detection.engine.state.checkpoint import CheckpointError, LoadedCheckpoint
from detection.engine.state.resume import image_order_of, resumed_settings
from detection.models.config import model_config


def test_of_an_order_of_images_the_checkpoint_decides():
    assert image_order_of(LoadedCheckpoint(Path("last.pt"), {"run": {}})) == 1
    with pytest.raises(CheckpointError, match="last.pt is of a newer version"):
        image_order_of(LoadedCheckpoint(Path("last.pt"), {"run": {"image_order": 99}}))


def test_more_epochs_go_on_after_the_last_one_and_are_named_as_a_change(start, finished, tmp_path, capsys, records_of):
    shutil.copytree(finished, tmp_path / "run")
    assert start(tmp_path / "run", "--resume", "--max-epochs", "3") == 0
    assert "schedule train_cfg.max_epochs: 2 in the checkpoint, 3 now; the command line wins" in capsys.readouterr().out
    assert [r["iteration"] for r in records_of(tmp_path / "run", "train")] == list(range(9))


def test_another_optimizer_begins_with_a_fresh_state_and_says_so(start, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    schedule = tmp_path / "adamw.py"
    schedule.write_text(
        "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3)\n"
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.01),\n"
        "    paramwise_cfg=dict(norm_decay_mult=0))\n"
    )
    assert start(tmp_path / "run", "--resume", "--schedule", schedule, "--max-epochs", "3") == 0
    said = capsys.readouterr().out
    assert "optimizer: SGD before, AdamW now" in said
    assert "schedule optim_wrapper.optimizer.type" in said


def test_the_memory_layout_may_change_in_a_resume(start, finished, tmp_path, records_of, monkeypatch):
    output = tmp_path / "run"
    assert start(output, "--resume", finished / "checkpoints" / "epoch_0001.pt", "--no-channels-last") == 0
    for ours, theirs in zip(records_of(output, "train"), records_of(finished, "train")[3:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_what_the_checkpoint_decides_is_said_where_the_command_line_says_otherwise(start, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    arguments = ["--norm", "gn", "--frozen-stages", "2", "--weights", "COCO_V1", "--seed", "5", "--dry-run"]
    assert start(tmp_path / "run", "--resume", *arguments) == 0
    said = capsys.readouterr().out
    assert "--norm: bn in the checkpoint, gn now; the checkpoint wins" in said
    assert "--freeze: none in the checkpoint, stage2 now; the checkpoint wins" in said
    assert "--weights: none in the checkpoint, COCO_V1 now; the checkpoint wins" in said
    assert "--seed: 0 in the checkpoint, 5 now; the command line wins" in said


def test_an_average_that_comes_or_goes_is_said(start, finished, tmp_path, capsys, load):
    shutil.copytree(finished, tmp_path / "run")
    assert start(tmp_path / "run", "--resume", "--ema", "--max-epochs", "3") == 0
    assert "the average begins with its weights" in capsys.readouterr().out
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["ema"] is not None
    assert start(tmp_path / "run", "--resume", "--dry-run", "--max-epochs", "3") == 0
    assert "give --ema" in capsys.readouterr().out


SETTINGS = {key: field for _, key, field in settings_of(RunConfig)}


def with_setting(key: str) -> RunConfig:
    """The defaults, but for one setting."""
    field = SETTINGS[key]
    by_name = {
        "settings": (("score_threshold", 0.5),),
        "lsj_range": (0.5, 1.0),
        "color_jitter": (0.1, 0.1, 0.1, 0.1),
        "frozen_stages": 3,
        "cuda_graphs": True,
    }
    by_kind = {bool: not field.default, int: 7, float: 0.25, str: "another", tuple: (7,), type(None): 7}
    value = by_name.get(field.name, by_kind[type(field.default)])
    config, *inside = RunConfig(), *key.split(".")[:-1]
    for group in inside:
        return dataclasses.replace(
            config, **{group: dataclasses.replace(getattr(config, group), **{field.name: value})}
        )
    return dataclasses.replace(config, **{field.name: value})


def checkpoint_of(config: RunConfig) -> LoadedCheckpoint:
    settings = dataclasses.asdict(model_config("faster_rcnn_r50_fpn", **dict(config.model.settings)))
    if config.model.frozen_stages is not None:
        settings["frozen_stages"] = config.model.frozen_stages
    return LoadedCheckpoint(Path("last.pt"), {"config": config.to_dict(), "model_config": settings})


@pytest.mark.parametrize("key", SETTINGS)
def test_of_every_setting_that_differs_it_is_said_which_of_the_two_holds(key):
    decides, options = SETTINGS[key].metadata["on_resume"], SETTINGS[key].metadata["options"]
    flag = options[0].flag_for(SETTINGS[key]) if options else key
    before, now = RunConfig(), with_setting(key)
    if decides is EQUAL:
        with pytest.raises(CheckpointError, match=f"give {flag} .* to resume"):
            resumed_settings(checkpoint_of(before), now)
        return
    config, lines = resumed_settings(checkpoint_of(before), now)
    assert config == (before if decides is CHECKPOINT else now)
    if decides in (EACH_START, SCHEDULE):  # the schedule's differences are found in the schedule
        assert lines == []
    else:
        (line,) = lines
        assert re.fullmatch(rf"{flag}( \w+)?: .+ in the checkpoint, .+ now; the (.+) wins", line)
        assert line.endswith(f"the {'checkpoint' if decides is CHECKPOINT else 'command line'} wins")


@pytest.mark.parametrize("key", [key for key, field in SETTINGS.items() if field.metadata["on_resume"] is CHECKPOINT])
def test_what_the_checkpoint_decides_holds_where_the_command_line_forgets_it(key):
    config, _ = resumed_settings(checkpoint_of(with_setting(key)), RunConfig())
    assert config == with_setting(key)


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        (False, {}, False),
        ("not recorded", {}, False),
        (None, {}, None),
        (True, {}, None),
        (False, {"cuda_graphs": True}, True),
        (False, {"fast": True}, None),
    ],
)
def test_a_run_that_began_without_graphs_gets_none_by_the_default_of_today(before, given, expected):
    checkpoint = checkpoint_of(RunConfig(train=TrainConfig(cuda_graphs=before)))
    if before == "not recorded":
        del checkpoint.state["config"]["train"]["cuda_graphs"]
    config, _ = resumed_settings(checkpoint, RunConfig(train=TrainConfig(**given)))
    assert config.train.cuda_graphs is expected


def test_a_checkpoint_from_before_there_was_a_setting_counts_as_one_with_its_default():
    checkpoint = checkpoint_of(RunConfig())
    del checkpoint.state["config"]["train"]["channels_last"], checkpoint.state["config"]["augmentation"]
    assert resumed_settings(checkpoint, RunConfig()) == (RunConfig(), [])


def test_batch_norm_is_synchronized_as_before_where_the_command_line_forgets_it(
    start, tmp_path, monkeypatch, capsys, load
):
    synchronized = []
    monkeypatch.setattr(build, "synchronize_batch_norm", lambda model, device: synchronized.append(model))
    assert start(tmp_path / "run", "--sync-bn", "--max-epochs", "1", "--limit-train-batches", "1") == 0
    assert start(tmp_path / "run", "--resume", "--limit-train-batches", "1") == 0
    assert len(synchronized) == 2
    assert "--sync-bn: on in the checkpoint, off now; the checkpoint wins" in capsys.readouterr().out
    # The next resume finds what the run was trained with, and not what the command line said.
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["config"]["model"]["sync_bn"] is True


def test_another_loss_scale_of_the_command_line_is_used(start, tmp_path, load, capsys):
    words = ["--set", "optim_wrapper.type=AmpOptimWrapper", "--limit-train-batches", "1", "--set"]
    assert start(tmp_path / "run", *words, "optim_wrapper.loss_scale=512", "--max-epochs", "1") == 0
    assert start(tmp_path / "run", *words, "optim_wrapper.loss_scale=64", "--resume") == 0
    said = "schedule optim_wrapper.loss_scale: 512.0 in the checkpoint, 64.0 now; the command line wins"
    assert said in capsys.readouterr().out
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["scaler"]["scale"] == 64
