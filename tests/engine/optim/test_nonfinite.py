"""--skip-nonfinite: an iteration that is not finite leaves nothing behind but its count."""

import math
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from detection.engine import RunError
from detection.engine.metrics import step_metrics as step_records_module
from detection.engine.optim.nonfinite import NonFiniteGuard
from detection.engine.trainer import Trainer
from detection.models import FasterRCNN


class _SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


def spoil(monkeypatch: pytest.MonkeyPatch, **at: str) -> list[int]:
    """Make the losses of forward pass n ("at_4=...") bad: "loss", "gradient" or "activations"."""
    plain, calls = FasterRCNN._losses, []

    def losses(self, images, targets, *features):
        what = at.get(f"at_{len(calls)}")
        calls.append(len(calls))
        if what == "activations":
            images = type(images)(images.pixels.float() * math.nan, images.sizes)
        found = plain(self, images, targets, *features)
        if what == "loss":
            # Its gradient is zero, and finite.
            found["loss_cls"] = found["loss_cls"] * 0 + math.inf
        if what == "gradient":
            found["loss_bbox"] = _SpoilGradient.apply(found["loss_bbox"])
        return found

    monkeypatch.setattr(FasterRCNN, "_losses", losses)
    return calls


def without_clock(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in ("config", "iteration", "skipped_steps")}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Any]]:
    """The loop's state after each iteration, copied, by iterations done."""
    states: dict[int, dict[str, Any]] = {}
    plain = Trainer.train_step

    def train_step(self, batches):
        iteration = self.state.progress.iteration
        plain(self, batches)
        memory = {
            f"{number}/{name}": value.clone()
            for number, values in enumerate(self.state.optimizer.state.values())
            for name, value in values.items()
        }
        weights = {name: value.clone() for name, value in self.state.model.state_dict().items()}
        ema = self.state.ema
        average = {name: value.clone() for name, value in ema.module.state_dict().items()} if ema else {}
        states[iteration + 1] = {"weights": weights, "memory": memory, "average": average}

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return states


@pytest.mark.parametrize("what", ["loss", "gradient", "activations"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_nothing_is_left_of_a_skipped_iteration(
    what: str, optimizer: str, start, tmp_path, monkeypatch, watched, same_state, load, records_of, capsys
) -> None:
    words = ["--ema", "0.5", "--norm", "bn", "--max-epochs", "1", "--skip-nonfinite"]
    if optimizer == "AdamW":
        words += ["--set", "optim_wrapper.optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05)"]
    spoil(monkeypatch, at_1=what)
    assert start(tmp_path / "run", *words) == 0
    same_state(watched[1], watched[2])
    assert any(not torch.equal(watched[2]["weights"][name], value) for name, value in watched[3]["weights"].items())
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in [*state["model"].values(), *state["ema"].values()])
    assert [r["skipped_steps"] for r in records_of(tmp_path / "run", "train")] == [0, 1, 1]
    said = capsys.readouterr()
    assert "iteration 1 (epoch 1, " in said.err and "step skipped" in said.err
    assert "1 of 3 iterations were not finite and made no step" in said.out
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(p.step, p.value) for p in events.Scalars("train/skipped_steps")] == [(0, 0), (1, 1), (2, 1)]


def test_where_all_is_finite_the_option_changes_no_bit(start, tmp_path, load, same_state) -> None:
    words = ["--ema", "0.5", "--norm", "bn", "--clip-grad", "1", "--accumulate", "2", "--max-epochs", "1"]
    assert start(tmp_path / "with", *words, "--skip-nonfinite") == 0
    assert start(tmp_path / "without", *words) == 0
    with_it, without = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("with", "without"))
    same_state(without_clock(with_it), without_clock(without))


def test_a_resumed_run_goes_on_with_the_count(start, tmp_path, monkeypatch, load, records_of) -> None:
    words = ["--skip-nonfinite", "--limit-train-batches", "3"]
    spoil(monkeypatch, at_1="loss", at_2="gradient")
    assert start(tmp_path / "run", *words, "--max-epochs", "1") == 0
    monkeypatch.undo()
    spoil(monkeypatch, at_1="loss")
    assert start(tmp_path / "run", *words, "--resume") == 0
    assert [r["skipped_steps"] for r in records_of(tmp_path / "run", "train")] == [0, 1, 2, 2, 3, 3]
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["skipped_steps"] == 3


