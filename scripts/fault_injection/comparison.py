"""Whether a disturbed training ended as the undisturbed one did: bit by bit, figure by figure."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

TIMINGS = {"images_per_second", "data_seconds", "idle_share", "seconds", "memory_gb"}
"""What depends on the clock, and on what else the machine does."""


def differences(one: Path, other: Path) -> list[str]:
    """What two output directories differ in: checkpoints, records, curves, detections. Empty where in nothing."""
    found: list[str] = []
    names = [sorted(path.name for path in (folder / "checkpoints").glob("*.pt")) for folder in (one, other)]
    if set(names[0]) - {"previous.pt"} != set(names[1]) - {"previous.pt"}:
        found.append(f"checkpoints: {names[0]} and {names[1]}")
    for name in sorted(set(names[0]) & set(names[1]) - {"previous.pt"}):  # previous.pt: whatever was saved before
        states = [_comparable_state(folder / "checkpoints" / name) for folder in (one, other)]
        found += _unequal(states[0], states[1], name)
    found += _unequal(_records(one), _records(other), "metrics.jsonl")
    found += _doubled(_points(other))
    found += _unequal(_curves(one), _curves(other), "TensorBoard")
    detections = [(folder / "detections_val.json").read_bytes() for folder in (one, other)]
    return found + (["detections_val.json"] if detections[0] != detections[1] else [])


def _comparable_state(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("output_dir", "resume"):  # where it was written, and that it was resumed
        del state["config"]["output"][key]
    return state


def _records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def _points(output: Path) -> list[tuple[str, int, float]]:
    """Every scalar in the event files as it stands there, without TensorBoard's own clearing up."""
    points = []
    for path in sorted((output / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    points.append((value.tag, event.step, value.tensor.float_val[0]))
    return points


def _doubled(points: list[tuple[str, int, float]]) -> list[str]:
    seen: set[tuple[str, int]] = set()
    found = []
    for tag, step, _ in points:
        if (tag, step) in seen:
            found.append(f"TensorBoard: {tag} has step {step} twice")
        seen.add((tag, step))
    return found[:3]


def _curves(output: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for tag, step, value in _points(output):
        if tag.rsplit("/", 1)[-1] not in TIMINGS:
            curves.setdefault(tag, []).append((step, value))
    return dict(sorted(curves.items()))


def _unequal(one: Any, other: Any, place: str) -> list[str]:
    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same or _same_bytes(one, other) else [f"{place}: another tensor"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: {sorted(map(str, one.keys() ^ other.keys()))[:4]} in one only"]
        return [line for key in one for line in _unequal(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [line for number, (left, right) in pairs for line in _unequal(left, right, f"{place}/{number}")]
    if isinstance(one, float) and math.isnan(one) and math.isnan(other):
        return []
    return [] if one == other else [f"{place}: {one!r} and {other!r}"]


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """For tensors with NaN in them."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)
