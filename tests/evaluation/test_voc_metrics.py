"""Pascal VOC's metric, against its definition written out box by box, with the development kits' whole pixels."""

import json

import numpy as np
import pytest

from data.coco.annotations import read_coco
from detection.evaluation import CocoEvaluator, Detections
from detection.evaluation.voc_metrics import average_precision

NAMES = ["cat", "dog", "owl"]


def ap_of_the_kit(objects, detections, mode):
    """VOCevaldet.m: objects {image: [(xmin, ymin, xmax, ymax, difficult)]}, detections [(image, score, corners)], of
    whole pixels, the last one included."""
    npos = sum(not difficult for boxes in objects.values() for *_, difficult in boxes)
    used = {(image, j): False for image, boxes in objects.items() for j in range(len(boxes))}
    tp, fp = [], []
    for image, _, (bx1, by1, bx2, by2) in sorted(detections, key=lambda each: -each[1]):
        best, jmax = -np.inf, None
        for j, (x1, y1, x2, y2, _) in enumerate(objects.get(image, [])):
            iw, ih = min(bx2, x2) - max(bx1, x1) + 1, min(by2, y2) - max(by1, y1) + 1
            if iw > 0 and ih > 0:
                union = (bx2 - bx1 + 1) * (by2 - by1 + 1) + (x2 - x1 + 1) * (y2 - y1 + 1) - iw * ih
                if iw * ih / union > best:
                    best, jmax = iw * ih / union, j
        is_tp = is_fp = 0
        if best >= 0.5:
            if not objects[image][jmax][4]:
                is_tp, is_fp = (0, 1) if used[image, jmax] else (1, 0)
                used[image, jmax] = True
        else:
            is_fp = 1
        tp.append(is_tp)
        fp.append(is_fp)
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    rec, prec = tp / npos, tp / np.maximum(tp + fp, 1)
    if mode == "11points":
        return sum(max(prec[rec >= t], default=0) / 11 for t in np.arange(0, 1.001, 0.1))
    mrec, mpre = np.concatenate([[0], rec, [1]]), np.concatenate([[0], prec, [0]])
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    where = np.flatnonzero(mrec[1:] != mrec[:-1]) + 1
    return float(((mrec[where] - mrec[where - 1]) * mpre[where]).sum())


@pytest.mark.parametrize("mode", ["11points", "area"])
def test_figures_are_the_development_kits(mode, tmp_path):
    rng = np.random.default_rng(3)
    objects = {name: {} for name in NAMES}
    for image in range(1, 25):
        for name in NAMES[: 1 + image % 2]:
            for _ in range(rng.integers(0, 4)):
                x, y, w, h = rng.integers(1, 40, 4).tolist()
                difficult = bool(rng.random() < 0.2)
                objects[name].setdefault(image, []).append((x, y, x + w, y + h, difficult))
    found = {name: [] for name in NAMES}
    scores = iter(rng.permutation(5000) / 5000)  # no ties
    for name, of_images in objects.items():
        for image, boxes in of_images.items():
            for box in boxes:
                for _ in range(rng.integers(0, 4)):
                    x1, y1, x2, y2 = (np.array(box[:4]) + rng.integers(-6, 7, 4)).tolist()
                    if x2 > x1 and y2 > y1:
                        found[name].append((image, float(next(scores)), (x1, y1, x2, y2)))
        found[name] += [(image, float(next(scores)), (3, 3, 12, 12)) for image in range(1, 25, 3)]
    file = tmp_path / "a.json"
    file.write_text(
        json.dumps(
            {
                "images": [{"id": i, "width": 90, "height": 90, "file_name": f"{i}.jpg"} for i in range(1, 25)],
                "categories": [{"id": 5 * n + 2, "name": name} for n, name in enumerate(NAMES)],
                "annotations": [
                    {
                        "id": 1000 * n + 10 * image + j + 1,
                        "image_id": image,
                        "category_id": 5 * n + 2,
                        "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                        "area": 100,
                        "iscrowd": int(difficult),
                    }
                    for n, name in enumerate(NAMES)
                    for image, boxes in objects[name].items()
                    for j, (x1, y1, x2, y2, difficult) in enumerate(boxes)
                ],
            }
        )
    )
    rows = [(image, 5 * n + 2, score, box) for n, name in enumerate(NAMES) for image, score, box in found[name]]
    detections = Detections(
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows]),
        np.array([[x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1] for *_, (x1, y1, x2, y2) in rows], dtype=np.float32),
        np.array([row[2] for row in rows]),
    )
    metrics = CocoEvaluator(read_coco(file), voc_metric=mode).evaluate(detections)
    expected = {name: ap_of_the_kit(objects[name], found[name], mode) for name in NAMES[:2]}
    assert min(expected.values()) > 0.2 and max(expected.values()) < 0.9
    assert metrics["voc_per_class"] == pytest.approx(expected | {"owl": -1}, abs=1e-12)
    assert metrics["voc_mAP"] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert "voc_mAP" not in CocoEvaluator(read_coco(file)).evaluate(detections)


def test_average_precision_by_hand():
    recall, precision = np.array([0.25, 0.25, 0.5]), np.array([1, 1 / 2, 2 / 3])
    assert average_precision(recall, precision, "area") == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert average_precision(recall, precision, "11points") == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)
    assert (
        average_precision(recall[:0], precision[:0], "11points")
        == 0
        == average_precision(recall[:0], recall[:0], "area")
    )
