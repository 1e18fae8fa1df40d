"""Backbones: torchvision's networks under torchvision's names, with normalization folded, trained or frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import regnet, resnet

from detection.models.backbones.resnet import (
    NORMS,
    Bottleneck,
    FrozenBatchNorm,
    ResNet,
    conv_norm,
    start_norms_at_one,
)
from detection.models.ops.backend import implementation

TORCHVISION = {
    "resnet18": lambda: resnet.resnet18(),
    "resnet34": lambda: resnet.resnet34(),
    "resnet50": lambda: resnet.resnet50(),
    "resnet101": lambda: resnet.resnet101(),
    "resnext50_32x4d": resnet.resnext50_32x4d,
    "resnext101_32x4d": lambda: resnet.ResNet(resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4),
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "resnext101_64x4d": resnet.resnext101_64x4d,
}


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {
        name: tensor.shape for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")
    }


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Statistics and affines that no test could confuse with the identity."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
        elif name.endswith("running_mean") or ("bn" in name or "downsample.1" in name):
            offset = 0.0 if name.endswith(("mean", "bias")) else 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2 + offset)


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        ours = ResNet(name, norm="frozen_bn", train_norm_affine=True, frozen_stages=1)
        theirs = TORCHVISION[name]()
    expected = {key: shape for key, shape in shapes(theirs).items() if not key.startswith("fc.")}
    assert shapes(ours) == expected
    assert list(shapes(ours)) == list(expected)


# Of the smallest torchvision's last stage is wider: 400 channels, and 384 in the paper's models and MMDetection's.
REGNETS = {"regnetx_800mf": regnet.regnet_x_800mf, "regnetx_1.6gf": regnet.regnet_x_1_6gf}


def torchvisions_regnet(name):
    """Our name of a tensor as torchvision's RegNet calls it."""
    if not name.startswith("layer"):
        return name.replace("conv1.", "stem.0.").replace("bn1.", "stem.1.")
    stage, block, part, *rest = name.split(".")
    start = f"trunk_output.block{stage[5:]}.block{stage[5:]}-{block}."
    if part == "downsample":
        return f"{start}proj.{'.'.join(rest)}"
    kind, number = part[:-1], int(part[-1])
    return f"{start}f.{'abc'[number - 1]}.{0 if kind == 'conv' else 1}.{'.'.join(rest)}"


@pytest.mark.parametrize("name", REGNETS)
def test_regnets_have_the_shapes_of_torchvisions(name):
    with torch.device("meta"):
        ours = ResNet(name, norm="frozen_bn", train_norm_affine=True, frozen_stages=1)
    theirs = REGNETS[name]()
    expected = {key: shape for key, shape in shapes(theirs).items() if not key.startswith("fc.")}
    assert {torchvisions_regnet(key): shape for key, shape in shapes(ours).items()} == expected
    groups = [module.groups for module in theirs.modules() if isinstance(module, nn.Conv2d)]
    assert sorted(m.groups for m in ours.modules() if isinstance(m, nn.Conv2d)) == sorted(groups)


