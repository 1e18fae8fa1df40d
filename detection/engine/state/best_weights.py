"""best_weights.safetensors: the best weights of a run alone, with all that a detector needs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from detection.engine.state.checkpoint import BEST, LAST, load_checkpoint, place_of
from detection.models.weights.files import DETECTOR
from detection.models.weights.safetensors_files import read_metadata
from detection.models.weights.stored import stripped_file, write_detector
from detection.reporting import write_whole


def write_best_weights(target: Path, state: Mapping[str, Any]) -> None:
    """Write the averaged weights of a checkpoint's state, or its weights without any, with the run's facts and notes;
    `target` is the old file or the new one at any time.

    Raises:
        OSError: it cannot be written.
    """
    content = stripped_file(
        state["ema"] or state["model"],
        **{name: state[name] for name in ("model_config", "class_names", "category_ids", "preprocessing")},
    )
    ending, output = state.get("ending", {}), state["config"].get("output", {})
    content |= {
        "iteration": state["iteration"],
        "epoch": state["best_epoch"],
        # The best value of the loss is kept negated: the higher the better.
        "metric": {ending["best_metric"]: abs(ending["best_value"])} if ending.get("best_value") is not None else {},
        "averaged": state["ema"] is not None,
        "data_digest": state["run"]["data_digest"],
        "program": f"detection-harness {_version()}",
        "notes": output.get("notes") or "",
    }
    write_whole(target, partial(write_detector, content=content))


def complete_best_weights(target: Path, checkpoints: Path) -> None:
    """Make `target` that of best.pt, or of last.pt in a run without one: a kill may have come between the two files.

    Raises:
        OSError, CheckpointError: a file cannot be read or written.
    """
    files = [checkpoints / name for name in (BEST, LAST)]
    source = next((file for file in files if file.is_file()), None)
    if source is not None and _iteration_of(target) != place_of(source)[0]:
        write_best_weights(target, load_checkpoint(source).state)


def _version() -> str:
    try:
        return metadata.version("detection-harness")
    except metadata.PackageNotFoundError:  # used without being installed
        return "unknown"


def _iteration_of(target: Path) -> int | None:
    with contextlib.suppress(Exception):  # whatever a file raises that is not there, or broken
        return int(json.loads(read_metadata(target)[DETECTOR])["iteration"])
    return None
