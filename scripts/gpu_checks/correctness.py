"""Whether what makes a GPU fast gives the numbers of plain code; one check a process, its figures as JSON.

    python scripts/gpu_checks/correctness.py kernels --device cuda --json kernels.json

Freed memory is filled with NaN before each run, so that what reads memory that nothing has written shows it. On a CPU
the same logic runs without kernels and graphs: a recording is then the pass itself, run again with the same tensors.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where checkout.py and the other parts are

import torch
import torch.distributed as dist
from torch import Tensor

import checkout  # noqa: F401
from benchmarks.figures import full_record, headline, write_json
from detection.engine.accelerate.cuda_graphs import CudaGraphBackend, GraphBackend, StepGraphs, record_detection
from detection.engine.distributed.comm import Processes
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.export import compare_detections
from detection.models import FasterRCNN, ImageBatch, TargetBatch, build_model
from detection.models.ops.backend import DEVICE, implementation
from detection.models.ops.selfcheck import describe_kernels, kernels_that_differ, uses_triton

SIZES = ((64, 96), (96, 64), (64, 128))
BATCHES_OF_A_SIZE = 4
"""The first two are passes as they are written, the third is recorded."""
_CLOSE_LOSS, _CLOSE_GRADIENT = 2e-3, 2e-2
"""Largest relative difference of a loss, and of the norm of all gradients, in float32: sums in another order."""
_CLOSE_OUTPUT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""The same of the dense parts' outputs and gradients against float64."""

Figures = dict[str, Any]


class Again:
    """A GraphBackend for a CPU: the recording is the pass itself."""

    def warm_up(self, step: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return step()

    def capture(self, step: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        return step


def poison(device: torch.device) -> None:
    """Fill memory that is free with bytes that are NaN in every floating type, and -1 in every whole one."""
    largest = 28 if device.type == "cuda" else 22
    blocks = [torch.empty(2**power, dtype=torch.uint8, device=device) for power in range(9, largest) for _ in range(3)]
    for block in blocks:
        block.fill_(255)


def small_model(device: torch.device) -> FasterRCNN:
    torch.manual_seed(0)
    # Frozen norms are folded, and what follows a convolution is then a kernel's; a weight of 0 would hide it.
    model = build_model("faster_rcnn_r18_fpn", 5, fpn_channels=64, roi_hidden_channels=128, frozen_stages=0)
    for name, value in model.backbone.state_dict().items():
        if value.dim() == 1 and name.endswith("weight"):
            value.fill_(0.7)
    return model.to(device).to(memory_format=torch.channels_last)


def random_batch(seed: int, device: torch.device) -> tuple[ImageBatch, TargetBatch]:
    """Two images of one of SIZES with a few boxes, or with 30."""
    generator = torch.Generator().manual_seed(seed)
    height, width = SIZES[seed % len(SIZES)]
    number = 3 + 27 * (seed % 2)
    corners = torch.rand(2, number, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + 8 + torch.rand(2, number, 2, generator=generator) * 14), dim=2)
    pixels = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (2, number), generator=generator)
    valid = torch.rand(2, number, generator=generator) > 0.2
    sizes = torch.tensor([[height, width], [height - 9, width - 17]])
    images = ImageBatch(*(each.to(device) for each in (pixels, sizes)))
    return images, TargetBatch(boxes, labels, valid, torch.tensor([seed, seed + 100])).to(device)


