"""A GPU that is not there: tensors on it have shapes, types and a device, and no memory.

What is run on it takes the code's way for devices other than the CPU, forward and backward, at any size. An operator
that is given tensors of two devices fails, and so does one whose result the host would have to wait for. It stands on
PyTorch's fake tensors and on the device type that it keeps for others' backends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

NAME = "pretended"
# Those of a training step that autocast runs in the lower precision.
_LOWERED = ("conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "bmm", "addmm")
_libraries: list[torch.library.Library] = []


def is_supported() -> bool:
    """Whether this PyTorch lets Python be such a backend."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def pretend_gpu() -> tuple[torch.device, FakeTensorMode]:
    """The device, and the mode in which tensors can be made on it. The process keeps it."""
    if not _libraries:

        class Module(backend_registration._DummyBackendModule):  # type: ignore[misc, name-defined]
            def get_amp_supported_dtype(self) -> list[torch.dtype]:
                return [torch.bfloat16]

        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
        rest, lowered = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        for name in _LOWERED:
            operator = getattr(torch.ops.aten, name.partition(".")[0])
            lowered.impl(name, _in_bfloat16(operator), "AutocastPrivateUse1")
        _libraries.extend((rest, lowered))
    return torch.device(NAME, 0), FakeTensorMode()


def _in_bfloat16(operator: Any) -> Any:
    autocast = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))

    def lowered(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*(_lower(value) for value in args), **{key: _lower(v) for key, v in kwargs.items()})

    return lowered


def _lower(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def move(model: nn.Module, device: torch.device) -> None:
    """`model.to(device)` with channels-last weights, which cannot take parameters there itself."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            there = parameter.detach().to(device)
            if there.dim() == 4:
                there = there.contiguous(memory_format=torch.channels_last)
            setattr(module, name, nn.Parameter(there, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
