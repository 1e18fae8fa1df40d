"""The optimizer of a schedule: its groups, its rates, its state by name."""

import pytest
import torch
from torch import nn

from detection.engine.optim.amp import Precision, gradient_norm
from detection.engine.optim.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_facts,
    set_learning_rate,
    trained_parameters,
)
from detection.models import build_model
from schedules import Schedule, load_schedule, schedule_from_dict, unmatched_custom_keys


def schedule_with(**optim_wrapper) -> Schedule:
    values = load_schedule("1x").to_dict()
    values["optim_wrapper"] |= optim_wrapper
    return schedule_from_dict(values)


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    (found,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return found


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        optimizer.zero_grad()
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        network(pixels).square().mean().backward()
        optimizer.step()


def test_parameters_that_are_frozen_are_in_no_group():
    model = build_model("tiny", 3, norm="frozen_bn", frozen_stages=1)
    held = {id(p) for p in trained_parameters(build_optimizer(model, load_schedule("1x")))}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in held) == parameter.requires_grad, name
    assert not model.backbone.conv1.weight.requires_grad


def test_paramwise_rules_and_custom_keys_decide_over_rate_and_decay():
    model = build_model("tiny", 3, norm="bn", frozen_stages=-1)
    schedule = schedule_with(
        paramwise_cfg={
            "norm_decay_mult": 0.0,
            "bias_lr_mult": 2.0,
            "custom_keys": {"backbone.layer4": {"lr_mult": 0.1}},
        }
    )
    optimizer = build_optimizer(model, schedule)
    cases = [
        (model.backbone.bn1.weight, 1.0, 0.0),
        (model.backbone.bn1.bias, 1.0, 0.0),
        (model.fpn.output[0].bias, 2.0, 1e-4),
        (model.fpn.output[0].weight, 1.0, 1e-4),
        (model.backbone.layer4[0].conv1.weight, 0.1, 1e-4),
        (model.backbone.layer4[0].bn1.weight, 0.1, 1e-4),
    ]
    for parameter, lr_mult, decay in cases:
        group = group_of(optimizer, parameter)
        assert (group["lr_mult"], group["weight_decay"]) == (lr_mult, pytest.approx(decay))
    assert set_learning_rate(optimizer, schedule, 600, 7330) == 0.02
    assert group_of(optimizer, model.fpn.output[0].bias)["lr"] == pytest.approx(0.04)
    assert group_of(optimizer, model.backbone.layer4[0].conv1.weight)["lr"] == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("neck", "fpn.lateral.0.weight"),
        ("neck.fpn_convs.2.conv", "fpn.output.2.weight"),
        ("rpn_head.rpn_cls", "rpn.objectness.weight"),
        ("roi_head.bbox_head.shared_fcs.0", "roi_head.fc1.weight"),
        ("bbox_head.fc_reg", "roi_head.regressor.weight"),
        ("roi_head.fc1", "roi_head.fc1.weight"),
    ],
)
def test_custom_keys_match_names_of_mmdetection_and_ours(key: str, ours: str):
    model = build_model("tiny", 3, norm="frozen_bn")
    schedule = schedule_with(paramwise_cfg={"custom_keys": {key: {"lr_mult": 0.5}}})
    assert not unmatched_custom_keys(schedule.paramwise, parameter_facts(model))
    optimizer = build_optimizer(model, schedule)
    parameters = dict(model.named_parameters())
    assert group_of(optimizer, parameters[ours])["lr_mult"] == 0.5
    assert group_of(optimizer, parameters["backbone.layer2.0.conv1.weight"])["lr_mult"] == 1.0


