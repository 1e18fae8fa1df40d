import pytest
import torch
import torchvision

from detection.models.ops.backend import implementation
from detection.models.ops.roi_align import RoIAlign, roi_levels
from tests.reference.parity import formula

STRIDES = (4, 8, 16, 32)


@pytest.fixture(params=["sparse_matrix", "operator"])
def each_implementation(request):
    """The CPU's, and that of other devices."""
    with implementation(roi_align=request.param):
        yield


@pytest.mark.usefixtures("each_implementation")
def test_pooling_and_its_gradient_equal_those_of_mmcv():
    case = formula.load_arrays("roi_align.npz")
    feature = case["feat"].requires_grad_()
    image, boxes = case["rois"][:, 0].long(), case["rois"][:, 1:]
    boxes_of_both = boxes.expand(2, -1, -1).contiguous()
    levels = torch.zeros(boxes_of_both.shape[:2], dtype=torch.int64)
    pooled = RoIAlign(7, 0, True, (8,))([feature], boxes_of_both, levels)
    pooled = pooled.reshape(2, len(boxes), 6, 7, 7)[image, torch.arange(len(boxes))]
    torch.testing.assert_close(pooled, case["out"], rtol=1e-5, atol=1e-6)
    (pooled * case["grad_weight"]).sum().backward()
    torch.testing.assert_close(feature.grad, case["grad_feat"], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def pyramid():
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(2, 3, 256 // s, 320 // s, generator=generator) for s in STRIDES]
    maps.append(torch.randn(2, 3, 4, 5, generator=generator))
    centers = torch.rand(2, 60, 2, generator=generator) * torch.tensor([320.0, 256.0])
    sides = torch.exp(torch.rand(2, 60, 2, generator=generator) * 6)
    boxes = torch.cat((centers - sides / 2, centers + sides / 2), dim=2)
    boxes[..., 0::2].clamp_(0, 320)
    boxes[..., 1::2].clamp_(0, 256)
    boxes[0, 0] = 0.0  # as empty slots are
    boxes[0, 1] = torch.tensor([0.0, 100, 320, 101])  # 46 samples in each bin's row, on the finest map
    boxes[0, 2] = torch.tensor([0.0, 0, 320, 256])
    boxes[1, 3] = torch.tensor([0.0, 0, 800, 640])  # beyond the map: its samples there count as zero
    return maps, boxes


@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize("by_stride", [False, True])
@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (2, False), (2, True), (3, True)])
def test_each_roi_is_pooled_from_its_level_as_torchvisions_operator_does(pyramid, ratio, aligned, by_stride):
    maps, boxes = pyramid
    maps = [each.clone().requires_grad_() for each in maps]
    levels = roi_levels(boxes, finest_scale=56 if by_stride else 1e9, eps_inside_log=True)
    assert levels.unique().tolist() == ([0, 1, 2, 3] if by_stride else [0])
    pooled = RoIAlign(7, ratio, aligned, STRIDES)(maps, boxes, levels).reshape(2, -1, 3, 7, 7)
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad((pooled * weights).sum(), maps, allow_unused=True)

    expected_maps = [each.detach().clone().requires_grad_() for each in maps]
    expected = torch.zeros_like(pooled)
    for level in range(4):
        for image in range(2):
            mine = levels[image] == level
            expected[image, mine] = torchvision.ops.roi_align(
                expected_maps[level][image : image + 1],
                [boxes[image, mine]],
                7,
                1 / STRIDES[level],
                ratio,
                aligned,
            )
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), expected_maps, allow_unused=True)
    for gradient, reference in zip(gradients[:4], expected_gradients[:4], strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_half_precision_maps_stay_close_to_single_precision(pyramid):
    maps, boxes = pyramid
    levels = roi_levels(boxes, finest_scale=56, eps_inside_log=True)
    roi_align = RoIAlign(7, 0, True, STRIDES)
    single = roi_align(maps, boxes, levels)
    half = roi_align([each.bfloat16() for each in maps], boxes, levels)
    assert half.dtype == torch.bfloat16
    assert (half.float() - single).norm() < 0.004 * single.norm()


def test_levels_equal_those_of_mmdetection():
    case = formula.load_json("roi_levels.json")
    boxes = torch.tensor(case["rois"])[:, 1:]
    levels = roi_levels(boxes, finest_scale=case["finest_scale"], eps_inside_log=True)
    assert levels.tolist() == case["level"]


def test_levels_equal_those_of_torchvision():
    from torchvision.ops.poolers import LevelMapper

    sides = torch.cat((torch.logspace(0, 3.2, 500), torch.tensor([0.0, 56, 111.9999, 112, 223.9999, 224, 448])))
    boxes = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), dim=1)
    assert torch.equal(roi_levels(boxes, finest_scale=56, eps_inside_log=False), LevelMapper(2, 5)([boxes]).long())


@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize(("ratio", "aligned"), [(0, True), (0, False), (2, False)])
def test_a_box_that_is_infinite_or_nan_gives_zeros_and_changes_no_other(pyramid, ratio, aligned):
    maps, boxes = pyramid
    maps, boxes = [each.clone().requires_grad_() for each in maps], boxes[:, :9].clone()
    inf, nan = torch.inf, torch.nan
    bad = torch.tensor([[0.0, 0, inf, 50], [-inf, -inf, inf, inf], [nan] * 4, [9.0, nan, 50, 60], [inf] * 4])
    boxes[1, 4:] = 0.0
    pool = RoIAlign(7, ratio, aligned, STRIDES)
    levels = roi_levels(boxes, finest_scale=56, eps_inside_log=True)
    expected = pool(maps, boxes, levels).unflatten(0, (2, 9))
    boxes[1, 4:] = bad
    levels = roi_levels(boxes, finest_scale=56, eps_inside_log=True)
    assert levels.min() >= 0 and levels.max() <= 3
    pooled = pool(maps, boxes, levels).unflatten(0, (2, 9))
    assert not pooled[1, 4:].any()
    assert torch.equal(pooled[0], expected[0]) and torch.equal(pooled[1, :4], expected[1, :4])
    gradients = torch.autograd.grad(pooled.sum(), maps, allow_unused=True)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
