"""3x3 convolutions in bfloat16 on the CPU with two thirds of the products, forward and backward.

Winograd's minimal filtering F(2, 3) (Lavin and Gray 2016) along the columns: two rows of output from four rows of input
x0..x3 take four convolutions of 1x3 instead of six.

    m0 = (x0 - x2) * w0                    y0 = m0 + m1 + m2
    m1 = (x1 + x2) * (w0 + w1 + w2) / 2    y1 = m1 - m2 - m3
    m2 = (x2 - x1) * (w0 - w1 + w2) / 2
    m3 = (x1 - x3) * w2

The sums before and after are rounded to bfloat16: an output is off by 0.4 % of the outputs' size instead of 0.24 %.
Both directions at once would spare more products, but their sums take the time that this gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Below these the sums, or the weights' transforms, take longer than a third of the products.
_FEWEST_CHANNELS, _FEWEST_CELLS = 128, 1500


def pays(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int) -> bool:
    num_images, channels, height, width = x.shape
    return (
        x.dtype == torch.bfloat16
        and weight.shape[2:] == (3, 3)
        and groups == 1
        and (*stride, *padding) == (1, 1, 1, 1)
        and min(channels, len(weight)) >= _FEWEST_CHANNELS
        and num_images * height * width >= _FEWEST_CELLS
    )


def convolve(x: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) of channels-last x, with `transformed(weight)`."""
    num_images, _, height, width = x.shape
    pairs = _rows_in_pairs(x)
    m1 = _convolve_1x3(_input_of(1, *pairs), kernels[1], bias)
    m2 = _convolve_1x3(_input_of(2, *pairs), kernels[2])
    total = m1 + m2
    difference = m1.sub_(m2)
    del m1, m2
    out = x.new_empty(num_images, height, width, len(kernels[0]))
    torch.add(total, _convolve_1x3(_input_of(0, *pairs), kernels[0]), out=out[:, 0::2])
    m3 = _convolve_1x3(_input_of(3, *pairs), kernels[3])
    # An odd height has no last row of these.
    num_odd = height // 2
    torch.sub(difference[:, :num_odd], m3[:, :num_odd], out=out[:, 1::2])
    return out.permute(0, 3, 1, 2)


def transformed(weight: Tensor) -> list[Tensor]:
    """The four kernels [O, I, 1, 3] of a weight [O, I, 3, 3]: those of m0..m3."""
    num_outputs, num_inputs = weight.shape[:2]
    rows = weight.permute(0, 2, 3, 1).contiguous().view(num_outputs, 3, 3 * num_inputs)
    w0, w1, w2 = rows.float().unbind(1)
    outer = w0 + w2
    middle = [torch.add(outer, w1).mul_(0.5), torch.sub(outer, w1).mul_(0.5)]
    kernels = [rows[:, 0].contiguous(), *(kernel.to(weight.dtype) for kernel in middle), rows[:, 2].contiguous()]
    return [kernel.view(num_outputs, 1, 3, num_inputs).permute(0, 3, 1, 2) for kernel in kernels]


def gradients(
    gradient: Tensor, x: Tensor, kernels: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, as far as they are wanted: `convolve` walked backwards."""
    of_x, of_weight, of_bias = wanted
    of_y0, of_y1 = _rows_in_pairs(gradient)
    of_products = (of_y0.contiguous, lambda: of_y0 + of_y1, lambda: of_y0 - of_y1, of_y1.neg)
    pairs = _rows_in_pairs(x) if of_weight else None
    found = []
    for number, (of_product, kernel) in enumerate(zip(of_products, kernels, strict=True)):
        product = of_product()
        # Without the weight's gradient no more than the shape is looked at.
        given = x.new_empty(*product.shape[:3], x.shape[1]) if pairs is None else _input_of(number, *pairs)
        of_all = torch.ops.aten.convolution_backward(
            product.permute(0, 3, 1, 2), given.permute(0, 3, 1, 2), kernel, [len(kernel)], [1, 1], [0, 1], [1, 1],
            False, [0, 0], 1, [of_x, of_weight, of_bias and number == 1],
        )  # fmt: skip
        found.append(of_all)
    of_inputs, of_kernels, of_biases = zip(*found, strict=True)
    return (
        _of_x(of_inputs, x.shape[2]) if of_x else None,
        _of_weight(of_kernels) if of_weight else None,
        of_biases[1],
    )


def _of_weight(of_kernels: Sequence[Tensor]) -> Tensor:
    k0, k1, k2, k3 = (kernel.float() for kernel in of_kernels)
    outer = (k1 + k2).mul_(0.5)
    return torch.cat([k0 + outer, (k1 - k2).mul_(0.5), k3 + outer], dim=2).to(of_kernels[0].dtype)


def _of_x(of_inputs: Sequence[Tensor], height: int) -> Tensor:
    """From the gradients of m0's..m3's inputs; a row of x is in two windows of four rows."""
    t0, t1, t2, t3 = (each.permute(0, 2, 3, 1) for each in of_inputs)
    num_images, half, width, channels = t0.shape
    of_x = t0.new_empty(num_images, height, width, channels)
    even, odd = of_x[:, 0::2], of_x[:, 1::2]
    of_x1 = (t1 - t2).add_(t3)
    even[:, :1] = of_x1[:, :1]
    torch.sub(of_x1[:, 1:], t3[:, :-1], out=even[:, 1:])
    of_x2 = t1.add_(t2).sub_(t0)
    torch.add(of_x2[:, : half - 1], t0[:, 1:], out=odd[:, : half - 1])
    odd[:, half - 1 :] = of_x2[:, half - 1 : height // 2]
    return of_x.permute(0, 3, 1, 2)


def _rows_in_pairs(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The even and the odd rows of channels-last maps [B, C, H, W], as many of both, zeros after the last:
    [B, ceil(H / 2), W, C]."""
    rows = maps.permute(0, 2, 3, 1)
    if rows.shape[1] % 2:
        rows = F.pad(rows, (0, 0, 0, 0, 0, 1))
    return rows[:, 0::2], rows[:, 1::2]


def _input_of(number: int, even: Tensor, odd: Tensor) -> Tensor:
    """What m0..m3 convolve, where x1 and x2 are an even row and the odd row after it: [B, ceil(H / 2), W, C]."""
    if number == 1:
        return even + odd
    if number == 2:
        return odd - even
    out = even.new_empty(even.shape)
    if number == 0:
        torch.neg(odd[:, :1], out=out[:, :1])
        torch.sub(odd[:, :-1], odd[:, 1:], out=out[:, 1:])
    else:
        torch.sub(even[:, :-1], even[:, 1:], out=out[:, :-1])
        out[:, -1:] = even[:, -1:]
    return out


def _convolve_1x3(rows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    maps = rows.permute(0, 3, 1, 2)
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(maps, kernel, bias, [0, 1], [1, 1], [1, 1], 1, "none", [], "")
    return out.permute(0, 2, 3, 1)
