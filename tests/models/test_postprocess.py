import pytest
import torch

from detection.export import compare_detections
from detection.models import ImageBatch, build_model
from detection.models.config import model_config
from detection.models.postprocess import select_detections
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
