"""What a step consists of: time by stage, synchronizations, FLOPs, a matrix multiplication to compare with, traces."""

from __future__ import annotations

import collections
import functools
import gzip
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import boxes

from detection.models import uses_triton
from detection.models.ops.cpu import conv as cpu_conv

REST = "rest"
# Operators whose result the host must see before it can go on, and how they show in the counts.
_WAITING_OPERATORS = {
    "aten.nonzero": "nonzero",
    "aten.masked_select": "masked_select",
    "aten._unique": "unique",
    "aten._unique2": "unique",
    "aten.unique_dim": "unique",
    "aten._local_scalar_dense": "scalar read by the host",
    "aten.is_nonzero": "scalar read by the host",
    "torchvision.nms": "nms",
    # Without Triton it asks a GPU once whether suppression has settled.
    "detection.suppress_within_levels": "nms",
}
_MATMUL_SIDES = {"cpu": 2048, "cuda": 8192}
_MATMUL_SECONDS = 1.0
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


class StageClock:
    """Time by stage; what a stage spends in stages inside it counts for these only.

    On a GPU, time between events on its stream: waiting for the host counts for the stage that waits. On the CPU, by
    `ticks` (time.perf_counter, time.process_time).
    """

    def __init__(self, device: torch.device, ticks: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._ticks = device, ticks
        self._open: list[tuple[str, int]] = []
        self._marks: list[Any] = []
        self._spans: list[tuple[str, int, int, str]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._mark()
        parent = self._open[-1][0] if self._open else ""
        self._open.append((name, start))
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, start, self._mark(), parent))

    def seconds(self) -> dict[str, float]:
        """Exclusive seconds of each stage so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total: dict[str, float] = collections.defaultdict(float)
        for name, start, end, parent in self._spans:
            duration = self._between(start, end)
            total[name] += duration
            if parent:
                total[parent] -= duration
        return dict(total)

    def _mark(self) -> int:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(self._ticks())
        return len(self._marks) - 1

    def _between(self, start: int, end: int) -> float:
        first, last = self._marks[start], self._marks[end]
        return first.elapsed_time(last) / 1e3 if self._device.type == "cuda" else last - first


@contextmanager
def wrapped(clock: StageClock, places: Sequence[tuple[Any, str, str]]) -> Iterator[list[str]]:
    """While inside, calls of each (owner, attribute) count for its stage. Yields the attributes that do not exist."""
    missing, restore = [], []
    for owner, attribute, stage in places:
        if not hasattr(owner, attribute):
            missing.append(f"{getattr(owner, '__name__', type(owner).__name__)}.{attribute}")
            continue
        had = vars(owner).get(attribute)
        _put(owner, attribute, _timed(clock, stage, getattr(owner, attribute)))
        restore.append((owner, attribute, had))
    try:
        yield missing
    finally:
        for owner, attribute, had in reversed(restore):
            if had is not None:
                _put(owner, attribute, had)
            elif isinstance(owner, torch.nn.Module):
                vars(owner).pop(attribute)
            else:
                delattr(owner, attribute)


def _put(owner: Any, attribute: str, value: Any) -> None:
    if isinstance(owner, torch.nn.Module):
        # Beside the submodule of that name, which stays where it is: this dictionary is looked at first.
        vars(owner)[attribute] = value
    else:
        setattr(owner, attribute, value)


def _timed(clock: StageClock, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(call, torch.nn.Module):
        return _TimedModule(clock, stage, call)

    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.stage(stage), torch.profiler.record_function(stage):
            return call(*args, **kwargs)

    return timed


class _TimedModule:
    """Stands in for a module, compiled or not: its calls are timed, all else is the module's own."""

    def __init__(self, clock: StageClock, stage: str, module: torch.nn.Module) -> None:
        self._clock, self._stage, self._module = clock, stage, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock.stage(self._stage), torch.profiler.record_function(self._stage):
            return self._module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _WaitCounter(TorchDispatchMode):
    """Counts operators that make the host wait for a GPU, wherever they run: downward for results that the host needs,
    upward for numbers that it hands over."""

    def __init__(self, downward: collections.Counter[str], upward: collections.Counter[str]) -> None:
        super().__init__()
        self.downward, self.upward = downward, upward

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name == "detection.suppress_within_levels" and uses_triton(args[0].device):
            pass
        elif name in _WAITING_OPERATORS:
            self.downward[_WAITING_OPERATORS[name]] += 1
        elif name in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
            by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            of_one_number = name != "aten.index" and args[2].dim() == 0
            # One number through a mask is a masked fill, which waits for nothing.
            if by_mask and not of_one_number:
                self.downward["index by a boolean mask"] += 1
            elif of_one_number and not by_mask:
                self.upward["one number assigned by index"] += 1
        return func(*args, **(kwargs or {}))


