"""ResNet, ResNeXt and RegNet backbones that return the four feature maps C2..C5.

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
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones.architectures import ARCHITECTURES, Architecture, Stage
from detection.models.ops.conv import StandardizedConv2d, convolution, end_of_block, stem_convolution, weight_of

NORMS: tuple[str, ...] = ("frozen_bn", "bn", "gn")
Norm = Callable[[int], nn.Module]
"""Makes a norm for so many channels."""
GROUPS_OF_GROUP_NORM = 32  # Wu and He, Group Normalization, section 4


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
    weight, shift = _folded(conv, norm)
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


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is both."""
    scale, shift = norm.scale_and_shift()
    return weight_of(conv) * scale[:, None, None, None], shift


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


class Convolutions:
    """Makes the convolutions and norms of a part of a backbone. standardized: weights as Qiao et al. 2019 have them."""

    def __init__(self, norm: Norm, *, standardized: bool = False) -> None:
        self.norm = norm
        self._kind = StandardizedConv2d if standardized else nn.Conv2d

    def conv(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1
    ) -> nn.Conv2d:
        """Without bias, He normal by fan out."""
        padding = dilation * (kernel // 2)
        conv = self._kind(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv

    def shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
        """None where the block's input has the shape of its output."""
        if stride == 1 and inputs == outputs:
            return None
        return nn.Sequential(self.conv(inputs, outputs, 1, stride), self.norm(outputs))


def _identity(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    conv, norm = downsample[0], downsample[1]
    assert isinstance(conv, nn.Conv2d)
    return conv_norm(conv, norm, x)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (ResNet 18 and 34)."""

    def __init__(self, inputs: int, channels: int, stride: int, make: Convolutions) -> None:
        super().__init__()
        self.conv1 = make.conv(inputs, channels, 3, stride)
        self.bn1 = make.norm(channels)
        self.conv2 = make.conv(channels, channels, 3)
        self.bn2 = make.norm(channels)
        self.downsample = make.shortcut(inputs, channels, stride)
        _start_as_identity(self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(self.conv1, self.bn1, x, relu=True)
        return conv_norm(self.conv2, self.bn2, out, relu=True, residual=_identity(self.downsample, x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions. The stride sits in the 3x3 ("pytorch" style) or in the first 1x1
    ("caffe")."""

    def __init__(
        self,
        inputs: int,
        stage: Stage,
        stride: int,
        make: Convolutions,
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = make.conv(inputs, stage.width, 1, stride_1x1)
        self.bn1 = make.norm(stage.width)
        self.conv2 = make.conv(stage.width, stage.width, 3, stride_3x3, stage.groups, dilation)
        self.bn2 = make.norm(stage.width)
        self.conv3 = make.conv(stage.width, stage.channels, 1)
        self.bn3 = make.norm(stage.channels)
        self.downsample = make.shortcut(inputs, stage.channels, stride)
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
    number: int,
    make: Convolutions,
    *,
    stride_in_1x1: bool = False,
    stride: int = 2,
    dilation: int = 1,
) -> nn.Sequential:
    """Stage 1 to 4 of a backbone. stride: of its first block. dilation: of its 3x3 convolutions."""
    stage = architecture.stages[number - 1]
    inputs = architecture.stem_channels if number == 1 else architecture.stages[number - 2].channels
    blocks: list[nn.Module] = []
    for index in range(stage.blocks):
        of_block = stride if index == 0 else 1
        if architecture.bottleneck:
            blocks.append(Bottleneck(inputs, stage, of_block, make, stride_in_1x1, dilation))
        else:
            blocks.append(BasicBlock(inputs, stage.channels, of_block, make))
        inputs = stage.channels
    return nn.Sequential(*blocks)


class ResNet(nn.Module):
    """Stem and four stages with fresh weights (He normal, fan out; norms at one and zero).

    name: a key of `ARCHITECTURES`. norm: "frozen_bn" (statistics never change), "bn" (plain batch norm,
    which an engine may turn into synchronized batch norm) or "gn" (32 groups). train_norm_affine: whether a
    frozen norm's weight and bias are trained; bn and gn always train theirs. frozen_stages: -1 nothing, 0
    the stem, n the stem and stages 1..n; these parts have requires_grad False and run without a graph. norm_eps:
    torchvision's COCO_V1 weights want 0. standardized: see Convolutions. stride_in_1x1: the bottlenecks of Detectron2's
    and Caffe's models.
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
        standardized: bool = False,
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

        def convolutions_of(part: int) -> Convolutions:
            frozen = part <= frozen_stages
            # Batch norm in a frozen part must not gather statistics: there it is frozen batch norm.
            kind = "frozen_bn" if frozen and norm == "bn" else norm
            affine = train_norm_affine and not frozen
            return Convolutions(functools.partial(make_norm, kind, affine, norm_eps), standardized=standardized)

        stem = convolutions_of(0)
        self._pools_stem = architecture.large_stem
        self.conv1 = stem.conv(3, architecture.stem_channels, 7 if architecture.large_stem else 3, stride=2)
        self.bn1 = stem.norm(architecture.stem_channels)
        for number in self._numbers:
            stride, dilation = (1, 2) if number == 4 and dilate_last else (2, 1)
            if number == 1 and architecture.large_stem:
                stride = 1
            layer = make_stage(
                architecture,
                number,
                convolutions_of(number),
                stride_in_1x1=stride_in_1x1,
                stride=stride,
                dilation=dilation,
            )
            self.add_module(f"layer{number}", layer)
        self.out_channels = tuple(architecture.stages[number - 1].channels for number in self._numbers)
        frozen = [self.conv1, self.bn1, *self.stages][: frozen_stages + 2] if frozen_stages >= 0 else []
        for module in frozen:
            module.requires_grad_(False)

    @property
    def stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{stage}") for stage in self._numbers]

    def _stem(self, x: Tensor) -> Tensor:
        if self._pools_stem and isinstance(self.bn1, FrozenBatchNorm):
            weight, shift = _folded(self.conv1, self.bn1)
            padding = cast("tuple[int, ...]", self.conv1.padding)
            return stem_convolution(x, weight, shift, stride=self.conv1.stride, padding=padding)
        x = conv_norm(self.conv1, self.bn1, x, relu=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1) if self._pools_stem else x

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalized images, float [B, 3, H, W], to C2..C5 (or C4): float [B, out_channels[i], H_i, W_i].

        H_i and W_i are H and W over 4, 8, 16 and 32 (or 16 again, where the last stage is dilated), rounded up.
        """
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and self.frozen_stages < 0):
            x = self._stem(x)
        features = []
        for number, stage in enumerate(self.stages, 1):
            with torch.set_grad_enabled(grad and self.frozen_stages < number):
                x = stage(x)
            features.append(x)
            if self.compiled_by_stage:
                torch._dynamo.graph_break()
        return tuple(features)
