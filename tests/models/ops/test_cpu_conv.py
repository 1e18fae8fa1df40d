import pytest
import torch
import torch.nn.functional as F

from detection.models.ops.cpu import conv as cpu_conv
from detection.models.ops.cpu.conv import convolution_with_sparse_gradient

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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_through_few_cells_are_those_of_a_plain_convolution(case, kernel, dtype, tolerance):
    given, gradient = inputs(3, 4, kernel, dtype), GRADIENTS[case].to(dtype)
    output = convolution_with_sparse_gradient(*given)
    expected = F.conv2d(*given, padding=kernel // 2)
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output, given, gradient)
    wanted = torch.autograd.grad(expected, given, gradient)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


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
    monkeypatch.setattr(cpu_conv, "WINDOWS_AT_ONCE", 4)
    blocks = torch.autograd.grad(convolution_with_sparse_gradient(*given), given, GRADIENTS["a row"])
    torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-5)
