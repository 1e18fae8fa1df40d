"""What a step consists of, as torch.profiler tells it: time by stage, synchronizations, a GPU's kernels; and FLOPs."""

from __future__ import annotations

import bisect
import collections
import gzip
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import anchor_utils, backbone_utils, faster_rcnn, roi_heads, rpn, transform
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.steps import TorchvisionStep
from data import DevicePrefetcher
from detection.engine.metrics.step_metrics import StepMetrics
from detection.engine.optim.amp import Precision
from detection.engine.optim.update import ParameterUpdate
from detection.models import FasterRCNN
from detection.models.anchors import AnchorGenerator
from detection.models.mask_head import MaskHead, mask_loss, mask_rois, mask_targets
from detection.models.ops.feature_table import cell_table, windows_3x3
from detection.models.ops.roi_align import RoIAlign, roi_levels
from detection.models.roi_head import BoxHead, roi_losses, sample_rois
from detection.models.rpn import RPNHead, anchor_targets, rpn_losses, select_proposals

INPUT, FEATURES, RPN_HEAD, PROPOSALS = "input", "backbone and FPN", "RPN head", "proposals and NMS"
ASSIGNMENT, ROI_ALIGN, BOX_HEAD, MASK_HEAD = "assignment and sampling", "RoIAlign", "box head", "mask head"
LOSSES, BACKWARD, OPTIMIZER, REST = "losses", "backward", "optimizer", "rest"
STAGES = (
    *(INPUT, FEATURES, RPN_HEAD, PROPOSALS, ASSIGNMENT, ROI_ALIGN, BOX_HEAD, MASK_HEAD),
    *(LOSSES, BACKWARD, OPTIMIZER, REST),
)
READING = "reading of the losses"
"""At logging steps only, so that its synchronizations are not a step's."""

OUR_FUNCTIONS: dict[str, Sequence[Callable[..., Any]]] = {
    INPUT: (DevicePrefetcher.__next__, DevicePrefetcher.prepare),
    FEATURES: (FasterRCNN.extract_features,),
    RPN_HEAD: (RPNHead.forward, RPNHead.at_anchors, windows_3x3),
    PROPOSALS: (AnchorGenerator.__call__, select_proposals),
    ASSIGNMENT: (anchor_targets, sample_rois),
    # The table of all levels' cells serves the sampled anchors and RoIAlign alike.
    ROI_ALIGN: (cell_table, roi_levels, RoIAlign.__call__),
    BOX_HEAD: (BoxHead.forward,),
    MASK_HEAD: (MaskHead.forward, mask_rois, mask_targets),
    LOSSES: (rpn_losses, roi_losses, mask_loss),
    BACKWARD: (Precision.backward,),
    OPTIMIZER: (ParameterUpdate.apply,),
    READING: (StepMetrics.read,),
}
"""Stage -> the functions whose time it is, less that of other stages' functions that they call."""
THEIR_FUNCTIONS: dict[str, Sequence[Callable[..., Any]]] = {
    INPUT: (TorchvisionStep.take_input, transform.GeneralizedRCNNTransform.forward),
    FEATURES: (backbone_utils.BackboneWithFPN.forward,),
    RPN_HEAD: (rpn.RPNHead.forward,),
    PROPOSALS: (anchor_utils.AnchorGenerator.forward, BoxCoder.decode, rpn.RegionProposalNetwork.filter_proposals),
    ASSIGNMENT: (
        rpn.RegionProposalNetwork.assign_targets_to_anchors,
        roi_heads.RoIHeads.select_training_samples,
        BalancedPositiveNegativeSampler.__call__,
    ),
    ROI_ALIGN: (MultiScaleRoIAlign.forward,),
    BOX_HEAD: (faster_rcnn.TwoMLPHead.forward, faster_rcnn.FastRCNNPredictor.forward),
    MASK_HEAD: (roi_heads.project_masks_on_boxes,),
    LOSSES: (rpn.RegionProposalNetwork.compute_loss, roi_heads.fastrcnn_loss),
    BACKWARD: (Precision.backward,),
    OPTIMIZER: (torch.optim.Optimizer.zero_grad, Precision.step),
}

# Operators whose result the host must see before it can go on, and how they show in the counts.
_WAITING_OPERATORS = {
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::_local_scalar_dense": "scalar read by the host",
    "torchvision::nms": "nms",
    # Without Triton it asks a GPU once whether suppression has settled.
    "detection::suppress_within_levels": "nms",
}
_GPU_WORK, _RUNTIME = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
_MATMUL_SIDES = {"cpu": 2048, "cuda": 8192}

Event = dict[str, Any]


