"""Convolutions with what follows them, as each device does it best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.ops.backend import implementation_of

_WEIGHT_EPS = 1e-5  # as in MMDetection's ConvWS


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weights of each output channel are brought to a mean of 0 and a standard deviation of 1
    whenever they are used (Qiao et al. 2019). Its parameters are those of a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, weight_of(self), self.bias)


def weight_of(conv: nn.Conv2d) -> Tensor:
    """The weights that a convolution computes with."""
    if not isinstance(conv, StandardizedConv2d):
        return conv.weight
    weight = conv.weight.flatten(1)
    centered = weight - weight.mean(dim=1, keepdim=True)
    deviation = (centered.square().sum(dim=1, keepdim=True) / (weight.shape[1] - 1)).sqrt()
    return (centered / (deviation + _WEIGHT_EPS)).view_as(conv.weight)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding, dilation), plus `residual` where one is given, then ReLU if that is
    asked for."""
    # A compiler fuses what follows a convolution itself.
    name = "torch" if torch.compiler.is_compiling() else implementation_of("convolution", x.device)
    if name == "triton" and x.dtype != torch.float64 and (bias is not None or relu or residual is not None):
        out = F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        if out.is_contiguous(memory_format=torch.channels_last):
            from detection.models.ops.triton.epilogue import finish_convolution

            return finish_convolution(out, bias, residual, relu=relu)
        out = out if bias is None else out.add_(bias[:, None, None])
    else:
        out = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if residual is not None:
        return end_of_block(out, residual, relu=relu)
    return F.relu_(out) if relu else out


def stem_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """F.conv2d(x, weight, bias, stride, padding), ReLU, and a 3x3 max pooling of stride 2 (padding 1).

    Adding a bias and ReLU keep the order of numbers. Where they follow the pooling, they touch a quarter of the cells.
    Both orders give the same bits if the convolution is rounded before its bias is added, as on a GPU.
    """
    if implementation_of("convolution", x.device) != "triton" or torch.is_grad_enabled():
        return _pool(convolution(x, weight, bias, stride=stride, padding=padding, relu=True))
    out = _pool(F.conv2d(x, weight, None, tuple(stride), tuple(padding)))
    is_channels_last = out.is_contiguous(memory_format=torch.channels_last)
    # A compiler fuses bias and ReLU itself.
    if torch.compiler.is_compiling() or out.dtype == torch.float64 or not is_channels_last:
        return F.relu_(out.add_(bias.to(out.dtype)[:, None, None]))
    from detection.models.ops.triton.epilogue import finish_convolution

    return finish_convolution(out, bias, None, relu=True)


def _pool(maps: Tensor) -> Tensor:
    return F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)


def end_of_block(out: Tensor, residual: Tensor, *, relu: bool) -> Tensor:
    """The sum with the residual, in the memory of `out`, then ReLU if that is asked for."""
    out = out.add_(residual)
    return F.relu_(out) if relu else out
