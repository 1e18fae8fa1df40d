"""What a run would save, in small."""

from typing import Any

import torch


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
