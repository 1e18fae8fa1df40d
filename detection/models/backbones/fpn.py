"""Feature pyramid network (Lin et al. 2017) over C2..C5, as both recipes have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones.resnet import GROUPS_OF_GROUP_NORM
from detection.models.ops.conv import StandardizedConv2d, convolution, weight_of


def _conv(inputs: int, outputs: int, kernel: int, norm: str | None, standardized: bool) -> nn.Conv2d:
    kind = StandardizedConv2d if standardized else nn.Conv2d
    conv = kind(inputs, outputs, kernel, padding=kernel // 2, bias=norm is None)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(conv, nn.Conv2d)
    padding = conv.kernel_size[0] // 2
    return convolution(x, weight_of(conv), conv.bias, padding=(padding, padding))


def _enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """x [B, C, h, w] with its nearest cells, [B, C, *size]."""
    height, width = x.shape[-2:]
    if torch.compiler.is_compiling() and (2 * height, 2 * width) == tuple(size):
        # As copies of each cell, for whose gradient a compiler adds four; interpolation's is scattered, atom by atom.
        return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(*x.shape[:2], 2 * height, 2 * width)
    # Autocast would copy it to float32, and nothing is computed here.
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, size=size, mode="nearest")


def _norms(norm: str | None, count: int, channels: int) -> nn.ModuleList | None:
    if norm is None:
        return None
    return nn.ModuleList(nn.GroupNorm(GROUPS_OF_GROUP_NORM, channels) for _ in range(count))


def size_of_p6(size_of_p5: tuple[int, int]) -> tuple[int, int]:
    """Height and width of every second row and column."""
    return (size_of_p5[0] + 1) // 2, (size_of_p5[1] + 1) // 2


class FPN(nn.Module):
    """Lateral 1x1 convolutions, nearest-neighbor enlargements from the top down, 3x3 output convolutions,
    and P6.

    norm: None (convolutions with bias, no norm: both recipes) or "gn" (32 groups after every convolution,
    which then have no bias). standardized: the weights of the convolutions. There is no activation.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        norm: str | None = None,
        *,
        standardized: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.lateral = nn.ModuleList(_conv(channels, out_channels, 1, norm, standardized) for channels in in_channels)
        self.output = nn.ModuleList(_conv(out_channels, out_channels, 3, norm, standardized) for _ in in_channels)
        self.lateral_norm = _norms(norm, len(in_channels), out_channels)
        self.output_norm = _norms(norm, len(in_channels), out_channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """C2..C5, float [B, in_channels[i], H_i, W_i], to P2..P6: float [B, out_channels, H_i, W_i].

        P6 is every second row and column of P5.
        """
        maps = [_convolve(conv, feature) for conv, feature in zip(self.lateral, features, strict=True)]
        if self.lateral_norm is not None:
            maps = [norm(x) for norm, x in zip(self.lateral_norm, maps, strict=True)]
        for level in range(len(maps) - 1, 0, -1):
            finer = maps[level - 1]
            finer.add_(_enlarged(maps[level], finer.shape[-2:]))
        outputs = [_convolve(conv, x) for conv, x in zip(self.output, maps, strict=True)]
        if self.output_norm is not None:
            outputs = [norm(x) for norm, x in zip(self.output_norm, outputs, strict=True)]
        outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return tuple(outputs)


class LastMap(nn.Module):
    """The backbone's last map alone, in place of a pyramid."""

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """C2..C4 or C2..C5 to one map, as a tuple."""
        return (features[-1],)
