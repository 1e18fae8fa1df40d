"""The optimizer that a schedule asks for, its parameter groups, and the learning rate of each iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from detection.models import mmdet_name
from schedules import ParameterFacts, Schedule, parameter_multipliers

_NORM_TYPES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, schedule: Schedule) -> Optimizer:
    """Optimizer over the trainable parameters of `model`.

    Parameters that share their multipliers share a group; a group carries "lr_mult" for
    `set_learning_rate`. Frozen parameters are in no group, so that neither momentum nor
    weight decay touches them.
    """
    settings = schedule.optimizer
    facts = parameter_facts(model)
    multipliers = parameter_multipliers(schedule.paramwise, facts)
    base_decay = float(settings.kwargs.get("weight_decay", _default_weight_decay(settings.type)))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(multipliers[name], []).append(parameter)
    optimizer_class = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[settings.type]
    optimizer = optimizer_class(
        [
            {"params": parameters, "lr_mult": lr_mult, "weight_decay": base_decay * decay_mult}
            for (lr_mult, decay_mult), parameters in groups.items()
        ],
        lr=schedule.optimizer.lr,
        **{"fused": is_fused(schedule), **settings.kwargs},
    )
    # With dampening the first step is unlike the others, which zeros as first momentum would not be.
    if settings.type == "SGD" and settings.kwargs.get("momentum") and not settings.kwargs.get("dampening"):
        # torch's fused step leaves the momentum as uninitialized memory where float16 overflows at the very first one.
        for parameter in trained_parameters(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def is_fused(schedule: Schedule) -> bool:
    """Whether the optimizer makes its step in one kernel, which can be skipped on the device: unless the schedule asks
    otherwise."""
    kwargs = schedule.optimizer.kwargs
    # Of an optimizer with dampening the very first step cannot be skipped, which float16 may want.
    may_skip_first = kwargs.get("dampening") and schedule.amp == "fp16"
    return bool(kwargs.get("fused", not may_skip_first and not kwargs.get("foreach")))


def set_learning_rate(optimizer: Optimizer, schedule: Schedule, iteration: int, iterations_per_epoch: int) -> float:
    """Give every group its learning rate for the step `iteration`; the schedule's own (multiplier 1) is returned."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate(iteration, iterations_per_epoch, group["lr_mult"])
    return schedule.learning_rate(iteration, iterations_per_epoch)


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of the optimizer, in group order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What the optimizer remembers: its type, and its tensors by the name of the parameter in `model`.

    By name, so that parameter groups may be cut otherwise after a resume; what the groups say is the schedule's.
    """
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items()}
    return {"type": type(optimizer).__name__, "state": state}


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, stored: dict[str, Any]) -> bool:
    """Give the optimizer what `optimizer_state` returned; False where that is of another type of optimizer.

    Raises:
        ValueError: it is not of this model.
    """
    if stored["type"] != type(optimizer).__name__:
        return False
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if unknown := [name for name in stored["state"] if name not in trained]:
        raise ValueError(f"the optimizer's state has {unknown[0]}, which the model does not train")
    for name, values in stored["state"].items():
        optimizer.state[trained[name]] = {key: _like(value, trained[name]) for key, value in values.items()}
    return True


def _like(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape != parameter.shape:  # a step counter
        return value.to(parameter.device, copy=True)
    # Fused steps walk through memory without a look at strides: momentum must lie as its parameter does.
    return torch.empty_like(parameter).copy_(value).detach()


def _default_weight_decay(optimizer_type: str) -> float:
    # PyTorch's own defaults: AdamW decays by 0.01 where nothing is said.
    return 0.01 if optimizer_type == "AdamW" else 0.0


def parameter_facts(model: nn.Module) -> list[ParameterFacts]:
    """What paramwise_cfg's rules ask of each parameter of `model`."""
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, _NORM_TYPES) or _is_frozen_norm(module)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    depthwise = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        for leaf, _ in module.named_parameters(recurse=False)
    }
    has_group_norm = any(isinstance(module, nn.GroupNorm) for module in model.modules())
    return [
        ParameterFacts(
            name=name,
            is_norm=name in norms,
            is_bias=name.endswith(".bias"),
            is_depthwise=name in depthwise,
            is_flat=parameter.ndim == 1,
            aliases=(mmdet_name(name, group_norm=has_group_norm),),
        )
        for name, parameter in model.named_parameters()
    ]


def _is_frozen_norm(module: nn.Module) -> bool:
    # A norm with frozen statistics is no subclass of torch's norms, and yet its weight and bias count as a norm's.
    return hasattr(module, "running_mean") and hasattr(module, "running_var")
