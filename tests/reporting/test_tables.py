import math

import pytest

from detection.reporting import sparkline, summary_table, validation_table

METRICS = {"mAP": 0.412, "mAP_50": 0.6, "mAP_75": 0.4, "mAP_s": -1.0, "mAP_m": 0.4, "mAP_l": 0.5, "AR_100": 0.55}


def row(table, name):
    (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
    return line.split()


def test_a_validation_table_shows_changes_to_the_last_and_the_best():
    table = validation_table(METRICS, METRICS | {"mAP": 0.4}, METRICS | {"mAP": 0.4304})
    assert row(table, "mAP")[1:4] == ["0.412", "+0.012", "-0.018"]
    assert row(table, "mAP_50")[1:4] == ["0.600", "+0.000", "+0.000"]
    assert validation_table(METRICS).splitlines()[0].split() == ["now"]


def test_minus_one_is_a_dash_and_explained():
    table = validation_table(METRICS, METRICS)
    assert row(table, "mAP_s")[1:3] == ["-", "-"]
    assert "-1.000" not in table
    assert "undefined" in table
    assert "undefined" not in validation_table(METRICS | {"mAP_s": 0.1})


def test_notes_stand_below_the_table_in_place_of_the_general_one():
    table = validation_table(METRICS | {"notes": ["no small objects in val.json"]})
    assert table.splitlines()[-1] == "note: no small objects in val.json"
    assert "undefined" not in table


def test_few_classes_are_all_listed_and_of_many_the_best_and_the_worst():
    table = validation_table(METRICS | {"per_class": {"cat": 0.2, "dog": 0.35, "owl": -1.0}})
    assert "AP by class: dog 0.350, cat 0.200" in table
    assert "no ground truth: owl" in table
    table = validation_table(METRICS | {"per_class": {f"c{number}": number / 100 for number in range(80)}})
    assert "highest: c79 0.790, c78 0.780" in table
    assert "lowest:  c4 0.040" in table
    assert "c40" not in table


def test_a_summary_has_a_line_an_epoch_and_marks_the_best():
    records = [METRICS | {"epoch": epoch, "mAP": value} for epoch, value in enumerate([0.1, 0.3, 0.2], start=1)]
    lines = summary_table(records, 2).splitlines()
    assert lines[0].split() == ["epoch", *METRICS]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "0.100"], ["2", "0.300"], ["3", "0.200"]]
    assert [line.endswith("<- best") for line in lines[1:]] == [False, True, False]


def test_a_summary_of_undefined_figures_marks_none():
    assert "best" not in summary_table([{"epoch": 1, "mAP": -1.0}], None)
    assert "no validation" in summary_table([], None)


def test_a_sparkline_shows_steps_where_they_are_in_one_line_or_several():
    assert sparkline([0.02] * 80 + [0.01] * 30 + [0.0] * 10, 12) == "████████▅▅▅▁"
    assert sparkline([1, 2, 3, 4, 5, 6], 6, 2, unicode=False) == "   .:#\n.:####"
    assert (sparkline([0.02] * 5, 10), sparkline([], 10)) == ("▁▁▁▁▁", "")


@pytest.mark.parametrize("unicode", [True, False])
def test_a_sparkline_keeps_to_its_width_and_to_ascii_where_asked(unicode):
    values = [1 + math.sin(number / 50) for number in range(1000)]
    lines = sparkline(values, 40, 3, unicode=unicode).splitlines()
    assert len(lines) == 3
    assert max(len(line) for line in lines) == 40
    assert "".join(lines).isascii() != unicode
