import dataclasses
import math

import pytest
import torch

from detection.export import compare_detections
from detection.models import ImageBatch, build_model, model_from_config
from detection.models.config import model_config
from detection.models.postprocess import lowered_scores, select_detections
from detection.models.structures import batch_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["faster_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn", "cascade_rcnn_r18_fpn"])
def model(request):
    torch.manual_seed(0)
    model = build_model(
        request.param, num_classes=5, score_threshold=0.2, fpn_channels=32, roi_hidden_channels=64
    ).eval()
    classifiers = [(head.classifier, 0.1) for head in model.roi_heads]
    for layer, std in ((model.rpn.objectness, 0.1), (model.rpn.deltas, 0.05), *classifiers):
        torch.nn.init.normal_(layer.weight, std=std)
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(4)
    sizes = ((96, 128), (60, 128), (96, 40), (33, 65))
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def test_a_batch_of_mixed_sizes_gives_what_each_image_gives_alone_at_the_same_padding(model, images):
    batch = batch_images(images, CPU)
    for index, found in enumerate(model(batch)):
        alone = model(ImageBatch(batch.pixels[index : index + 1], batch.sizes[index : index + 1]))
        difference = compare_detections(
            [found], alone, score_threshold=0.2, detections_per_image=100, score_tolerance=1e-4
        )
        assert difference.within(1e-4, 1e-2) and difference.num_matched > 0, difference


def test_a_list_and_a_padded_batch_are_the_same(model, images):
    for of_list, of_batch in zip(model(images), model(batch_images(images, CPU)), strict=True):
        assert all(torch.equal(of_list[key], of_batch[key]) for key in of_list)


def test_detections_are_sorted_inside_their_image_and_above_the_threshold(model, images):
    for image, found in zip(images, model(images), strict=True):
        assert found["scores"].dtype == found["boxes_xyxy"].dtype == torch.float32
        assert found["labels"].dtype == torch.int64
        assert (found["scores"] > model.config.score_threshold).all()
        assert (found["scores"].diff() <= 0).all()
        assert (found["boxes_xyxy"] >= 0).all()
        assert (found["boxes_xyxy"] <= torch.tensor([image.shape[2], image.shape[1]] * 2)).all()
        assert found["labels"].max() < 5


def select(logits, boxes, **overrides):
    config = model_config("faster_rcnn_r18_fpn", num_classes=2, **overrides)
    logits, boxes = torch.tensor(logits), torch.tensor(boxes)
    deltas = torch.zeros(len(boxes), 2, 4)
    valid = torch.ones(1, len(boxes), dtype=torch.bool)
    return select_detections(config, logits, deltas, boxes[None], valid, torch.tensor([[50, 60]]))[0]


def test_suppression_is_within_a_class_and_one_roi_may_give_two_classes():
    boxes = [[10.0, 10, 20, 20], [10, 10, 20, 20.5], [30, 30, 40, 40]]
    found = select([[4.0, 3.8, 0], [2.5, -5, 0], [0, 0, 9.0]], boxes)
    assert found["labels"].tolist() == [0, 1]
    assert found["boxes_xyxy"].tolist() == [boxes[1], boxes[0]]


def test_boxes_are_clipped_and_the_best_are_kept():
    boxes = [[-5.0, 10, 20, 70], [30, 30, 70, 40], [0, 0, 5, 5]]
    found = select([[3.0, 0, 0], [4.0, 0, 0], [2.0, 0, 0]], boxes, detections_per_image=2)
    assert found["boxes_xyxy"].tolist() == [[30, 30, 60, 40], [0, 10, 20, 50]]


def test_too_small_detections_are_dropped_on_request():
    boxes = [[70.0, 10, 80, 20], [0, 0, 5, 5]]
    logits = [[5.0, 0, 0], [4.0, 0, 0]]
    assert len(select(logits, boxes)["scores"]) == 2
    assert select(logits, boxes, detection_min_size=1e-2)["boxes_xyxy"].tolist() == [boxes[1]]


