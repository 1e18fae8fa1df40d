"""The training step's optimizations one by one: each taken out again, to see what it is worth on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkout  # noqa: F401
from benchmarks.timing import format_table, pairwise_ratio
from detection.models import FasterRCNN, backbones, faster_rcnn
from detection.models.backbones import FrozenBatchNorm
from detection.models.ops import conv as convolutions
from detection.models.ops import nms
from detection.models.ops.backend import implementation
from detection.models.ops.cpu import winograd as cpu_winograd

KEPT_MEMORY, FUSED_OPTIMIZER = "kept-memory", "fused-optimiser"

Patches = Callable[[FasterRCNN], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Optimization:
    """One thing that makes the step faster, and how to do without it while a step runs."""

    text: str
    without: Patches | None
    """None: the step itself knows how"""
    device: str | None = None
    """The only type of device that has it"""


def _unfolded(model: FasterRCNN) -> contextlib.AbstractContextManager[Any]:
    def conv_norm(
        conv: nn.Conv2d, norm: nn.Module, x: Tensor, *, relu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        # As the folded one computes it, but for the fold.
        padding = cast("tuple[int, ...]", conv.padding)
        out = backbones.convolution(x, conv.weight, conv.bias, stride=conv.stride, padding=padding, groups=conv.groups)
        if isinstance(norm, FrozenBatchNorm):
            scale, shift = norm.scale_and_shift()
            out = out * scale[:, None, None].to(out.dtype) + shift[:, None, None].to(out.dtype)
        else:
            out = norm(out)
        if residual is not None:
            return convolutions.end_of_block(out, residual, relu=relu)
        return F.relu_(out) if relu else out

    return mock.patch.object(backbones, "conv_norm", conv_norm)


@contextlib.contextmanager
def _dense_rpn(model: FasterRCNN) -> Iterator[None]:
    """The RPN's head over whole maps with its gradient, as both reference implementations have it."""
    head, extract = model.rpn.forward, model.extract_features
    kept: dict[str, Any] = {}

    def extract_features(images: Any) -> tuple[Tensor, ...]:
        kept["features"] = extract(images)
        return kept["features"]

    def at_anchors(patches: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = head(kept.pop("features"))
        kept["dense"] = logits.detach(), deltas.detach()
        return logits.gather(1, anchors), deltas.gather(1, anchors[..., None].expand(-1, -1, 4))

    def forward(features: Any) -> tuple[Tensor, Tensor]:
        return kept.pop("dense") if "dense" in kept else head(features)

    with (
        mock.patch.object(model, "extract_features", extract_features),
        mock.patch.object(model.rpn, "at_anchors", at_anchors),
        mock.patch.object(model.rpn, "forward", forward),
    ):
        yield


def _with(**names: str) -> Patches:
    return lambda model: implementation(**names)


@contextlib.contextmanager
def _nms_operator(model: FasterRCNN) -> Iterator[None]:
    with implementation(nms="rounds"), mock.patch.object(nms, "in_rounds", nms.level_by_level):
        yield


def _all_products(model: FasterRCNN) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(cpu_winograd, "pays", lambda *arguments: False)


def _two_table_gradients(model: FasterRCNN) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(faster_rcnn, "take_rows", lambda table, rows: (table, table.index_select(0, rows)))


OPTIMIZATIONS: dict[str, Optimization] = {
    "folded-norm": Optimization("frozen batch norm folded into the convolutions", _unfolded),
    "sampled-rpn": Optimization("RPN learns at its sampled anchors only", _dense_rpn),
    FUSED_OPTIMIZER: Optimization("fused SGD", None),
    "shared-table-gradient": Optimization("one gradient for the cell table", _two_table_gradients),
    "triton-nms": Optimization(
        "NMS as a Triton kernel, instead of rounds of products", _with(nms="rounds"), device="cuda"
    ),
    "joint-nms": Optimization(
        "NMS of all images and levels at once, instead of an operator call each", _nms_operator, device="cuda"
    ),
    "triton-assignment": Optimization("assignment as a Triton kernel", _with(assignment="blocks"), device="cuda"),
    "triton-roi-align": Optimization("RoIAlign as a Triton kernel", _with(roi_align="operator"), device="cuda"),
    "finished-convolutions": Optimization(
        "bias, residual and ReLU after a convolution in one pass", _with(convolution="torch"), device="cuda"
    ),
    "sparse-roi-align": Optimization("RoIAlign as a sparse matrix product", _with(roi_align="operator"), device="cpu"),
    "sparse-pyramid-gradient": Optimization(
        "pyramid's convolutions: no backward work where nothing was learned",
        _with(pyramid_gradient="dense"),
        device="cpu",
    ),
    "fused-convolutions": Optimization(
        "convolution and ReLU in one pass, 1x1 weights' gradients as products", _with(convolution="torch"), device="cpu"
    ),
    "winograd": Optimization("3x3 convolutions with two thirds of the products", _all_products, device="cpu"),
    KEPT_MEMORY: Optimization("freed memory stays with the process", None, device="cpu"),
}


def ablation_variants(amp: str, device: torch.device, *, compiled: bool) -> dict[str, str]:
    """Variants to be timed beside "ours-<precision>-cl", which is the first, and what each does without."""
    precision = "fp32" if amp == "off" else amp
    full = f"ours-{precision}-cl"
    variants = {full: "nothing"}
    if amp != "off":
        variants["ours-fp32-cl"] = f"{precision} (float32 instead)"
    variants[f"ours-{precision}"] = "channels-last"
    for name, optimization in OPTIMIZATIONS.items():
        if optimization.device in (None, device.type):
            variants[f"{full}-without-{name}"] = optimization.text
    if compiled:
        variants[f"{full}-compile"] = "(with --compile added)"
    return variants


def ablation_rows(variants: Mapping[str, str], seconds: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """{"variant", "without", "ratio"} for each but the first: its seconds over the first's, round by round. Above 1,
    what it does without is worth having."""
    full = next(iter(variants))
    return [
        {"variant": name, "without": text, "ratio": pairwise_ratio(seconds[full], seconds[name])}
        for name, text in variants.items()
        if name != full
    ]


def ablation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [row["without"], f"{row['ratio']['median']:.3f} ({row['ratio']['min']:.3f}..{row['ratio']['max']:.3f})"]
        for row in rows
    ]
    return format_table(["without", "x time of the whole"], cells)
