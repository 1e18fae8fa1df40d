"""Whether a disturbed training ended as the undisturbed one did: bit by bit, figure by figure."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

TIMINGS = {"images_per_second", "data_seconds", "idle_share", "seconds", "memory_gb"}
"""What depends on the clock, and on what else the machine does."""


def differences(one: Path, other: Path) -> list[str]:
    """What two output directories differ in: checkpoints, records, curves, detections. Empty where in nothing."""
    found: list[str] = []
    # previous.pt: whatever was saved before.
    names, others = (
        {path.name for path in (run / "checkpoints").glob("*.pt")} - {"previous.pt"} for run in (one, other)
    )
    if names != others:
        found.append(f"checkpoints: {sorted(names)} and {sorted(others)}")
    for name in sorted(names & others):
        found += _unequal(_comparable_state(one, name), _comparable_state(other, name), name)
    found += _unequal(_records(one), _records(other), "metrics.jsonl")
    curves, points = _points(one), _points(other)
    counts = collections.Counter((tag, step) for tag, step, _ in points)
    found += [f"TensorBoard: {tag} has step {step} twice" for (tag, step), count in counts.items() if count > 1][:3]
    found += _unequal(_curves(curves), _curves(points), "TensorBoard")
    detections, theirs = ((run / "detections_val.json").read_bytes() for run in (one, other))
    return found + (["detections_val.json"] if detections != theirs else [])


def _comparable_state(output: Path, name: str) -> dict[str, Any]:
    state = torch.load(output / "checkpoints" / name, map_location="cpu", weights_only=True)
    for key in ("output_dir", "resume"):  # where it was written, and that it was resumed
        del state["config"]["output"][key]
    return state


def _records(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def _points(output: Path) -> list[tuple[str, int, float]]:
    """Every scalar in the event files as it stands there, without TensorBoard's own clearing up."""
    return [
        (value.tag, event.step, value.tensor.float_val[0])
        for path in sorted((output / "tensorboard").iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    ]


def _curves(points: list[tuple[str, int, float]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for tag, step, value in points:
        if tag.rsplit("/", 1)[-1] not in TIMINGS:
            curves.setdefault(tag, []).append((step, value))
    return curves


def _unequal(one: Any, other: Any, place: str) -> list[str]:
    ours, theirs = dict(_leaves(one, place)), dict(_leaves(other, place))
    found = []
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            one, other = ours[name], theirs[name]
            is_told = isinstance(one, str) and isinstance(other, str)
            found.append(f"{name}: {one!s} and {other!s}" if is_told else f"{name}: another tensor")
    return sorted(found) + [f"{name}: in one only" for name in sorted(ours.keys() ^ theirs.keys())]


def _leaves(value: Any, place: str) -> Iterator[tuple[str, str | bytes]]:
    """The place and the exact content of everything in it that has no parts."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(part, f"{place}/{key}")
    elif isinstance(value, (list, tuple)):
        yield place, f"{len(value)} entries"
        for number, part in enumerate(value):
            yield from _leaves(part, f"{place}/{number}")
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        yield place, f"{value.dtype} {tuple(value.shape)}".encode() + content
    else:
        yield place, repr(value)
