"""The training step that ended a run, in a file: all that it takes to run it again.

The file is a dictionary of tensors (on the CPU) and plain types, loaded with weights_only=True:

    iteration, message, amp, loss_scale, device, torch    the step, and how it was run
    model                                                 weights and buffers before the step
    model_config, class_names, config, ...                what describes the run, as in a checkpoint
    batches                                               one a process and micro-step, see below

A batch has "rank", "micro_step", "image_ids", "file_names", and the tensors that the model was given: "pixels" (uint8
[B, 3, H, W], resized, flipped and padded), "sizes", "boxes_xyxy", "labels", "valid", "sample_keys", and for a model
with masks "mask_offsets", "mask_rectangles" and "mask_bits".
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import TrainLoader
from detection.engine.distributed.agreement import USER_ERRORS
from detection.engine.metrics.step_metrics import NonFiniteLoss
from detection.engine.optim.amp import Precision
from detection.errors import DetectionError
from detection.models import read_archive
from detection.reporting import write_whole

FORMAT = "detection-captured-step"
VERSION = 1
MOST_FILES = 4
"""In one output directory: each has the size of the weights, and a run may be started again and again."""
OF_BATCH = ("pixels", "sizes", "boxes_xyxy", "labels", "valid", "sample_keys")
"""Tensors of a batch, an entry an image: those of ImageBatch, then those of TargetBatch."""

MASKS_OF_BATCH = ("mask_offsets", "mask_rectangles")
"""Those of a model with masks that have an entry an image. "mask_bits" is of all images together."""

_REQUIRED = ["iteration", "message", "amp", "loss_scale", "device", "model", "model_config", "config", "run", "batches"]


class CapturedStepError(DetectionError):
    """A file that does not hold a captured step. The message names it."""


def capture_step(
    folder: Path,
    error: NonFiniteLoss,
    loader: TrainLoader,
    model: nn.Module,
    precision: Precision,
    facts: Mapping[str, Any],
) -> str:
    """Write the step of `error` into a file in `folder`, whole or not at all; what came of it, in words.

    Nothing was kept for it. The model has not changed since (see NonFiniteGuard), and the batches of any process are
    a function of the run's settings: they are read again.
    """
    step = error.step
    path = folder / f"iteration_{step.iteration:07d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() or len(list(folder.glob("*.pt"))) >= MOST_FILES:
            full = f"{path} exists" if path.exists() else f"{folder} has {MOST_FILES} of them"
            return f"The step was not written into a file: {full}. Move away what is no longer needed."
        content = {
            "format": FORMAT,
            "version": VERSION,
            "iteration": step.iteration,
            "message": str(error),
            "amp": precision.amp,
            "loss_scale": precision.loss_scale_before(step.steps_missed),
            "device": precision.device.type,
            "torch": str(torch.__version__),
            **facts,
            "model": {name: value.cpu() for name, value in model.state_dict().items()},
            "batches": [batch for rank in step.ranks for batch in _batches(loader, step.iteration, rank, precision)],
        }
        stream = io.BytesIO()
        torch.save(content, stream)
        write_whole(path, stream.getvalue())
    except (*USER_ERRORS, OSError, torch.OutOfMemoryError) as problem:
        return f"The step was not written into a file: {problem}"
    return f"The step is kept. Where in the model it began: python3 scripts/replay.py {path}"


def _batches(loader: TrainLoader, iteration: int, rank: int, precision: Precision) -> Iterator[dict[str, Any]]:
    for micro_step, raw in enumerate(loader.read_iteration(iteration, rank)):
        # Resized where the run did it: another device may round a pixel otherwise.
        batch = raw.to(precision.device)
        yield {
            "rank": rank,
            "micro_step": micro_step,
            "image_ids": batch.image_ids.tolist(),
            "file_names": [loader.dataset.annotations.file_name(index) for index in batch.plan.indices.tolist()],
            **{name: getattr(batch, name).cpu() for name in OF_BATCH},
            **{name: value.cpu() for name, value in batch.tensors().items() if name.startswith("mask_")},
        }


def read_captured_step(path: Path) -> dict[str, Any]:
    """What `capture_step` wrote; nothing in the file is executed.

    Raises:
        CapturedStepError: it cannot be read, or is something else.
    """
    try:
        content = read_archive(path, verified=True)
    except Exception as error:  # a damaged file fails in the zip reader or the unpickler, with any error of theirs
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CapturedStepError(f"{path}: not a readable file of a captured step ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CapturedStepError(f"{path}: not a captured step; a run that is not finite leaves one in nonfinite/")
    if content.get("version") != VERSION:
        raise CapturedStepError(f"{path}: version {content.get('version')}, this program reads version {VERSION}")
    if missing := [key for key in _REQUIRED if key not in content]:
        raise CapturedStepError(f"{path}: an incomplete captured step, it lacks {', '.join(missing)}")
    return content
