"""LVIS's rules: equal to the lvis package's own evaluator to the last bit, boxes and masks, by each backend."""

import copy
import importlib.util
import json
import logging
import sys
import types

import numpy as np
import pytest
from pycocotools import mask as pycocotools_mask

from data import read_coco
from detection.evaluation import (
    LVIS_METRIC_NAMES,
    METRIC_NAMES,
    CocoEvaluator,
    describe_judging,
    evaluate_results,
    metric_names,
    read_results,
)
from detection.evaluation.analysis import analyze_results

needs_hotcoco = pytest.mark.skipif(
    importlib.util.find_spec("hotcoco") is None, reason="the optional package hotcoco is not installed"
)
SIDE = 200


def random_case(seed, *, masks=False):
    """An LVIS file's content and a results file's: ties, boxes without area, classes not searched for, images with more
    than 300 detections."""
    rng = np.random.default_rng(seed)
    names = [f"class {k}" for k in range(rng.integers(1, 8))]
    ids = (rng.permutation(30)[: len(names)] + 1).tolist()
    categories = [
        {"id": i, "name": name, "frequency": str(rng.choice(["r", "c", "f"]))}
        for i, name in zip(ids, names, strict=True)
    ]
    images, annotations, results = [], [], []
    for image in rng.permutation(50)[: rng.integers(1, 8)].tolist():
        negative = [i for i in ids if rng.random() < 0.3]
        others = [i for i in ids if i not in negative]
        partly = [i for i in others if rng.random() < 0.3]
        images.append({"id": image, "width": SIDE, "height": SIDE, "file_name": f"{image}.png"})
        images[-1] |= {"neg_category_ids": negative, "not_exhaustive_category_ids": partly}
        boxes = []
        for _ in range(int(rng.integers(0, 7)) if others else 0):
            box = [*rng.integers(0, 90, 2).tolist(), *rng.integers(0, rng.choice([10, 50, 110]), 2).tolist()]
            boxes.append(box)
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": int(rng.choice(others))})
            annotations[-1] |= {"bbox": box, "area": box[2] * box[3] * float(rng.choice([1, 0.5]))}
            if rng.random() < 0.1:
                annotations[-1]["ignore"] = 1
        for _ in range(400 if seed % 20 == 0 and not masks else int(rng.choice([0, 5, 20]))):
            if boxes and rng.random() < 0.7:
                box = np.array(boxes[rng.integers(len(boxes))]) + rng.integers(-3, 4, 4) * rng.integers(0, 2)
                box = [max(side, 0) for side in box.tolist()]
            else:
                box = rng.integers(0, 100, 4).tolist()
            category = int(rng.choice(annotations[-1]["category_id"] if boxes and rng.random() < 0.6 else ids))
            results.append({"image_id": image, "category_id": category, "bbox": box, "score": rng.integers(9) / 8})
    for each in annotations + results if masks else ():
        each["segmentation"] = rectangle(each)
        if "score" in each:
            del each["bbox"]
        else:
            each["area"] = float(pycocotools_mask.area(each["segmentation"]))
    return {"images": images, "categories": categories, "annotations": annotations}, results


def rectangle(entry):
    x, y, w, h = entry["bbox"]
    bitmap = np.zeros((SIDE, SIDE), np.uint8, order="F")
    bitmap[y : y + max(h, 1), x : x + max(w, 1)] = 1
    run_lengths = pycocotools_mask.encode(bitmap)
    return {"size": run_lengths["size"], "counts": run_lengths["counts"].decode()}


@pytest.fixture
def judge(monkeypatch):
    """The lvis package's evaluator: (content, results, kind) -> its thirteen figures."""
    if importlib.util.find_spec("lvis") is None:
        pytest.skip("the package lvis is not installed")
    monkeypatch.setattr(np, "float", float, raising=False)  # numpy has given the name up since
    monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))  # it only draws with OpenCV
    from lvis import LVIS, LVISEval, LVISResults

    monkeypatch.setattr(LVIS, "__init__", lambda self, content: None)  # it reads files alone
    monkeypatch.setattr(logging.getLogger("lvis"), "disabled", True)
    monkeypatch.setattr(logging.getLogger("lvis.results"), "disabled", True)

    def evaluate(content, results, kind):
        truth = LVIS(None)
        truth.logger, truth.dataset = logging.getLogger("lvis"), copy.deepcopy(content)
        truth._create_index()
        evaluation = LVISEval(truth, LVISResults(truth, copy.deepcopy(results)), kind)
        evaluation.run()
        return [float(value) for value in evaluation.get_results().values()]

    return evaluate


