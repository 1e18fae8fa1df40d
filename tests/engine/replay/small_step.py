"""A captured step of two small images, as a run would leave it."""

from dataclasses import asdict
from typing import Any

import torch

from detection.engine.replay.captured_step import FORMAT, VERSION
from detection.models import build_model
from tests.engine.tiny_model import make_known


def captured_step(amp: str = "off", **settings: Any) -> dict[str, Any]:
    """Content of the file, of the tiny model with `settings`; all is finite until something is changed in it."""
    make_known()
    torch.manual_seed(0)
    model = build_model("tiny", 3, **settings)
    batch = {
        "rank": 0,
        "micro_step": 0,
        "image_ids": [7, 9],
        "file_names": ["seven.jpg", "nine.jpg"],
        "pixels": torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8),
        "sizes": torch.tensor([[64, 96], [60, 80]]),
        "boxes_xyxy": torch.tensor([[[8.0, 8, 40, 44], [0, 0, 0, 0]], [[2.0, 5, 30, 20], [10, 10, 60, 50]]]),
        "labels": torch.tensor([[1, 0], [2, 0]]),
        "valid": torch.tensor([[True, False], [True, True]]),
        "sample_keys": torch.tensor([3, 4]),
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "iteration": 5,
        "message": "iteration 5 is not finite",
        "amp": amp,
        "loss_scale": 1.0,
        "device": "cpu",
        "model_config": asdict(model.config),
        "config": {"train": {"channels_last": False}, "model": {"sync_bn": False}},
        "run": {"world_size": 1},
        "model": model.state_dict(),
        "batches": [batch],
    }
