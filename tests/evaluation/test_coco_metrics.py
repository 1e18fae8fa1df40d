"""COCO metrics over given images: known values, explanations, and refusals."""

import json

import numpy as np
import pytest

from data import AnnotationError, read_coco
from detection.evaluation import (
    METRIC_NAMES,
    CocoEvaluator,
    Detections,
    EvaluationError,
    evaluate_results,
    read_results,
    write_results,
)
from tests.evaluation.coco_cases import annotation, detections_of, evaluate, random_case, write_annotations

LARGE = [10, 10, 200, 100]
MEDIUM = [300, 10, 50, 50]
SMALL = [400, 400, 20, 20]


@pytest.fixture
def annotations(tmp_path):
    return write_annotations(
        tmp_path / "instances.json",
        [
            annotation(11, 1, 1, LARGE),
            annotation(12, 1, 5, MEDIUM),
            annotation(13, 2, 1, SMALL),
        ],
    )


PERFECT = [(1, 1, LARGE, 0.9), (1, 5, MEDIUM, 0.8), (2, 1, SMALL, 0.7)]


def test_perfect_detections_score_one_everywhere_and_need_no_notes(annotations):
    metrics = evaluate(annotations, detections_of(PERFECT))
    assert {name: metrics[name] for name in METRIC_NAMES} == dict.fromkeys(METRIC_NAMES, pytest.approx(1))
    assert metrics["per_class"] == {"cat": pytest.approx(1), "dog": pytest.approx(1)}
    assert metrics["notes"] == []


