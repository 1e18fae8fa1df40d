"""Weight files: read and translated into our names and tensors, stripped to what a detector needs, averaged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from detection.models.weights.files import DETECTOR, WeightsError, read_weight_file
from detection.models.weights.layouts import (
    CAFFE_INPUT,
    IMAGENET_INPUT,
    PixelInput,
    box_heads,
    classifier_names,
    clean_names,
    recognize,
    regressor_names,
    stem_for,
    to_ours,
)
from detection.models.weights.safetensors_files import write_safetensors
from detection.models.weights.sources import is_zero_eps_file

CHECKPOINT_FORMAT = "detection-checkpoint"
STRIPPED_FORMAT = "detector-weights"
_STEM = "backbone.conv1.weight"
_DETECTOR_ENTRIES = {"model_config": dict, "class_names": list, "category_ids": list, "preprocessing": dict}


@dataclass(frozen=True)
class StoredWeights:
    """What a weight file holds.

    state: our names to tensors. origin: our names to the file's names; what has no counterpart in our models
    is in `state` under the file's name and not in `origin`. layout: see `layouts.recognize`. norm_eps:
    the batch norm epsilon that the weights were made for, None where the file does not tell. stride_in_1x1:
    likewise. notes: for the user. payload: the whole file, tensors and metadata (inert stand-ins where it was
    not plain).
    """

    state: dict[str, Tensor]
    origin: dict[str, str]
    layout: str
    norm_eps: float | None
    stride_in_1x1: bool | None
    notes: tuple[str, ...]
    payload: Mapping[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether the file is a checkpoint or a stripped file of this project, which knows its model."""
        return _is_ours(self.payload)


def _is_ours(payload: Mapping[str, Any]) -> bool:
    name = payload.get("format")
    return isinstance(name, str) and name in (CHECKPOINT_FORMAT, STRIPPED_FORMAT)


def read_weights(
    path: Path, pixels: PixelInput | None = IMAGENET_INPUT, *, is_published: bool = False
) -> StoredWeights:
    """Reads a file of ours, torchvision's, MMDetection's or Detectron2's and translates its names and
    tensors, which are on the CPU.

    pixels: what the network is given whose stem this shall be. A file that does not tell what its own was given is
    taken to be for the same. None: the stem stays as it is. is_published: the file is one of torchvision's.

    Raises WeightsError where it cannot be read or is none of these.
    """
    payload = read_weight_file(path)
    if not isinstance(payload, Mapping):
        raise WeightsError(f"{path} holds a {type(payload).__name__}, not a dictionary of weights")
    found, notes = _find_state(path, payload)
    state = clean_names(found)
    layout = recognize(state)
    if layout is None:
        raise WeightsError(
            f"the names in {path} are of no known layout ({', '.join(list(state)[:4])}, ...). Readable are our "
            "checkpoints, Faster R-CNNs of torchvision, MMDetection and Detectron2, and ResNets of torchvision's or "
            "transformers' names"
        )
    try:
        ours, origin = to_ours(state, layout)
        if _is_ours(payload):
            config = payload["model_config"] if isinstance(payload.get("model_config"), dict) else {}
            norm_eps = config["norm_eps"] if isinstance(config.get("norm_eps"), float) else None
            stride_in_1x1 = config["stride_in_1x1"] if isinstance(config.get("stride_in_1x1"), bool) else None
            made_for = _stored_input(config)
        else:
            norm_eps = 0.0 if layout == "torchvision" and is_zero_eps_file(path) else None
            stride_in_1x1, made_for = _strides_and_input(layout, state, payload)
        if layout == "backbone" and is_published:
            stride_in_1x1, made_for = False, IMAGENET_INPUT
        # Another deviation alone is a matter of the data: their pixels are to look like those of the weights' own.
        if pixels is not None and made_for is not None and _words(made_for) != _words(pixels) and _STEM in ours:
            ours[_STEM] = stem_for(ours[_STEM], made_for, pixels)
            notes.append(f"the stem was turned from the input it was made for ({_words(made_for)}) to {_words(pixels)}")
    except (IndexError, RuntimeError) as error:
        raise WeightsError(f"{path}: a tensor has not the shape that its name calls for ({error})") from error
    for head in box_heads(ours):
        for names, rows in ((classifier_names(head), 1), (regressor_names(head), 4)):
            for name, dimensions in zip(names, (2, 1), strict=True):
                shape = ours[name].shape if name in ours else None
                if shape is not None and (len(shape) != dimensions or shape[0] < max(2, rows) or shape[0] % rows):
                    raise WeightsError(f"{path}: {origin.get(name, name)} has the shape {list(shape)}")
    return StoredWeights(ours, origin, layout, norm_eps, stride_in_1x1, tuple(notes), payload)