def test_custom_keys_match_mmdetections_group_norms():
    model = build_model("tiny", 3, norm="gn", fpn_norm="gn", frozen_stages=-1)
    schedule = schedule_with(paramwise_cfg={"custom_keys": {".gn1.": {"decay_mult": 0.0}}})
    optimizer = build_optimizer(model, schedule)
    assert group_of(optimizer, model.backbone.layer2[0].bn1.weight)["weight_decay"] == 0


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_state_goes_on_by_name_whatever_the_groups_and_the_memory_layout(kind: str):
    settings = {"type": kind, "lr": 0.05, "weight_decay": 0.01}
    if kind == "SGD":
        settings["momentum"] = 0.9
    schedule = schedule_with(optimizer=settings)
    whole = small_network()
    whole_optimizer = build_optimizer(whole, schedule)
    steps(whole, whole_optimizer, 3)
    stored = optimizer_state(whole_optimizer, whole)
    # The resumed run lays its weights out otherwise, and names its parameters one by one.
    resumed = small_network().to(memory_format=torch.contiguous_format)
    resumed.load_state_dict(whole.state_dict())
    regrouped = schedule_with(optimizer=settings, paramwise_cfg={"custom_keys": {"2.": {"lr_mult": 1.0}}})
    resumed_optimizer = build_optimizer(resumed, regrouped)
    assert load_optimizer_state(resumed_optimizer, resumed, stored)
    steps(whole, whole_optimizer, 2)
    steps(resumed, resumed_optimizer, 2)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("how", [{"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}])
def test_every_implementation_that_a_schedule_may_ask_for_makes_the_same_steps(kind: str, how: dict[str, bool]):
    usual, asked = small_network(), small_network()
    settings = {"type": kind, "lr": 0.05} | ({"momentum": 0.9} if kind == "SGD" else {})
    for network, more in ((usual, {}), (asked, how)):
        steps(network, build_optimizer(network, schedule_with(optimizer=settings | more)), 3)
    for name, value in asked.state_dict().items():
        torch.testing.assert_close(value, usual.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_state_of_another_optimizer_is_left_alone():
    network = small_network()
    stored = optimizer_state(build_optimizer(network, load_schedule("1x")), network)
    other = build_optimizer(network, schedule_with(optimizer={"type": "AdamW", "lr": 1e-3}))
    assert not load_optimizer_state(other, network, stored)
    steps(network, other, 1)


def test_state_of_another_network_is_refused():
    network = small_network()
    optimizer = build_optimizer(network, load_schedule("1x"))
    with pytest.raises(ValueError, match="0.weight"):
        load_optimizer_state(optimizer, nn.Linear(1, 1), optimizer_state(optimizer, network))


def test_a_float16_overflow_at_the_first_step_leaves_no_rubbish_in_the_momentum():
    network = small_network()
    optimizer = build_optimizer(network, load_schedule("1x"))
    precision = Precision("fp16", torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    precision.backward(network(torch.ones(1, 3, 8, 8)).sum() * float("inf"))
    precision.unscale(optimizer)
    precision.step(optimizer)
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], torch.zeros_like(parameter))
    assert precision.scaler.get_scale() == 2**15


def test_the_first_steps_are_those_of_torchs_plain_sgd():
    ours, theirs = small_network(), small_network()
    schedule = load_schedule("1x")
    optimizer = build_optimizer(ours, schedule)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    steps(ours, optimizer, 3)
    steps(theirs, plain, 3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_a_fixed_loss_scale_stays_and_a_dynamic_one_follows_its_arguments():
    fixed = Precision("fp16", torch.device("cpu"), 512.0)
    dynamic = Precision("fp16", torch.device("cpu"), {"init_scale": 256.0, "growth_interval": 1})
    for precision, expected in ((fixed, 512.0), (dynamic, 512.0)):
        network = small_network()
        optimizer = build_optimizer(network, load_schedule("1x"))
        precision.backward(network(torch.ones(1, 3, 8, 8)).sum())
        precision.unscale(optimizer)
        precision.step(optimizer)
        assert precision.scaler.get_scale() == expected


@pytest.mark.parametrize(("norm_type", "expected"), [(2.0, 5.0), (float("inf"), 4.0), (1.0, 7.0)])
def test_the_gradient_norm_is_over_all_gradients_and_clipping_brings_it_down(norm_type: float, expected: float):
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    assert gradient_norm(parameters, norm_type=norm_type, clip_to=None) == expected
    assert gradient_norm(parameters, norm_type=norm_type, clip_to=1.0) == expected
    assert gradient_norm(parameters, norm_type=norm_type, clip_to=None) == pytest.approx(1.0, rel=1e-4)
    assert gradient_norm(parameters, norm_type=norm_type, clip_to=9.0) == pytest.approx(1.0, rel=1e-4)
    assert parameters[0].grad.item() == pytest.approx(3.0 / expected, rel=1e-4)
