"""Batch norm with statistics over all processes.

On GPUs it is torch.nn.SyncBatchNorm, which works on nothing else; on CPUs the plain formula below with
differentiable all-reduces, slower and with the same results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the batches of all processes together."""

    def forward(self, input: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same; B may differ between the processes."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        # float64: the variance is a small difference of large sums where a channel's mean is far from zero.
        count = torch.tensor([values.numel() / values.shape[1]], dtype=torch.float64)
        exact = values.double()
        sums = all_reduce(torch.cat([exact.sum((0, 2, 3)), exact.square().sum((0, 2, 3)), count]))
        channels = values.shape[1]
        total = sums[-1]
        mean64 = sums[:channels] / total
        variance = (sums[channels:-1] / total - mean64.square()).clamp(min=0).float()
        mean, total = mean64.float(), total.float()
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1).clamp(min=1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (values * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(input.dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace every nn.BatchNorm2d inside `model` by one over all processes; names and values stay.

    Does nothing where there is one process.
    """
    if not dist.is_initialized():
        return
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                synchronized = CpuSyncBatchNorm2d(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
                )
                synchronized.load_state_dict(child.state_dict())
                synchronized.train(child.training)
                setattr(module, name, synchronized)


def has_synchronized_batch_norm(model: nn.Module) -> bool:
    """Whether a forward pass in training talks to the other processes."""
    return any(isinstance(module, (nn.SyncBatchNorm, CpuSyncBatchNorm2d)) for module in model.modules())


@contextlib.contextmanager
def local_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm over all processes takes the statistics of this one, and waits for no other."""
    kinds = (CpuSyncBatchNorm2d, nn.SyncBatchNorm)
    changed: dict[nn.Module, type] = {each: type(each) for each in model.modules() if isinstance(each, kinds)}
    for module in changed:
        module.__class__ = nn.BatchNorm2d
    try:
        yield
    finally:
        for module, kind in changed.items():
            module.__class__ = kind
