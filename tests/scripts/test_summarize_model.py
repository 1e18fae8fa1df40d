"""scripts/summarize_model.py: its figures against counts by hand."""

import pytest
import torch

from detection.models import build_model
from detection.models.summary import summarize_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"fpn_channels": 16, "roi_hidden_channels": 32, "rpn_proposals_test": 40}
    return build_model("faster_rcnn_r18_fpn", num_classes=3, **small)


def test_parameters_are_those_of_the_model_and_the_parts_are_all_of_it(model):
    parts = {part.name: part for part in summarize_model(model, 64, 64)}
    assert list(parts) == ["backbone", "fpn", "rpn", "roi_head", "rest"]
    parameters = list(model.parameters())
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in parameters)
    assert sum(part.trained for part in parts.values()) == sum(p.numel() for p in parameters if p.requires_grad)
    assert parts["roi_head"].parameters == (16 * 49 + 1) * 32 + 33 * 32 + 33 * 4 + 33 * 12
    frozen = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    assert parts["backbone"].parameters - parts["backbone"].trained == frozen > 0


def test_operations_are_twice_the_multiplications_of_the_layers(model):
    parts = {part.name: part for part in summarize_model(model, 64, 64)}
    cells = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1
    assert parts["rpn"].flops == 2 * cells * (16 * 16 * 9 + 16 * 3 + 16 * 12)
    assert parts["roi_head"].flops == 2 * 40 * (16 * 49 * 32 + 32 * 32 + 32 * 4 + 32 * 12)
    fpn_cells = cells - 1
    laterals = 2 * 16 * (256 * 64 + 64 * 128 + 16 * 256 + 4 * 512)
    assert parts["fpn"].flops == laterals + 2 * fpn_cells * 16 * 16 * 9


def test_a_mask_head_is_a_part_of_its_own_with_its_layers_at_each_detection():
    small = {"fpn_channels": 16, "roi_hidden_channels": 32, "rpn_proposals_test": 40, "mask_channels": 8}
    model = build_model("mask_rcnn_r18_fpn", num_classes=3, score_threshold=0.0, detections_per_image=20, **small)
    part = {part.name: part for part in summarize_model(model, 64, 64)}["mask_head"]
    assert part.parameters == (16 * 9 + 1) * 8 + 3 * (8 * 9 + 1) * 8 + 8 * 8 * 4 + 8 + 3 * 8 + 3
    convolutions = 14 * 14 * (16 * 9 * 8 + 3 * 8 * 9 * 8 + 8 * 8 * 4)
    # The logits of the own class alone, whose weights a product picks.
    assert part.flops == 2 * 20 * (convolutions + 28 * 28 * 8 + 3 * 8)
    # 128 RoIs at most; outputs of four convolutions and the upsampling, and more.
    assert part.saved_bytes > 4 * 128 * 8 * (4 * 14 * 14 + 28 * 28)


@pytest.mark.slow
def test_more_pixels_keep_more_and_frozen_stages_keep_nothing(model):
    small, large = ({p.name: p.saved_bytes for p in summarize_model(model, side, side)} for side in (64, 128))
    assert large["backbone"] == 4 * small["backbone"] > 0
    # The pyramid's output convolutions keep their inputs, 16 channels at the sizes of P2 to P5 in float32, and the
    # pooling to P6 its input and an int64 index for each output.
    assert small["fpn"] == 4 * 16 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2) + 4 * 16 * (2 * 2) + 8 * 16
    frozen = build_model("faster_rcnn_r18_fpn", 3, fpn_channels=16, roi_hidden_channels=32, frozen_stages=4)
    parts = {part.name: part for part in summarize_model(frozen, 64, 64)}
    assert parts["backbone"].saved_bytes == parts["backbone"].folded_bytes == 0 == parts["backbone"].trained


def test_neither_the_model_nor_the_random_state_changes(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mode, state = model.training, torch.get_rng_state()
    summarize_model(model, 64, 64)
    assert model.training == mode and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_table_ends_with_totals_and_an_unknown_model_is_one_line(program, capsys):
    sizes = ["--height", "64", "--width", "64", "--num-classes", "2"]
    assert program("summarize_model", "--model", "faster_rcnn_r18_fpn", *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[0] == "part" and len({len(line) for line in lines[1:8]}) == 1
    columns = [[float(cell.replace(",", "")) for cell in line.split()[1:]] for line in lines[2:8]]
    assert lines[7].startswith("total")
    assert columns[-1][:2] == [sum(row[0] for row in columns[:-1]), sum(row[1] for row in columns[:-1])]
    assert program("summarize_model", "--model", "faster_rcnn_r19_fpn") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "faster_rcnn_r18_fpn" in error
