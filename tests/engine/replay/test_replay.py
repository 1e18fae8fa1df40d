"""A captured step run again: the first module whose output or gradient is not finite, and the image."""

from typing import Any

import pytest
import torch

from detection.engine.replay.replay import Finding, images_alone, remedy, replay
from tests.engine.replay.small_step import captured_step

CPU = torch.device("cpu")


def found(content: dict[str, Any], amp: str | None = None) -> Finding | None:
    return replay(content, content["batches"][0], CPU, content["amp"] if amp is None else amp)


@pytest.mark.parametrize(("amp", "norm"), [("off", "bn"), ("bf16", "frozen_bn")])
def test_where_all_is_finite_nothing_is_found(amp, norm):
    content = captured_step(amp, norm=norm)
    assert found(content) is None
    assert images_alone(content, content["batches"][0], CPU, amp) == []
    assert "try --device cpu" in remedy(content, None, None)


@pytest.mark.parametrize(
    ("weight", "module"),
    [
        ("backbone.layer2.0.conv1.weight", "backbone.layer2.0.conv1"),  # called as a function, its norm folded in
        ("fpn.lateral.1.weight", "fpn.lateral.1"),
        ("rpn.conv.weight", "rpn.conv"),
        ("roi_head.fc1.weight", "roi_head.fc1"),
    ],
)
def test_an_overflow_of_float16_is_found_in_its_layer_and_not_in_float32(weight, module):
    content = captured_step("fp16", norm="frozen_bn", frozen_stages=-1)
    content["model"][weight] *= 1e6
    finding, in_float32 = found(content), found(content, "off")
    assert finding is not None and (finding.phase, finding.module) == ("forward", module)
    assert in_float32 is None
    assert "--amp bf16" in remedy(content, finding, None)


def test_a_gradient_that_overflows_is_found_in_the_layer_that_makes_it():
    """Forward, fc2 multiplies zeros by its huge weights; backward, a gradient."""
    content = captured_step()
    state = content["model"]
    for name, value in (("fc1.weight", 0.0), ("fc1.bias", 0.0), ("fc2.bias", 1e-20)):
        state[f"roi_head.{name}"].fill_(value)
    state["roi_head.fc2.weight"] *= 1e30
    state["roi_head.classifier.weight"] *= 1e20
    finding = found(content)
    assert finding is not None and (finding.phase, finding.module) == ("backward", "roi_head.fc2")
    assert "--clip-grad" in remedy(content, finding, finding)


def test_a_loss_scale_that_is_too_large_is_found_backward_in_float16_alone():
    content = captured_step("fp16")
    content["loss_scale"] = 2.0**40
    finding = found(content)
    assert finding is not None and finding.phase == "backward" and finding.module.startswith("roi_head")
    assert found(content, "off") is None


def test_a_norm_that_overflows_is_found_where_the_gradients_are_largest():
    content = captured_step()
    content["model"]["roi_head.fc2.bias"].fill_(1e25)
    content["model"]["roi_head.classifier.weight"] *= 1e-25
    content["model"]["roi_head.regressor.weight"] *= 1e-25
    finding = found(content)
    assert finding is not None and "norm of all gradients" in finding.what
    assert finding.module in ("roi_head.classifier", "roi_head.regressor")


def test_the_image_of_an_infinite_box_is_found():
    content = captured_step()
    (batch,) = content["batches"]
    batch["boxes_xyxy"][1, 1, 2] = torch.inf
    finding = found(content)
    assert finding is not None and (finding.phase, finding.module) == ("batch", "boxes_xyxy")
    assert images_alone(content, batch, CPU, "off") == [(9, "nine.jpg")]
    assert "check_dataset.py" in remedy(content, finding, finding)


def test_pixels_that_become_infinite_are_found_before_the_first_layer():
    content = captured_step(pixel_std=(1e-3, 1e-3, 1e-3))
    content["batches"][0]["pixels"] = content["batches"][0]["pixels"].float()
    content["batches"][0]["pixels"][0, :, :4] = 1e37
    finding = found(content)
    assert finding is not None and finding.phase == "forward"
    assert finding.module == "the model itself" and "what it gives to backbone" in finding.what


def test_weights_that_are_not_finite_are_found_before_anything_is_run():
    content = captured_step()
    content["model"]["rpn.conv.weight"][0, 0, 0, 0] = torch.nan
    finding = found(content)
    assert finding is not None and (finding.phase, finding.module) == ("weights", "rpn.conv.weight")
    assert "--weights" in remedy(content, finding, finding)


def test_one_image_of_a_batch_is_found_alone():
    content = captured_step("fp16", norm="frozen_bn", frozen_stages=-1, pixel_mean=(124.0, 124.0, 124.0))
    (batch,) = content["batches"]
    batch["pixels"][1] = 124  # nothing is left after normalization
    content["model"]["backbone.conv1.weight"] *= 4e5
    finding = found(content)
    assert finding is not None and finding.module == "backbone.conv1"
    assert images_alone(content, batch, CPU, "fp16") == [(7, "seven.jpg")]
