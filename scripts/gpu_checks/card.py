"""What a card reaches: rates of products and copies, cost of a launch, and each convolution of the step by itself.

python scripts/gpu_checks/card.py convolutions --device cuda --json convolutions.json
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where checkout.py and the other parts are

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkout  # noqa: F401
from benchmarks.figures import format_table, full_record, headline, write_json
from benchmarks.profilers import matmul_rate, synchronize
from detection.models import build_model

Found = tuple[dict[str, Any], str]
_LAUNCHES = 2000
_REPEATS = 5


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """The least time of a call, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(device: torch.device) -> Found:
    """TFLOP/s of a large product, TB/s of a copy, and microseconds of a small launch, as written and in a graph."""
    on_gpu = device.type == "cuda"
    figures: dict[str, Any] = {}
    for name, dtype, allowed in (
        ("bf16 TFLOP/s", torch.bfloat16, False),
        ("TF32 TFLOP/s", torch.float32, True),
        ("float32 TFLOP/s", torch.float32, False),
    ):
        if on_gpu or dtype == torch.float32 and not allowed:
            torch.backends.cuda.matmul.allow_tf32 = allowed
            figures[name] = matmul_rate(device, dtype) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.ones(2**30 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figures["copy TB/s"] = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device) / 1e12
    small = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1)

    figures["launch us"] = seconds_of(launches, device) / _LAUNCHES * 1e6
    if on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        figures["launch in a graph us"] = seconds_of(graph.replay, device) / _LAUNCHES * 1e6
    return figures, "\n".join(f"{name}: {value:.3g}" for name, value in figures.items())


class Convolutions(TorchDispatchMode):
    """Counts convolutions by what decides their algorithm: shapes, stride, padding, dilation, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[Any, ...]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            given, weight, _, stride, padding, dilation, _, _, groups = args
            key = (given.shape, weight.shape, stride, padding, dilation)
            shape = tuple(tuple(each) for each in key)
            self.found[(shape, groups)] += 1
        return func(*args, **(kwargs or {}))


def convolutions_of(name: str, batch_size: int, height: int, width: int) -> collections.Counter[tuple[Any, ...]]:
    """Those of the model's dense parts in a forward pass, and how often; nothing is computed."""
    with FakeTensorMode(), torch.no_grad(), Convolutions() as mode:
        model = build_model(name)
        model.rpn(model.fpn(model.backbone(torch.empty(batch_size, 3, height, width))))
    return mode.found


def convolutions(device: torch.device) -> Found:
    """Milliseconds of each convolution, forward and with its backward pass, by cuDNN's heuristic and by its search."""
    on_gpu = device.type == "cuda"
    size = ("faster_rcnn_r50_fpn", 16, 800, 1344) if on_gpu else ("faster_rcnn_r18_fpn", 1, 64, 96)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = []
    for key, count in convolutions_of(*size).items():
        (given_shape, weight_shape, stride, padding, dilation), groups = key
        given, weight = (
            torch.randn(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last).requires_grad_()
            for shape in (given_shape, weight_shape)
        )
        times = []
        for search in (False, True):
            torch.backends.cudnn.benchmark = search
            out = torch.nn.functional.conv2d(given, weight, None, stride, padding, dilation, groups)
            gradient = torch.ones_like(out)

            def forward() -> torch.Tensor:
                with torch.no_grad():
                    return torch.nn.functional.conv2d(given, weight, None, stride, padding, dilation, groups)  # noqa: B023

            def backward() -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(out, (given, weight), gradient, retain_graph=True)  # noqa: B023

            times += [seconds_of(call, device) * 1e3 for call in (forward, backward)]
        products = 2 * out.numel() * weight[0].numel() / 1e9
        rows.append([given_shape, weight_shape, stride, count, products, *times])
    torch.backends.cudnn.benchmark = False
    heads = ["input", "weight", "stride", "times", "GFLOP"]
    heads += [f"{what}, {how}" for how in ("heuristic ms", "search ms") for what in ("forward", "backward")]
    totals = [sum(row[3] * row[place] for row in rows) for place in range(5, 9)]
    cells = [[str(value) if index < 4 else f"{value:.3g}" for index, value in enumerate(row)] for row in rows]
    cells.append(["all", "", "", "", "", *(f"{total:.3g}" for total in totals)])
    records = [dict(zip(heads, row, strict=True)) for row in rows]
    return {"convolutions": records, "totals": dict(zip(heads[5:], totals, strict=True))}, format_table(heads, cells)


MEASURED = {"rates": rates, "convolutions": convolutions}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MEASURED)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="for the figures")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    figures, text = MEASURED[arguments.what](torch.device(arguments.device))
    record = full_record("card", vars(arguments), figures, arguments.device)
    write_json(arguments.json, record)
    print(headline(record), text, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
