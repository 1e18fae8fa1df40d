"""Gradients of several processes: run by test_gradient_buckets.py in each, results left in <folder>/<rank>.pt."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detection.config import parse_arguments
from detection.engine import run
from detection.engine.accelerate.cuda_graphs import StepGraphs
from detection.engine.distributed.comm import Processes, start_processes, stop_processes
from detection.engine.optim import gradient_buckets
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.engine.trainer import Trainer
from detection.models.ops.backend import DEVICE, implementation
from detection.process_exit import leave
from tests.engine.accelerate.operator_recorder import OperatorRecorder
from tests.engine.accelerate.test_cuda_graphs import batch, tiny
from tests.engine.tiny_model import make_known


class Network(nn.Module):
    """Layers of unequal size. The last takes part on process 0 alone, the first nowhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.nowhere = nn.Linear(3, 3)
        self.first, self.second = nn.Linear(5, 33), nn.Linear(33, 7)
        self.only_on_0 = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor, *, everything: bool) -> torch.Tensor:
        x = self.second(self.first(x).tanh())
        return (self.only_on_0(x) if everything else x).square().sum()


def exchanged(processes: Processes, *, in_rank_order: bool, accumulate: int = 1) -> dict[str, Any]:
    """Each process's own gradients, and what the buckets make of them; how many buckets left in the backward pass."""
    model = Network()
    given = torch.Generator().manual_seed(processes.rank)
    sent_in_backward = -1

    def backward(buckets: GradientBuckets | None) -> None:
        nonlocal sent_in_backward
        given.manual_seed(processes.rank)
        for micro_step in range(accumulate):
            if buckets is not None and micro_step == accumulate - 1:
                buckets.send_in_backward()
            model(torch.randn(4, 5, generator=given) * 1e3, everything=processes.is_main).backward()
        if buckets is not None:
            sent_in_backward = len(watched)
            buckets.finish()

    backward(None)
    own = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    watched: list[Any] = []
    plain = Processes.all_reduce_sum_async

    def watch(self: Processes, values: torch.Tensor, **how: Any) -> Any:
        watched.append(values)
        return plain(self, values, **how)

    Processes.all_reduce_sum_async = watch  # type: ignore[method-assign]
    buckets = GradientBuckets(list(model.parameters()), processes, in_rank_order=in_rank_order)
    results = []
    for _ in range(3):
        buckets.zero()
        watched.clear()
        backward(buckets)
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    Processes.all_reduce_sum_async = plain  # type: ignore[method-assign]
    return {"own": own, "results": results, "in_backward": sent_in_backward, "buckets": len(watched)}


def graphs_of_other_times(processes: Processes) -> dict[str, Any]:
    """Passes that each process records at another time, because its images have other numbers of boxes."""
    numbers = [3, 3, 40, 3, 40, 40, 3, 40]
    mine = numbers if processes.is_main else numbers[::-1]
    batches = [batch(10 * seed + processes.rank, number) for seed, number in enumerate(mine)]
    found: dict[str, Any] = {}
    for name in ("graphs", "eager"):
        model = tiny()
        parameters = list(model.parameters())
        recorder = OperatorRecorder()
        recorder.untouched = lambda parameters=parameters: [p.grad for p in parameters]
        graphs = StepGraphs(recorder, print)
        buckets = GradientBuckets(parameters, processes, stay=name == "graphs")

        def step(images: Any, targets: Any, model: nn.Module = model) -> dict[str, torch.Tensor]:
            losses = model(images, targets)
            torch.stack(list(losses.values())).sum().backward()
            return {name: value.detach() for name, value in losses.items()}

        captured, gradients = [], []
        with implementation(**DEVICE):
            for images, targets in batches:
                buckets.zero()
                buckets.send_in_backward()
                (graphs.run(step, images, targets)) if name == "graphs" else step(images, targets)
                buckets.finish()
                captured.append(graphs.num_captures)
                gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        found[name] = {"captured": captured, "gradients": torch.stack(gradients)}
    return found


def trainings(folder: Path, ports: list[str], words: list[str]) -> list[int]:
    """A training that goes through, and one that is stopped after its first iteration and resumed."""
    plain = Trainer.train_step

    def signaled(self: Trainer, batches: Any) -> None:
        iteration = self.state.progress.iteration
        plain(self, batches)
        if (os.environ["RANK"], iteration) == ("1", 0):
            os.kill(os.getpid(), signal.SIGTERM)

    status = []
    for name, step, more in (("whole", plain, []), ("halves", signaled, []), ("halves", plain, ["--resume"])):
        os.environ["MASTER_PORT"] = ports.pop()
        Trainer.train_step = step  # type: ignore[method-assign]
        status.append(run(parse_arguments([*words, "--output-dir", str(folder / name), *more])))
    return status


def main() -> None:
    folder, ports, words = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    make_known()
    gradient_buckets.BUCKET_BYTES = 600
    processes = start_processes("cpu")
    found: dict[str, Any] = {
        "plain": exchanged(processes, in_rank_order=False),
        "in rank order": exchanged(processes, in_rank_order=True),
        "accumulated": exchanged(processes, in_rank_order=False, accumulate=3),
        "graphs": graphs_of_other_times(processes),
    }
    stop_processes()
    gradient_buckets.BUCKET_BYTES = 2**20
    found["trainings"] = trainings(folder, ports, words)
    torch.save(found, folder / f"{processes.rank}.pt")
    leave(0)


if __name__ == "__main__":
    main()
