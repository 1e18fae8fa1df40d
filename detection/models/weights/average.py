"""Several checkpoints of one model made into one by averaging their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from detection.models.weights.files import WeightsError
from detection.models.weights.stored import StoredWeights, read_weights, stripped_file

_MUST_AGREE = ("model_config", "class_names", "category_ids", "preprocessing")


def average_weights(paths: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """A stripped weights file with the mean of the weights in `paths`, and notes for the user.

    Checkpoints and stripped files of ours, of which the moving averages (EMA) are taken where they have them. Means,
    also those of batch norm statistics, are formed in float64 and stored in the tensors' own type; whole-number
    tensors come from the last file. One file after the other is in memory.

    Raises:
        WeightsError: a file cannot be read, is not of ours, holds NaN or infinity, or is of another model, class list
            or preprocessing than the first.
    """
    if len(paths) < 2:
        raise WeightsError("an average needs two files or more")
    first = _read(paths[0])
    sums: dict[str, Tensor] = {}
    stored, with_ema = first, 0
    for path in paths:
        stored = first if path == paths[0] else _read(path)
        _check_same_model(paths[0], first, path, stored)
        with_ema += isinstance(stored.payload.get("ema"), Mapping)
        for name, tensor in stored.state.items():
            if not tensor.is_floating_point():
                continue
            if not tensor.isfinite().all():
                raise WeightsError(f"{path}: {name} holds NaN or infinity; leave this file out")
            value = tensor.double()
            sums[name] = sums[name].add_(value) if name in sums else value
    # double() of what is float64 already is no copy; the first file is not used any more, so adding in place is safe.
    averaged = {
        name: (sums[name] / len(paths)).to(tensor.dtype) if name in sums else tensor
        for name, tensor in stored.state.items()
    }
    notes = [f"{with_ema} of {len(paths)} files have a moving average (EMA) of the weights, which was taken"]
    if with_ema == 0:
        notes.clear()
    elif with_ema < len(paths):
        notes.append("plain weights and moving averages were mixed: is that meant?")
    return stripped_file(averaged, **{key: first.payload[key] for key in _MUST_AGREE}), notes


def _read(path: Path) -> StoredWeights:
    stored = read_weights(path)
    missing = [key for key in _MUST_AGREE if stored.payload.get(key) is None]
    if not stored.is_ours or missing:
        raise WeightsError(
            f"{path} is no checkpoint or detector of this project; scripts/convert_weights.py --to ours makes one"
        )
    return stored


def _check_same_model(first_path: Path, first: StoredWeights, path: Path, stored: StoredWeights) -> None:
    for key in _MUST_AGREE:
        one, other = first.payload[key], stored.payload[key]
        if one == other:
            continue
        detail = ""
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            field = next(field for field in {**one, **other} if one.get(field) != other.get(field))
            detail = f" ({field}: {one.get(field)} and {other.get(field)})"
        raise WeightsError(f"{path} and {first_path} do not have the same {key}{detail}; only equal models average")
    shapes, others = ({name: tensor.shape for name, tensor in s.state.items()} for s in (first, stored))
    if shapes != others:
        name = next(name for name in {**shapes, **others} if shapes.get(name) != others.get(name))
        raise WeightsError(f"{path} and {first_path} do not have the same tensors: {name} differs")
