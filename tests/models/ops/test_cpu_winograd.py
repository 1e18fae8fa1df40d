import pytest
import torch
import torch.nn.functional as F

from detection.models.ops.cpu import conv as cpu_conv
from detection.models.ops.cpu import winograd as cpu_winograd
from detection.models.ops.cpu.conv import convolution, convolution_with_sparse_gradient

pytestmark = pytest.mark.skipif(
    not (cpu_conv._IS_FUSED_KERNEL_BUILT and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 here",
)
SIZES = {"even": (8, 7), "odd": (9, 5), "one row": (1, 5), "two rows": (2, 3)}
# Of the outputs' size. One rounding to bfloat16 is 0.0017; plain convolutions have it once, these a few times.
TOLERANCE = 0.006


def given(height, width, num_inputs=128, num_outputs=160):
    generator = torch.Generator().manual_seed(3)
    shapes = (2, num_inputs, height, width), (num_outputs, num_inputs, 3, 3), (num_outputs,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [
        x.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_(),
        (weight / 34).bfloat16().requires_grad_(),
        bias.bfloat16().requires_grad_(),
    ]


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(cpu_winograd, "_FEWEST_CELLS", 1)
    convolved = []
    convolve = cpu_winograd.convolve
    monkeypatch.setattr(cpu_winograd, "convolve", lambda *args: convolved.append(1) or convolve(*args))
    return convolved


@pytest.mark.parametrize("convolve", [convolution, convolution_with_sparse_gradient])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_are_those_of_a_convolution_but_for_rounding(size, convolve, everywhere):
    inputs = given(*SIZES[size])
    output = convolve(*inputs, padding=(1, 1), relu=True) if convolve is convolution else convolve(*inputs)
    assert everywhere
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = F.conv2d(*exact, padding=1)
    expected = expected * (output > 0) if convolve is convolution else expected
    assert error(output, expected) < TOLERANCE
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = torch.autograd.grad(output, inputs, gradient)
    for ours, theirs in zip(found, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        assert ours.dtype == torch.bfloat16 and error(ours, theirs) < TOLERANCE


def test_frozen_inputs_and_frozen_weights_get_no_gradient(everywhere):
    x, weight, bias = given(*SIZES["odd"])
    whole = torch.autograd.grad(convolution(x, weight, bias, padding=(1, 1)).sum(), (x, weight))
    (of_x,) = torch.autograd.grad(convolution(x, weight.detach(), None, padding=(1, 1)).sum(), x)
    (of_weight,) = torch.autograd.grad(convolution(x.detach(), weight, None, padding=(1, 1)).sum(), weight)
    assert torch.equal(of_x, whole[0]) and torch.equal(of_weight, whole[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"x": given(40, 40)[0].float()},
        {"x": given(4, 4)[0]},
        {"x": given(40, 40, num_inputs=64)[0]},
        {"weight": given(4, 4, num_outputs=64)[1]},
        {"weight": given(4, 4)[1][..., :1, :1]},
        {"stride": (2, 2)},
        {"padding": (0, 0)},
        {"groups": 2},
    ],
    ids=["float32", "few cells", "few inputs", "few outputs", "1x1", "stride", "padding", "groups"],
)
def test_it_pays_for_large_plain_ones_in_bfloat16_only(changed):
    x, weight, _ = given(40, 40)
    usual = {"x": x, "weight": weight, "stride": (1, 1), "padding": (1, 1), "groups": 1}
    assert cpu_winograd.pays(**usual)
    assert not cpu_winograd.pays(**usual | changed)