def passes(
    model: FasterRCNN,
    batches: Sequence[tuple[ImageBatch, TargetBatch]],
    graphs: StepGraphs | None,
    processes: Processes,
) -> list[tuple[Tensor, Tensor]]:
    """Losses [4] and all gradients [n] of each batch, the gradients averaged over the processes."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    buckets = GradientBuckets(parameters, processes, stay=True)

    def step(images: ImageBatch, targets: TargetBatch) -> dict[str, Tensor]:
        losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        return {name: value.detach() for name, value in losses.items()}

    found = []
    for images, targets in batches:
        poison(processes.device)
        buckets.zero()
        buckets.send_in_backward()
        losses = step(images, targets) if graphs is None else graphs.run(step, images, targets)
        buckets.finish()
        gradients = torch.cat([each.grad.flatten() for each in parameters if each.grad is not None])
        found.append((torch.stack(list(losses.values())).clone(), gradients.clone()))
    buckets.check()
    return found


def differences(ours: Sequence[tuple[Tensor, Tensor]], plain: Sequence[tuple[Tensor, Tensor]]) -> Figures:
    """The largest relative differences; NaN is the largest of all."""
    losses = [((a - b).abs() / b.abs().clamp(min=1e-3)).max() for (a, _), (b, _) in zip(ours, plain, strict=True)]
    gradients = [(a - b).norm() / b.norm() for (_, a), (_, b) in zip(ours, plain, strict=True)]
    figures = {"loss": float(torch.stack(losses).max()), "gradient": float(torch.stack(gradients).max())}
    is_close = figures["loss"] <= _CLOSE_LOSS and figures["gradient"] <= _CLOSE_GRADIENT
    return {**figures, "wrong": [] if is_close else [f"losses or gradients differ: {figures}"]}


def alone(device: torch.device) -> Processes:
    return Processes(0, 0, 1, 1, device)


def backend_of(device: torch.device) -> GraphBackend:
    return CudaGraphBackend() if device.type == "cuda" else Again()


def check_kernels(device: torch.device) -> Figures:
    """Each kernel beside plain code, the dense parts beside float64 on the CPU, and a whole step beside operators."""
    poison(device)
    wrong = kernels_that_differ(device) if device.type == "cuda" else []
    figures: Figures = {"kernels": describe_kernels(device), "wrong": [f"kernel of {name}" for name in wrong]}
    if device.type == "cuda" and not uses_triton(device):
        figures["wrong"].append("the kernels are not used")
    model, (images, targets) = small_model(device), random_batch(1, device)
    reference = copy.deepcopy(model).cpu().double()
    expected = dense_parts(reference, images.pixels.cpu().double(), nullcontext())
    for dtype, limit in _CLOSE_OUTPUT.items():
        poison(device)
        precision = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        found = dense_parts(copy.deepcopy(model), images.pixels.float(), precision)
        off = [
            float((ours.cpu().double() - plain).norm() / plain.norm())
            for ours, plain in zip(found, expected, strict=True)
        ]
        figures[str(dtype)] = dict(zip(("logits", "deltas", "gradients"), off, strict=True))
        figures["wrong"] += [
            f"{dtype}: {name} is off by {each:.1e}" for name, each in figures[str(dtype)].items() if not each <= limit
        ]
    ours = passes(model, [(images, targets)], None, alone(device))
    with implementation(**DEVICE):
        plain = passes(copy.deepcopy(model), [(images, targets)], None, alone(device))
    step = differences(ours, plain)
    figures["wrong"] += step.pop("wrong")
    return figures | {"step": step}


def dense_parts(model: FasterRCNN, pixels: Tensor, precision: AbstractContextManager[Any]) -> list[Tensor]:
    """The RPN's logits and deltas, and the gradients of a weighted sum of them by all weights up to there."""
    with precision:
        outputs = model.rpn(model.fpn(model.backbone((pixels - 120.0) / 60.0)))
    weights = [torch.linspace(-1, 1, each.numel(), device=each.device).view_as(each) for each in outputs]
    sums = [(each.double() * weight).mean() for each, weight in zip(outputs, weights, strict=True)]
    torch.stack(sums).sum().backward()
    parts = (model.backbone, model.fpn, model.rpn)
    gradients = [p.grad.double().flatten() for part in parts for p in part.parameters() if p.grad is not None]
    return [*(each.detach() for each in outputs), torch.cat(gradients)]


def check_replay(device: torch.device) -> Figures:
    """Replayed passes beside passes as they are written, over mixed sizes and numbers of boxes."""
    problems: list[str] = []
    batches = [random_batch(seed, device) for seed in range(BATCHES_OF_A_SIZE * len(SIZES))]
    graphs = StepGraphs(backend_of(device), problems.append)
    model = small_model(device)
    figures = differences(
        passes(model, batches, graphs, alone(device)), passes(copy.deepcopy(model), batches, None, alone(device))
    )
    figures |= {"recorded": graphs.num_captures, "wrong": [*figures["wrong"], *problems]}
    return figures