def figures_of(tmp_path, content, results, backend, prefix=""):
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "r.json").write_text(json.dumps(results))
    metrics = evaluate_results(tmp_path / "a.json", tmp_path / "r.json", backend=backend)
    return [metrics[prefix + name] for name in LVIS_METRIC_NAMES]


@needs_hotcoco
@pytest.mark.parametrize("block", range(2))
def test_figures_of_boxes_equal_the_lvis_packages_to_the_last_bit(tmp_path, judge, block):
    between = 0
    for seed in range(100 * block, 100 * block + 100):
        content, results = random_case(seed)
        if results and content["annotations"]:  # without results the package fails
            expected = judge(content, results, "bbox")
            for backend in ("pycocotools", "hotcoco"):
                assert figures_of(tmp_path, content, results, backend) == expected, f"case {seed}, {backend}"
            between += 0 < expected[0] < 1
    assert between > 40, "the cases were meant to be neither all right nor all wrong"


@needs_hotcoco
def test_figures_of_masks_equal_the_lvis_packages_to_the_last_bit(tmp_path, judge):
    for seed in range(30):
        content, results = random_case(seed, masks=True)
        if results and content["annotations"]:
            expected = judge(content, results, "segm")
            for backend in ("pycocotools", "hotcoco"):
                found = figures_of(tmp_path, content, results, backend, "segm_")
                assert found == expected, f"case {seed}, {backend}"


def test_an_image_is_judged_for_the_classes_it_was_searched_for(tmp_path):
    box = {"bbox": [10, 10, 50, 50], "score": 0.5}
    categories = [{"id": i, "name": f"class {i}", "frequency": "rcf"[i - 1]} for i in (1, 2, 3)]
    image = {"id": 1, "width": 100, "height": 100, "file_name": "1.png"}
    content = {
        "images": [image | {"neg_category_ids": [2], "not_exhaustive_category_ids": [1]}],
        "categories": categories,
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500}],
    }
    found = [box | {"image_id": 1, "category_id": 1}]
    spared = [box | {"image_id": 1, "category_id": category, "score": 0.9} for category in (1, 3)]
    spared[0] = spared[0] | {"bbox": [70, 70, 20, 20]}  # of a class that has more there than is annotated
    for backend in ("pycocotools", "auto"):
        figures = dict(zip(LVIS_METRIC_NAMES, figures_of(tmp_path, content, spared + found, backend), strict=True))
        assert (figures["mAP"], figures["mAP_r"], figures["mAP_c"]) == (pytest.approx(1), pytest.approx(1), -1)
    assert metric_names(read_coco(tmp_path / "a.json")) == LVIS_METRIC_NAMES
    for entry in content["images"]:
        del entry["neg_category_ids"], entry["not_exhaustive_category_ids"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    evaluator = CocoEvaluator(tmp_path / "a.json")
    metrics = evaluator.evaluate(read_results(tmp_path / "r.json"))
    assert metrics["mAP"] < 0.6 and set(METRIC_NAMES) < set(metrics)


def test_the_analysis_counts_more_than_a_hundred_detections_of_a_class_in_an_image(tmp_path):
    boxes = [[10 * number, 0, 8, 40] for number in range(150)]
    image = {"id": 1, "file_name": "a.jpg", "height": 600, "width": 2000}
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": 320}
        for number, box in enumerate(boxes, start=1)
    ]
    content = {
        "images": [image | {"neg_category_ids": [], "not_exhaustive_category_ids": []}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a", "frequency": "f"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    analysis = analyze_results(tmp_path / "a.json", tmp_path / "r.json")
    assert analysis["errors"]["AP_50"] == analysis["metrics"]["mAP_50"] == 1.0
    assert analysis["errors"]["counts"]["missed"] == 0


def test_the_start_tells_what_pycocotools_will_cost_on_a_large_set(tmp_path):
    content, _ = random_case(1)
    (tmp_path / "a.json").write_text(json.dumps(content))
    annotations = read_coco(tmp_path / "a.json")
    assert not any("pycocotools" in line for line in describe_judging(annotations, "pycocotools", 100))
    told = describe_judging(annotations, "pycocotools", 10_000_000)[-1]
    assert "minutes" in told and "pip install hotcoco" in told
