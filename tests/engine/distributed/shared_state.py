"""One state from process 0 to all: run by test_shared_state.py, what arrived left in <folder>/<rank>.pt."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.engine.distributed.comm import Processes, start_processes, stop_processes
from detection.engine.optim.time_budget import TimeBudget
from detection.engine.state.train_state import TrainState
from detection.process_exit import leave
from schedules import load_schedule


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


def planned_end(processes: Processes) -> dict:
    """What a budget of hours plans where every process's clock goes at a pace of its own."""
    model: Any = None
    facts = {"iterations_per_epoch": 100}
    state = TrainState(model, model, model, None, load_schedule("1x"), facts)
    budget = TimeBudget(0.1, processes, clock=lambda: state.progress.iteration * (1.0 + processes.rank))
    for _ in range(5):
        state.progress.iteration += 20
        state.progress.ending.seconds, left = budget.left(state.progress.iteration, state.progress.ending.seconds)
        if left is not None:
            state.end_in(left)
    return asdict(state.progress)


def gathered(processes: Processes) -> dict:
    """Arrays of unequal lengths, put together on process 0."""
    rank = processes.rank
    cases = {
        "unequal": np.arange(3 + 2 * rank, dtype=np.int64) + 100 * rank,
        "main one without": np.full((2 * rank, 4), 7.5, np.float32),
        "none has": np.zeros((0, 3)),
        "large, of the first": np.arange(2**53, 2**53 + 5 * (rank == 0) + 1, dtype=np.int64),
    }
    found = {name: processes.gather_arrays(array) for name, array in cases.items()}
    return {name: None if array is None else torch.from_numpy(array) for name, array in found.items()}


def main() -> int:
    processes = start_processes("cpu")
    arrived = processes.broadcast_state(state_to_share() if processes.is_main else None)
    arrived["plan"] = planned_end(processes)
    torch.save(gathered(processes), Path(sys.argv[1]) / f"gathered_{processes.rank}.pt")
    torch.save(arrived, Path(sys.argv[1]) / f"{processes.rank}.pt")
    processes.barrier()
    stop_processes()
    return 0


if __name__ == "__main__":
    leave(main())