def test_the_twelve_figures_equal_cocoeval_run_by_hand(tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    detections = random_case(np.random.default_rng(5), tmp_path / "a.json", crowded_image=True)
    content = json.loads((tmp_path / "a.json").read_text())
    for entry in content["annotations"]:
        entry["id"] += 1  # COCOeval alone does not count id 0
    (tmp_path / "b.json").write_text(json.dumps(content))
    write_results(detections, tmp_path / "r.json")
    truth = COCO(str(tmp_path / "b.json"))
    judge = COCOeval(truth, truth.loadRes(str(tmp_path / "r.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    metrics = evaluate_results(tmp_path / "a.json", tmp_path / "r.json", backend="pycocotools")
    assert [metrics[name] for name in METRIC_NAMES] == judge.stats.tolist()
    for k, category in enumerate(judge.params.catIds):
        precision = judge.eval["precision"][:, :, k, 0, 2]
        expected = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert metrics["per_class"][truth.cats[category]["name"]] == pytest.approx(expected, abs=1e-12)
    assert 0 < metrics["mAP"] < 1


def test_metrics_of_a_written_file_are_those_of_the_detections_in_memory(tmp_path):
    detections = random_case(np.random.default_rng(8), tmp_path / "a.json", crowded_image=True)
    write_results(detections, tmp_path / "r.json")
    assert evaluate_results(tmp_path / "a.json", tmp_path / "r.json") == evaluate(tmp_path / "a.json", detections)


def test_only_the_given_images_are_evaluated(annotations):
    found_on_2 = detections_of([(2, 1, SMALL, 0.7)])
    assert evaluate(annotations, found_on_2)["AR_100"] < 1
    metrics = evaluate(annotations, found_on_2, image_ids=[3, 2])
    assert metrics["AR_100"] == pytest.approx(1)
    assert metrics["per_class"] == {"cat": pytest.approx(1), "dog": -1}


def test_images_without_boxes_count_their_false_detections(annotations):
    false_first = detections_of([*PERFECT, (3, 1, LARGE, 0.99)])
    assert evaluate(annotations, false_first)["mAP"] < 1
    without_3 = CocoEvaluator(annotations).evaluate(detections_of(PERFECT), image_ids=[1, 2])
    assert without_3["mAP"] == pytest.approx(1)


def test_a_detection_on_a_crowd_box_counts_neither_way(tmp_path):
    path = write_annotations(tmp_path / "a.json", [annotation(1, 1, 1, LARGE), annotation(2, 2, 1, LARGE, iscrowd=1)])
    on_crowd = (2, 1, [20, 20, 50, 50], 0.99)
    assert evaluate(path, detections_of([(1, 1, LARGE, 0.5), on_crowd]))["mAP"] == pytest.approx(1)


def test_no_detections_give_zero_where_there_are_boxes_and_a_note(annotations):
    metrics = evaluate(annotations, Detections.empty())
    assert [metrics[name] for name in METRIC_NAMES] == [0] * 12
    assert metrics["per_class"] == {"cat": 0, "dog": 0}
    assert any(note.startswith("no detections at all") for note in metrics["notes"])


def test_each_minus_one_has_its_note(annotations):
    metrics = CocoEvaluator(annotations).evaluate(detections_of([(2, 1, SMALL, 0.7)]), image_ids=[2])
    assert (metrics["mAP_m"], metrics["mAP_l"], metrics["AR_m"], metrics["per_class"]["dog"]) == (-1,) * 4
    notes = "\n".join(metrics["notes"])
    assert "mAP_m is not defined" in notes and "mAP_l is not defined" in notes
    assert "AP of class 'dog' is not defined" in notes
    assert "mAP_s" not in notes and "'cat'" not in notes


def test_many_absent_classes_share_one_note(tmp_path):
    categories = {i: f"kind {i}" for i in range(1, 31)}
    path = write_annotations(tmp_path / "a.json", [annotation(1, 1, 1, LARGE)], categories=categories)
    notes = [n for n in evaluate(path, Detections.empty())["notes"] if "classes is not defined" in n]
    assert len(notes) == 1
    assert notes[0].startswith("AP of 29 classes is not defined (-1 in files)") and notes[0].endswith(
        "kind 11 and 19 more"
    )


@pytest.mark.parametrize(
    ("boxes", "image_ids", "held"),
    [
        ([annotation(1, 1, 1, LARGE)], [3], "1 evaluated images hold no boxes"),
        ([annotation(1, 1, 1, LARGE)], [], "0 evaluated images hold no boxes"),
        ([annotation(1, 1, 1, LARGE, iscrowd=1)], None, "3 evaluated images hold only crowd boxes"),
    ],
)
def test_images_without_any_box_that_counts_give_minus_one_explained(tmp_path, boxes, image_ids, held):
    path = write_annotations(tmp_path / "a.json", boxes)
    found = detections_of([(1, 1, LARGE, 0.9)] if image_ids is None else [])
    metrics = evaluate(path, found, image_ids=image_ids)
    assert [metrics[name] for name in METRIC_NAMES] == [-1] * 12
    assert metrics["notes"] == [f"no figure is defined (-1 in files): the {held}"]


def test_missing_area_and_iscrowd_are_filled_in_with_a_note_and_the_file_stays(tmp_path):
    bare = [annotation(1, 1, 1, SMALL), annotation(2, 1, 1, LARGE)]
    for entry in bare:
        del entry["area"], entry["iscrowd"]
    path = write_annotations(tmp_path / "a.json", bare)
    before = path.read_bytes()
    metrics = evaluate(path, detections_of([(1, 1, SMALL, 0.9)]))
    assert metrics["AR_s"] == pytest.approx(1) and metrics["AR_l"] == 0
    notes = "\n".join(metrics["notes"])
    assert "2 annotations have no 'area': width x height" in notes
    assert "2 annotations have no 'iscrowd'" in notes
    assert path.read_bytes() == before


def test_evaluating_twice_gives_the_same_and_changes_nothing(annotations):
    evaluator = CocoEvaluator(annotations)
    detections = detections_of(PERFECT[:2])
    first = evaluator.evaluate(detections)
    evaluator.evaluate(detections_of(PERFECT), image_ids=[1, 2])
    assert evaluator.evaluate(detections) == first


@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_evaluation_prints_nothing(annotations, capfd, backend):
    evaluate(annotations, detections_of(PERFECT), backend=backend)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_detections_of_unknown_categories_count_for_nothing_and_are_noted(annotations):
    metrics = evaluate(annotations, detections_of([*PERFECT, (1, 77, LARGE, 1.0)]))
    assert metrics["mAP"] == pytest.approx(1)
    assert metrics["notes"] == [
        "1 detections have category ids that the annotation file lacks (77): they count for nothing"
    ]


@pytest.mark.parametrize(
    ("rows", "image_ids", "message"),
    [
        ([(99, 1, LARGE, 0.9)], None, r"1 detections are on 1 images .*ids 99"),
        (PERFECT, [1], r"among the 1 evaluated images .*ids 2"),
        ([], [1, 2, 2], r"1 images were evaluated more than once \(ids 2\)"),
        ([], [1, 8], r"not in .*instances\.json \(ids 8\)"),
        ([(1, 1, [np.inf, 0, 1, 1], 0.9)], None, "diverged"),
    ],
)
def test_images_and_detections_that_do_not_fit_together_are_refused(annotations, rows, image_ids, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(annotations, detections_of(rows), image_ids=image_ids)


def test_a_file_without_boxes_is_known_beforehand_and_refused(tmp_path):
    path = write_annotations(tmp_path / "image_info_test.json", [])
    evaluator = CocoEvaluator(path)
    assert not evaluator.has_boxes
    with pytest.raises(EvaluationError, match="holds no boxes"):
        evaluator.evaluate(Detections.empty())


def test_what_training_refuses_in_an_annotation_file_is_refused_here_too(tmp_path):
    path = write_annotations(tmp_path / "instances.json", [annotation(1, 44, 1, LARGE)])
    with pytest.raises(
        AnnotationError, match=r'instances\.json: annotations\[0\].*"image_id" is 44, none of the images'
    ):
        evaluate(path, Detections.empty())


def test_arrays_that_were_read_for_a_model_of_another_class_order_give_what_their_file_gives(tmp_path):
    detections = random_case(np.random.default_rng(3), tmp_path / "a.json", crowded_image=True)
    names = read_coco(tmp_path / "a.json").class_names
    assert len(names) > 2
    arrays = read_coco(tmp_path / "a.json", names[::-1], cache_dir=tmp_path)
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert evaluate(arrays, detections) == evaluate(tmp_path / "b.json", detections)


def test_results_read_back_are_double_precision_so_that_close_scores_do_not_tie(tmp_path, annotations):
    rows = [
        {"image_id": 1, "category_id": 1, "bbox": [500, 300, 50, 50], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": LARGE, "score": 0.9 + 1e-12},
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    assert len(np.unique(read_results(tmp_path / "r.json").scores)) == 2
    metrics = CocoEvaluator(annotations).evaluate(read_results(tmp_path / "r.json"), image_ids=[1])
    assert metrics["per_class"]["cat"] == pytest.approx(1)


CURVE_CASE = [
    (1, 1, [10, 10, 40, 40], 0.9),  # cat, found exactly
    (2, 1, [100, 100, 40, 40], 0.8),  # no cat there
    (1, 5, [10, 100, 40, 40], 0.7),  # dog, found exactly
    (2, 5, [10, 10, 40, 30], 0.6),  # dog, at IoU 0.75
]


@pytest.fixture
def curves_evaluator(tmp_path):
    boxes = [(1, 1, [10, 10, 40, 40]), (1, 1, [100, 10, 40, 40]), (1, 5, [10, 100, 40, 40]), (2, 5, [10, 10, 40, 40])]
    annotations = [annotation(number, *box) for number, box in enumerate(boxes, start=1)]
    categories = {1: "cat", 5: "dog", 7: "cow"}
    return CocoEvaluator(write_annotations(tmp_path / "a.json", annotations, image_ids=(1, 2), categories=categories))


def test_the_area_under_a_curve_is_the_average_precision(curves_evaluator):
    metrics = curves_evaluator.evaluate(detections_of(CURVE_CASE))
    curves = curves_evaluator.curves
    assert set(curves) == {"all/IoU 0.50", "all/IoU 0.75", "class/cat", "class/dog"}
    assert curves["all/IoU 0.50"][0].mean() == pytest.approx(metrics["mAP_50"])
    assert curves["all/IoU 0.75"][0].mean() == pytest.approx(metrics["mAP_75"])
    precision, recall = curves["class/cat"]
    assert recall[0] == 1 and recall[-1] == 0
    np.testing.assert_allclose(precision, np.where(recall <= 0.5, 1.0, 0.0))


def test_only_the_last_evaluation_counts_and_without_boxes_there_is_no_curve(curves_evaluator):
    assert curves_evaluator.curves == {}
    curves_evaluator.evaluate(detections_of(CURVE_CASE))
    curves_evaluator.evaluate(detections_of(CURVE_CASE[3:]), image_ids=[2])
    assert set(curves_evaluator.curves) == {"all/IoU 0.50", "all/IoU 0.75", "class/dog"}
