"""Reading weight files from anywhere without executing anything that they contain.

A pickle can name any function and have it called, so neither pickle's nor torch's reader is used: see pickles.py.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

from detection.models.config import ModelError
from detection.models.weights.pickles import read_pickle
from detection.models.weights.safetensors_files import is_safetensors, read_safetensors
from detection.models.weights.torch_files import LEGACY_START, read_archive, read_legacy


class WeightsError(ModelError):
    """A weight file or name that cannot be used; the message says why and what to do."""


BEST_WEIGHTS = "best_weights.safetensors"
"""What a run leaves in its output directory: its best weights alone, with all that a detector needs."""
DETECTOR = "detector"
"""The entry of a safetensors file's metadata that holds, as JSON, what of a stripped weights file is no tensor."""
_ZIP = b"PK"
_PICKLE = b"\x80"


def weight_file(path: Path) -> Path:
    """The file that a path means: the best weights of a run where it is that run's output directory."""
    if not path.is_dir():
        return path
    files = [path / name for name in ("checkpoints/best.pt", BEST_WEIGHTS, "checkpoints/last.pt")]
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise WeightsError(f"{path} is a folder without checkpoints/best.pt: give a weights file, or a run's folder")
    return found


def read_weight_file(path: Path) -> Any:
    """Whatever object the file holds, its tensors on the CPU, its metadata replaced by stand-ins.

    Raises WeightsError where the file does not exist, is damaged, or refers to anything but data.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file" if path.exists() else f"there is no weight file {path}")
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY_START))
        if start.startswith(_ZIP):
            return read_archive(path)
        if start == LEGACY_START:
            return read_legacy(path)
        if start.startswith(_PICKLE):
            content = path.read_bytes()
            return read_pickle(io.BytesIO(content), len(content))
        if is_safetensors(start):
            tensors, metadata = read_safetensors(path)
            return {**json.loads(metadata[DETECTOR]), "model": tensors} if DETECTOR in metadata else tensors
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was not read, and nothing in it was executed: {error}. If you trust it, load it "
            "where it was made and save its state_dict() alone"
        ) from error
    except Exception as error:  # what bytes that are not what they should be make zipfile and the readers raise
        raise WeightsError(f"{path} is damaged or cut short ({error}); fetch or copy it again") from error
    raise WeightsError(f"{path} is no torch file (.pt, .pth), safetensors file or pickle of numpy arrays (.pkl)")
