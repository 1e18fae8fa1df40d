"""Views of an image: boxes mapped back, and fused as weighted box fusion says."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from detection.inference.tta import View, fuse_views, make_views, mirror, predict_views


def found(*rows):
    """Detections from (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return {"boxes_xyxy": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def rows_of(result):
    return [
        (*box, pytest.approx(score), label)
        for box, score, label in zip(
            result["boxes_xyxy"].tolist(), result["scores"].tolist(), result["labels"].tolist(), strict=True
        )
    ]


def test_views_are_every_scale_as_it_is_and_mirrored():
    assert make_views((1.0, 2.0), flip=True) == (View(1, False), View(1, True), View(2, False), View(2, True))
    assert make_views((1.0, 2.0), flip=False) == (View(1, False), View(2, False))


def test_a_mirrored_box_mirrored_again_is_the_box():
    boxes = torch.tensor([[0.0, 1.0, 5.0, 7.0], [3.25, 0.0, 20.0, 4.0]])
    assert mirror(boxes, 20).tolist() == [[15, 1, 20, 7], [0, 0, 16.75, 4]]
    assert torch.equal(mirror(mirror(boxes, 20), 20), boxes)


def test_boxes_of_an_object_become_their_mean_weighted_by_score():
    one = found((0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.4, 1))
    other = found((0, 0, 12, 10, 0.3, 0))
    result = rows_of(fuse_views([one, other], most=100))
    # (0.9 * 10 + 0.3 * 12) / 1.2 = 10.5; (0.9 + 0.3) / 2; seen in one view of two: 0.4 / 2.
    assert result == [(0, 0, pytest.approx(10.5), 10, 0.6, 0), (50, 50, 60, 60, pytest.approx(0.2), 1)]
    assert rows_of(fuse_views([one, other], most=1)) == result[:1]


def test_masks_of_an_object_become_their_mean_weighted_by_score():
    views = [found((0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.4, 1)), found((0, 0, 12, 10, 0.3, 0))]
    masks = torch.rand(3, 28, 28)
    views[0]["mask_probabilities"], views[1]["mask_probabilities"] = masks[:2], masks[2:]
    fused = fuse_views(views, most=100)["mask_probabilities"]
    torch.testing.assert_close(fused, torch.stack(((0.9 * masks[0] + 0.3 * masks[2]) / 1.2, masks[1])))


def test_classes_and_distant_boxes_stay_apart():
    one = found((0, 0, 10, 10, 0.9, 0))
    other_class, distant = found((0, 0, 10, 10, 0.8, 1)), found((4, 0, 14, 10, 0.8, 0))
    for other in (other_class, distant):
        assert len(fuse_views([one, other], most=100)["scores"]) == 2


def test_a_view_that_finds_two_does_not_count_twice():
    # Both lie near the first view's box, so that the group has three members of two views.
    one = found((0, 0, 10, 10, 0.9, 0))
    other = found((0, 0, 10, 10, 0.6, 0), (0, 0, 10, 9, 0.3, 0))
    assert fuse_views([one, other], most=100)["scores"].tolist() == pytest.approx([0.6])


def test_one_view_is_left_as_it_is_and_nothing_stays_nothing():
    one = found((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 10.5, 0.8, 0))
    assert all(torch.equal(tensor, one[key]) for key, tensor in fuse_views([one], most=1).items())
    assert len(fuse_views([found(), found()], most=100)["scores"]) == 0


@dataclass(frozen=True)
class BrightestColumn:
    """A detector that finds the brightest column of an image; asked: the sizes that it was asked for."""

    min_size: int
    max_size: int
    asked: list = field(default_factory=list)
    model: ClassVar = SimpleNamespace(config=SimpleNamespace(detections_per_image=100))

    def predict(self, images, batch_size):
        self.asked.append((self.min_size, self.max_size))
        columns = [int(image.sum(axis=(0, 2)).argmax()) for image in images]
        return [found((column, 0, column + 1, len(p), 0.5, 0)) for column, p in zip(columns, images, strict=True)]


def test_each_view_has_its_size_and_finds_the_same_place():
    detector = BrightestColumn(80, 133)
    image = np.zeros((6, 30, 3), np.uint8)
    image[:, 4] = 200
    (result,) = predict_views(detector, [image], make_views((0.5, 1.0), flip=True), batch_size=1)
    assert rows_of(result) == [(4, 0, 5, 6, 0.5, 0)]
    assert detector.asked == [(40, 66), (40, 66), (80, 133), (80, 133)]
