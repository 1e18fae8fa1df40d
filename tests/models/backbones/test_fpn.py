"""The feature pyramid: torchvision's numbers, exact sizes, both normalizations."""

import pytest
import torch
from torch import nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from detection.models.backbones.fpn import FPN

CHANNELS = (8, 16, 32, 64)


def maps(sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, c, h, w, generator=generator, dtype=dtype) for c, (h, w) in zip(CHANNELS, sizes, strict=True)
    ]


@pytest.mark.parametrize("sizes", [((16, 24), (8, 12), (4, 6), (2, 3)), ((17, 25), (9, 13), (5, 7), (3, 4))])
def test_it_computes_torchvisions_pyramid_also_where_sizes_are_not_doubles(sizes):
    theirs = FeaturePyramidNetwork(list(CHANNELS), 32, extra_blocks=LastLevelMaxPool()).double()
    ours = FPN(CHANNELS, 32).double()
    for level in range(4):
        ours.lateral[level].load_state_dict(theirs.inner_blocks[level][0].state_dict())
        ours.output[level].load_state_dict(theirs.layer_blocks[level][0].state_dict())
    features = maps(sizes, torch.float64)
    expected = list(theirs({str(i): feature for i, feature in enumerate(features)}).values())
    results = ours(features)
    assert len(results) == 5
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12)


def test_fresh_biases_are_zero_and_weights_uniform_within_xaviers_bound():
    torch.manual_seed(0)
    fpn = FPN(CHANNELS, 32)
    for name, parameter in fpn.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            fan = parameter.shape[2] * parameter.shape[3] * (parameter.shape[0] + parameter.shape[1])
            bound = (6 / fan) ** 0.5
            assert 0.9 * bound < parameter.abs().max().item() <= bound


def test_group_norm_takes_the_place_of_the_biases():
    fpn = FPN(CHANNELS, 64, norm="gn")
    assert sum(isinstance(module, nn.GroupNorm) and module.num_groups == 32 for module in fpn.modules()) == 8
    assert not any(name.startswith(("lateral.", "output.")) for name, _ in fpn.named_parameters() if "bias" in name)
    for level in fpn(maps(((16, 24), (8, 12), (4, 6), (2, 3))))[:4]:
        grouped = level.reshape(2, 32, -1)
        torch.testing.assert_close(grouped.mean(-1), torch.zeros(2, 32), atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient_in_bf16_and_channels_last():
    fpn = FPN(CHANNELS, 32).to(memory_format=torch.channels_last)
    features = [f.to(memory_format=torch.channels_last) for f in maps(((16, 24), (8, 12), (4, 6), (2, 3)))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = fpn(features)
    assert all(r.dtype == torch.bfloat16 and r.is_contiguous(memory_format=torch.channels_last) for r in results)
    sum(result.float().square().sum() for result in results).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in fpn.parameters())


@pytest.mark.slow
def test_compiled_for_maps_of_twice_the_size_it_gives_the_same_maps_and_gradients():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        fpn = FPN(CHANNELS, 32)
        features = [f.requires_grad_() for f in maps(((16, 24), (8, 12), (4, 6), (2, 3)))]
        run = torch.compile(fpn, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else fpn
        results = run(features)
        sum(result.square().sum() for result in results).backward()
        found.append([*(r.detach() for r in results), *(f.grad for f in features), *(p.grad for p in fpn.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