def read_own(path: Path) -> StoredWeights:
    """The weights of a detector of one's own: those of a run here, or a plain state dict of the module itself."""
    payload = read_weight_file(path)
    if not isinstance(payload, Mapping):
        raise WeightsError(f"{path} holds a {type(payload).__name__}, not a dictionary of weights")
    found, notes = _find_state(path, payload)
    state = {name if name.startswith("own.") else f"own.{name}": tensor for name, tensor in found.items()}
    return StoredWeights(state, {f"own.{name}": name for name in found}, "ours", None, None, tuple(notes), payload)


def read_detector_file(path: Path) -> StoredWeights:
    """A checkpoint or a stripped file of ours, with all that a detector needs. Raises WeightsError for any other."""
    payload = read_weight_file(path)
    is_own = isinstance(payload, Mapping) and _is_ours(payload) and "factory" in (payload.get("model_config") or {})
    stored = read_own(path) if is_own else read_weights(path, pixels=None)
    if not stored.is_ours:
        raise WeightsError(
            f"{path} is no checkpoint or detector of this project: it holds weights alone, without class names and the "
            "model's settings; make a detector of it with scripts/convert_weights.py --to ours"
        )
    for key, kind in _DETECTOR_ENTRIES.items():
        if stored.payload.get(key) is None:
            raise WeightsError(f"{path} lacks {key!r}, which a detector needs")
        with contextlib.suppress(TypeError, ValueError):
            json.dumps(stored.payload[key])  # of nothing but plain values
            if isinstance(stored.payload[key], kind):
                continue
        raise WeightsError(f"{path} does not hold together: {key!r} is not what a detector needs")
    return stored


def _strides_and_input(
    layout: str, state: Mapping[str, Tensor], payload: Mapping[str, Any]
) -> tuple[bool | None, PixelInput | None]:
    """Whether strides sit in the first 1x1 convolutions, and what the stem is given; None: not known.

    BGR goes with strides in the first 1x1 in networks that descend from Caffe's ResNet: Detectron2's, unless their
    backbone was converted from torchvision's, and those MMDetection calls caffe style (in the configuration text that
    its checkpoints carry). A bare ResNet may be torchvision's, or Caffe's with torchvision's names.
    """
    if layout == "backbone":
        return None, None
    if layout in ("torchvision", "transformers"):
        return False, IMAGENET_INPUT
    if layout == "detectron2":
        from_caffe = payload.get("__author__") != "torchvision"
        deviation = state.get("pixel_std")
        undivided = from_caffe and (deviation is None or bool((deviation == 1).all()))
        return from_caffe, CAFFE_INPUT if undivided else IMAGENET_INPUT
    meta = payload.get("meta")
    text = (meta.get("cfg") or meta.get("config")) if isinstance(meta, Mapping) else None
    if not isinstance(text, str) or "style=" not in text:
        return None, None
    from_caffe = "style='caffe'" in text
    undivided = from_caffe and "std=[1.0, 1.0, 1.0]" in text
    return from_caffe, CAFFE_INPUT if undivided else IMAGENET_INPUT


def _stored_input(config: Mapping[str, Any]) -> PixelInput | None:
    """That of the settings in a file of ours."""
    order, std = config.get("pixel_order", "rgb"), config.get("pixel_std")
    if order not in ("rgb", "bgr") or not isinstance(std, (list, tuple)) or len(std) != 3 or 0 in std:
        return None
    return PixelInput(order, tuple(std)) if all(isinstance(each, (int, float)) for each in std) else None


