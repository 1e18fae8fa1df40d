"""The kind of each error, what mending it would gain, and confused classes."""

import importlib.util

import numpy as np
import pytest

from detection.evaluation import CocoEvaluator, Detections
from detection.evaluation.analysis import confusion_matrix, error_split
from detection.evaluation.error_types import Outcome, sort_outcomes
from tests.evaluation.coco_cases import BOX, CAT, DOG, FAR, annotation, detections_of, random_case, write_annotations


def outcomes_of(tmp_path, annotations, rows):
    truth = CocoEvaluator(write_annotations(tmp_path / "a.json", annotations)).truth
    return sort_outcomes(truth, detections_of(rows))


@pytest.mark.parametrize(
    ("category", "box", "expected"),
    [
        (CAT, BOX, Outcome.CORRECT),
        (CAT, [120, 100, 100, 100], Outcome.CORRECT),  # IoU 2/3
        (CAT, [150, 100, 100, 100], Outcome.LOCALISATION),  # IoU 1/3
        (DOG, [120, 100, 100, 100], Outcome.CLASS),
        (DOG, [150, 100, 100, 100], Outcome.BOTH),
        (CAT, [190, 100, 100, 100], Outcome.BACKGROUND),  # IoU 1/19
        (DOG, [190, 100, 100, 100], Outcome.BACKGROUND),
        (CAT, FAR, Outcome.BACKGROUND),
    ],
)
def test_overlap_and_class_decide_the_kind(tmp_path, category, box, expected):
    outcomes = outcomes_of(tmp_path, [annotation(1, 1, CAT, BOX)], [(1, category, box, 0.9)])
    assert outcomes.kinds.tolist() == [expected]
    assert outcomes.targets.tolist() == [-1 if expected == Outcome.BACKGROUND else 0]


def test_the_less_sure_of_two_on_one_box_is_a_duplicate(tmp_path):
    rows = [(1, CAT, BOX, 0.5), (1, CAT, [105, 100, 100, 100], 0.9)]
    outcomes = outcomes_of(tmp_path, [annotation(1, 1, CAT, BOX)], rows)
    assert outcomes.kinds.tolist() == [Outcome.DUPLICATE, Outcome.CORRECT]


def test_a_second_box_close_by_turns_a_duplicate_into_a_match(tmp_path):
    boxes = [annotation(1, 1, CAT, BOX), annotation(2, 1, CAT, [110, 100, 100, 100])]
    rows = [(1, CAT, BOX, 0.5), (1, CAT, BOX, 0.9)]
    outcomes = outcomes_of(tmp_path, boxes, rows)
    assert outcomes.kinds.tolist() == [Outcome.CORRECT, Outcome.CORRECT]
    assert outcomes.targets.tolist() == [1, 0]


def test_detections_in_a_crowd_of_their_class_are_ignored_and_of_another_class_are_not(tmp_path):
    crowd = annotation(1, 1, CAT, [0, 0, 300, 300], iscrowd=1)
    rows = [(1, CAT, [20, 20, 30, 30], 0.9), (1, DOG, [20, 20, 30, 30], 0.8)]
    outcomes = outcomes_of(tmp_path, [crowd], rows)
    assert outcomes.kinds.tolist() == [Outcome.IGNORED, Outcome.BACKGROUND]
    assert not outcomes.missed.any()


def test_only_the_hundred_surest_of_an_image_and_class_count(tmp_path):
    scores = np.random.default_rng(0).permutation(130) / 130
    rows = [(1, CAT, FAR, float(s)) for s in scores] + [(2, CAT, FAR, 0.0), (1, DOG, FAR, 0.0)]
    outcomes = outcomes_of(tmp_path, [annotation(1, 1, CAT, BOX)], rows)
    counted = outcomes.kinds != Outcome.IGNORED
    np.testing.assert_array_equal(counted[:130], scores >= np.sort(scores)[30])
    assert counted[130:].all()


def test_a_box_is_missed_when_no_detection_even_answers_to_it(tmp_path):
    boxes = [annotation(i, i, CAT, BOX) for i in (1, 2, 3)]
    rows = [(1, DOG, BOX, 0.9), (2, CAT, [150, 100, 100, 100], 0.9), (3, DOG, [150, 100, 100, 100], 0.9)]
    outcomes = outcomes_of(tmp_path, boxes, rows)
    assert outcomes.missed.tolist() == [False, False, True]


