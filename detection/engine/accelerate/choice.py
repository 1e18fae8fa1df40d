"""Which accelerations a training has: those that were asked for, and on a GPU those that it has by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from detection.config.run_config import TrainConfig
from detection.engine.distributed.sync_batch_norm import has_synchronized_batch_norm
from detection.models import FasterRCNN, describe_kernels, uses_triton
from detection.models.own.backbone import OwnBackbone


@dataclass(frozen=True)
class Acceleration:
    """What makes the steps of a training faster and leaves their numbers equal to rounding."""

    graphs: bool = False
    """CUDA graphs of the passes."""
    graphs_asked_for: bool = False
    """By an option. Others are left away where they do not fit into memory."""
    compile: bool = False
    reason: str = ""
    """Why there are no graphs, on a GPU."""

    def describe(self) -> str:
        """Lines for the start of a run on a GPU."""
        parts = ["CUDA graphs"] * self.graphs + ["compiled parts"] * self.compile
        text = ", ".join(parts) or "as written"
        if self.reason:
            text += f"; no CUDA graphs: {self.reason}"
        if not (self.graphs and self.compile):
            text += "\n--fast adds what is equal to rounding; its --compile takes minutes at first"
        return text


def has_few_shapes(config: TrainConfig, device: torch.device) -> bool:
    """Whether the padded sizes of batches are those of few buckets, for what is made once for each size.

    On a GPU also where graphs are impossible: the batches of a run do not depend on the number of its processes.
    """
    asked_for = config.compile or bool(config.cuda_graphs)
    return asked_for or (device.type == "cuda" and (config.fast or config.cuda_graphs is not False))


def searches_algorithms(config: TrainConfig, device: torch.device) -> bool:
    """Whether cuDNN tries its algorithms for each padded size; which is the fastest varies from run to run."""
    return device.type == "cuda" and has_few_shapes(config, device) and not config.deterministic


def acceleration_of(config: TrainConfig, device: torch.device, world_size: int, model: nn.Module) -> Acceleration:
    """What a training of `model` on `device` gets. What is asked for by its own option is not doubted here."""
    if device.type != "cuda":
        return Acceleration(bool(config.cuda_graphs), bool(config.cuda_graphs), config.compile)
    kernels = "" if uses_triton(device) else f"the kernels are {describe_kernels(device)}"
    is_ours = isinstance(model, FasterRCNN)
    reason = "" if is_ours else "the detector is your own"
    reason = reason or kernels or ("--sync-bn" if has_synchronized_batch_norm(model) else "")
    reason = reason or ("--deterministic" if config.deterministic else "")
    asked_for = bool(config.cuda_graphs) or (config.fast and not reason)
    if not config.fast:
        if config.cuda_graphs is False:
            reason = "--no-cuda-graphs, or a run that began without them"
        elif isinstance(getattr(model, "backbone", None), OwnBackbone):
            reason = reason or "the backbone is your own"
        elif world_size > 1:
            reason = reason or "with several GPUs they are on by --cuda-graphs or --fast"
    graphs = asked_for or not reason
    return Acceleration(
        graphs,
        asked_for,
        config.compile or (config.fast and is_ours and not kernels),
        "" if graphs else reason,
    )