def _words(pixels: PixelInput) -> str:
    return f"{pixels.order.upper()}, {'undivided' if set(pixels.std) == {1.0} else 'divided'}"


def stripped_file(
    state: Mapping[str, Tensor],
    *,
    model_config: Mapping[str, Any],
    class_names: Sequence[str],
    category_ids: Sequence[int],
    preprocessing: Mapping[str, int],
) -> dict[str, Any]:
    """What a stripped weights file holds: all that `load_detector` needs and nothing of a training run.

    state: weights in our layout. model_config: the model's settings as a dictionary. class_names,
    category_ids: one per label. preprocessing: {"min_size", "max_size"}.
    """
    return {
        "format": STRIPPED_FORMAT,
        "version": 1,
        "model": {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()},
        "model_config": dict(model_config),
        "class_names": list(class_names),
        "category_ids": list(category_ids),
        "preprocessing": dict(preprocessing),
    }


def write_detector(stream: BinaryIO, content: Mapping[str, Any]) -> None:
    """Write what `stripped_file` gives, with any plain entries besides, as a safetensors file."""
    described = {name: value for name, value in content.items() if name != "model"}
    # "format" tells the format's own readers of whom the tensors are.
    write_safetensors(stream, content["model"], {"format": "pt", DETECTOR: json.dumps(described)})


def _find_state(path: Path, payload: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The names and tensors inside what a training program saved, and what to say about the choice."""
    notes = []
    if _is_ours(payload):
        if isinstance(payload.get("ema"), Mapping):
            payload = payload["ema"]
            notes.append("the checkpoint's moving average (EMA) of the weights was taken")
        elif isinstance(payload.get("model"), Mapping):
            payload = payload["model"]
        else:
            raise WeightsError(f"{path} calls itself a {payload['format']} but has no weights under 'model'")
    for key in ("state_dict", "model"):
        if isinstance(payload.get(key), Mapping) and payload[key]:
            payload = payload[key]
            break
    if "blobs" in payload:
        raise WeightsError(f"{path} has Caffe2's names, which are not read; convert it with Detectron2 first")
    tensors = {str(name): tensor for name, value in payload.items() if (tensor := _tensor(value)) is not None}
    if not tensors:
        keys = ", ".join(map(str, list(payload)[:8]))
        raise WeightsError(f"there are no weights in {path}; it holds {keys or 'nothing'}")
    return tensors, notes


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=True))
    return None


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
    first = read_detector_file(paths[0])
    sums: dict[str, Tensor] = {}
    stored, with_ema = first, 0
    for path in paths:
        stored = first if path == paths[0] else read_detector_file(path)
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
    notes = []
    if with_ema:
        notes.append(f"{with_ema} of {len(paths)} files have a moving average (EMA) of the weights, which was taken")
    if 0 < with_ema < len(paths):
        notes.append("plain weights and moving averages were mixed: is that meant?")
    return stripped_file(averaged, **{key: first.payload[key] for key in _DETECTOR_ENTRIES}), notes


def _check_same_model(first_path: Path, first: StoredWeights, path: Path, stored: StoredWeights) -> None:
    for key in _DETECTOR_ENTRIES:
        one, other = first.payload[key], stored.payload[key]
        if one == other:
            continue
        detail = ""
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            field = next(field for field in {**one, **other} if one.get(field) != other.get(field))
            detail = f" ({field}: {one.get(field)} and {other.get(field)})"
        raise WeightsError(f"{first_path} and {path} do not have the same {key}{detail}; only equal models average")
    shapes, others = ({name: tensor.shape for name, tensor in s.state.items()} for s in (first, stored))
    if shapes != others:
        name = next(name for name in {**shapes, **others} if shapes.get(name) != others.get(name))
        raise WeightsError(f"{first_path} and {path} do not have the same tensors: {name} differs")
