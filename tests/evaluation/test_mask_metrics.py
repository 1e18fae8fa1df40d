"""Metrics of masks: equal to pycocotools run by itself on the files, with either backend."""

import contextlib
import importlib.util
import io
import json

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.coco.annotations import read_coco
from data.coco.run_lengths import RunLengths
from detection.evaluation import (
    METRIC_NAMES,
    CocoEvaluator,
    Detections,
    ResultsError,
    evaluate_results,
    read_results,
    write_mask_results,
)
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