def test_no_score_above_the_threshold_gives_empty_tensors():
    found = select([[0.0, 0, 9]], [[0.0, 0, 5, 5]])
    assert found["boxes_xyxy"].shape == (0, 4)
    assert found["scores"].shape == found["labels"].shape == (0,)


def test_what_is_not_finite_is_no_detection_and_its_image_is_told(model, images):
    batch = batch_images(images, CPU)
    expected, is_finite = model.detect(batch)
    assert is_finite.all()
    pixels = batch.pixels.float()
    pixels[1, :, 5, 5] = torch.nan
    found, is_finite = model.detect(ImageBatch(pixels, batch.sizes))
    assert is_finite.tolist() == [True, False, True, True]
    assert all(each["boxes_xyxy"].isfinite().all() and each["scores"].isfinite().all() for each in found)
    for index in (0, 2, 3):
        assert all(torch.equal(found[index][name], value) for name, value in expected[index].items())


@pytest.mark.parametrize("part", ["backbone.conv1", "rpn.deltas", "rpn.objectness", "roi_head.regressor"])
def test_a_model_whose_weights_are_nan_detects_nothing_and_raises_nothing(part, model, images):
    stage = "" if model.config.cascade_ious is None else "0."
    weight = model.get_parameter(part.replace("roi_head.", f"roi_head.{stage}") + ".weight")
    before = weight.detach().clone()
    try:
        weight.data.fill_(torch.nan)
        found, is_finite = model.detect(batch_images(images, CPU))
    finally:
        weight.data.copy_(before)
    assert not is_finite.any()
    assert all(each["boxes_xyxy"].isfinite().all() for each in found)
    if part != "rpn.objectness":  # whose proposals are boxes all the same
        assert not any(len(each["scores"]) for each in found)


def softly(boxes, scores, *, kind, threshold, sigma, min_score):
    """Soft-NMS of one class as mmcv does it: the best box is put aside and lowers those that are left."""
    left, done = [[score, box] for score, box in zip(scores, boxes, strict=True)], []
    while left:
        left.sort(key=lambda each: -each[0])
        best = left.pop(0)
        done.append(best)
        for each in left:
            (a1, b1, a2, b2), (c1, d1, c2, d2) = best[1], each[1]
            both = max(0, min(a2, c2) - max(a1, c1)) * max(0, min(b2, d2) - max(b1, d1))
            iou = both / ((a2 - a1) * (b2 - b1) + (c2 - c1) * (d2 - d1) - both)
            if kind == "gaussian":
                each[0] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                each[0] *= 1 - iou
        left = [each for each in left if each[0] >= min_score]
    return done


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
def test_soft_nms_lowers_scores_within_each_class(kind):
    generator = torch.Generator().manual_seed(5)
    boxes = torch.rand(60, 4, generator=generator) * 20
    boxes[:, 2:] += boxes[:, :2] + 5
    scores, labels = torch.rand(60, generator=generator), torch.arange(60) % 2
    config = model_config("faster_rcnn_r50_fpn", soft_nms=kind, nms_iou=0.3, soft_nms_min_score=0.05)
    order, lowered = lowered_scores(config, boxes, scores, labels)
    found = sorted((round(lowered[i].item(), 4), labels[i].item()) for i in order)
    expected = []
    for label in (0, 1):
        own = labels == label
        kept = softly(boxes[own].tolist(), scores[own].tolist(), kind=kind, threshold=0.3, sigma=0.5, min_score=0.05)
        expected += [(score, label) for score, _ in kept]
    assert [label for _, label in found] == [label for _, label in sorted(expected)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in sorted(expected)], abs=2e-4)
    assert 0 < len(order) < 60 and (lowered[order].diff() <= 0).all()


def test_a_detector_finds_more_with_soft_nms_and_its_best_box_stays(model, images):
    hard = model(images[:1])[0]
    soft = model_from_config({**dataclasses.asdict(model.config), "soft_nms": "linear"}, model.state_dict()).eval()
    found = soft(images[:1])[0]
    assert torch.equal(found["boxes_xyxy"][0], hard["boxes_xyxy"][0]) and found["scores"][0] == hard["scores"][0]
    assert len(found["scores"]) >= len(hard["scores"])
