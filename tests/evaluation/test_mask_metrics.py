"""Metrics of masks: equal to pycocotools run by itself on the files, with either backend."""

import base64
import contextlib
import importlib.util
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageColor
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.coco.annotations import read_coco
from data.coco.run_lengths import RunLengths
from detection.evaluation import (
    METRIC_NAMES,
    CocoEvaluator,
    Detections,
    EvaluationError,
    ResultsError,
    evaluate_results,
    read_results,
    write_mask_results,
)
from detection.evaluation.analysis import analyze_results
from detection.evaluation.html_report import KIND_COLORS, html_report
from tests.evaluation.coco_cases import SCORES

HEIGHT, WIDTH = 60, 80


def blob(rng, center, reach):
    """The bitmap of a random polygon and its ring."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * reach * rng.uniform(0.5, 1, (len(angles), 1)) + center
    ring = np.round(points, 2).reshape(-1).tolist()
    entry = mask.merge(mask.frPyObjects([ring], HEIGHT, WIDTH))
    return ring, mask.decode(entry)


def random_case(rng, folder):
    """Annotations with polygons, crowds as run lengths of both kinds, and results of masks near them; the two files."""
    annotations, results = [], []
    image_ids = rng.permutation(50)[: int(rng.integers(1, 5))].tolist()
    for image_id in image_ids:
        for _ in range(int(rng.choice([0, 1, 3, 6]))):
            center, reach = rng.uniform(0, [WIDTH, HEIGHT]), float(rng.choice([4, 12, 40]))
            ring, bits = blob(rng, center, reach)
            text = mask.encode(np.asfortranarray(bits))
            crowd = rng.random() < 0.2
            segmentation = [ring]
            if crowd and rng.random() < 0.5:
                segmentation = {"size": text["size"], "counts": text["counts"].decode()}
            elif crowd:
                flat = np.concatenate([[0], bits.T.reshape(-1), [2]])
                segmentation = {
                    "size": text["size"],
                    "counts": np.diff([0, *np.flatnonzero(np.diff(flat.astype(int)))]).tolist(),
                }
                if flat[1]:
                    segmentation["counts"] = [0, *segmentation["counts"][1:]]
            category = int(rng.choice([2, 9]))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": int(crowd),
                    "segmentation": segmentation, "area": float(bits.sum()) * float(rng.choice([1, 1, 30])),
                    "bbox": mask.toBbox(text).tolist(),
                }
            )  # fmt: skip
            for _ in range(int(rng.choice([0, 1, 2]))):
                _, found = blob(rng, center + rng.normal(size=2), reach)
                found = bits.copy() if rng.random() < 0.4 else found | (bits & (rng.random(bits.shape) < 0.9))
                entry = mask.encode(np.asfortranarray(found.astype(np.uint8)))
                entry["counts"] = entry["counts"].decode()
                results.append(
                    {
                        "image_id": image_id, "category_id": int(rng.choice([category, category, 2])),
                        "segmentation": entry, "score": float(rng.choice(SCORES)),
                    }
                )  # fmt: skip
    images = [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.png"} for i in image_ids]
    categories = [{"id": 2, "name": "a"}, {"id": 9, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "annotations.json", folder / "results.json"


def pycocotools_alone(annotation_file, results_file):
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = COCO(str(annotation_file))
        evaluation = COCOeval(annotated, annotated.loadRes(str(results_file)), iouType="segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_figures_of_masks_equal_pycocotools_by_itself_on_random_cases(tmp_path):
    backends = ["pycocotools", *(["hotcoco"] if importlib.util.find_spec("hotcoco") is not None else [])]
    compared = partly_right = 0
    for seed in range(220):
        files = random_case(np.random.default_rng(seed), tmp_path)
        if not json.loads(files[1].read_text()):
            continue
        expected = pycocotools_alone(*files)
        for backend in backends:
            metrics = evaluate_results(*files, backend=backend)
            assert [metrics[f"segm_{name}"] for name in METRIC_NAMES] == expected, f"case {seed}, {backend}"
        compared += 1
        partly_right += 0 < expected[0] < 1
    assert compared > 150 and partly_right > 50


def test_the_error_split_goes_by_the_overlap_of_masks(tmp_path):
    compared = not_as_boxes = 0
    for seed in range(60):
        files = random_case(np.random.default_rng(seed), tmp_path)
        if not json.loads(files[1].read_text()):
            continue
        analysis = analyze_results(*files)
        metrics = analysis["metrics"]
        assert analysis["errors"]["AP_50"] == pytest.approx(metrics["segm_mAP_50"], abs=1e-12), seed
        of_classes = [row["AP_50"] for row in analysis["classes"] if row["AP_50"] >= 0]
        assert not of_classes or np.mean(of_classes) == pytest.approx(metrics["segm_mAP_50"])
        compared += metrics["segm_mAP_50"] >= 0
        not_as_boxes += metrics["segm_mAP_50"] != metrics["mAP_50"]
    assert compared > 30 and not_as_boxes > 5


def test_the_report_draws_masks_in_the_colors_of_their_kinds(tmp_path):
    left, right = np.zeros((2, HEIGHT, WIDTH), dtype=np.uint8)
    left[10:50, 4:24], right[10:50, 50:70] = 1, 1
    texts = [
        {"size": [HEIGHT, WIDTH], "counts": mask.encode(np.asfortranarray(b))["counts"].decode()} for b in (left, right)
    ]
    boxes = [[4, 10, 20, 40], [50, 10, 20, 40]]
    content = {
        "images": [{"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "a.png"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "segmentation": text, "bbox": box, "area": 800, "iscrowd": 0}
            for i, (text, box) in enumerate(zip(texts, boxes, strict=True), 1)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = {"image_id": 1, "category_id": 1, "segmentation": texts[0], "score": 0.9}
    (tmp_path / "r.json").write_text(json.dumps([found]))
    analysis = analyze_results(tmp_path / "a.json", tmp_path / "r.json")
    page = html_report(analysis, title="masks", image_of=lambda name: np.full((HEIGHT, WIDTH, 3), 200, np.uint8))
    data = base64.b64decode(re.search(r"data:image/jpeg;base64,([^\"]+)", page)[1])
    drawn = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    expected = {
        kind: 0.55 * 200 + 0.45 * np.array(ImageColor.getrgb(KIND_COLORS[kind])) for kind in ("correct", "missed")
    }
    assert abs(drawn[30, 14] - expected["correct"]).max() < 12 and abs(drawn[30, 60] - expected["missed"]).max() < 12
    assert abs(drawn[30, 37] - 200).max() < 12
    assert "segm_mAP_50" in page and "per_class" not in page


def test_results_of_masks_are_read_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    bits = (rng.random((300, HEIGHT, WIDTH)) < 0.5).astype(np.uint8)
    bits[0], bits[0, 44:, 0] = 0, 1
    masks = RunLengths.encode(bits)
    assert b"\\" in masks.text.tobytes()  # which JSON writes as two
    ids = np.arange(300)
    scores = rng.random(300).astype(np.float32)
    detections = Detections(ids, ids % 3, np.zeros((300, 4), np.float32), scores, masks)
    write_mask_results(detections, tmp_path / "r.json")
    read = read_results(tmp_path / "r.json")
    assert read.masks.entries() == masks.entries()
    assert np.array_equal(read.boxes_xywh, [mask.toBbox(entry) for entry in masks.entries()])
    assert np.array_equal(masks.areas(), bits.sum(axis=(1, 2)))
    assert np.array_equal(read.scores.astype(np.float32), scores) and np.array_equal(read.image_ids, ids)


@pytest.mark.parametrize("counts", ["", "01", [5], None])
def test_results_whose_runs_do_not_fill_the_image_are_refused_with_their_entry(tmp_path, counts):
    good = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {"size": [2, 3], "counts": [2, 4]}}
    (tmp_path / "r.json").write_text(json.dumps([good, good | {"segmentation": {"size": [2, 3], "counts": counts}}]))
    with pytest.raises(ResultsError, match=r"entry 1 .*segmentation is .*fill the image"):
        read_results(tmp_path / "r.json")


def test_results_with_a_box_and_a_mask_in_a_row_are_judged_by_both(tmp_path):
    annotations, results = random_case(np.random.default_rng(3), tmp_path)
    rows = json.loads(results.read_text())
    boxes = [{**row, "bbox": list(mask.toBbox(row["segmentation"]))} for row in rows]
    (tmp_path / "both.json").write_text(json.dumps(boxes))
    assert rows and evaluate_results(annotations, tmp_path / "both.json") == evaluate_results(annotations, results)
    boxes = [{**row, "bbox": [0, 0, 1, 1]} for row in rows]
    (tmp_path / "both.json").write_text(json.dumps(boxes))
    assert read_results(tmp_path / "both.json").boxes_xywh.tolist() == [[0, 0, 1, 1]] * len(rows)


def test_a_run_longer_than_the_format_can_hold_is_refused(tmp_path):
    huge = {"size": [2**17, 2**16], "counts": [2**33]}
    row = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": huge}
    (tmp_path / "r.json").write_text(json.dumps([row]))
    with pytest.raises(ResultsError, match="entry 0"):
        read_results(tmp_path / "r.json")


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_masks_of_another_size_than_their_image_are_refused(tmp_path, backend):
    seed = next(s for s in range(20) if json.loads(random_case(np.random.default_rng(s), tmp_path)[1].read_text()))
    annotations, results = random_case(np.random.default_rng(seed), tmp_path)
    rows = json.loads(results.read_text())
    smaller = {"size": [HEIGHT // 2, WIDTH // 2], "counts": [0, HEIGHT * WIDTH // 4]}
    results.write_text(json.dumps([*rows, rows[0] | {"segmentation": smaller}]))
    with pytest.raises(EvaluationError, match=rf"1 masks .* image {rows[0]['image_id']}: 40 x 30 pixels, .* 80 x 60"):
        evaluate_results(annotations, results, backend)


def test_an_annotation_without_an_outline_is_judged_by_its_box_with_a_note(tmp_path):
    content = {
        "images": [{"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "a.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 10], "area": 200, "iscrowd": 0},
            {
                "id": 2, "image_id": 1, "category_id": 1, "bbox": [30, 30, 20, 10], "area": 100, "iscrowd": 0,
                "segmentation": [[30, 30, 50, 30, 50, 40]],
            },
        ],
        "categories": [{"id": 1, "name": "a"}],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    bits = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    bits[0, 6:16, 5:25] = 1
    bits[1] = mask.decode(mask.merge(mask.frPyObjects([[30, 30, 50, 30, 50, 40]], HEIGHT, WIDTH)))
    ones = np.ones(2, np.int64)
    boxes = np.array([[5, 6, 20, 10], [30, 30, 20, 10]], np.float32)
    detections = Detections(ones, ones, boxes, np.array([0.9, 0.8], np.float32), RunLengths.encode(bits))
    metrics = CocoEvaluator(read_coco(tmp_path / "a.json", masks=True)).evaluate(detections)
    assert metrics["segm_mAP"] == metrics["mAP"] == 1.0 and metrics["segm_per_class"] == {"a": 1.0}
    assert any("the box stands in" in note for note in metrics["notes"])
    assert "segm_mAP" not in CocoEvaluator(tmp_path / "a.json").evaluate(detections)
