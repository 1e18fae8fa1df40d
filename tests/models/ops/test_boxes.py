import pytest
import torch

from detection.models.ops.boxes import clip_boxes, decode_boxes, encode_boxes, pairwise_iou, sides_above
from tests.reference.parity import formula


@pytest.fixture(scope="module")
def coder():
    return formula.load_json("bbox_coder.json")


@pytest.mark.parametrize("stage", ["rpn", "rcnn"])
def test_encoding_equals_that_of_mmdetection(coder, stage):
    encoded = encode_boxes(torch.tensor(coder["gt"]), torch.tensor(coder["proposals"]), coder[stage]["stds"])
    torch.testing.assert_close(encoded, torch.tensor(coder[stage]["encoded"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", ["rpn", "rcnn"])
def test_decoding_and_clipping_equal_those_of_mmdetection(coder, stage):
    expected = coder[stage]
    proposals, deltas = torch.tensor(coder["proposals"]), torch.tensor(coder["deltas"])
    decoded = decode_boxes(deltas, proposals, expected["stds"], clip_shrinking=True)
    torch.testing.assert_close(decoded, torch.tensor(expected["decoded"]), rtol=1e-5, atol=1e-3)
    clipped = clip_boxes(decoded[None], torch.tensor([[480, 640]]))[0]
    torch.testing.assert_close(clipped, torch.tensor(expected["decoded_clipped"]), rtol=1e-5, atol=1e-3)


def test_shrinking_is_limited_on_request_only():
    reference = torch.tensor([0.0, 0, 1000, 1000])
    deltas = torch.tensor([0.0, 0, -20, 20])
    limited = decode_boxes(deltas, reference, (1, 1, 1, 1), clip_shrinking=True)
    free = decode_boxes(deltas, reference, (1, 1, 1, 1), clip_shrinking=False)
    assert (limited[2] - limited[0]).item() == pytest.approx(16, rel=1e-4)
    assert (free[2] - free[0]).item() == pytest.approx(0, abs=1e-3)
    assert limited[3] - limited[1] == free[3] - free[1]


def test_iou_of_touching_empty_and_equal_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [5, 5, 5, 5], [0, 0, 10, 10], [0, 0, 10, 5]])
    iou = pairwise_iou(boxes, boxes)
    assert iou[0].tolist() == [1.0, 0.0, 0.0, 1.0, 0.5]
    assert iou[2].tolist() == [0.0] * 5
    assert torch.equal(iou, iou.T)


def test_a_side_must_exceed_the_minimum():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 2], [0, 0, 2, 2]])
    assert sides_above(boxes, 1.0).tolist() == [False, False, True]
