"""The 3x3 convolutions that box and mask heads begin with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones.resnet import GROUPS_OF_GROUP_NORM
from detection.models.config import FasterRCNNConfig
from detection.models.ops.conv import StandardizedConv2d, convolution, weight_of


class HeadConvs(nn.Module):
    """A head with `count` 3x3 convolutions, each with a ReLU: with bias, or with group norm (head_norm) and without."""

    def __init__(self, config: FasterRCNNConfig, inputs: int, channels: int, count: int) -> None:
        super().__init__()
        kind = StandardizedConv2d if config.standardize_weights else nn.Conv2d
        self.convs = nn.ModuleList(
            kind(inputs if number == 0 else channels, channels, 3, padding=1, bias=config.head_norm is None)
            for number in range(count)
        )
        self.conv_norms: nn.ModuleList | None = None
        if config.head_norm == "gn":
            self.conv_norms = nn.ModuleList(nn.GroupNorm(GROUPS_OF_GROUP_NORM, channels) for _ in range(count))
        for conv in self.convs:
            start_as_he(conv)

    def convolve(self, x: Tensor) -> Tensor:
        """RoI features [R, C, S, S] to [R, channels, S, S]."""
        for number, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv2d)
            normed = self.conv_norms is not None
            x = convolution(x, weight_of(conv), conv.bias, padding=(1, 1), relu=not normed)
            if self.conv_norms is not None:
                x = F.relu_(self.conv_norms[number](x))
        return x


def start_as_he(conv: nn.Module) -> None:
    """Weights He normal by fan out, biases zero."""
    nn.init.kaiming_normal_(conv.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
    if getattr(conv, "bias", None) is not None:
        nn.init.zeros_(conv.get_parameter("bias"))