def test_an_overflow_of_float16_is_the_scalers_and_not_counted(start, tmp_path, monkeypatch, load, watched) -> None:
    spoil(monkeypatch, at_0="gradient", at_2="loss")
    schedule = tmp_path / "half.py"
    # 2**8: nothing overflows by itself in a few iterations of a tiny network.
    schedule.write_text(
        "train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=1)\n"
        "param_scheduler = [dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)]\n"
        "optim_wrapper = dict(type='AmpOptimWrapper', loss_scale=dict(init_scale=256.0),\n"
        "    optimizer=dict(type='SGD', lr=0.02, momentum=0.9))\n"
    )
    words = ["--skip-nonfinite", "--schedule", schedule, "--amp", "fp16", "--max-epochs", "1", "--ema", "0.5"]
    assert start(tmp_path / "run", *words) == 0
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["skipped_steps"] == 1  # the loss
    assert state["scaler"]["scale"] == 64  # halved once for each, not twice
    for name, value in watched[2]["weights"].items():
        assert torch.equal(value, watched[3]["weights"][name]), name
        assert value.isfinite().all()


def test_a_run_that_only_skips_ends(start, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step_records_module, "MOST_SKIPPED_IN_A_ROW", 3)
    spoil(monkeypatch, **{f"at_{n}": "loss" for n in (0, 2, 3, 4)})
    with pytest.raises(RunError, match=r"3 iterations in a row were not finite(?s:.*)iteration 4 ") as failed:
        start(tmp_path / "run", "--skip-nonfinite")
    assert "--resume" in str(failed.value)  # the first epoch was saved


def test_without_the_option_the_message_has_all_that_helps(start, tmp_path, monkeypatch, records_of) -> None:
    spoil(monkeypatch, at_4="loss")
    with pytest.raises(RunError) as failed:
        start(tmp_path / "run")
    message = str(failed.value)
    assert "iteration 4 (epoch 2, learning rate " in message and "grad_norm " in message
    assert "process 0: loss = inf, loss_cls = inf; image ids [" in message
    assert "checkpoints/last.pt is from before it (after 3 iterations)" in message
    assert "--skip-nonfinite" in message and "--lr" in message and "--resume" in message
    # The curves lead up to it.
    assert [r["iteration"] for r in records_of(tmp_path / "run", "train")] == [0, 1, 2, 3, 4]


def test_without_a_checkpoint_the_message_says_so(start, tmp_path, monkeypatch) -> None:
    spoil(monkeypatch, at_0="loss")
    with pytest.raises(RunError, match=r"No checkpoint was written yet(?s:.*)--overwrite"):
        start(tmp_path / "run")


@pytest.mark.parametrize("setting", ["dampening=0.1", "foreach=True", "fused=False"])
def test_an_optimizer_without_a_fused_step_is_refused(setting, start, tmp_path) -> None:
    with pytest.raises(RunError, match="only a fused step"):
        start(tmp_path / "run", "--skip-nonfinite", "--set", f"optim_wrapper.optimizer.{setting}")


@pytest.mark.parametrize("skips", [True, False])
def test_nothing_is_read_from_the_device_to_decide(skips: bool) -> None:
    """On a meta device, where reading a value is an error."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).to("meta")
    guard = NonFiniteGuard(network, skips=skips)
    guard.begin()
    loss = guard.mark(network(torch.ones(1, 1, 2, 2, device="meta")).sum())
    assert guard.finish(loss.detach()).device.type == "meta"
    with pytest.raises(RuntimeError):
        float(loss.detach())


def test_a_float16_gradient_that_overflows_at_every_loss_scale_ends_the_run(start, tmp_path, monkeypatch):
    monkeypatch.setattr(step_records_module, "MOST_SKIPPED_IN_A_ROW", 4)
    spoil(monkeypatch, **{f"at_{number}": "gradient" for number in range(1, 6)})
    with pytest.raises(
        RunError, match=r"(?s)4 iterations in a row .* made no step, the last:\niteration 4 .*use --amp bf16"
    ):
        start(tmp_path / "run", "--amp", "fp16")


def test_single_overflows_of_float16_are_the_loss_scales_business(start, tmp_path, monkeypatch, records_of):
    monkeypatch.setattr(step_records_module, "MOST_SKIPPED_IN_A_ROW", 3)
    spoil(monkeypatch, at_0="gradient", at_1="gradient", at_3="gradient", at_4="gradient")
    assert start(tmp_path / "run", "--amp", "fp16") == 0
    norms = [record["grad_norm"] for record in records_of(tmp_path / "run", "train")]
    assert [norm is not None and math.isfinite(norm) for norm in norms] == [False, False, True, False, False, True]