def profile(run: Callable[[], object], device: torch.device, file: str | Path | None = None) -> list[Event]:
    """The events of one run in the order of their starts; `file` keeps the Chrome trace (ui.perfetto.dev) of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities, with_stack=True) as profiler:
        run()
        synchronize(device)
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        trace = Path(file or Path(folder) / "trace.json")
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        return read_trace(trace)


def read_trace(trace: Path) -> list[Event]:
    """What a Chrome trace (.json or .json.gz) has of events with a duration, in the order of their starts."""
    content = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    return sorted(events, key=lambda event: (event["ts"], -event["dur"]))


class StageSpans:
    """When which stage was under way, by the Python functions that a profile saw."""

    def __init__(self, events: Sequence[Event], functions: Mapping[str, Sequence[Callable[..., Any]]]) -> None:
        stages = {_place(function): stage for stage, some in functions.items() for function in some}
        calls = [event for event in events if event.get("cat") == "python_function"]
        named = [(event, stages.get("/".join(event["name"].rsplit("/", 2)[-2:]))) for event in calls]
        self.spans = [(event["ts"], event["ts"] + event["dur"], stage) for event, stage in named if stage is not None]
        self._starts = [start for start, _, _ in self.spans]

    def at(self, time: float) -> str:
        """The innermost stage then."""
        for start, end, stage in self.spans[bisect.bisect(self._starts, time) - 1 :: -1] if self.spans else ():
            if start <= time < end:
                return stage
        return REST

    def seconds(self, events: Sequence[Event]) -> dict[str, float]:
        """Host time of each stage, less that of stages inside it; on a GPU the time of the work that it launched."""
        total: dict[str, float] = collections.defaultdict(float, dict.fromkeys(STAGES, 0.0))
        work = [event for event in events if event.get("cat") in _GPU_WORK]
        if work:
            launches = {_correlation(event): event["ts"] for event in events if event.get("cat") in _RUNTIME}
            for event in work:
                total[self.at(launches.get(_correlation(event), -1))] += event["dur"] / 1e6
            return dict(total)
        last = max(event["ts"] + event["dur"] for event in events)
        marks = sorted({events[0]["ts"], last, *(time for start, end, _ in self.spans for time in (start, end))})
        for start, end in zip(marks, marks[1:], strict=False):
            total[self.at(start)] += (end - start) / 1e6
        return dict(total)


def _place(function: Callable[..., Any]) -> str:
    """How a profile names a Python function, without the upper folders of its file."""
    code = inspect.unwrap(function).__code__
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}({code.co_firstlineno}): {code.co_name}"


def _correlation(event: Event) -> int:
    return event.get("args", {}).get("correlation", -1)


def count_waits(events: Sequence[Event], spans: StageSpans, num_steps: int) -> dict[str, float]:
    """Synchronizations a step by kind: on a GPU those of the CUDA runtime, else operators that would wait for one."""
    counts: collections.Counter[str] = collections.Counter()
    on_gpu = any(event.get("cat") in _GPU_WORK for event in events)
    counted_until = 0.0
    for event in events:
        name, category = event.get("name", ""), event.get("cat")
        if category in _RUNTIME and "Synchronize" in name and name != "cudaDeviceSynchronize":
            kind = "CUDA runtime"
        elif category == "cpu_op" and name in _WAITING_OPERATORS and event["ts"] >= counted_until and not on_gpu:
            kind = _WAITING_OPERATORS[name]
            counted_until = event["ts"] + event["dur"]  # operators inside it are its own
        else:
            continue
        if spans.at(event["ts"]) != READING:
            counts[kind] += 1
    return {kind: number / num_steps for kind, number in counts.items()}


def gpu_figures(events: Sequence[Event], num_steps: int) -> dict[str, float]:
    """Kernels, launches and copies a step, and seconds a step in which the GPU worked."""
    work = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in _GPU_WORK]
    kernels = sum(event.get("cat") == "kernel" for event in events)
    launches = sum(event.get("cat") in _RUNTIME and "Launch" in event.get("name", "") for event in events)
    counts = {"kernels": kernels, "launches": launches, "copies": len(work) - kernels}
    figures = {f"{name}_per_step": number / num_steps for name, number in counts.items()}
    busy, reached = 0.0, 0.0
    for start, end in work:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return figures | {"gpu_busy_seconds_per_step": busy / 1e6 / num_steps}


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix multiplications and convolutions in one run, forward and backward."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, ticks: Callable[[], float] = time.perf_counter) -> float:
    """FLOP per second by `ticks` of a large square matrix multiplication, with this process's threads; the median of a
    second."""
    side = _MATMUL_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        a @ b
        synchronize(device)

    timer = Timer("run()", globals={"run": multiply}, num_threads=torch.get_num_threads(), timer=ticks)
    return 2 * side**3 / timer.blocked_autorange(min_run_time=1.0).median


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