class _CopyCounter(TorchFunctionMode):
    """Counts tensors made on a device from Python numbers: copies that a GPU's host waits for."""

    def __init__(self, counts: collections.Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        moved = func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor) and args[0].dim() == 0
        if made or moved:
            self.counts["tensor made from Python numbers"] += 1
        return func(*args, **kwargs)


def count_waits(run: Callable[[], object]) -> dict[str, Any]:
    """Synchronizations of one run by kind: {"device_to_host": {kind: number}, "host_to_device": {kind: number}}.

    Counted by operator, as they would be on a GPU: a run on the CPU gives about the same. Code that is compiled runs
    uncompiled here.
    """
    downward: collections.Counter[str] = collections.Counter()
    upward: collections.Counter[str] = collections.Counter()
    # Which way torchvision and we take depends on the device; these are the ones of the GPU.
    as_on_gpu = mock.patch.object(boxes, "_batched_nms_vanilla", boxes._batched_nms_coordinate_trick)
    no_cpu_convolutions = mock.patch.object(cpu_conv, "_applies", lambda *arguments: False)
    with (
        as_on_gpu,
        no_cpu_convolutions,
        torch.compiler.set_stance("force_eager"),
        _CopyCounter(upward),
        _WaitCounter(downward, upward),
    ):
        run()
    return {"device_to_host": dict(downward), "host_to_device": dict(upward)}


def count_cuda_waits(run: Callable[[], object]) -> int:
    """Synchronizations that the CUDA runtime itself reports for one run."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # Switching the mode on warns too, once a process: that it does not see all "synchronizing operations".
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix multiplications and convolutions in one run, forward and backward."""
    counter = FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), counter:
        run()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP per second of `clock` of a large square matrix multiplication, with this process's threads; the median of
    about a second."""
    side = _MATMUL_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < 4 or time.perf_counter() - begin < _MATMUL_SECONDS:
        synchronize(device)
        start = clock()
        calls = 1 if device.type == "cpu" else 20
        for _ in range(calls):
            a @ b
        synchronize(device)
        rates.append(2 * side**3 * calls / (clock() - start))
    return statistics.median(rates[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_trace(run: Callable[[], object], file: Path, device: torch.device) -> None:
    """A Chrome trace (chrome://tracing, ui.perfetto.dev) of one run."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))


def gpu_figures(trace: Path, num_steps: int) -> dict[str, float]:
    """From a Chrome trace (.json, or .json.gz): kernels, launches and copies a step, seconds a step in which the GPU
    worked, and the share of the time between its first and last work in which it had nothing to do."""
    content = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    work = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events if e.get("cat") in _GPU_WORK)
    kernels = sum(event.get("cat") == "kernel" for event in events)
    launches = sum(
        event.get("cat") in ("cuda_runtime", "cuda_driver") and "Launch" in event.get("name", "") for event in events
    )
    figures = {
        "kernels_per_step": kernels / num_steps,
        "launches_per_step": launches / num_steps,
        "copies_per_step": (len(work) - kernels) / num_steps,
    }
    if work:
        busy, reached = 0.0, work[0][0]
        for start, end in work:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        figures["gpu_busy_seconds_per_step"] = busy / 1e6 / num_steps
        figures["gpu_idle_share"] = 1 - busy / (reached - work[0][0])
    return figures
