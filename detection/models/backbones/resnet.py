"""ResNet and ResNeXt backbones that return the four feature maps C2..C5.

Batch norm with frozen statistics is an affine map per channel, so it is folded into the convolution in
front of it: `conv2d(x, weight * scale, bias=shift)` instead of a convolution and a second pass over its
output. Gradients still reach the convolution's weight and, where they are trained, the norm's weight and
bias, because the fold is part of the graph.

Parameters carry the names that torchvision and MMDetection give them (conv1.weight, bn1.running_mean,
layer1.0.downsample.0.weight, ...), whatever the normalization.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.ops.conv import convolution, end_of_block

NORMS: tuple[str, ...] = ("frozen_bn", "bn", "gn")
Norm = Callable[[int], nn.Module]
"""Makes a norm for so many channels."""
GROUPS_OF_GROUP_NORM = 32  # Wu and He, Group Normalization, section 4


@dataclass(frozen=True)
class Architecture:
    """Blocks per stage, their kind, the grouping of the 3x3 convolutions, and the channels of stem and first stage."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    groups: int = 1
    width_per_group: int = 64
    channels: int = 64


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
    "resnext101_32x4d": Architecture((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=4),
    "resnext101_64x4d": Architecture((3, 4, 23, 3), bottleneck=True, groups=64, width_per_group=4),
    "resnext101_32x8d": Architecture((3, 4, 23, 3), bottleneck=True, groups=32, width_per_group=8),
}