@pytest.mark.parametrize("block", range(4))
def test_ap_50_of_the_split_is_cocoevals(tmp_path, block):
    checked = 0
    for seed in range(20 * block, 20 * block + 20):
        detections = random_case(np.random.default_rng(seed), tmp_path / "a.json", crowded_image=seed % 5 == 0)
        evaluator = CocoEvaluator(tmp_path / "a.json")
        if not evaluator.has_boxes:
            continue
        outcomes = sort_outcomes(evaluator.truth, detections)
        split = error_split(outcomes)
        assert split["AP_50"] == pytest.approx(evaluator.evaluate(detections)["mAP_50"], abs=1e-12), seed
        checked += 0 < split["AP_50"] < 1
    assert checked >= 5


@pytest.mark.skipif(importlib.util.find_spec("hotcoco") is None, reason="hotcoco is not installed")
def test_counts_and_gains_are_tides_as_hotcoco_computes_them(tmp_path):
    import hotcoco

    checked = 0
    for seed in range(60):  # no crowds and no ties, which TIDE leaves open
        detections = random_case(np.random.default_rng(seed), tmp_path / "a.json", crowds=False)
        scores = np.random.default_rng(seed).permutation(len(detections)) / (len(detections) + 1)
        detections = Detections(detections.image_ids, detections.category_ids, detections.boxes_xywh, scores)
        truth = CocoEvaluator(tmp_path / "a.json").truth
        if not truth.num_boxes or not len(detections):
            continue
        ours = error_split(sort_outcomes(truth, detections))
        loaded = hotcoco.COCO(str(tmp_path / "a.json"))
        rows = np.column_stack(
            [detections.image_ids, detections.boxes_xywh, detections.scores, detections.category_ids]
        )
        judge = hotcoco.COCOeval(loaded, loaded.load_res(rows.astype(np.float64)), "bbox")
        judge.evaluate()
        theirs = judge.tide_errors()
        names = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
        assert list(ours["counts"].values()) == [theirs["counts"][n] for n in names], seed
        gains = [theirs["delta_ap"][n] for n in names]
        assert list(ours["AP_50_gain"].values()) == pytest.approx(gains, abs=1e-9), seed
        checked += sum(ours["counts"].values()) > 5
    assert checked >= 20


def test_mending_everything_of_one_kind_gains_what_it_costs(tmp_path):
    boxes = [annotation(1, 1, CAT, BOX), annotation(2, 2, CAT, BOX)]
    correct = (1, CAT, BOX, 0.5)
    for row, kind in [
        ((2, DOG, BOX, 0.9), "class"),
        ((2, CAT, [150, 100, 100, 100], 0.9), "localisation"),
        ((2, DOG, [150, 100, 100, 100], 0.1), "missed"),
    ]:
        outcomes = outcomes_of(tmp_path, boxes, [correct, row])
        split = error_split(outcomes)
        assert split["AP_50"] < 1
        assert split["AP_50"] + split["AP_50_gain"][kind] == pytest.approx(1), kind


def test_the_confusion_matrix_counts_each_box_once(tmp_path):
    boxes = [annotation(1, 1, CAT, BOX), annotation(2, 2, CAT, BOX), annotation(3, 3, DOG, BOX)]
    rows = [
        (1, CAT, BOX, 0.9),  # found
        (1, DOG, BOX, 0.8),  # the box is taken: background found as dog
        (2, DOG, BOX, 0.7),  # cat found as dog
        (2, DOG, BOX, 0.6),  # the box is taken
        (3, CAT, FAR, 0.5),  # background found as cat; the dog is missed
        (3, DOG, BOX, 0.1),  # not shown
    ]
    outcomes = outcomes_of(tmp_path, boxes, rows)
    matrix = confusion_matrix(outcomes, outcomes.detections.scores > 0.2)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 1], [1, 2, 0]]


def test_rows_of_the_confusion_matrix_add_up_to_the_boxes_and_columns_to_the_detections(tmp_path):
    detections = random_case(np.random.default_rng(2), tmp_path / "a.json", crowds=False)
    truth = CocoEvaluator(tmp_path / "a.json").truth
    outcomes = sort_outcomes(truth, detections)
    matrix = confusion_matrix(outcomes, np.ones(len(detections), bool))
    for k, category in enumerate(truth.category_ids):
        assert matrix[k].sum() == (truth.box_labels == k).sum()
        assert matrix[:, k].sum() == (detections.category_ids == category).sum()
    assert matrix.sum() > 10
