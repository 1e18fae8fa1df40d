"""The curves behind AP: their area is AP, and they fall where they must."""

import json

import numpy as np
import pytest

from detection.evaluation import CocoEvaluator, Detections


@pytest.fixture
def evaluator(tmp_path):
    boxes = [(1, 1, [10, 10, 40, 40]), (1, 1, [100, 10, 40, 40]), (1, 2, [10, 100, 40, 40]), (2, 2, [10, 10, 40, 40])]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "cow"}],
        "annotations": [
            {"id": 1 + n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(boxes)
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return CocoEvaluator(file)


def found(*rows):
    images, categories, boxes, scores = zip(*rows, strict=True)
    return Detections(
        np.array(images), np.array(categories), np.array(boxes, dtype=np.float64), np.array(scores, dtype=np.float64)
    )


DETECTIONS = [
    (1, 1, [10, 10, 40, 40], 0.9),  # cat, found exactly
    (2, 1, [100, 100, 40, 40], 0.8),  # no cat there
    (1, 2, [10, 100, 40, 40], 0.7),  # dog, found exactly
    (2, 2, [10, 10, 40, 30], 0.6),  # dog, at IoU 0.75
]


def test_the_area_under_a_curve_is_the_average_precision(evaluator):
    metrics = evaluator.evaluate(found(*DETECTIONS))
    curves = evaluator.curves
    assert set(curves) == {"all/IoU 0.50", "all/IoU 0.75", "class/cat", "class/dog"}
    assert curves["all/IoU 0.50"][0].mean() == pytest.approx(metrics["mAP_50"])
    assert curves["all/IoU 0.75"][0].mean() == pytest.approx(metrics["mAP_75"])


def test_precision_is_that_of_the_detections_up_to_the_recall(evaluator):
    evaluator.evaluate(found(*DETECTIONS))
    precision, recall = evaluator.curves["class/cat"]
    assert recall[0] == 1
    assert recall[-1] == 0
    np.testing.assert_allclose(precision, np.where(recall <= 0.5, 1.0, 0.0))


def test_only_the_last_evaluation_counts_and_without_boxes_there_is_no_curve(evaluator):
    assert evaluator.curves == {}
    evaluator.evaluate(found(*DETECTIONS))
    evaluator.evaluate(found(DETECTIONS[3]), image_ids=[2])
    assert set(evaluator.curves) == {"all/IoU 0.50", "all/IoU 0.75", "class/dog"}
