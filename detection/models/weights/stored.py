"""A weight file, read and translated into our names and tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.models.weights.files import WeightsError, read_weight_file
from detection.models.weights.layouts import clean_names, recognize, stem_from_bgr, to_ours
from detection.models.weights.sources import ZERO_EPS_WEIGHTS, published_hash

CHECKPOINT_FORMAT = "detection-checkpoint"
STRIPPED_FORMAT = "detector-weights"
STEM = "backbone.conv1.weight"


@dataclass(frozen=True)
class StoredWeights:
    """What a weight file holds.

    state: our names to tensors. origin: our names to the file's names; what has no counterpart in our models
    is in `state` under the file's name and not in `origin`. layout: see `weight_layouts.recognize`. norm_eps:
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
        return self.payload.get("format") in (CHECKPOINT_FORMAT, STRIPPED_FORMAT)


def read_weights(path: Path, map_location: str | torch.device = "cpu") -> StoredWeights:
    """Reads a file of ours, torchvision's, MMDetection's or Detectron2's and translates its names and
    tensors.

    Raises WeightsError where it cannot be read or is none of these.
    """
    payload = read_weight_file(path, map_location)
    if not isinstance(payload, Mapping):
        raise WeightsError(f"{path} holds a {type(payload).__name__}, not a dictionary of weights")
    found, notes = _find_state(path, payload)
    state = clean_names(found)
    layout = recognize(state)
    if layout is None:
        raise WeightsError(
            f"the names in {path} are of no known layout ({', '.join(list(state)[:4])}, ...). Readable are our "
            "checkpoints, Faster R-CNNs of torchvision, MMDetection and Detectron2, and torchvision's ResNets"
        )
    ours, origin = to_ours(state, layout)
    norm_eps: float | None = None
    if payload.get("format") in (CHECKPOINT_FORMAT, STRIPPED_FORMAT):
        config = payload.get("model_config") or {}
        norm_eps, stride_in_1x1 = config.get("norm_eps"), config.get("stride_in_1x1")
    else:
        stride_in_1x1, undivided_bgr = _input_and_strides(layout, state, payload)
        if layout == "torchvision" and _sha256(path).startswith(tuple(map(published_hash, ZERO_EPS_WEIGHTS))):
            norm_eps = 0.0
        if undivided_bgr and STEM in ours:
            ours[STEM] = stem_from_bgr(ours[STEM])
            notes.append("the stem was turned from the input it was made for (BGR, undivided) to ours (RGB, divided)")
    return StoredWeights(ours, origin, layout, norm_eps, stride_in_1x1, tuple(notes), payload)


def _input_and_strides(
    layout: str, state: Mapping[str, Tensor], payload: Mapping[str, Any]
) -> tuple[bool | None, bool]:
    """Whether strides sit in the first 1x1 convolutions (None: not known), and whether the input is BGR undivided.

    The two go together in networks that descend from Caffe's ResNet: Detectron2's, unless their backbone was
    converted from torchvision's, and those MMDetection calls caffe style (in the configuration text that its
    checkpoints carry).
    """
    if layout in ("torchvision", "backbone"):
        return False, False
    if layout == "detectron2":
        from_caffe = payload.get("__author__") != "torchvision"
        deviation = state.get("pixel_std")
        return from_caffe, from_caffe and (deviation is None or bool((deviation == 1).all()))
    meta = payload.get("meta")
    text = (meta.get("cfg") or meta.get("config")) if isinstance(meta, Mapping) else None
    if not isinstance(text, str) or "style=" not in text:
        return None, False
    from_caffe = "style='caffe'" in text
    return from_caffe, from_caffe and "std=[1.0, 1.0, 1.0]" in text


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


def _find_state(path: Path, payload: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The names and tensors inside what a training program saved, and what to say about the choice."""
    if payload.get("format") in (CHECKPOINT_FORMAT, STRIPPED_FORMAT):
        if isinstance(payload.get("ema"), Mapping):
            return dict(payload["ema"]), ["the checkpoint's moving average (EMA) of the weights was taken"]
        if not isinstance(payload.get("model"), Mapping):
            raise WeightsError(f"{path} calls itself a {payload['format']} but has no weights under 'model'")
        return dict(payload["model"]), []
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
    return tensors, []


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=True))
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