class FrozenBatchNorm(nn.Module):
    """Batch norm whose running statistics never change, in training mode either.

    It has no forward of its own: `conv_norm` folds it into the convolution before it. `weight` and `bias`
    (float [C]) are parameters that train only with `train_affine`; `running_mean` and `running_var` (float
    [C]) are buffers.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, train_affine: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=train_affine)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=train_affine)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The map y = scale * x + shift per channel: two tensors [C]."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, train_affine={self.weight.requires_grad}"


def conv_norm(
    conv: nn.Conv2d, norm: nn.Module, x: Tensor, *, relu: bool = False, residual: Tensor | None = None
) -> Tensor:
    """norm(conv(x)), plus `residual` where one is given, then ReLU if that is asked for; the norm is folded into the
    convolution where its statistics are frozen.

    The fold happens in the parameters' own precision; under autocast the convolution then rounds the folded
    weight once.
    """
    if not isinstance(norm, FrozenBatchNorm):
        out = norm(conv(x))
        if residual is not None:
            return end_of_block(out, residual, relu=relu)
        return F.relu_(out) if relu else out
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale[:, None, None, None]
    padding = cast("tuple[int, ...]", conv.padding)  # never one of the words that nn.Conv2d takes
    return convolution(
        x,
        weight,
        shift,
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
        relu=relu,
        residual=residual,
    )


def make_norm(kind: str, train_affine: bool, eps: float, channels: int) -> nn.Module:
    """A norm of one of NORMS; train_affine: of a frozen one."""
    if kind == "gn":
        return nn.GroupNorm(GROUPS_OF_GROUP_NORM, channels, eps=eps)
    if kind == "bn":
        return nn.BatchNorm2d(channels, eps=eps)
    return FrozenBatchNorm(channels, train_affine=train_affine, eps=eps)


def _start_as_identity(last_norm: nn.Module) -> None:
    # A zero weight in a residual block's last norm steadies training from scratch (Goyal et al. 2017, section 5.1).
    # Frozen norms come from a trained network, where a zero that nothing overwrites silences the block.
    if not isinstance(last_norm, FrozenBatchNorm):
        nn.init.zeros_(last_norm.get_parameter("weight"))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


def _identity(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    conv, norm = downsample[0], downsample[1]
    assert isinstance(conv, nn.Conv2d)
    return conv_norm(conv, norm, x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet 18 and 34)."""

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = norm(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(inputs, planes, stride, norm)
        _start_as_identity(self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, relu=True)
        return conv_norm(self.conv2, self.bn2, out, relu=True, residual=_identity(self.downsample, x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions. The stride sits in the 3x3 ("pytorch" style) or in the first 1x1
    ("caffe")."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        architecture: Architecture,
        norm: Norm,
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        width = planes * architecture.width_per_group // 64 * architecture.groups
        outputs = planes * self.expansion
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(inputs, width, 1, stride_1x1)
        self.bn1 = norm(width)
        self.conv2 = _conv(width, width, 3, stride_3x3, architecture.groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)
        _start_as_identity(self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, relu=True)
        out = conv_norm(self.conv2, self.bn2, out, relu=True)
        return conv_norm(self.conv3, self.bn3, out, relu=True, residual=_identity(self.downsample, x))


def start_norms_at_one(backbone: nn.Module) -> None:
    """Give the last norm of each residual block the weight one, with which the block is not the identity at first."""
    for block in backbone.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.ones_((block.bn2 if isinstance(block, BasicBlock) else block.bn3).get_parameter("weight"))


def make_stage(
    architecture: Architecture,
    stage: int,
    norm: Norm,
    *,
    stride_in_1x1: bool = False,
    stride: int = 2,
    dilation: int = 1,
) -> nn.Sequential:
    """Stage 1 to 4 of a ResNet. stride: of its first block. dilation: of its 3x3 convolutions."""
    expansion = Bottleneck.expansion if architecture.bottleneck else 1
    planes = architecture.channels * 2 ** (stage - 1)
    channels = architecture.channels if stage == 1 else planes // 2 * expansion
    blocks: list[nn.Module] = []
    for index in range(architecture.blocks[stage - 1]):
        of_block = stride if index == 0 else 1
        if architecture.bottleneck:
            blocks.append(Bottleneck(channels, planes, of_block, architecture, norm, stride_in_1x1, dilation))
        else:
            blocks.append(BasicBlock(channels, planes, of_block, norm))
        channels = planes * expansion
    return nn.Sequential(*blocks)


def stage_channels(name: str, stage: int) -> int:
    """The channels of the map that a stage (1 to 4) of a ResNet gives."""
    architecture = ARCHITECTURES[name]
    expansion = Bottleneck.expansion if architecture.bottleneck else 1
    return architecture.channels * 2 ** (stage - 1) * expansion


class ResNet(nn.Module):
    """Stem and four stages with fresh weights (He normal, fan out; norms at one and zero).

    name: a key of `ARCHITECTURES`. norm: "frozen_bn" (statistics never change), "bn" (plain batch norm,
    which an engine may turn into synchronized batch norm) or "gn" (32 groups). train_norm_affine: whether a
    frozen norm's weight and bias are trained; bn and gn always train theirs. frozen_stages: -1 nothing, 0
    the stem, n the stem and stages 1..n; these parts have requires_grad False and run without a graph. norm_eps:
    torchvision's COCO_V1 weights want 0. stride_in_1x1: the bottlenecks of Detectron2's and Caffe's models.
    num_stages: 4, or 3. dilate_last: the fourth stage keeps the third's stride. What these may be, FasterRCNNConfig
    checks. `out_channels` are the channels of C2..C5.
    """

    compiled_by_stage = False
    """Whether torch.compile cuts its graph after each stage, so that gradients are there before the whole pass ends."""

    def __init__(
        self,
        name: str,
        *,
        norm: str,
        train_norm_affine: bool,
        frozen_stages: int,
        norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
        num_stages: int = 4,
        dilate_last: bool = False,
    ) -> None:
        super().__init__()
        self._numbers = range(1, num_stages + 1)
        self.name = name
        self.frozen_stages = frozen_stages
        self.stride_in_1x1 = stride_in_1x1

        architecture = ARCHITECTURES[name]

        def norm_of(part: int) -> Norm:
            frozen = part <= frozen_stages
            # Batch norm in a frozen part must not gather statistics: there it is frozen batch norm.
            kind = "frozen_bn" if frozen and norm == "bn" else norm
            return functools.partial(make_norm, kind, train_norm_affine and not frozen, norm_eps)

        self.conv1 = _conv(3, architecture.channels, 7, stride=2)
        self.bn1 = norm_of(0)(architecture.channels)
        for stage in self._numbers:
            stride, dilation = (1, 1) if stage == 1 else (1, 2) if stage == 4 and dilate_last else (2, 1)
            layer = make_stage(
                architecture,
                stage,
                norm_of(stage),
                stride_in_1x1=stride_in_1x1,
                stride=stride,
                dilation=dilation,
            )
            self.add_module(f"layer{stage}", layer)
        self.out_channels = tuple(stage_channels(name, stage) for stage in self._numbers)
        frozen = [self.conv1, self.bn1, *self.stages][: frozen_stages + 2] if frozen_stages >= 0 else []
        for module in frozen:
            module.requires_grad_(False)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{stage}") for stage in self._numbers]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalized images, float [B, 3, H, W], to C2..C5 (or C4): float [B, out_channels[i], H_i, W_i].

        H_i and W_i are H and W over 4, 8, 16 and 32 (or 16 again, where the last stage is dilated), rounded up.
        """
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and self.frozen_stages < 0):
            x = conv_norm(self.conv1, self.bn1, x, relu=True)
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        features = []
        for number, stage in enumerate(self.stages, 1):
            with torch.set_grad_enabled(grad and self.frozen_stages < number):
                x = stage(x)
            features.append(x)
            if self.compiled_by_stage:
                torch._dynamo.graph_break()
        return tuple(features)
