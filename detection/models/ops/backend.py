"""Which implementation of an operator runs: a choice by the device, which a caller can override.

    operator           CPU              other devices   GPUs whose Triton kernels passed their self-check
    nms                per_level        rounds          triton
    assignment         trimmed          blocks          triton
    roi_align          sparse_matrix    operator        triton
    convolution        torch            torch           triton (bias, residual and ReLU in one pass)
    mask_crops         trimmed          blocks          triton
    table_gradient     autograd         autograd        shared (one float32 sum for all readers of the feature table)
    glue               plain            plain           compiled (with --compile: what is between the dense parts)

All of a row give the same results but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

CPU = {
    "nms": "per_level",
    "assignment": "trimmed",
    "roi_align": "sparse_matrix",
    "convolution": "torch",
    "mask_crops": "trimmed",
    "table_gradient": "autograd",
    "glue": "plain",
}
DEVICE = {
    "nms": "rounds",
    "assignment": "blocks",
    "roi_align": "operator",
    "convolution": "torch",
    "mask_crops": "blocks",
    "table_gradient": "autograd",
    "glue": "plain",
}
TRITON = dict.fromkeys(CPU, "triton") | {"table_gradient": "shared", "glue": "compiled"}


class Verdict(NamedTuple):
    """Whether a GPU runs the Triton kernels, and the reason in words."""

    usable: bool
    reason: str


verdicts: dict[int, Verdict] = {}
"""What `selfcheck.check_kernels` found, by the GPU's number. A GPU without an entry runs no Triton kernel."""
_overrides: dict[str, str] = {}


def implementation_of(operator: str, device: torch.device) -> str:
    """The name of the implementation of `operator` (a row of the table above) that runs on `device`."""
    if operator in _overrides:
        return _overrides[operator]
    if device.type == "cpu":
        return CPU[operator]
    is_usable = device.type == "cuda" and verdicts.get(gpu_number(device), Verdict(False, "")).usable
    return (TRITON if is_usable else DEVICE)[operator]


@contextmanager
def implementation(**names: str) -> Iterator[None]:
    """Inside the `with` block these implementations run, whatever the device:

        with implementation(nms="rounds", roi_align="operator"): ...

    `implementation(**DEVICE)` has a CPU run what other devices do. Raises ValueError for a name not in the table.
    """
    for operator, name in names.items():
        known = [names_of[operator] for names_of in (CPU, DEVICE, TRITON) if operator in names_of]
        if name not in known:
            raise ValueError(f"no implementation {name!r} of {operator!r}; there are {known or list(CPU)}")
    before = _overrides.copy()
    _overrides.update(names)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def gpu_number(device: torch.device) -> int:
    """Number of a CUDA device: `torch.device("cuda")` is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index
