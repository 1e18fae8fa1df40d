"""What two processes do together: run by test_two_ranks.py in both, results left in <folder>/<rank>.pt."""

import contextlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import train
from detection.config import ConfigError, parse_arguments
from detection.engine import RunError, build, run
from detection.engine import train as train_module
from detection.engine.accelerate.cuda_graphs import Losses, StepGraphs
from detection.engine.distributed.agreement import run_on_all_ranks, run_on_main_rank
from detection.engine.distributed.comm import Processes, start_processes, stop_processes
from detection.engine.distributed.sync_batch_norm import synchronize_batch_norm
from detection.engine.evaluator import EvalLoader
from detection.engine.metrics.step_metrics import NonFiniteLoss, StepMetrics
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.engine.trainer import Trainer
from detection.models import FasterRCNN, ImageBatch, TargetBatch, build_model
from detection.process_exit import leave
from tests.engine.tiny_model import make_known


def agreed(processes: Processes) -> dict[str, Any]:
    def fails_on(rank: int) -> int:
        if processes.rank == rank:
            raise ConfigError(f"rank {rank} does not like it")
        return processes.rank

    def fails_on_both() -> None:
        raise ConfigError("nobody likes it")

    def message(action: Callable[[], Any]) -> str:
        try:
            return f"result {action()}"
        except RunError as error:
            return str(error)

    shared = nn.BatchNorm2d(1)
    nn.init.constant_(shared.weight, 3.0 + processes.rank)
    shared.running_mean.fill_(7.0 + processes.rank)
    processes.broadcast_weights(shared)
    return {
        "together, one fails": message(lambda: run_on_all_ranks(processes, lambda: fails_on(1))),
        "together, both fail": message(lambda: run_on_all_ranks(processes, fails_on_both)),
        "together": message(lambda: run_on_all_ranks(processes, lambda: fails_on(9))),
        "main first, main fails": message(lambda: run_on_main_rank(processes, lambda: fails_on(0))),
        "main first": message(lambda: run_on_main_rank(processes, lambda: fails_on(1))),
        "broadcast": processes.broadcast({"rank": processes.rank}),
        "largest": processes.all_reduce_max_async(processes.rank).result(),
        "mean": processes.mean(torch.tensor([1.0 + processes.rank, 5.0])).tolist(),
        "weights": [float(shared.weight.detach()), float(shared.running_mean)],
    }


