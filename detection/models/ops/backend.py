"""Which devices run this package's Triton kernels: GPUs on which they were seen to work.

A GPU, its driver, or a missing C compiler (Triton builds its launchers with it) can each spoil them, and none of that
is known before. So the first question about a GPU makes them prove themselves there on small problems, beside the plain
code that they stand for; where they do not, the plain code goes on doing the work.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import NamedTuple

import torch

SWITCH = "DETECTION_TRITON"
"""Environment variable; 0 turns the kernels off."""


class Verdict(NamedTuple):
    """Whether a device runs the kernels, and the reason in words."""

    usable: bool
    reason: str


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go through Triton kernels. The first call for a GPU takes seconds."""
    return device.type == "cuda" and _verdict(_index(device)).usable


def describe_kernels(device: torch.device) -> str:
    """One line about the kernels of a GPU; "" for other devices, which have none."""
    return _verdict(_index(device)).reason if device.type == "cuda" else ""


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _verdict(index: int) -> Verdict:
    if os.environ.get(SWITCH, "1") == "0":
        return Verdict(False, f"PyTorch's operators ({SWITCH}=0)")
    # The comparison reads results, which is no business of whoever counts waits.
    sync_debug_mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    found: list[str] = []
    # A thread of its own has gradients and nothing else turned on, wherever the question comes from: inference mode,
    # autocast, the inside of an operator.
    asked = threading.Thread(target=lambda: found.append(_differences(torch.device("cuda", index))))
    try:
        asked.start()
        asked.join()
    finally:
        torch.cuda.set_sync_debug_mode(sync_debug_mode)
    if found[0]:
        return Verdict(False, f"PyTorch's operators, as Triton's kernels do not work here: {found[0]}")
    return Verdict(True, "Triton, checked on this GPU against PyTorch's operators")


def _differences(device: torch.device) -> str:
    """What is wrong with the kernels on `device`; "" where nothing is."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        from detection.models.ops.selfcheck import kernels_that_differ

        # torchvision's RoIAlign is another one, for hours, where algorithms are to be deterministic.
        torch.use_deterministic_algorithms(False)
        with torch.cuda.device(device):
            wrong = kernels_that_differ(device)
    except Exception as error:  # whatever it is, training can do without
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return f"{', '.join(wrong)}: other results" if wrong else ""