def test_the_maps_of_a_regnet_are_torchvisions():
    theirs = regnet.regnet_x_800mf().double().eval()
    ours = ResNet("regnetx_800mf", norm="frozen_bn", train_norm_affine=True, frozen_stages=1).double().eval()
    state = theirs.state_dict()
    ours.load_state_dict({name: state[torchvisions_regnet(name)] for name in ours.state_dict()})
    x = torch.randn(1, 3, 65, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = theirs.stem(x)
        for stage, feature in zip(theirs.trunk_output, ours(x), strict=True):
            y = stage(y)
            torch.testing.assert_close(feature, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
def test_standardized_weights_are_those_of_the_formula_and_learn(norm):
    backbone = ResNet("resnet18", norm=norm, train_norm_affine=True, frozen_stages=0, standardized=True).double()
    start_norms_at_one(backbone)
    plain = ResNet("resnet18", norm=norm, train_norm_affine=True, frozen_stages=0).double()
    state = backbone.state_dict()
    for name, weight in state.items():
        if weight.dim() == 4:
            flat = weight.flatten(1)
            deviation, mean = torch.std_mean(flat, dim=1, keepdim=True)
            state[name] = ((flat - mean) / (deviation + 1e-5)).view_as(weight)
    plain.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    maps = backbone(x)
    for ours, expected in zip(maps, plain(x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    maps[-1].square().sum().backward()
    gradient = backbone.stages[3][1].conv1.weight.grad
    # A shift of all weights of a channel changes nothing.
    assert gradient.abs().sum() > 0 and gradient.sum(dim=(1, 2, 3)).abs().max() < 1e-9 * gradient.abs().max() + 1e-12


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_features_equal_torchvisions_in_float64(name, norm):
    theirs = TORCHVISION[name]().double().eval()
    randomize(theirs)
    ours = ResNet(name, norm=norm, train_norm_affine=True, frozen_stages=1).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(1, 3, 65, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        features = ours(x)
        for stage, channels, feature in zip(
            (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), ours.out_channels, features, strict=True
        ):
            y = stage(y)
            assert feature.shape[1] == channels
            torch.testing.assert_close(feature, y, rtol=1e-10, atol=1e-10)


def test_the_grouped_network_equals_torchvisions():
    theirs = resnet.Bottleneck(
        64,
        64,
        groups=32,
        base_width=4,
        downsample=nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256)),
    )
    backbone = ResNet("resnext101_32x4d", norm="frozen_bn", train_norm_affine=True, frozen_stages=-1)
    block = backbone.stages[0][0].double()
    theirs = theirs.double().eval()
    randomize(theirs)
    block.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(1, 64, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_folding_leaves_output_and_every_gradient_as_they_are():
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False).double()
    norm = FrozenBatchNorm(8, train_affine=True).double()
    randomize(nn.ModuleDict({"bn": norm}))
    x = torch.randn(2, 6, 9, 10, dtype=torch.float64, requires_grad=True)
    leaves = [x, conv.weight, norm.weight, norm.bias]

    folded = conv_norm(conv, norm, x)
    unfolded = F.batch_norm(conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    torch.testing.assert_close(folded, unfolded, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(folded)
    for ours, theirs in zip(
        torch.autograd.grad((folded * weights).sum(), leaves),
        torch.autograd.grad((unfolded * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_frozen_stem_is_the_same_where_it_pools_before_bias_and_relu():
    torch.manual_seed(0)
    stem = ResNet("resnet18", norm="frozen_bn", train_norm_affine=False, frozen_stages=0).double()
    randomize(stem)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected = stem(x)
    with implementation(convolution="triton"):
        found = stem(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_fold_is_rounded_to_bf16_once():
    conv = nn.Conv2d(4, 4, 1, bias=False)
    norm = FrozenBatchNorm(4, train_affine=True)
    randomize(nn.ModuleDict({"bn": norm}))
    x = torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = conv_norm(conv, norm, x)
    scale, shift = norm.scale_and_shift()
    weight = (conv.weight * scale[:, None, None, None]).bfloat16()
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, F.conv2d(x.bfloat16(), weight, shift.bfloat16()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_parts_have_no_gradient_and_the_others_all_have_one(norm, frozen_stages):
    backbone = ResNet("resnet18", norm=norm, train_norm_affine=True, frozen_stages=frozen_stages).train()
    frozen_prefixes = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")[
        : {-1: 0, 0: 2, 2: 4, 4: 6}[frozen_stages]
    ]
    frozen = {name for name, _ in backbone.named_parameters() if name.startswith(frozen_prefixes) and frozen_prefixes}
    assert {name for name, p in backbone.named_parameters() if not p.requires_grad} == frozen

    features = backbone(torch.randn(2, 3, 64, 64))
    assert [feature.requires_grad for feature in features] == [stage > frozen_stages for stage in (1, 2, 3, 4)]
    if frozen_stages < 4:
        sum(feature.square().sum() for feature in features if feature.requires_grad).backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is None} == frozen


@pytest.mark.parametrize("norm", NORMS)
def test_the_affine_of_frozen_norms_is_trained_only_on_request(norm):
    backbone = ResNet("resnet18", norm=norm, train_norm_affine=False, frozen_stages=-1)
    affines = [p.requires_grad for name, p in backbone.named_parameters() if "bn" in name or "downsample.1" in name]
    assert set(affines) == {norm != "frozen_bn"}


def test_training_mode_changes_no_frozen_statistics_but_gathers_the_others():
    backbone = ResNet("resnet18", norm="bn", train_norm_affine=True, frozen_stages=2).train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(torch.randn(2, 3, 64, 64))
    after = backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed == {name for name in statistics if name.startswith(("layer3.", "layer4."))}

    frozen = ResNet("resnet18", norm="frozen_bn", train_norm_affine=True, frozen_stages=-1).train()
    before = copy.deepcopy(frozen.state_dict())
    frozen(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_residual_blocks_start_as_the_identity_when_trained_from_scratch(norm):
    backbone = ResNet("resnet50", norm=norm, train_norm_affine=True, frozen_stages=-1)
    block = backbone.stages[0][1]
    assert isinstance(block, Bottleneck)
    x = torch.rand(2, 256, 8, 8)
    torch.testing.assert_close(block(x), x)


def test_fresh_convolutions_are_he_initialized_by_fan_out():
    torch.manual_seed(0)
    weight = ResNet("resnet18", norm="bn", train_norm_affine=True, frozen_stages=-1).stages[3][1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert abs(weight.mean().item()) < 1e-4


def test_channels_last_input_gives_channels_last_features():
    backbone = ResNet("resnet18", norm="frozen_bn", train_norm_affine=True, frozen_stages=1)
    backbone = backbone.to(memory_format=torch.channels_last)
    features = backbone(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)


def test_the_last_stage_can_be_dilated_in_place_of_its_stride_or_left_out():
    shape = {"norm": "frozen_bn", "train_norm_affine": True, "frozen_stages": 1}
    usual, dilated = ResNet("resnet50", **shape), ResNet("resnet50", dilate_last=True, **shape)
    x = torch.randn(1, 3, 64, 96)
    maps, wider = usual(x), dilated(x)
    assert [block.conv2.dilation for block in dilated.stages[3]] == [(2, 2)] * 3
    assert wider[3].shape[2:] == maps[2].shape[2:] and wider[3].shape[1] == maps[3].shape[1]
    short = ResNet("resnet50", num_stages=3, **shape)
    assert short.out_channels == (256, 512, 1024) and len(short(x)) == 3
    assert not any(name.startswith("layer4") for name in short.state_dict())


def test_the_stride_can_sit_in_the_first_1x1():
    usual = ResNet("resnet50", norm="frozen_bn", train_norm_affine=True, frozen_stages=1)
    caffe = ResNet("resnet50", norm="frozen_bn", train_norm_affine=True, frozen_stages=1, stride_in_1x1=True)
    strides = [(b.stages[1][0].conv1.stride, b.stages[1][0].conv2.stride) for b in (usual, caffe)]
    assert strides == [((1, 1), (2, 2)), ((2, 2), (1, 1))]
    x = torch.randn(1, 3, 64, 96)
    assert [f.shape for f in caffe(x)] == [f.shape for f in usual(x)]