def check_compiled(device: torch.device) -> Figures:
    """A compiled step beside the step as it is written, with few boxes and with many; not generated code on a CPU."""
    model = small_model(device)
    plain = copy.deepcopy(model)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    model.compile_dense_parts(dynamic=False, backend=backend)
    model.glue.compile(lambda function, stage: torch.compile(function, dynamic=False, backend=backend))
    batches = [random_batch(seed, device) for seed in (0, len(SIZES))]
    as_written = passes(plain, batches, None, alone(device))
    with nullcontext() if device.type == "cuda" else implementation(glue="compiled"):
        return differences(passes(model, batches, None, alone(device)), as_written)


def check_detection(device: torch.device) -> Figures:
    """Replayed detections beside those of the network as it is written."""
    problems: list[str] = []
    plain = small_model(device).eval()
    torch.nn.init.normal_(plain.roi_heads[0].get_parameter("classifier.weight"), std=0.1)
    recorded = copy.deepcopy(plain)
    record_detection(recorded, backend_of(device), problems.append)
    matched = 0
    for seed in range(BATCHES_OF_A_SIZE * len(SIZES)):
        images, targets = random_batch(seed, device)
        poison(device)
        found, _, _ = recorded.detect_with_losses(images, targets)
        ours, theirs = (
            [{name: value.cpu() for name, value in each.items()} for each in some]
            for some in (found, plain.detect(images)[0])
        )
        config = plain.config
        difference = compare_detections(
            ours,
            theirs,
            score_threshold=config.score_threshold,
            detections_per_image=config.detections_per_image,
            score_tolerance=1e-3,
        )
        matched += difference.num_matched
        problems += [] if difference.within(1e-3, 0.1) else [f"batch {seed}: {difference}"]
    return {"matched": matched, "wrong": problems if matched else [*problems, "nothing was detected"]}


def check_one_process_group(device: torch.device) -> Figures:
    """NCCL's threads look at their work while passes are recorded: what it adds up before, between and after."""
    with tempfile.TemporaryDirectory() as folder:
        kind = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kind, init_method=f"file://{folder}/store", rank=0, world_size=1)
        values, wrong = torch.ones(2**20, device=device), []
        for _ in range(3):
            work = [dist.all_reduce(values, async_op=True) for _ in range(20)]
            figures = check_replay(device)
            for each in work:
                each.wait()
            wrong += figures["wrong"]
        wrong += [] if bool((values == 1).all()) else ["a sum over one process is another number"]
        dist.destroy_process_group()
    return {**figures, "wrong": wrong}


def check_two_processes(device: torch.device) -> Figures:
    """Two processes on one device, with flat gradients that graphs write: the mean of both is each one's."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one_of_two, (folder, device.type), nprocs=2)
        return torch.load(Path(folder) / "figures.pt", weights_only=True)


def _one_of_two(rank: int, folder: str, kind: str) -> None:
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    problems: list[str] = []
    of_both = [[random_batch(2 * seed + other, device) for seed in range(6)] for other in range(2)]
    model = small_model(device)
    graphs = StepGraphs(backend_of(device), problems.append)
    found = passes(model, of_both[rank], graphs, Processes(rank, 0, 2, 2, device))
    if rank == 0:
        mine, others = (passes(copy.deepcopy(model), batches, None, alone(device)) for batches in of_both)
        expected = [(losses, (a + b) / 2) for (losses, a), (_, b) in zip(mine, others, strict=True)]
        figures = differences(found, expected)
        torch.save({**figures, "wrong": [*figures["wrong"], *problems]}, Path(folder) / "figures.pt")
    dist.barrier()
    dist.destroy_process_group()


CHECKS: dict[str, Callable[[torch.device], Figures]] = {
    "kernels": check_kernels,
    "replay": check_replay,
    "compiled": check_compiled,
    "detection": check_detection,
    "nccl": check_one_process_group,
    "two-processes": check_two_processes,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="for the figures")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False
    figures = CHECKS[arguments.check](torch.device(arguments.device))
    record = full_record("correctness", vars(arguments), figures, arguments.device)
    write_json(arguments.json, record)
    print(headline(record))
    for name, value in figures.items():
        print(f"{name}: {value}")
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
