import pytest
import torch

from detection.models.ops import matcher
from detection.models.ops.matcher import IGNORED, NEGATIVE, POSITIVE, MaxIoUAssigner
from tests.reference.parity import formula

RPN = MaxIoUAssigner(0.7, 0.3, 0.3)
ROI = MaxIoUAssigner(0.5, 0.5)


def assign(assigner, gt, candidates, num_padding=0, candidate_valid=None):
    """Both results for one image, with invalid boxes behind the real ones."""
    padded = torch.cat((gt, torch.tensor([[0.0, 0, 1e4, 1e4]]).expand(num_padding, 4)))
    valid = torch.arange(len(padded)) < len(gt)
    kind, index = assigner(padded[None], valid[None], candidates[None], candidate_valid)
    return kind[0], index[0]


@pytest.mark.parametrize("block", [1, 10**9])
@pytest.mark.parametrize(("assigner", "name"), [(RPN, "assigner_rpn.npz"), (ROI, "assigner_rcnn.npz")])
def test_assignment_equals_that_of_mmdetection(monkeypatch, assigner, name, block):
    monkeypatch.setattr(matcher, "BLOCK_ON_CPU", block)
    case = formula.load_arrays(name)
    kind, index = assign(assigner, case["gt"], case["boxes"], num_padding=3)
    expected = case["gt_inds"].long()  # -1 ignored, 0 negative, k for box k - 1
    assert torch.equal(kind, expected.clamp(max=1))
    assert torch.equal(index[kind == POSITIVE] + 1, expected[expected > 0])


def test_without_boxes_every_candidate_is_negative():
    kind, _ = assign(RPN, torch.zeros(0, 4), torch.rand(50, 4), num_padding=2)
    assert (kind == NEGATIVE).all()


def test_invalid_candidates_are_ignored_and_cannot_be_a_boxs_best():
    box = torch.tensor([[0.0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]])
    kind, _ = assign(RPN, box, candidates, candidate_valid=torch.tensor([[False, True, True]]))
    assert kind.tolist() == [IGNORED, POSITIVE, NEGATIVE]


def test_a_low_quality_match_goes_to_the_last_box_or_to_the_best_one():
    # The candidate is the best of both boxes, and overlaps the first one more.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6]])
    candidates = torch.tensor([[0.0, 0, 10, 9]])
    own = MaxIoUAssigner(0.95, 0.3, 0.3, low_quality_takes_own_box=True)
    best = MaxIoUAssigner(0.95, 0.3, 0.3, low_quality_takes_own_box=False)
    assert [x.item() for x in assign(own, boxes, candidates)] == [POSITIVE, 1]
    assert [x.item() for x in assign(best, boxes, candidates)] == [POSITIVE, 0]


def test_low_quality_matches_need_their_least_iou():
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    candidates = torch.tensor([[0.0, 0, 10, 2.5]])
    assert assign(RPN, boxes, candidates)[0].item() == NEGATIVE
    assert assign(MaxIoUAssigner(0.7, 0.3, 0.2), boxes, candidates)[0].item() == POSITIVE


def test_assignment_equals_torchvisions_matcher_with_its_settings():
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 24, (300, 2), generator=generator).float()
    candidates = torch.cat((corners, corners + torch.randint(4, 16, (300, 2), generator=generator)), dim=1)
    gt = candidates[:8] + torch.tensor([0.0, 0, 2, 1])
    matches = Matcher(0.7, 0.3, allow_low_quality_matches=True)(box_iou(gt, candidates))
    kind, index = assign(MaxIoUAssigner(0.7, 0.3, 0.0, low_quality_takes_own_box=False), gt, candidates)
    assert torch.equal(kind == POSITIVE, matches >= 0)
    assert torch.equal(kind == NEGATIVE, matches == -1)
    assert torch.equal(index[kind == POSITIVE], matches[matches >= 0])
