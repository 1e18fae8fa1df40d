"""What a run leaves that ends because it is not finite: one file with the step as it was, which runs again."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loading.batch import OF_MASKS
from detection.engine import RunError
from detection.engine.replay import captured_step
from detection.engine.replay.captured_step import CapturedStepError, read_captured_step
from detection.engine.trainer import Trainer
from detection.models import FasterRCNN
from tests.engine.replay.captured_ranks import spoil_losses

HALF = (
    "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)\n"
    "param_scheduler = [dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)]\n"
    "optim_wrapper = dict(type='AmpOptimWrapper', loss_scale=dict(init_scale=256.0),\n"
    "    optimizer=dict(type='SGD', lr=0.02, momentum=0.9))\n"
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The model's state before each iteration, and what it was given in each forward pass."""
    found: dict[str, list[Any]] = {"state": [], "given": []}
    plain_step, plain_losses = Trainer.train_step, FasterRCNN._losses

    def train_step(self, batches):
        found["state"].append({name: value.clone() for name, value in self.state.model.state_dict().items()})
        plain_step(self, batches)

    def losses(self, images, targets, *features):
        found["given"].append([*images, *targets[:4], *(targets.masks or ())])
        return plain_losses(self, images, targets, *features)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(FasterRCNN, "_losses", losses)
    return found


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "loss",
            [
                "--accumulate",
                "2",
                "--model",
                "tiny_mask",
                "--set",
                "optim_wrapper.optimizer=dict(type='AdamW', lr=1e-3)",
            ],
        ),
        ("gradient", ["--ema", "0.5", "--set", "optim_wrapper.optimizer.dampening=0.1"]),
        ("activations", ["--color-jitter", "0.4", "0.4", "0.4", "0.1", "--amp", "bf16"]),
        ("loss", ["--schedule", "half.py", "--amp", "fp16"]),
    ],
)
def test_the_file_has_the_step_as_it_was_however_long_ago(
    what, words, start, tmp_path, monkeypatch, seen, same_state
) -> None:
    """The losses of iterations 1 to 3 are read after iteration 3; iteration 1 was the bad one."""
    monkeypatch.chdir(tmp_path)
    Path("half.py").write_text(HALF)
    num_micro_steps = 2 if "--accumulate" in words else 1
    spoil_losses(monkeypatch, num_micro_steps, what)
    with pytest.raises(RunError, match=r"iteration 1 (?s:.*)scripts/replay.py \S*iteration_0000001.pt\n"):
        start(tmp_path / "run", *words, "--norm", "bn", "--limit-train-batches", "4", "--log-interval", "9")
    (file,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert len(seen["state"]) == 4  # the run went on until the losses were read
    content = read_captured_step(file)
    assert content["iteration"] == 1
    same_state(dict(content["model"]), seen["state"][1])
    same_state(dict(content["model"]), seen["state"][3])
    assert content["loss_scale"] == (256 if "fp16" in words else 1)
    given = seen["given"][num_micro_steps : 2 * num_micro_steps]
    names = [*captured_step.OF_BATCH, *(OF_MASKS if "tiny_mask" in words else ())]
    kept = [[batch[name] for name in names] for batch in content["batches"]]
    same_state(kept, given)


def test_a_resumed_run_ends_as_one_that_was_finite(start, tmp_path, monkeypatch, finished, load, same_state) -> None:
    spoil_losses(monkeypatch, 4, "loss")
    with pytest.raises(RunError, match="--resume"):
        start(tmp_path / "run", "--checkpoint-iterations", "1")
    monkeypatch.undo()
    assert start(tmp_path / "run", "--checkpoint-iterations", "1", "--resume") == 0
    one, other = (load(folder / "checkpoints" / "last.pt") for folder in (finished, tmp_path / "run"))
    for name in ("iteration", "model", "optimizer"):
        same_state(one[name], other[name])


def test_what_cannot_be_written_leaves_the_message_and_no_file(start, tmp_path, monkeypatch) -> None:
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    spoil_losses(monkeypatch, 0, "loss")
    monkeypatch.setattr(captured_step, "write_whole", full)
    with pytest.raises(RunError, match=r"iteration 0 (?s:.*)not written into a file: (?s:.*)No space left"):
        start(tmp_path / "run")
    assert not list((tmp_path / "run" / "nonfinite").iterdir())


def test_an_optimizer_that_cannot_hold_a_step_back_leaves_no_file(start, tmp_path, monkeypatch) -> None:
    spoil_losses(monkeypatch, 0, "loss")
    with pytest.raises(RunError, match="not kept: without a fused optimizer"):
        start(tmp_path / "run", "--set", "optim_wrapper.optimizer.foreach=True")
    assert not (tmp_path / "run" / "nonfinite").exists()


def test_a_run_that_only_skips_leaves_its_last_step(start, tmp_path, monkeypatch, seen, same_state) -> None:
    monkeypatch.setattr("detection.engine.metrics.step_metrics.MOST_SKIPPED_IN_A_ROW", 2)
    spoil_losses(monkeypatch, 1, "gradient", last=9)
    with pytest.raises(RunError, match="2 iterations in a row"):
        start(tmp_path / "run", "--skip-nonfinite", "--norm", "bn")
    content = read_captured_step(tmp_path / "run" / "nonfinite" / "iteration_0000002.pt")
    same_state(dict(content["model"]), seen["state"][2])


def test_another_file_is_refused(tmp_path) -> None:
    with pytest.raises(CapturedStepError, match="none.pt"):
        read_captured_step(tmp_path / "none.pt")
    torch.save({"format": "other"}, tmp_path / "other.pt")
    with pytest.raises(CapturedStepError, match="not a captured step"):
        read_captured_step(tmp_path / "other.pt")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_one_bad_process_stops_all_where_they_were_and_one_file_has_its_batch(
    world_size, program, arguments, tmp_path, same_state
) -> None:
    words = arguments(tmp_path / "run", "--limit-train-batches", "4", "--batch-size", "1", "--log-interval", "9")
    with program("replay/captured_ranks.py", tmp_path, *words, "--norm", "bn", ranks=world_size) as processes:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, out[-3000:] + err[-6000:]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    assert all(each["message"] == found[0]["message"] for each in found)
    content = read_captured_step(tmp_path / "run" / "nonfinite" / "iteration_0000001.pt")
    (batch,) = content["batches"]
    assert batch["rank"] == world_size - 1
    same_state([batch[name] for name in captured_step.OF_BATCH], found[-1]["given"][1])
    same_state(dict(content["model"]), found[0]["before"])
    for each in found:
        for name, value in found[0]["before"].items():
            if "running" not in name and "num_batches" not in name:  # statistics are each process's own
                assert torch.equal(each["before"][name], value) and torch.equal(each["after"][name], value), name
