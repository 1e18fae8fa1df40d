import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from detection.models.ops.box_losses import BOX_LOSSES, overlap_loss

PAIRS = [
    ((0, 0, 10, 10), (2, 3, 12, 9)),
    ((5, 5, 30, 20), (6, 4, 28, 22)),
    ((0, 0, 10, 10), (50, 60, 80, 70)),
    ((1, 1, 4, 40), (1, 1, 40, 4)),
    ((10, 10, 90, 30), (12, 11, 60, 33)),
    ((0, 0, 1, 1), (0, 0, 300, 200)),
]


def expected(kind, box, target):
    """The losses as the papers and MMDetection's documentation state them, in float64."""
    (x1, y1, x2, y2), (a1, b1, a2, b2) = box, target
    w, h, tw, th = x2 - x1, y2 - y1, a2 - a1, b2 - b1
    cx, cy = abs(x1 + x2 - a1 - a2) / 2, abs(y1 + y2 - b1 - b2) / 2
    if kind == "bounded_iou":
        parts = [1 - max(0.0, (tw - 2 * cx) / (tw + 2 * cx + 1e-3)), 1 - max(0.0, (th - 2 * cy) / (th + 2 * cy + 1e-3))]
        parts += [1 - min(tw / (w + 1e-3), w / (tw + 1e-3)), 1 - min(th / (h + 1e-3), h / (th + 1e-3))]
        return sum(part**2 / 0.4 if part < 0.2 else part - 0.1 for part in parts)
    both = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
    union = w * h + tw * th - both
    hull_w, hull_h = max(x2, a2) - min(x1, a1), max(y2, b2) - min(y1, b1)
    if kind == "iou":
        return -math.log(max(both / union, 1e-6))
    if kind == "giou":
        return 1 - both / union + (hull_w * hull_h - union) / (hull_w * hull_h)
    iou, apart = both / (union + 1e-6), (cx**2 + cy**2) / (hull_w**2 + hull_h**2 + 1e-6)
    if kind == "diou":
        return 1 - iou + apart
    v = 4 / math.pi**2 * (math.atan(tw / (th + 1e-6)) - math.atan(w / (h + 1e-6))) ** 2
    alpha = v / (1 - iou + v) if iou > 0.5 else 0
    return 1 - max(-1, min(1, iou - apart - alpha * v))


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_losses_are_those_of_the_formulas(kind):
    boxes, targets = torch.tensor(PAIRS, dtype=torch.float64).unbind(1)
    wanted = torch.tensor([expected(kind, *pair) for pair in PAIRS], dtype=torch.float64)
    torch.testing.assert_close(overlap_loss(kind, boxes, targets), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(overlap_loss(kind, boxes.float(), targets.float()), wanted.float(), rtol=1e-5, atol=1e-6)
    if kind == "giou":
        torch.testing.assert_close(generalized_box_iou_loss(boxes, targets), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_boxes_that_are_equal_or_empty_give_no_nan(kind):
    boxes = torch.tensor([[3.0, 4, 50, 60], [7, 7, 7, 7], [0, 0, 0, 0]], requires_grad=True)
    loss = overlap_loss(kind, boxes, torch.tensor([[3.0, 4, 50, 60], [5, 5, 9, 9], [0, 0, 0, 0]]))
    loss.sum().backward()
    assert loss.isfinite().all() and boxes.grad.isfinite().all()
    assert loss[0].item() == pytest.approx(0, abs=1e-5)
