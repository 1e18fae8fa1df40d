"""hotcoco equals pycocotools, the judge, on random cases; choosing between them."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.evaluation import CocoEvaluator, Detections, EvaluationError, backends, resolve_backend
from detection.evaluation.backends import (
    Accumulated,
    accumulate,
    accumulate_with_hotcoco,
    accumulate_with_pycocotools,
)
from detection.evaluation.coco_metrics import figures_of
from tests.evaluation.coco_cases import annotation, detections_of, random_case, write_annotations

needs_hotcoco = pytest.mark.skipif(
    importlib.util.find_spec("hotcoco") is None, reason="the optional package hotcoco is not installed"
)


def assert_backends_agree(path, detections):
    truth = CocoEvaluator(path).truth
    judge = accumulate_with_pycocotools(truth, detections)
    fast = accumulate_with_hotcoco(truth, detections)
    by_class = accumulate("pycocotools", truth, detections)
    for field in ("precision", "recall"):
        for other in (fast, by_class):
            np.testing.assert_array_equal(getattr(other, field), getattr(judge, field), err_msg=field, strict=True)
    return figures_of(judge, truth)


@needs_hotcoco
@pytest.mark.parametrize("block", range(10))
def test_hotcoco_equals_pycocotools_to_the_last_bit_on_random_cases(tmp_path, block):
    found = 0
    for seed in range(block * 30, block * 30 + 30):
        detections = random_case(np.random.default_rng(seed), tmp_path / "a.json", crowded_image=seed % 10 == 0)
        found += 0 < assert_backends_agree(tmp_path / "a.json", detections)["mAP"] < 1
    assert found >= 5, "the cases were meant to be neither all right nor all wrong"


coordinate = st.integers(0, 6).map(lambda i: 8.0 * i)
length = st.integers(0, 6).map(lambda i: 16.0 * i)
box = st.tuples(coordinate, coordinate, length, length)
truth_row = st.tuples(st.integers(1, 3), st.sampled_from([1, 5]), box, st.booleans(), st.sampled_from([0, 1, 2]))
detection_row = st.tuples(st.integers(1, 3), st.sampled_from([1, 5]), box, st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@needs_hotcoco
@settings(max_examples=150, deadline=None)
@given(truths=st.lists(truth_row, max_size=8), rows=st.lists(detection_row, max_size=12))
def test_hotcoco_equals_pycocotools_on_a_coarse_grid_of_boxes_where_everything_ties(tmp_path_factory, truths, rows):
    path = tmp_path_factory.mktemp("case") / "a.json"
    write_annotations(
        path,
        [
            annotation(i, image, category, box, iscrowd=int(crowd), area=box[2] * box[3] * scale)
            for i, (image, category, box, crowd, scale) in enumerate(truths)
        ],
    )
    assert_backends_agree(path, detections_of(rows))


@needs_hotcoco
def test_hotcoco_equals_pycocotools_without_detections_and_on_no_images(tmp_path):
    path = write_annotations(tmp_path / "a.json", [annotation(0, 1, 1, [0, 0, 9, 9])])
    assert_backends_agree(path, Detections.empty())
    both = CocoEvaluator(path, backend="both")
    assert both.evaluate(Detections.empty(), image_ids=[])["mAP"] == -1
    assert both.evaluate(Detections.empty(), image_ids=[2])["mAP"] == -1


@needs_hotcoco
def test_metrics_do_not_depend_on_the_backend(tmp_path):
    detections = random_case(np.random.default_rng(3), tmp_path / "a.json", crowded_image=True)
    metrics = [
        CocoEvaluator(tmp_path / "a.json", backend=b).evaluate(detections)
        for b in ("pycocotools", "hotcoco", "both", "auto")
    ]
    assert all(m == metrics[0] for m in metrics)
    assert resolve_backend("auto") == "hotcoco"


@needs_hotcoco
def test_both_raises_and_names_the_figure_when_the_backends_differ(tmp_path, monkeypatch):
    def slightly_wrong(truth, detections, *rest, **kind):
        right = accumulate_with_pycocotools(truth, detections, *rest, **kind)
        return Accumulated(right.precision, right.recall + 1e-6)

    detections = random_case(np.random.default_rng(3), tmp_path / "a.json")
    monkeypatch.setattr(backends, "accumulate_with_hotcoco", slightly_wrong)
    with pytest.raises(EvaluationError, match=r"disagree on .*a\.json: recall\["):
        CocoEvaluator(tmp_path / "a.json", backend="both").evaluate(detections)


def test_without_hotcoco_auto_is_pycocotools_and_asking_for_it_or_an_unknown_one_says_what_there_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_backend("auto") == "pycocotools"
    for name in ("hotcoco", "both"):
        with pytest.raises(EvaluationError, match="pip install hotcoco"):
            resolve_backend(name)
    with pytest.raises(EvaluationError, match="unknown evaluation backend 'fast'.*auto, pycocotools"):
        resolve_backend("fast")
