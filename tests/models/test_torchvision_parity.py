"""The torchvision recipe beside torchvision's own model: same weights and images, same detections and losses."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

from detection.export import compare_detections
from detection.models import build_model, export_state_dict
from detection.models.config import model_config
from detection.models.weights.layouts import to_ours

pytestmark = pytest.mark.slow

NUM_CLASSES = 7
TRAINING_PROPOSALS = 300  # of 2000, because the backward pass of their RoIAlign takes its time
LOSS_NAMES = {
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_bbox": "loss_rpn_box_reg",
    "loss_cls": "loss_classifier",
    "loss_bbox": "loss_box_reg",
    "loss_mask": "loss_mask",
}


@pytest.fixture(scope="module")
def theirs():
    """torchvision's maskrcnn_resnet50_fpn with random weights that make its outputs vary, everything sampled."""
    torch.manual_seed(0)
    backbone = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for name, buffer in backbone.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("bias"):
            buffer.normal_(0, 0.05)
    # These limits leave images with a shorter side of 128 and a longer one of up to 160 as they are.
    model = torchvision.models.detection.MaskRCNN(
        _resnet_fpn_extractor(backbone, 3), NUM_CLASSES + 1, min_size=128, max_size=160
    )
    for layer, std in (
        (model.rpn.head.cls_logits, 0.1),
        (model.rpn.head.bbox_pred, 0.02),
        (model.roi_heads.box_predictor.cls_score, 0.1),
        (model.roi_heads.box_predictor.bbox_pred, 0.02),
    ):
        nn.init.normal_(layer.weight, std=std)
    for sampler in (model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image = 10**7
        sampler.positive_fraction = 0.5
    model.rpn._post_nms_top_n["training"] = TRAINING_PROPOSALS
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    model = build_model(
        "maskrcnn_resnet50_fpn",
        num_classes=NUM_CLASSES,
        rpn_samples_per_image=None,
        roi_samples_per_image=None,
        rpn_proposals_train=TRAINING_PROPOSALS,
    )
    model.load_state_dict(to_ours(theirs.state_dict(), "torchvision")[0])
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    photos = []
    for height, width in ((128, 160), (152, 128)):
        blocks = torch.randint(0, 256, (3, height // 8, width // 8), dtype=torch.uint8, generator=generator)
        photos.append(blocks.repeat_interleave(8, 1).repeat_interleave(8, 2))
    return photos


def test_detections_and_masks_equal_torchvisions(theirs, ours, images):
    theirs.eval()
    with torch.no_grad():
        inputs, _ = theirs.transform([image / 255 for image in images])
        features = theirs.backbone(inputs.tensors)
        proposals, _ = theirs.rpn(inputs, features)
        found, _ = theirs.roi_heads(features, proposals, inputs.image_sizes)
    names = {"boxes_xyxy": "boxes", "scores": "scores", "labels": "labels", "mask_probabilities": "masks"}
    expected = [{ours: each[theirs] for ours, theirs in names.items()} for each in found]
    for each in expected:
        each["labels"] -= 1
        each["mask_probabilities"] = each["mask_probabilities"][:, 0]
    difference = compare_detections(
        ours.eval()(images), expected, score_threshold=0.05, detections_per_image=100, score_tolerance=1e-5
    )
    assert difference.within(1e-5, 1e-3) and difference.num_matched > 40, difference


@pytest.mark.parametrize("case", ["boxes in both", "none in the second", "equal boxes of two classes"])
def test_training_losses_and_gradients_equal_torchvisions(theirs, ours, images, case):
    """In float64, where no activation is so near zero that the two models' rounding puts it on two sides."""
    theirs, ours = (copy.deepcopy(model).double() for model in (theirs, ours))
    targets = [
        {
            "boxes_xyxy": torch.tensor([[10.0, 10, 80, 90], [30, 40, 150, 110], [120, 5, 136, 25]]),
            "labels": torch.tensor([2, 0, 4]),
        },
        {"boxes_xyxy": torch.tensor([[5.0, 50, 40, 90]]), "labels": torch.tensor([6])},
    ]
    if case == "none in the second":
        targets[1] = {"boxes_xyxy": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for each in targets:
        rows, columns = torch.arange(160)[:, None], torch.arange(160)
        x1, y1, x2, y2 = each["boxes_xyxy"].T[..., None, None]
        inside = (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
        each["masks"] = (inside & ((rows + columns) % 23 < 15)).to(torch.uint8)
    if case == "equal boxes of two classes":
        targets[0]["boxes_xyxy"][1] = targets[0]["boxes_xyxy"][0]
    in_their_terms = [
        {"boxes": each["boxes_xyxy"].double(), "labels": each["labels"] + 1, "masks": each["masks"]} for each in targets
    ]
    expected = theirs.train()([image.double() / 255 for image in images], in_their_terms)
    losses = ours.train()(images, targets)
    for name, their_name in LOSS_NAMES.items():
        assert losses[name].item() == pytest.approx(expected[their_name].item(), rel=1e-5), name
    if case != "boxes in both":
        return
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    their_gradients, _ = to_ours(
        {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, "torchvision"
    )
    our_gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert (gradient - their_gradients[name]).norm() < 2e-6 * their_gradients[name].norm(), name


def test_numbers_of_proposals_samples_and_detections_equal_torchvisions():
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    config = model_config("fasterrcnn_resnet50_fpn")
    rpn, roi_heads = theirs.rpn, theirs.roi_heads
    assert rpn._pre_nms_top_n == {"training": config.rpn_nms_pre_train, "testing": config.rpn_nms_pre_test}
    assert rpn._post_nms_top_n == {"training": config.rpn_proposals_train, "testing": config.rpn_proposals_test}
    assert rpn.nms_thresh == config.rpn_nms_iou
    assert rpn.fg_bg_sampler.batch_size_per_image == config.rpn_samples_per_image
    assert rpn.fg_bg_sampler.positive_fraction == config.rpn_positive_fraction
    assert roi_heads.fg_bg_sampler.batch_size_per_image == config.roi_samples_per_image
    assert roi_heads.fg_bg_sampler.positive_fraction == config.roi_positive_fraction
    assert roi_heads.score_thresh == config.score_threshold
    assert roi_heads.nms_thresh == config.nms_iou
    assert roi_heads.detections_per_img == config.detections_per_image


@pytest.mark.slow
def test_every_layer_begins_as_torchvisions():
    torch.manual_seed(0)
    theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, trainable_backbone_layers=5
    ).state_dict()
    model = build_model("fasterrcnn_resnet50_fpn", num_classes=3, norm="bn", frozen_stages=-1)
    ours = export_state_dict(model, "torchvision")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        one, other = tensor.double(), theirs[name].double()
        if other.numel() == 1 or float(other.std()) == 0:
            assert torch.equal(one, other), name
            continue
        # Of n normal or uniform values the deviation is known to a part of 1 / sqrt(2 n); five times that.
        assert float(one.std() / other.std()) == pytest.approx(1, abs=5 / other.numel() ** 0.5), name
        kurtosis = [float(((each - each.mean()) / each.std()).pow(4).mean()) for each in (one, other)]
        if other.numel() > 1000:  # 3 of a normal, 1.8 of a uniform distribution
            assert kurtosis[0] == pytest.approx(kurtosis[1], abs=0.6), name
