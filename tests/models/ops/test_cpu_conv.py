import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from detection.models.ops.cpu import conv as cpu_conv
from detection.models.ops.cpu.conv import convolution, convolution_with_sparse_gradient

HEIGHT, WIDTH = 9, 11


def maps(channels, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, channels, HEIGHT, WIDTH, generator=generator).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def inputs(inputs, outputs, kernel, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    return [maps(inputs, 1, dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]


def sparse(*cells):
    """A gradient of the output that is zero but at the cells (image, row, column)."""
    gradient = torch.zeros(2, 4, HEIGHT, WIDTH).contiguous(memory_format=torch.channels_last)
    for image, row, column in cells:
        gradient[image, :, row, column] = maps(4, 2)[image, :, row, column]
    return gradient


GRADIENTS = {
    "inside": sparse((0, 4, 5), (0, 4, 6), (1, 2, 3)),
    "corners": sparse((0, 0, 0), (0, 8, 10), (1, 0, 10), (1, 8, 0)),
    "none": sparse(),
    "a row": sparse(*((0, 8, column) for column in range(WIDTH))),
    "everywhere": maps(4, 3),
}


PLACES = {
    "3x3": (3, {"padding": (1, 1)}),
    "3x3, stride 2": (3, {"padding": (1, 1), "stride": (2, 2)}),
    "1x1": (1, {}),
    "1x1, stride 2": (1, {"stride": (2, 2)}),
    "1x1, padded": (1, {"padding": (1, 1)}),
    "groups": (3, {"padding": (1, 1), "groups": 2}),
}


@pytest.mark.skipif(not cpu_conv._IS_FUSED_KERNEL_BUILT, reason="PyTorch is built without oneDNN")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_a_fused_convolution_and_its_gradients_are_those_of_torch(place, relu, monkeypatch):
    kernel, settings = PLACES[place]
    x, weight, bias = given = inputs(4, 6, kernel)
    if "groups" in settings:
        given[1] = weight = weight.detach()[:, :2].clone().requires_grad_()
    fused = []
    apply = cpu_conv._FusedConvolution.apply
    monkeypatch.setattr(cpu_conv._FusedConvolution, "apply", lambda *args: fused.append(1) or apply(*args))
    output = convolution(*given, **settings, relu=relu)
    assert fused
    expected = F.conv2d(*given, **settings)
    expected = F.relu(expected) if relu else expected
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(output)
    found = torch.autograd.grad(output, given, gradient)
    torch.testing.assert_close(found, torch.autograd.grad(expected, given, gradient), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_fused_convolution_under_autocast_is_bfloat16_with_float32_gradients(kernel):
    given = inputs(8, 6, kernel)
    padding = (kernel // 2, kernel // 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = convolution(*given, padding=padding, relu=True)
        expected = F.relu(F.conv2d(*given, padding=padding))
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    found = torch.autograd.grad(output.float().square().sum(), given)
    reference = torch.autograd.grad(expected.float().square().sum(), given)
    for ours, theirs in zip(found, reference, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_frozen_weight_lets_the_gradient_through_and_gets_none():
    x, weight, bias = inputs(3, 4, 1)
    output = convolution(x, weight.detach(), bias.detach(), relu=True)
    (found,) = torch.autograd.grad(output.sum(), x)
    (expected,) = torch.autograd.grad(F.relu(F.conv2d(x, weight, bias)).sum(), x)
    torch.testing.assert_close(found, expected)


def test_memory_in_rows_of_channels_gets_the_plain_convolution(monkeypatch):
    monkeypatch.setattr(cpu_conv, "_FusedConvolution", None)
    x, weight, bias = inputs(3, 4, 3)
    x = x.detach().contiguous()
    assert torch.equal(convolution(x, weight, bias, relu=True), F.relu(F.conv2d(x, weight, bias)))


def test_a_build_without_the_fused_kernel_has_the_plain_convolution(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    spec = importlib.util.spec_from_file_location("without_kernel", cpu_conv.__file__)
    without_kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without_kernel)
    given = inputs(3, 4, 3)
    assert torch.equal(without_kernel.convolution(*given, relu=True), F.relu(F.conv2d(*given)))


def test_operations_are_counted_as_those_of_a_plain_convolution():
    given = inputs(4, 6, 3)
    counts = []
    for convolve in (convolution, F.conv2d):
        with FlopCounterMode(display=False) as counter:
            convolve(*given, padding=(1, 1)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_through_few_cells_are_those_of_a_plain_convolution(case, kernel, monkeypatch):
    dense_backward = cpu_conv._dense_backward
    dense = []
    monkeypatch.setattr(cpu_conv, "_dense_backward", lambda *args: dense.append(args) or dense_backward(*args))
    given = inputs(3, 4, kernel)
    output = convolution_with_sparse_gradient(*given)
    expected = F.conv2d(*given, padding=kernel // 2)
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output, given, GRADIENTS[case])
    torch.testing.assert_close(found, torch.autograd.grad(expected, given, GRADIENTS[case]), rtol=1e-5, atol=1e-5)
    assert len(dense) == (1 if case == "everywhere" else 0)


def test_gradients_through_few_cells_keep_the_digits_of_float64():
    given = inputs(3, 4, 3, torch.float64)
    gradient = GRADIENTS["inside"].double()
    found = torch.autograd.grad(convolution_with_sparse_gradient(*given), given, gradient)
    expected = torch.autograd.grad(F.conv2d(*given, padding=1), given, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_finite_goes_on():
    given = inputs(3, 4, 3)
    gradient = sparse((0, 4, 5))
    gradient[0, 2, 4, 5] = torch.nan
    found = torch.autograd.grad(convolution_with_sparse_gradient(*given), given, gradient)
    assert all(each.isnan().any() for each in found)


def test_under_autocast_outputs_are_bfloat16_and_parameters_gradients_float32():
    given = inputs(3, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        output = convolution_with_sparse_gradient(*given)
        expected = F.conv2d(*given, padding=1)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    found = torch.autograd.grad(output.float().square().sum(), given)
    reference = torch.autograd.grad(expected.float().square().sum(), given)
    for ours, theirs in zip(found, reference, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_what_needs_no_gradient_gets_none_and_a_missing_bias_is_none():
    x, weight, _ = inputs(3, 4, 3)
    output = convolution_with_sparse_gradient(x.detach(), weight, None)
    (found,) = torch.autograd.grad(output, weight, GRADIENTS["inside"])
    (expected,) = torch.autograd.grad(F.conv2d(x.detach(), weight, padding=1), weight, GRADIENTS["inside"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_windows_are_gathered_in_blocks(monkeypatch):
    given = inputs(3, 4, 3)
    whole = torch.autograd.grad(convolution_with_sparse_gradient(*given), given, GRADIENTS["a row"])
    monkeypatch.setattr(cpu_conv, "_WINDOWS_AT_ONCE", 4)
    blocks = torch.autograd.grad(convolution_with_sparse_gradient(*given), given, GRADIENTS["a row"])
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-5)
