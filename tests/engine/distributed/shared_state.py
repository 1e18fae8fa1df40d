"""One state from process 0 to all: run by test_shared_state.py, what arrived left in <folder>/<rank>.pt."""

import sys
from pathlib import Path

import torch

from detection.engine.distributed.comm import start_processes, stop_processes
from detection.process_exit import leave


def state_to_share() -> dict:
    weight = torch.arange(60.0).view(3, 4, 5).permute(2, 0, 1)
    special = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return {
        "model": {"weight": weight, "half": special.bfloat16(), "special": special, "empty": torch.zeros(0, 3)},
        "optimizer": {"type": "SGD", "state": {"weight": {"step": torch.tensor(7), "momentum": torch.randn(3)}}},
        "scaler": {},
        "best_map": None,
        "names": ["cat", "dog"],
    }


def main() -> int:
    processes = start_processes("cpu")
    arrived = processes.broadcast_state(state_to_share() if processes.is_main else None)
    torch.save(arrived, Path(sys.argv[1]) / f"{processes.rank}.pt")
    processes.barrier()
    stop_processes()
    return 0


if __name__ == "__main__":
    leave(main())
