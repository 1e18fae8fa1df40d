import math

import pytest
import torch

from detection.models.anchors import AnchorGenerator, anchors_inside_padding
from detection.models.config import model_config
from tests.reference.parity import formula

CPU = torch.device("cpu")


def sizes_of_maps(height, width):
    sizes = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)]
    return [*sizes, (-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2))]


@pytest.fixture(scope="module")
def reference():
    return formula.load_json("anchors.json")


@pytest.fixture(scope="module")
def grid(reference):
    height, width = reference["input_hw"]
    generator = AnchorGenerator(model_config("faster_rcnn_r50_fpn"))
    return generator((height, width), sizes_of_maps(height, width), CPU)


def test_anchors_equal_those_of_mmdetection(reference, grid):
    assert len(grid.boxes_xyxy) == reference["total"]
    for expected, boxes in zip(reference["levels"], grid.boxes_xyxy.split(grid.per_level), strict=True):
        assert len(boxes) == expected["num_anchors"]
        assert torch.equal(boxes[:6], torch.tensor(expected["first6"]))
        assert torch.equal(boxes[-3:], torch.tensor(expected["last3"]))
        index = torch.tensor(expected["sample_index"])
        assert torch.equal(boxes[index], torch.tensor(expected["sample_boxes"]))


def test_anchors_take_part_within_the_images_own_padding_only(reference, grid):
    example = reference["valid_flags_example"]
    height, width = example["pad_shape_hw"]
    inside = anchors_inside_padding(grid, torch.tensor([[height - 31, width - 5], [800, 1088]]))
    counts = [level[0].sum().item() for level in inside.split(grid.per_level, dim=1)]
    assert counts == example["valid_per_level"]
    assert inside[1].all()


def test_torchvisions_anchors_have_whole_corners_and_a_stride_taken_from_the_grid():
    from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionGenerator
    from torchvision.models.detection.image_list import ImageList

    size = (160, 224)  # the coarsest map has 3 rows and 4 columns, so its strides are 53 and 56 instead of 64
    maps = sizes_of_maps(*size)
    grid = AnchorGenerator(model_config("fasterrcnn_resnet50_fpn"))(size, maps, CPU)
    theirs = TorchvisionGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.zeros(1, 3, *size), [size])
    assert torch.equal(grid.boxes_xyxy, theirs(images, [torch.zeros(1, 1, *each) for each in maps])[0])


def test_a_grid_is_made_once_and_the_number_of_kept_grids_is_bounded():
    generator = AnchorGenerator(model_config("faster_rcnn_r50_fpn"))
    first = generator((32, 32), sizes_of_maps(32, 32), CPU)
    assert generator((32, 32), sizes_of_maps(32, 32), CPU) is first
    for width in range(64, 64 + 32 * 70, 32):
        generator((32, width), sizes_of_maps(32, width), CPU)
    assert len(generator._grids) < 70
    assert generator((32, 32), sizes_of_maps(32, 32), CPU) is not first


def test_a_grid_made_in_inference_mode_serves_training():
    generator = AnchorGenerator(model_config("faster_rcnn_r50_fpn"))
    with torch.inference_mode():
        grid = generator((32, 32), sizes_of_maps(32, 32), CPU)
    assert not grid.boxes_xyxy.is_inference()


def test_a_single_map_has_every_size_at_each_cell_by_ratio_and_then_size():
    config = model_config(
        "faster_rcnn_r50_fpn", features="dc5", anchor_strides=(16,), anchor_sizes=(32, 64), anchor_ratios=(0.5, 2)
    )
    grid = AnchorGenerator(config)((32, 48), [(2, 3)], torch.device("cpu"))
    assert grid.per_level == (2 * 3 * 4,) and config.anchors_per_cell == 4
    expected = []
    for ratio in (0.5, 2):
        for size in (32, 64):
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            expected.append([16 - width / 2, -height / 2, 16 + width / 2, height / 2])
    torch.testing.assert_close(grid.boxes_xyxy[4:8], torch.tensor(expected))
