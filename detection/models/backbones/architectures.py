"""What the backbones here are made of: ResNet (He et al. 2016), ResNeXt (Xie et al. 2017), RegNetX (Radosavovic et al.
2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Blocks of a stage, the channels of its map, and the width and groups of its 3x3 convolutions."""

    blocks: int
    channels: int
    width: int
    groups: int = 1


@dataclass(frozen=True)
class Architecture:
    """Four stages of blocks with two 3x3 convolutions, or of bottlenecks, behind a stem.

    large_stem: a 7x7 convolution and a pooling, both of stride 2. Otherwise the stem is a 3x3 convolution of stride 2,
    and the first stage has a stride of 2 itself.
    """

    stages: tuple[Stage, ...]
    bottleneck: bool
    stem_channels: int = 64
    large_stem: bool = True


def residual(
    blocks: tuple[int, int, int, int], *, bottleneck: bool, groups: int = 1, group_width: int = 64, channels: int = 64
) -> Architecture:
    """A ResNet or ResNeXt. channels: of stem and first stage. group_width: of each group in the first stage."""
    expansion = 4 if bottleneck else 1
    planes = [channels * 2**stage for stage in range(4)]
    widths = [each * group_width // 64 * groups for each in planes] if bottleneck else planes
    stages = (
        Stage(count, each * expansion, width, groups) for count, each, width in zip(blocks, planes, widths, strict=True)
    )
    return Architecture(tuple(stages), bottleneck, channels)


def regnet(initial: int, slope: float, factor: float, group_width: int, depth: int) -> Architecture:
    """A RegNetX by the numbers of its paper, section 3.3.

    Widths grow linearly from block to block. Then they are rounded to the nearest power of `factor` times the initial
    width, and to multiples of 8. Blocks of one width are a stage, whose width becomes a multiple of its groups'.
    """
    exponents = [round(math.log((initial + slope * block) / initial) / math.log(factor)) for block in range(depth)]
    widths = [round(initial * factor**exponent / 8) * 8 for exponent in exponents]
    stages = []
    for width in sorted(set(widths)):
        in_group = min(group_width, width)
        whole = round(width / in_group) * in_group
        stages.append(Stage(widths.count(width), whole, whole, whole // in_group))
    return Architecture(tuple(stages), bottleneck=True, stem_channels=32, large_stem=False)


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": residual((2, 2, 2, 2), bottleneck=False),
    "resnet34": residual((3, 4, 6, 3), bottleneck=False),
    "resnet50": residual((3, 4, 6, 3), bottleneck=True),
    "resnet101": residual((3, 4, 23, 3), bottleneck=True),
    "resnext50_32x4d": residual((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "resnext101_32x4d": residual((3, 4, 23, 3), bottleneck=True, groups=32, group_width=4),
    "resnext101_64x4d": residual((3, 4, 23, 3), bottleneck=True, groups=64, group_width=4),
    "resnext101_32x8d": residual((3, 4, 23, 3), bottleneck=True, groups=32, group_width=8),
    "regnetx_400mf": regnet(24, 24.48, 2.54, 16, 22),
    "regnetx_800mf": regnet(56, 35.73, 2.28, 16, 16),
    "regnetx_1.6gf": regnet(80, 34.01, 2.25, 24, 18),
    "regnetx_3.2gf": regnet(88, 26.31, 2.25, 48, 25),
    "regnetx_4.0gf": regnet(96, 38.65, 2.43, 40, 23),
    "regnetx_6.4gf": regnet(184, 60.83, 2.07, 56, 17),
    "regnetx_8.0gf": regnet(80, 49.56, 2.88, 120, 23),
    "regnetx_12gf": regnet(168, 73.36, 2.37, 112, 19),
}
