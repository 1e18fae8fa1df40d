"""Exported detectors find what the detector in PyTorch finds, in images of every allowed shape."""

import json

import numpy as np
import pytest
import torch
import torchvision

from detection.export import (
    DetectorGraph,
    ExportError,
    InputShape,
    compare_detections,
    open_onnx,
    save_onnx,
)
from detection.export.graph import suppress_groups
from detection.models import build_model
from detection.models.backbones import architectures
from detection.models.detector import Detector

RECIPES = ["mask_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn", "cascade_mask_rcnn_r18_fpn"]
SHAPES = [(100, 150), (150, 100), (128, 128), (40, 300), (1, 60)]


def small_detector(recipe):
    """Random weights, one block a stage, inputs of 128 to 213 pixels."""
    torch.manual_seed(0)
    patch = pytest.MonkeyPatch()
    patch.setitem(architectures.ARCHITECTURES, "resnet18", architectures.residual((1, 1, 1, 1), bottleneck=False))
    small = {"fpn_channels": 32, "roi_hidden_channels": 64, "rpn_nms_pre_test": 100, "rpn_proposals_test": 50}
    small["mask_channels"] = 8
    model = build_model(recipe, 3, detections_per_image=20, **small).eval()
    patch.undo()
    for head in model.mask_heads:
        head.logits.weight.data.mul_(0.2)  # as certain as trained ones
    for parameter in model.roi_head.parameters():
        parameter.data.mul_(3)  # classes that differ from box to box
    return Detector(model, ("cat", "dog", "bird"), (1, 5, 9), 128, 213)


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def difference(detector, ours, theirs):
    config = detector.model.config
    return compare_detections(
        ours,
        theirs,
        score_threshold=config.score_threshold,
        detections_per_image=config.detections_per_image,
        score_tolerance=5e-4,
    )


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_graph_is_the_detector(recipe, shape):
    detector = small_detector(recipe)
    images = [image(*shape, seed) for seed in range(2)]
    with torch.no_grad():
        boxes, scores, labels, counts, *masks = DetectorGraph(detector)(torch.from_numpy(np.stack(images)))
    outputs = {"boxes_xyxy": boxes, "scores": scores, "labels": labels}
    if detector.model.config.has_masks:
        (outputs["mask_probabilities"],) = masks
    found = [{key: each[row, :count] for key, each in outputs.items()} for row, count in enumerate(counts.tolist())]
    result = difference(detector, detector.predict(images, batch_size=2), found)
    # A mask of a box of a few pixels follows the rounding of its corners.
    limit = 5e-4 if result.largest_mask == 0 else 2e-3
    assert result.num_matched > 2 and result.within(limit, 1e-2), str(result)
    assert (result.largest_mask > 0) == detector.model.config.has_masks
    assert boxes.shape == (2, 20, 4) and scores.dtype == torch.float32 and labels.dtype == torch.int64
    for row, count in enumerate(counts.tolist()):
        assert (
            (boxes[row, count:] == 0).all() and (scores[row, count:] == 0).all() and (labels[row, count:] == -1).all()
        )
        assert (scores[row, :count].diff() <= 0).all()


def test_nothing_found_is_a_count_of_zero():
    detector = small_detector(RECIPES[0])
    with torch.no_grad():
        detector.model.roi_head.classifier.weight.zero_()
        detector.model.roi_head.classifier.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))  # background, always
        boxes, scores, labels, counts, masks = DetectorGraph(detector)(torch.from_numpy(image(90, 120))[None])
    assert not masks.any()
    assert counts.tolist() == [0] and (boxes == 0).all() and (scores == 0).all() and (labels == -1).all()


