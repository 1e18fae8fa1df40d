"""Metrics that explain, and the program that writes them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.evaluation import evaluate_results, write_results
from detection.evaluation.analysis import analyze_results, average_precision, best_f1
from detection.evaluation.html_report import html_report, short_count
from tests.evaluation.coco_cases import BOX, CAT, DOG, FAR, annotation, detections_of, random_case, write_annotations

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def case(tmp_path):
    """Cats: two boxes, both found, one false alarm. Dogs: one box, taken for a cat. Birds: none."""
    annotations = write_annotations(
        tmp_path / "instances.json",
        [annotation(1, 1, CAT, BOX), annotation(2, 2, CAT, BOX), annotation(3, 3, DOG, BOX)],
        categories={CAT: "cat", DOG: "dog & <wolf>", 9: "bird"},
    )
    rows = [(1, CAT, BOX, 0.9), (2, CAT, BOX, 0.75), (2, CAT, FAR, 0.5), (3, CAT, BOX, 0.25), (3, DOG, FAR, 0.1)]
    write_results(detections_of(rows), tmp_path / "results.json")
    return annotations, tmp_path / "results.json"


@pytest.mark.parametrize(
    ("scores", "correct", "num_boxes", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], 2, (0.8, 0.7, 2 / 3, 1)),
        ([0.5, 0.5, 0.5], [1, 0, 0], 1, (0.5, 0.5, 1 / 3, 1)),  # a threshold cannot part a tie
        ([0.5], [0], 0, None),
        ([], [], 3, None),
    ],
)
def test_f1_is_best_where_counting_says(scores, correct, num_boxes, expected):
    point = best_f1(np.array(scores), np.array(correct, dtype=bool), num_boxes)
    names = ("f1", "threshold", "precision", "recall")
    assert point == (expected and pytest.approx(dict(zip(names, expected, strict=True))))


def test_average_precision_of_one_hit_in_two_boxes_reaches_half_the_recall_points():
    assert average_precision(np.array([0.9]), np.array([True]), 2) == pytest.approx(51 / 101)
    assert average_precision(np.zeros(0), np.zeros(0, bool), 2) == 0


def test_the_analysis_knows_each_class(case):
    analysis = analyze_results(*case)
    cat, dog, bird = analysis["classes"]
    assert (cat["name"], cat["num_boxes"], cat["num_detections"]) == ("cat", 2, 4)
    assert (cat["best_f1"], cat["best_f1_threshold"]) == (pytest.approx(1), pytest.approx(0.75))
    assert cat["errors"] == {"class": 1, "localisation": 0, "both": 0, "duplicate": 0, "background": 1, "missed": 0}
    assert dog["best_f1"] == 0 and dog["errors"]["background"] == 1 and dog["errors"]["missed"] == 0
    assert bird["AP"] == -1 and bird["best_f1"] is None
    assert analysis["metrics"] == evaluate_results(*case)
    assert [row["AP"] for row in analysis["classes"]] == list(analysis["metrics"]["per_class"].values())


def test_figures_of_the_classes_average_to_cocos(tmp_path):
    write_results(random_case(np.random.default_rng(57), tmp_path / "a.json"), tmp_path / "r.json")
    analysis = analyze_results(tmp_path / "a.json", tmp_path / "r.json")
    names = {"AP": "mAP", "AP_50": "mAP_50", "AP_75": "mAP_75", "AP_s": "mAP_s", "AP_l": "mAP_l", "AR_100": "AR_100"}
    for ours, cocos in names.items():
        values = [row[ours] for row in analysis["classes"] if row[ours] > -1]
        assert np.mean(values) == pytest.approx(analysis["metrics"][cocos], abs=1e-9), ours
    curves = analysis["precision_recall"]["mean"]
    assert np.mean(curves["iou_50"]) == pytest.approx(analysis["metrics"]["mAP_50"], abs=1e-4)
    assert np.mean(curves["iou_50_95"]) == pytest.approx(analysis["metrics"]["mAP"], abs=1e-4)


def test_the_score_threshold_chooses_what_the_confusion_matrix_shows(case):
    at_best = analyze_results(*case)["confusion_matrix"]
    assert at_best["labels"] == ["cat", "dog & <wolf>", "bird", "background"]
    assert at_best["matrix"] == [[2, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    lower = analyze_results(*case, score_threshold=0.2)["confusion_matrix"]
    assert lower["matrix"] == [[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_worst_images_come_worst_first_with_what_is_wrong(case):
    worst = analyze_results(*case, score_threshold=0.0)["worst_images"]
    assert [(w["image_id"], w["correct"], w["wrong"], w["missed"]) for w in worst] == [(3, 0, 2, 1), (2, 1, 1, 0)]
    assert [(b["kind"], b["name"], b["truth"]) for b in worst[0]["boxes"]] == [
        ("missed", "dog & <wolf>", "dog & <wolf>"),
        ("class", "cat", "dog & <wolf>"),
        ("background", "dog & <wolf>", None),
    ]
    assert analyze_results(*case, score_threshold=0.0, num_worst_images=1)["worst_images"] == worst[:1]


def test_the_best_images_have_few_errors_and_are_not_among_the_worst(case):
    of_all = analyze_results(*case, score_threshold=0.0)
    assert [image["image_id"] for image in of_all["worst_images"]] == [3, 2]
    assert [(image["image_id"], image["correct"], image["f1"]) for image in of_all["best_images"]] == [(1, 1, 1.0)]
    one_worst = analyze_results(*case, score_threshold=0.0, num_worst_images=1)
    assert [image["image_id"] for image in one_worst["best_images"]] == [1, 2]


def test_the_confusion_matrix_shows_its_numbers_and_each_column_is_explained(case):
    page = html_report(analyze_results(*case, score_threshold=0.2), title="t")
    assert re.findall(r"<text [^>]*pointer-events:none[^>]*>([^<]+)</text>", page) == ["2", "1", "1"]
    for heading in re.findall(r"<th[^>]*>([^<]+)</th>", page[page.index("<h2>Classes") : page.index("<h2>Confusions")]):
        assert heading == "class" or f"<dt>{heading}</dt>" in page


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (9949, "9.9k"), (9950, "10k"), (999_499, "999k"), (999_500, "1.0M")],
)
def test_counts_are_short(number, text):
    assert short_count(number) == text


def test_an_analysis_is_plain_json_also_without_any_detection(case, tmp_path):
    write_results(detections_of([]), tmp_path / "empty.json")
    for results in (case[1], tmp_path / "empty.json"):
        analysis = analyze_results(case[0], results)
        assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis
        assert html_report(analysis, title="t").count("<h2>") == 6
    assert analysis["errors"]["counts"]["missed"] == 3


def test_the_report_escapes_names_and_needs_no_other_file(case):
    def image_of(name):
        if name == "3.png":
            raise FileNotFoundError(f"no {name} here")
        return np.zeros((480, 640, 3), np.uint8)

    page = html_report(analyze_results(*case, score_threshold=0.0), title="a <b>", image_of=image_of)
    assert "dog &amp; &lt;wolf&gt;" in page and "<wolf>" not in page and "a &lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 2 and "no 3.png here" in page
    for outside in ("http://", "https://", "src="):
        assert outside not in page


def run_program(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "analyze_results.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_the_program_writes_json_images_and_a_report_with_the_worst_images(case, tmp_path):
    pytest.importorskip("matplotlib")
    images = tmp_path / "images"
    images.mkdir()
    for i in (1, 2, 3):
        Image.new("RGB", (640, 480), (i, 0, 0)).save(images / f"{i}.png")
    out = tmp_path / "out"
    done = run_program(
        *("--annotations", case[0], "--results", case[1], "--images", images, "--output-dir", out),
        *("--score-threshold", "0.2"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "analysis.json").read_text()) == analyze_results(*case, score_threshold=0.2)
    assert (out / "report.html").read_text().count("data:image/jpeg;base64,") == 3
    for name in ("precision_recall", "error_kinds", "confusion_matrix", "class_ap"):
        assert Image.open(out / f"{name}.png").size[0] > 200
    assert "note: AP of class 'bird' is not defined" in done.stdout


@pytest.mark.slow
def test_the_program_ends_with_one_line_about_what_is_wrong(case, tmp_path):
    missing = run_program("--annotations", case[0], "--results", tmp_path / "none.json")
    assert missing.returncode == 2 and "no such results file" in missing.stderr and "Traceback" not in missing.stderr
    other = run_program("--annotations", case[0], "--results", case[1], "--images", tmp_path)
    assert other.returncode == 2 and "holds none of the images to show" in other.stderr
    for options in (("--results", tmp_path), ("--results", case[1], "--output-dir", case[1])):
        done = run_program("--annotations", case[0], *options)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
