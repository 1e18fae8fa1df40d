"""A training whose last process has a loss that is not finite in iteration 1: run by test_captured_step.py in each of
its processes, what they saw left in <folder>/<rank>.pt."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.config import parse_arguments
from detection.engine import RunError, run
from detection.engine.trainer import Trainer
from detection.models import FasterRCNN
from detection.process_exit import leave
from tests.engine.tiny_model import make_known


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * math.inf


def spoil_losses(patch: pytest.MonkeyPatch, first: int, what: str, last: int | None = None) -> None:
    """Make the losses of forward passes `first` to `last` bad: "loss", "gradient" or "activations"."""
    plain, calls = FasterRCNN._losses, []

    def losses(self: FasterRCNN, images: Any, targets: Any, *features: Any) -> dict[str, torch.Tensor]:
        calls.append(None)
        is_bad = first <= len(calls) - 1 <= (first if last is None else last)
        if is_bad and what == "activations":
            # As the backbone sees it; the batch stays what it is.
            hook = self.backbone.register_forward_pre_hook(lambda module, given: (given[0] * math.nan,))
            found = plain(self, images, targets, *features)
            hook.remove()
            return found
        found = plain(self, images, targets, *features)
        if is_bad and what == "loss":
            # Its gradient is zero, and finite.
            found["loss_cls"] = found["loss_cls"] * 0 + math.inf
        if is_bad and what == "gradient":
            found["loss_bbox"] = _InfiniteGradient.apply(found["loss_bbox"])
        return found

    patch.setattr(FasterRCNN, "_losses", losses)


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    make_known()
    found: dict[str, Any] = {"given": []}
    plain_step, plain_log = Trainer.train_step, Trainer.write_log

    def train_step(self: Trainer, batches: Any) -> None:
        if self.state.progress.iteration == 1:
            found["before"] = _copy(self)
        plain_step(self, batches)

    def write_log(self: Trainer) -> None:
        found["after"] = _copy(self)
        plain_log(self)

    with pytest.MonkeyPatch.context() as patch:
        if rank == world_size - 1:
            spoil_losses(patch, 1, "loss")
        plain_losses = FasterRCNN._losses

        def losses(self: FasterRCNN, images: Any, targets: Any, *features: Any) -> dict[str, torch.Tensor]:
            found["given"].append([*images, *targets[:4]])
            return plain_losses(self, images, targets, *features)

        patch.setattr(FasterRCNN, "_losses", losses)
        patch.setattr(Trainer, "train_step", train_step)
        patch.setattr(Trainer, "write_log", write_log)
        try:
            run(parse_arguments(words))
        except RunError as error:
            found["message"] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    leave(0)


def _copy(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


if __name__ == "__main__":
    main()
