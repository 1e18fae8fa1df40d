"""What mask heads learn, and masks in whole images, against MMDetection's figures and torchvision's operator."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision

from detection.models import build_model, model_config, paste_masks
from detection.models.mask_head import MaskHead, MaskRois, mask_loss, mask_rois, mask_targets
from detection.models.ops.backend import implementation
from detection.models.roi_head import RoISample
from detection.models.structures import batch_images, batch_targets
from tests.reference.parity import formula
from tests.reference.parity.formula import MASK

CPU = torch.device("cpu")
CONFIG = model_config("mask_rcnn_r18_fpn", 80)


def unpacked(packed, *shape):
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=shape[-1] * shape[-2])).bool().view(-1, *shape)


def packed_masks(masks):
    """Of one image."""
    target = {"boxes_xyxy": torch.ones(len(masks), 4), "labels": torch.zeros(len(masks), dtype=torch.int64)}
    return batch_targets([{**target, "masks": masks}], 80, CPU).masks


def positives(boxes, gt_index):
    ones = torch.ones(1, len(boxes), dtype=torch.bool)
    return MaskRois(boxes[None], ones, torch.zeros(1, len(boxes), dtype=torch.int64), gt_index.long()[None])


@pytest.mark.parametrize("blocks", ["trimmed", "blocks"])
def test_covered_shares_equal_mmdetections(blocks):
    case = formula.load_arrays("mask_target.npz", MASK)
    masks = packed_masks(unpacked(case["masks_packed"], 282, 303))
    soft = dataclasses.replace(CONFIG, mask_soft_targets=True)
    with implementation(mask_crops=blocks):
        found = mask_targets(soft, positives(case["boxes"], case["inds"]), masks, (282, 303))
    torch.testing.assert_close(found, case["soft_targets"], rtol=0, atol=1e-5)


def test_targets_of_a_training_step_equal_mmdetections():
    case = formula.load_arrays("mask_train_f32.npz", MASK)
    expected = unpacked(case["mask_targets_packed"], 28, 28)
    truth = batch_targets(formula.targets(MASK), 80, CPU)
    found = []
    for image in range(2):
        mine = case["pos_rois"][:, 0] == image
        masks = type(truth.masks)(truth.masks.bits, *(each[image : image + 1] for each in truth.masks[1:]))
        rois = positives(case["pos_rois"][mine, 1:], case["pos_gt"][mine])
        found.append(mask_targets(CONFIG, rois, masks, (352, 320)).bool())
    differing = (torch.cat(found) != expected).nonzero().tolist()
    # 0.5 in exact arithmetic, on which rounding decides.
    assert all(each in ([59, 10, 18], [59, 24, 24]) for each in differing)


@pytest.mark.parametrize("aligned", [True, False])
def test_covered_shares_equal_torchvisions_operator_on_whole_bitmaps(aligned):
    generator = torch.Generator().manual_seed(2)
    height, width = 96, 64
    masks = torch.zeros(6, height, width, dtype=torch.bool)
    masks[0, 20:60, 10:50] = torch.rand(40, 40, generator=generator) < 0.5
    masks[1] = torch.rand(height, width, generator=generator) < 0.7
    masks[2, 95, 63] = True
    masks[3, 5:90, 7] = True  # masks[4] is empty
    masks[5, :2] = True
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat((corners, corners + torch.rand(60, 2, generator=generator) * 70), dim=1)
    boxes[0] = torch.tensor([0.0, 0, width, height])
    boxes[1] = torch.tensor([5.0, 5, 5, 40])
    boxes = torch.minimum(boxes, torch.tensor([width, height] * 2))
    gt_index = torch.arange(60) % 6
    expected = torchvision.ops.roi_align(
        masks[:, None].float(), torch.cat((gt_index[:, None].float(), boxes), dim=1), 28, 1.0, aligned=aligned
    )[:, 0]
    config = dataclasses.replace(CONFIG, mask_soft_targets=True, roi_aligned=aligned)
    found = mask_targets(config, positives(boxes, gt_index), packed_masks(masks), (height, width))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_pasted_masks_equal_mmdetections():
    case = formula.load_arrays("mask_paste.npz", MASK)
    expected = unpacked(case["pasted_masks_packed"], 90, 120)
    lower, upper = (paste_masks(case["probs"], case["boxes"], (90, 120), threshold) for threshold in (0.499, 0.501))
    has_area = case["pixels_differing_from_full_paste"] == 0  # MMDetection itself has two answers for the other
    assert not (upper & ~expected)[has_area].any() and not (expected & ~lower)[has_area].any()
    assert has_area.sum() == 13 and not paste_masks(case["probs"], case["boxes"], (90, 120))[~has_area].any()
    assert (lower != upper).sum() < 0.01 * expected.sum()


def test_no_boxes_and_boxes_that_are_not_finite_have_empty_masks():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 7)).shape == (0, 5, 7)
    boxes = torch.tensor([[0.0, 0, torch.inf, 5], [torch.nan] * 4, [3.0, 2, 1, 5]])
    assert not paste_masks(torch.ones(3, 28, 28), boxes, (5, 7)).any()


def sampled(positive):
    slots = positive.shape[1]
    boxes = torch.arange(positive.numel() * 4.0).view(*positive.shape, 4)
    labels = torch.where(positive, torch.arange(slots), 80)
    return RoISample(boxes, positive, positive, labels, boxes, labels, boxes, None)


def test_positives_have_as_many_slots_as_can_be_or_as_many_as_there_are():
    positive = torch.tensor([[False, True, False, True, False, False], [False] * 6])
    for trimmed, samples, slots in ((False, 8, 2), (False, None, 6), (True, 8, 2), (True, None, 2)):
        config = dataclasses.replace(CONFIG, roi_samples_per_image=samples)
        rois = mask_rois(config, sampled(positive), trimmed=trimmed)
        assert rois.positive.shape == (2, slots)
        assert rois.positive.sum(1).tolist() == [2, 0]
        assert rois.labels[0, :2].tolist() == [1, 3] and rois.labels[1, 0] == 80
        assert not rois.boxes_xyxy[1].any()
    assert mask_rois(CONFIG, sampled(positive[1:]), trimmed=True).positive.shape == (1, 1)


def test_the_loss_is_the_mean_over_positives_and_zero_without():
    logits, targets = torch.randn(4, 28, 28), (torch.rand(4, 28, 28) < 0.5).float()
    rois = positives(torch.ones(4, 4), torch.zeros(4))
    some = rois._replace(positive=torch.tensor([[True, False, True, False]]))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[::2], targets[::2])
    assert mask_loss(logits, targets, some) == pytest.approx(expected.item(), rel=1e-6)
    assert mask_loss(logits, targets, rois._replace(positive=torch.zeros(1, 4, dtype=torch.bool))) == 0


def test_logits_are_those_of_the_own_class():
    torch.manual_seed(0)
    head = MaskHead(dataclasses.replace(CONFIG, num_classes=5, fpn_channels=8, mask_channels=16))
    torch.nn.init.normal_(head.logits.bias)
    pooled = torch.randn(3, 8, 14, 14)
    hidden = pooled
    for conv in head.convs:
        hidden = conv(hidden).relu()
    maps = head.logits(head.upsample(hidden).relu())
    labels = torch.tensor([4, 0, 5])
    found = head(pooled, labels)
    torch.testing.assert_close(found[:2], maps[[0, 1], labels[:2]], rtol=1e-5, atol=1e-5)
    assert not found[2].any()


def test_a_list_of_images_without_masks_is_refused():
    model = build_model("mask_rcnn_r18_fpn", 5).train()
    target = {"boxes_xyxy": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1])}
    with pytest.raises(ValueError, match='give "masks"'):
        model(batch_images([torch.zeros(3, 32, 32)], CPU), [target])
