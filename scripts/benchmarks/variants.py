"""What is compared: variants of the training step, the work they are given, and the stages their time goes to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import checkout  # noqa: F401
from benchmarks.ablation import OPTIMIZATIONS
from benchmarks.timing import BenchmarkError
from data import RawBatch, TrainLoader
from detection.engine.accelerate.allocator import keep_freed_memory, return_freed_memory

INPUT, FEATURES, RPN_HEAD, PROPOSALS = "input", "backbone and FPN", "RPN head", "proposals and NMS"
ASSIGNMENT, ROI_ALIGN, BOX_HEAD = "assignment and sampling", "RoIAlign", "box head"
LOSSES, BACKWARD, OPTIMIZER = "losses", "backward", "optimizer"
STAGES = (INPUT, FEATURES, RPN_HEAD, PROPOSALS, ASSIGNMENT, ROI_ALIGN, BOX_HEAD, LOSSES, BACKWARD, OPTIMIZER)

Place = tuple[Any, str, str]
"""An owner (module, object or class), the name of something it calls, and the stage that this belongs to."""


@dataclass(frozen=True)
class Variant:
    """One of the steps compared, e.g. "ours-bf16-cl-compile": whose, precision, memory format, compiled or not, in CUDA
    graphs or not."""

    name: str
    owner: str
    amp: str
    channels_last: bool
    compiled: bool
    graphs: bool = False
    without: str | None = None
    """Of ours: the one of OPTIMIZATIONS that is left out."""

    @staticmethod
    def parse(name: str) -> Variant:
        match = re.fullmatch(
            r"(ours|torchvision)-(fp32|bf16|fp16)(-cl)?(-compile)?(-graphs)?(?:-without-([a-z0-9-]+))?", name
        )
        if match is None:
            raise BenchmarkError(
                f"variant {name!r}: write ours or torchvision, then -fp32, -bf16 or -fp16, then -cl (channels last) "
                "and -compile as wanted, e.g. torchvision-bf16-cl"
            )
        owner, precision, channels_last, compiled, graphs, without = match.groups()
        if graphs is not None and owner != "ours":
            raise BenchmarkError(f"variant {name!r}: -graphs goes with ours")
        if without is not None and (owner != "ours" or without not in OPTIMIZATIONS):
            raise BenchmarkError(f"variant {name!r}: -without- goes with ours and one of {', '.join(OPTIMIZATIONS)}")
        amp = "off" if precision == "fp32" else precision
        return Variant(name, owner, amp, channels_last is not None, compiled is not None, graphs is not None, without)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Work:
    """What every variant is given."""

    model: str
    num_classes: int
    min_size: int
    max_size: int
    device: torch.device
    loader: TrainLoader
    batches: tuple[RawBatch, ...]
    """In host memory, pinned for a GPU, as the workers hand them over"""
    weights: Path
    """torchvision's state dict that both models start from"""


class Step(Protocol):
    """A model that can be trained and run on the batches of its work."""

    variant: Variant

    def settle(self, run: Callable[[], object]) -> None:
        """Right before `run` is timed: memory as this step's own program has it."""

    def train(self, batches: Sequence[RawBatch]) -> None:
        """One optimizer step a batch, from what workers hand over to updated weights."""

    def detect(self, batches: Sequence[RawBatch]) -> None:
        """Detections of each batch, on the host."""

    def losses(self) -> dict[str, float]:
        """Those of the latest training step."""

    def stages(self) -> list[Place]:
        """Where the time of `train` goes."""


class HostMemory:
    """Whether this process keeps what it frees: train.py on the CPU does, torchvision's reference training does not."""

    keeps = False

    @classmethod
    def switch(cls, keep: bool) -> bool:
        """True where that changed something."""
        if keep == cls.keeps:
            return False
        cls.keeps = keep
        return keep_freed_memory() if keep else return_freed_memory()


def to_host(detection: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in detection.items()}