def non_finite(processes: Processes) -> str:
    records = StepMetrics(processes, images_per_iteration=4, gradient_may_overflow=False)
    for iteration in range(2):
        losses = {name: torch.tensor(1.0) for name in ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")}
        if (processes.rank, iteration) == (1, 1):
            losses["loss_cls"] = torch.tensor(float("nan"))
        facts = {"epoch": 0, "iteration": iteration, "lr": 0.1, "data_seconds": 0.0}
        records.add(losses, torch.tensor(2.0), [10 * processes.rank + iteration], **facts)
    try:
        records.read()
    except NonFiniteLoss as error:
        return str(error)
    return "nothing was found"


def synchronized_norm(processes: Processes) -> dict[str, Any]:
    """A small network with two norms over half of a batch, one more image on rank 1 than on rank 0."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    synchronize_batch_norm(network, processes.device)
    pixels = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 50
    mine = pixels[:2] if processes.rank == 0 else pixels[2:]
    mine.requires_grad_()
    outputs = network.train()(mine)
    outputs.square().mul(torch.arange(1.0, 37.0).view(6, 6)[:4, :4]).sum().backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        # mean() divides by the number of processes, and the loss is a sum over all images.
        gradients[name] = 2 * processes.mean(parameter.grad)
    found = {"outputs": outputs.detach(), "input_gradient": mine.grad, "gradients": gradients}
    return {**found, "state": network.state_dict(), "evaluated": network.eval()(mine).detach()}


def shared_buffers(processes: Processes) -> list[float]:
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(5.0 + processes.rank)
    norm.num_batches_tracked.fill_(3 + processes.rank)
    processes.broadcast_buffers(norm)
    return [norm.running_mean.item(), norm.num_batches_tracked.item()]


def without_boxes(processes: Processes) -> dict[str, Any]:
    """A training step in which rank 1 has no box, then one in which nobody has."""
    torch.manual_seed(0)
    model = build_model("tiny", 3, norm="bn", frozen_stages=-1).train()
    buckets = GradientBuckets(list(model.parameters()), processes)
    images = ImageBatch(torch.full((1, 3, 64, 64), 90, dtype=torch.uint8), torch.tensor([[64, 64]]))
    boxes = torch.tensor([[[8.0, 8.0, 40.0, 44.0], [0.0, 0.0, 0.0, 0.0]]])
    found: dict[str, Any] = {}
    for case, valid in (("rank 1 has none", processes.rank == 0), ("nobody has any", False)):
        buckets.zero()
        buckets.send_in_backward()
        targets = TargetBatch(
            boxes * valid, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[valid, False]]), torch.tensor([3])
        )
        losses = model(images, targets)
        sum(losses.values()).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        buckets.finish()
        found[case] = {
            "losses": {name: float(value) for name, value in losses.items()},
            "without gradient": without,
            "gradients": {name: p.grad.clone() for name, p in model.named_parameters()},
        }
    return found


class NoRecorder:
    def warm_up(self, step: Callable[[], Losses]) -> Losses:
        return step()

    def capture(self, step: Callable[[], Losses]) -> Callable[[], Losses]:
        raise RuntimeError("nothing is recorded here")


def trainings(folder: Path, ports: list[str], words: list[str]) -> dict[str, Any]:
    """Whole trainings of one epoch, each as torchrun would start it."""

    def train(name: str, *more: str) -> int:
        os.environ["MASTER_PORT"] = ports.pop()
        return run(parse_arguments([*words, "--output-dir", str(folder / name), *more]))

    rank = int(os.environ["RANK"])
    as_one = ["--norm", "gn", "--limit-val-batches", "9"]
    one_image = ["--val-images", words[words.index("--data-path") + 1] + "/val2017"]
    one_image += ["--val-annotations", str(folder / "one_image.json")]
    masks = ["--model", "tiny_mask"]
    found: dict[str, Any] = {}
    found["as one process"] = train("as_one", *as_one)
    found["one image"] = train("one_image", "--limit-train-batches", "1", "--sync-bn", *one_image, *masks)
    found["whole"] = train("whole", "--ema", "0.5", *masks)

    # Gradients that stay in their buckets, beside those that move there.
    words_of_graphs = ["--cuda-graphs", "--norm", "gn", "--limit-val-batches", "1"]
    for name, graphs in (("moving", None), ("staying", StepGraphs(NoRecorder(), print))):
        build.require_cuda_graphs = lambda device: None  # type: ignore[assignment]
        train_module.cuda_step_graphs = lambda model, warn, graphs=graphs: graphs  # type: ignore[assignment, misc]
        found[name] = train(name, *words_of_graphs)

    plain_step, plain_plan = Trainer.train_step, EvalLoader.batches

    def signalled_step(self: Trainer, batches: Any) -> None:
        iteration = self.state.progress.iteration
        plain_step(self, batches)
        if (rank, iteration) == (1, 0):
            os.kill(os.getpid(), signal.SIGTERM)

    def signalled_batches(self: EvalLoader) -> Any:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain_plan(self)

    Trainer.train_step = signalled_step  # type: ignore[method-assign]
    found["stopped in training"] = train("stopped", "--ema", "0.5", *masks)
    Trainer.train_step = plain_step  # type: ignore[method-assign]
    EvalLoader.batches = signalled_batches  # type: ignore[method-assign]
    found["stopped in validation"] = train("stopped", "--ema", "0.5", "--resume", *masks)
    EvalLoader.batches = plain_plan  # type: ignore[method-assign]
    if rank == 1:  # whatever lies at that path for it: the state is the one that process 0 has read
        build.newest_checkpoint = None  # type: ignore[assignment]
    found["resumed"] = train("stopped", "--ema", "0.5", "--resume", *masks)
    return found


def faults(folder: Path, ports: list[str], words: list[str]) -> dict[str, Any]:
    """Trainings in which something is wrong on rank 1 alone."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}

    def train(name: str, *more: str) -> str:
        os.environ["MASTER_PORT"] = ports.pop()
        try:
            return f"status {run(parse_arguments([*words, '--output-dir', str(folder / name), *more]))}"
        except RunError as error:
            return str(error)

    plain_losses, plain_step = FasterRCNN._losses, Trainer.train_step
    calls: list[None] = []

    def losses(self: FasterRCNN, images: ImageBatch, targets: TargetBatch, *features: Any) -> dict[str, Any]:
        calls.append(None)
        values = plain_losses(self, images, targets, *features)
        if (rank, len(calls)) == (1, 2):
            # Of finite gradients: nothing but the guard itself can tell the other process.
            values["loss_cls"] = values["loss_cls"] * 0 + math.inf
        return values

    def watched(self: Trainer, batches: Any) -> None:
        plain_step(self, batches)
        average = self.state.ema.module.state_dict()  # type: ignore[union-attr]
        state = self.state.model.state_dict() | {f"ema {name}": value for name, value in average.items()}
        found.setdefault("weights", []).append({name: value.clone() for name, value in state.items()})

    FasterRCNN._losses, Trainer.train_step = losses, watched  # type: ignore[method-assign]
    found["skipping"] = train("skipping", "--skip-nonfinite", "--norm", "bn", "--ema", "0.5")
    FasterRCNN._losses, Trainer.train_step = plain_losses, plain_step  # type: ignore[method-assign]

    data = Path(words[words.index("--data-path") + 1])
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    del content["annotations"][:rank]
    mine = folder / f"train_of_{rank}.json"
    mine.write_text(json.dumps(content))
    found["other data"] = train(
        "other_data", "--train-images", str(data / "train2017"), "--train-annotations", str(mine)
    )

    where = ["--data-path", str(folder / "broken_set")]
    words = [*words[: words.index("--data-path")], *where, *words[words.index("--data-path") + 2 :]]
    found["replacing"] = train("replacing", "--limit-train-batches", "9", "--limit-val-batches", "9")
    found["too many"] = train("too_many", "--limit-train-batches", "9", "--max-bad-images", "1")
    found["too many to validate"] = train("too_many_val", "--limit-val-batches", "9", "--max-bad-images", "0")
    return found


def missing_data(folder: Path, port: str) -> dict[str, Any]:
    """What the program itself says where there is no data set, and its exit status."""
    os.environ["MASTER_PORT"] = port
    os.chdir(folder)
    sys.argv = ["train.py", "--device", "cpu", "--weights", "none"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = train.main()
    return {"status": status, "said": said.getvalue(), "wrote": (folder / "runs").exists()}


def main() -> None:
    folder, ports, words = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    make_known()
    processes = start_processes("cpu")
    found: dict[str, Any] = {}
    for claim in (agreed, non_finite, synchronized_norm, shared_buffers, without_boxes):
        found[claim.__name__] = claim(processes)
    stop_processes()
    found["trainings"] = trainings(folder, ports, words)
    found["faults"] = faults(folder, ports, words)
    found["missing_data"] = missing_data(folder, ports.pop())
    torch.save(found, folder / f"{processes.rank}.pt")
    leave(0)


if __name__ == "__main__":
    main()
