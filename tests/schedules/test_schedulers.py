"""schedules.schedulers, against the figures of MMEngine 0.10.7."""

import csv
import json
import pickle
import re
import sys
from pathlib import Path

import pytest

from schedules import ScheduleError, load_schedule, schedule_from_dict

REFERENCE = Path(__file__).parents[1] / "reference" / "lr"
TABLES = sorted(REFERENCE.glob("*.csv"))
CASES = json.loads((REFERENCE / "schedulers_mmengine.json").read_text())["cases"]


def schedule_of(param_scheduler, max_epochs=6, lr=0.02):
    return schedule_from_dict(
        {
            "train_cfg": {"max_epochs": max_epochs},
            "param_scheduler": param_scheduler,
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": lr}},
        }
    )


def largest_relative_error(schedule, length, expected, lr_mult=1.0):
    worst = 0.0
    for iteration, value in expected:
        lr = schedule.learning_rate(iteration, length, lr_mult)
        worst = max(worst, abs(lr - value) / abs(value) if value else abs(lr))
    return worst


def spread(changes, total):
    starts = [start for start, _ in changes[1:]] + [total]
    first = 0
    for (_, value), end in zip(changes, starts, strict=True):
        for iteration in range(first, end):
            yield iteration, value
        first = end


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_named_schedules_equal_mmengine_at_every_iteration(table):
    name, length, batch = re.fullmatch(r"(\w+?)_ipe(\d+)(?:_autoscale_bs(\d+))?", table.stem).groups()
    schedule = load_schedule(name)
    if batch:
        schedule = schedule.scaled(int(batch))
    rows = [(int(row["first_iter"]), float(row["lr"])) for row in csv.DictReader(table.open())]
    expected = spread(rows, schedule.max_epochs * int(length))
    assert largest_relative_error(schedule, int(length), expected) < 1e-12


def test_the_tables_of_all_three_named_schedules_are_there():
    assert {table.stem.split("_")[0] for table in TABLES} == {"1x", "2x", "20e"}
    assert len(TABLES) == 18


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['name']}-{c['iterations_per_epoch']}-{c['lr_mult']:g}")
def test_every_kind_of_scheduler_equals_mmengine_alone_and_composed(case):
    schedule = schedule_of(case["param_scheduler"], case["max_epochs"], case["lr"])
    length = case["iterations_per_epoch"]
    expected = case.get("samples") or spread(case["values"], case["max_epochs"] * length)
    assert largest_relative_error(schedule, length, expected, case["lr_mult"]) < 1e-12


def test_the_cases_cover_every_kind_and_both_ways_of_computing():
    kinds = {s["type"] for case in CASES for s in case["param_scheduler"] if isinstance(s, dict)}
    assert kinds == {
        "LinearLR", "MultiStepLR", "ConstantLR", "StepLR", "ExponentialLR", "CosineAnnealingLR", "PolyLR"
    }  # fmt: skip
    assert sum(case["real_runner"] for case in CASES) >= 50


def test_a_value_does_not_depend_on_what_was_asked_before():
    schedulers = [
        {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "end": 25},
        {"type": "CosineAnnealingLR", "eta_min": 1e-3},
    ]
    forwards, backwards = schedule_of(schedulers), schedule_of(schedulers)
    values = [forwards.learning_rate(i, 10) for i in range(60)]
    assert [backwards.learning_rate(i, 10) for i in reversed(range(60))] == values[::-1]
    assert len(set(values)) > 25


def test_iterations_past_the_end_of_the_run_still_have_a_learning_rate():
    assert load_schedule("1x").learning_rate(10_000, 100) == pytest.approx(0.0002, rel=1e-12)
    schedule = schedule_of([{"type": "CosineAnnealingLR", "eta_min": 1e-3, "T_max": 6}])
    assert schedule.learning_rate(1000, 10) == schedule.learning_rate(59, 10)


def test_without_schedulers_the_learning_rate_is_constant():
    assert {schedule_of([]).learning_rate(i, 10) for i in range(60)} == {0.02}
    assert schedule_of(None).learning_rate(0, 1) == 0.02


def test_scaling_multiplies_the_whole_curve_and_changes_nothing_else():
    schedule = load_schedule("1x")
    scaled = schedule.scaled(4)
    assert scaled.optimizer.lr == 0.005
    assert scaled.learning_rate(0, 100) == pytest.approx(0.02 / 4 * 0.001, rel=1e-15)
    assert schedule.learning_rate(499, 100) == 0.02
    assert scaled.to_dict()["param_scheduler"] == schedule.to_dict()["param_scheduler"]


def test_impossible_questions_are_schedule_errors():
    schedule = load_schedule("1x")
    for iteration, length in ((-1, 100), (0, 0), (5, -1)):
        with pytest.raises(ScheduleError):
            schedule.learning_rate(iteration, length)
    with pytest.raises(ScheduleError, match="at least one image"):
        schedule.scaled(0)


def test_a_scheduler_that_begins_after_the_run_in_iterations_says_so():
    late = schedule_of([{"type": "PolyLR", "by_epoch": False, "begin": 100}])
    with pytest.raises(ScheduleError, match=r"param_scheduler\.0 .*begins at 100 and ends at 60"):
        late.learning_rate(0, 10)
    assert late.learning_rate(0, 100) == 0.02


def test_a_learning_rate_that_overflows_is_an_error_of_the_schedule():
    growing = schedule_of([{"type": "ExponentialLR", "gamma": 1e30}])
    with pytest.raises(ScheduleError, match=r"the learning rate is 2e\+148 in iteration 50: give a smaller lr"):
        growing.learning_rate(0, 10)


def test_schedulers_that_must_be_replayed_are_refused_for_runs_without_an_end():
    overlapping = schedule_of([{"type": "PolyLR", "eta_min": 0.001}, {"type": "CosineAnnealingLR", "eta_min": 0.002}])
    with pytest.raises(ScheduleError, match=r"computed step by step, for at most 50,000,000 iterations"):
        overlapping.learning_rate(0, 10_000_000)


def test_a_call_costs_the_same_at_every_iteration():
    schedule = load_schedule("1x")
    schedule.learning_rate(0, 7330)
    calls = []

    def count(frame, event, argument):
        calls[-1] += event in ("call", "c_call")

    for iteration in (1, 499, 40_000, 79_999):
        calls.append(0)
        sys.setprofile(count)
        schedule.learning_rate(iteration, 7330)
        sys.setprofile(None)
    assert max(calls) < 30, calls


def test_a_schedule_can_be_sent_to_another_process():
    schedule = load_schedule("20e")
    schedule.learning_rate(0, 10)
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied == schedule
    assert copied.learning_rate(199, 10) == schedule.learning_rate(199, 10)
