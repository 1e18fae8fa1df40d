"""What a run would save, in small, saved and damaged."""

from pathlib import Path
from typing import Any

import torch

from detection.engine.state import checkpoint
from detection.engine.state.checkpoint import load_checkpoint
from detection.engine.state.checkpoint_store import CheckpointStore


def state_at(iteration: int, **changes: Any) -> dict[str, Any]:
    """The state after `iteration` iterations, with other entries where they are given."""
    return {
        "iteration": iteration,
        "iterations_per_epoch": 10,
        "validation_due": False,
        "best_map": None,
        "best_epoch": None,
        "model": {"w": torch.full((4, 4), float(iteration))},
        "ema": None,
        "optimizer": {"type": "SGD", "state": {}},
        "scaler": {},
        "schedule": {"train_cfg": {"max_epochs": 12}, "param_scheduler": [{"type": "LinearLR"}]},
        "model_config": {"norm": "bn", "frozen_stages": -1},
        "config": {"model": {"weights": "none"}},
        "class_names": ["circle", "dreieck ü"],
        "category_ids": [1, 2],
        "preprocessing": {"min_size": 64, "max_size": 96},
        "run": {"model_name": "tiny", "seed": 0, "global_batch_size": 2, "world_size": 1, "data_digest": "0"},
        **changes,
    }


def save(folder: Path, iteration: int, names: list[str], *, keep: int = 3, due: bool = False) -> None:
    store = CheckpointStore(folder, keep)
    assert store.save(state_at(iteration, validation_due=due), names) is None
    assert store.close() is None


def iterations(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path).state["iteration"] for path in sorted(folder.glob("*.pt"))}


def damage(path: Path, how: str) -> None:
    """`path` as a crash, a bad disk or a mistake leaves it; other names of the same file stay whole."""
    content = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit-flipped":
        # In the tensor's bytes: a flip that torch.load alone would not notice.
        place = content.index(torch.full((4, 4), 2.0).numpy().tobytes())
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    elif how == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(1)}}, path)
    elif how == "half-written":
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    elif how == "other-version":
        torch.save({"format": checkpoint.FORMAT, "version": 99, **state_at(2)}, path)
    elif how == "incomplete":
        torch.save({"format": checkpoint.FORMAT, "version": 1, "iteration": 2, "validation_due": False}, path)
