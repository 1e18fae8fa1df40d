"""Kernels and bytes of compiled code, counted on an H100 that is not there."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from detection.models import model_config
from detection.models.anchors import AnchorGenerator
from detection.models.backbones.architectures import ARCHITECTURES
from detection.models.backbones.resnet import Bottleneck, Convolutions, make_norm
from detection.models.ops.backend import TRITON, implementation
from detection.models.rpn import select_proposals

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def test_compiled_proposals_are_few_launches_around_suppression(script):
    generated_code = script("gpu_checks.generated_code")
    kernels, calls = [], []
    code = generated_code.GeneratedCode(kernels.extend, lambda stage, operator, _: calls.append((stage, str(operator))))
    config, device = model_config("faster_rcnn_r50_fpn"), torch.device("cpu")
    with generated_code.pretended_h100(), FakeTensorMode(), implementation(**TRITON):
        grid = AnchorGenerator(config)((320, 320), [(side, side) for side in (80, 40, 20, 10, 5)], device)
        logits = torch.empty(2, len(grid.boxes_xyxy))
        select = code.compiled(select_proposals, "proposals")
        sizes = torch.empty(2, 2, dtype=torch.int64)
        proposals = select(config, logits, torch.empty(*logits.shape, 4), grid, sizes, training=True)
    assert proposals.boxes_xyxy.shape == (2, 1000, 4)
    assert calls == [("proposals", "detection.keep_best.default")] and 10 < len(kernels) <= 27


def test_a_compiled_block_makes_as_few_passes_over_its_maps_as_it_did(script):
    """Fails when bytes or launches grow: lower the numbers when they fall."""
    generated_code = script("gpu_checks.generated_code")
    kernels = []
    code = generated_code.GeneratedCode(kernels.extend)
    with generated_code.pretended_h100(), FakeTensorMode():
        convolutions = Convolutions(partial(make_norm, "frozen_bn", True, 1e-5))
        block = Bottleneck(256, ARCHITECTURES["resnet50"].stages[0], 1, convolutions)
        script("gpu_checks.fake_device").move(block, torch.device("cpu"))
        code.compile(block, "block")
        x = torch.empty(2, 256, 64, 64, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        out.float().sum().backward()
    assert len(code.source) == 2 and all("cc=90" in text and "@triton.jit" in text for text in code.source)
    for is_backward, most_passes, most_maps in ((False, 6, 18), (True, 7, 29)):
        of_pass = [each for each in kernels if each.is_backward == is_backward]
        passes = [each for each in of_pass if not each.is_product]
        num_bytes = sum(each.num_bytes for each in passes)
        # In maps of 64 channels. Folded weights are small change.
        found = len(passes), round(num_bytes / (2 * 2 * 64 * 64 * 64))
        assert len(of_pass) - len(passes) == 3 and passes
        assert found[0] <= most_passes and found[1] <= most_maps, (is_backward, found)
