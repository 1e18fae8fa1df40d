import pytest
import torch
import torchvision

from detection.models.ops import nms
from detection.models.ops.backend import implementation
from tests.reference.parity import formula


@pytest.fixture(params=["per_level", "threads", "rounds", "too few rounds", "group by group"])
def suppress(request, monkeypatch):
    """What the CPU does, and what other devices do."""
    if request.param == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        monkeypatch.setattr(nms, "WORTH_THREADS", 0)
    if request.param == "too few rounds":
        monkeypatch.setattr(nms, "ROUNDS", 1)
    if request.param == "group by group":
        monkeypatch.setattr(nms, "PAIRS_AT_ONCE", 1)
    with implementation(nms="per_level" if request.param in ("per_level", "threads") else "rounds"):
        yield nms.suppress


def test_suppression_equals_that_of_mmcv(suppress):
    case = formula.load_arrays("nms.npz")
    boxes, scores = case["boxes"][None], case["scores"][None]
    keep = suppress(boxes, scores, torch.ones(1, 300, dtype=torch.bool), [300], 0.7)
    assert torch.equal(keep[0].nonzero()[:, 0], case["keep_agnostic_070"].sort().values)


def test_classes_as_levels_are_suppressed_apart_as_in_mmcv(suppress):
    case = formula.load_arrays("nms.npz")
    order = case["classes"].argsort(stable=True)
    per_class = case["classes"].bincount().tolist()
    keep = suppress(
        case["boxes"][order][None],
        case["scores"][order][None],
        torch.ones(1, 300, dtype=torch.bool),
        per_class,
        0.5,
    )
    assert torch.equal(order[keep[0]].sort().values, case["keep_per_class_050"].sort().values)


def test_images_and_levels_do_not_suppress_each_other(suppress):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(3, 200, 2, generator=generator) * 1000
    boxes = torch.cat((corners, corners + 100 + torch.rand(3, 200, 2, generator=generator) * 300), dim=2)
    scores = torch.randn(3, 200, generator=generator)
    keep = suppress(boxes, scores, torch.ones(3, 200, dtype=torch.bool), [120, 80], 0.5)
    for image in range(3):
        for start, stop in ((0, 120), (120, 200)):
            kept = torchvision.ops.nms(boxes[image, start:stop], scores[image, start:stop], 0.5)
            assert torch.equal(keep[image, start:stop].nonzero()[:, 0], kept.sort().values)
    assert 0 < keep.sum() < 600


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7])
def test_rounds_give_what_the_operator_gives(threshold):
    generator = torch.Generator().manual_seed(3)
    # Boxes at whole pixels among few places: many overlaps, many equal ones, many at a threshold exactly.
    corners = torch.randint(0, 30, (4, 900, 2), generator=generator)
    sides = torch.randint(0, 12, (4, 900, 2), generator=generator)
    boxes = torch.cat((corners, corners + sides), dim=2).float()
    ranking = torch.randint(0, 200, (4, 900), generator=generator).float()
    ranking[:, ::7] = -torch.inf
    ranking[0, 3] = torch.nan
    per_level = [500, 300, 100]
    expected = nms.level_by_level(boxes, ranking, per_level, threshold) & (ranking != -torch.inf)
    assert torch.equal(nms.in_rounds(boxes, ranking, per_level, threshold), expected)
    assert 0 < expected.sum() < (ranking > -torch.inf).sum() and expected[0, 3]


def test_a_chain_longer_than_the_rounds_is_followed_to_its_end(monkeypatch):
    monkeypatch.setattr(nms, "ROUNDS", 3)
    # Each box overlaps the next by more than half, and no other by as much: every second one is kept.
    left = torch.arange(101.0) * 30
    boxes = torch.stack((left, torch.zeros(101), left + 100, torch.ones(101)), dim=1)[None]
    keep = nms.in_rounds(boxes, -torch.arange(101.0)[None], [101], 0.5)
    assert keep[0].nonzero()[:, 0].tolist() == list(range(0, 101, 2))


def test_an_invalid_box_is_neither_kept_nor_suppresses(suppress):
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 50, 60]]])
    scores = torch.tensor([[5.0, 3.0, 2.0, 1.0]])
    valid = torch.tensor([[False, True, True, False]])
    assert suppress(boxes, scores, valid, [4], 0.7).tolist() == [[False, True, False, False]]
    assert not suppress(boxes, scores, torch.zeros_like(valid), [4], 0.7).any()


def test_an_iou_equal_to_the_threshold_does_not_suppress(suppress):
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 4]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert suppress(boxes, torch.tensor([[2.0, 1.0]]), valid, [2], 0.5).all()


def test_the_operator_agrees_with_its_shape_rule():
    boxes = torch.rand(2, 7, 4)
    boxes[..., 2:] += boxes[..., :2]
    arguments = (boxes, torch.rand(2, 7), torch.ones(2, 7, dtype=torch.bool), [3, 4], 0.7)
    torch.library.opcheck(nms.suppress_within_levels, arguments, test_utils=("test_schema", "test_faketensor"))