def test_suppression_stays_within_its_group():
    torch.manual_seed(1)
    corners = torch.rand(4, 30, 2) * 60
    boxes = torch.cat((corners, corners + 5 + torch.rand(4, 30, 2) * 30), dim=2)
    scores = torch.randn(4, 30)
    scores[1, ::2] = -torch.inf
    scores[3] = -torch.inf
    keep = suppress_groups(boxes, scores, 0.4, 30)
    for group in range(4):
        rows = torch.nonzero(scores[group] > -torch.inf)[:, 0]
        expected = rows[torchvision.ops.nms(boxes[group, rows], scores[group, rows], 0.4)]
        assert keep[group].nonzero()[:, 0].tolist() == sorted(expected.tolist())


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='ONNX is the optional extra "export"')
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    detector = small_detector(RECIPES[0])
    save_onnx(detector, InputShape(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_onnx_file_finds_the_same_in_any_size_and_batch(onnx_file, shape, batch_size):
    detector = small_detector(RECIPES[0])
    images = [image(*shape, seed) for seed in range(batch_size)]
    result = difference(
        detector, detector.predict(images, batch_size=batch_size), open_onnx(onnx_file)(np.stack(images))
    )
    assert result.largest_mask > 0
    assert result.num_matched > 2 and result.within(5e-4, 1e-2), str(result)


@pytest.mark.slow
def test_an_onnx_file_is_alone_valid_and_knows_its_classes(onnx_file):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    assert [path.name for path in onnx_file.parent.iterdir()] == [onnx_file.name]
    entries = {entry.key: json.loads(entry.value) for entry in model.metadata_props if not entry.key.startswith("pkg.")}
    assert entries["class_names"] == ["cat", "dog", "bird"] and entries["category_ids"] == [1, 5, 9]
    assert entries["preprocessing"] == {"min_size": 128, "max_size": 213}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", "height", "width", 3],
        "boxes_xyxy": ["batch", 20, 4],
        "scores": ["batch", 20],
        "labels": ["batch", 20],
        "num_detections": ["batch"],
        "mask_probabilities": ["batch", 20, 28, 28],
    }


def test_a_file_that_onnxruntime_cannot_run_is_named(tmp_path):
    pytest.importorskip("onnxruntime", reason='ONNX is the optional extra "export"')
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot run .*broken.onnx"):
        open_onnx(tmp_path / "broken.onnx")


def test_a_height_without_a_width_is_refused():
    with pytest.raises(ExportError, match="both"):
        InputShape(height=100)


def found(*rows):
    """Detections from (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return {"boxes_xyxy": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def compare(one, other, detections_per_image=100):
    return compare_detections(
        [one], [other], score_threshold=0.1, detections_per_image=detections_per_image, score_tolerance=0.01
    )


def test_differences_are_those_of_the_same_objects_in_whatever_order():
    one = found((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 10, 0.8, 1), (50, 50, 90, 90, 0.5, 0))
    other = found((0, 0, 10, 10.25, 0.75, 1), (0, 0, 10, 10, 0.9, 0), (50.5, 50, 90, 90, 0.5, 0))
    result = compare(one, other)
    assert result.num_matched == 3 and result.unmatched_scores == ()
    assert result.largest_score == pytest.approx(0.05) and result.largest_box == 0.5
    assert result.within(0.06, 0.5) and not result.within(0.04, 0.5) and not result.within(0.06, 0.4)


def test_what_one_found_alone_counts_unless_it_had_barely_passed():
    kept = (0, 0, 10, 10, 0.9, 0)
    assert compare(found(kept), found(kept, (50, 50, 90, 90, 0.5, 0))).unmatched_scores == (0.5,)
    assert compare(found(kept, (50, 50, 90, 90, 0.5, 0)), found(kept)).unmatched_scores == (0.5,)
    assert compare(found(kept), found(kept, (50, 50, 90, 90, 0.105, 0))).unmatched_scores == ()
    # The list is full, so that the last place decides.
    last = (20, 20, 40, 40, 0.5, 1)
    assert compare(found(kept, last), found(kept, (50, 50, 90, 90, 0.505, 0)), 2).unmatched_scores == ()
    assert compare(found(kept, last), found(kept, (0, 0, 10, 10, 0.6, 1)), 2).unmatched_scores == pytest.approx((0.6,))
    assert compare(found(), found()).within(0, 0)
