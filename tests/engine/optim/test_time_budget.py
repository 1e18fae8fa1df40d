"""A training that ends in time."""

import copy
from typing import Any

import pytest

from detection.engine.optim.time_budget import TimeBudget
from detection.engine.state.train_state import Progress, TrainState
from schedules import load_schedule

PER_EPOCH = 100


class Alone:
    """One process."""

    def broadcast(self, value: Any) -> Any:
        return value


def run(progress: Progress, hours: float, pace, stop_at: int | None = None, plan_each: int = 5) -> list[float]:
    """The learning rates of a run of 1x in which iteration i takes pace(i) seconds; it changes `progress`."""
    schedule: Any = load_schedule("1x")
    model: Any = None
    state = TrainState(model, model, model, None, schedule, {"iterations_per_epoch": PER_EPOCH}, progress)
    now = [0.0]
    processes: Any = Alone()
    budget = TimeBudget(hours, processes, clock=lambda: now[0])
    rates = []
    while state.reason_to_end(None) is None and progress.iteration != stop_at:
        rates.append(schedule.learning_rate(int(state.schedule_iteration), PER_EPOCH))
        now[0] += pace(progress.iteration)
        progress.iteration += 1
        if progress.iteration % plan_each == 0:
            progress.ending.seconds, left = budget.left(progress.iteration, progress.ending.seconds)
            if left is not None:
                state.end_in(left)
    return rates


@pytest.mark.parametrize("pace", [lambda i: 1.0, lambda i: 1.0 if i > 300 else 2.0, lambda i: 2.0 if i > 300 else 1.0])
def test_the_learning_rate_drops_as_often_and_as_low_in_the_time_that_there_is(pace):
    progress = Progress()
    rates = run(progress, 700 / 3600, pace)
    seconds = sum(map(pace, range(len(rates))))
    assert 670 < seconds <= 702
    full = load_schedule("1x").optimizer.lr
    # The warmup of 500 iterations is gone through faster too.
    assert max(rates) == pytest.approx(full, rel=0.02)
    assert rates[-1] == pytest.approx(0.01 * full)
    assert 0.05 < sum(rate == pytest.approx(0.1 * full) for rate in rates[300:]) / len(rates) < 0.4


def test_the_time_between_two_plans_is_counted_once():
    now, processes = [0.0], Alone()
    budget = TimeBudget(1, processes, clock=lambda: now[0])
    now[0] = 30.0
    seconds = budget.counted(100.0)  # as a checkpoint after a validation has it
    now[0] = 50.0
    assert (seconds, budget.left(4, seconds)[0], budget.counted(150.0)) == (130.0, 150.0, 150.0)


def test_hours_that_suffice_change_nothing():
    schedule = load_schedule("1x")
    assert run(Progress(), 10, lambda i: 1.0) == [schedule.learning_rate(i, PER_EPOCH) for i in range(12 * PER_EPOCH)]


def test_a_resumed_run_follows_the_stored_plan_and_counts_the_hours_before_it():
    hours = 700 / 3600
    progress = Progress()
    first = run(progress, hours, lambda i: 1.0, stop_at=250)
    rest, again = (run(copy.deepcopy(progress), hours, lambda i: 1.0) for _ in range(2))
    assert rest == again
    whole = run(Progress(), hours, lambda i: 1.0)
    assert abs(len(first) + len(rest) - len(whole)) <= 1
    # Until the plan is made anew it is the stored one, to the bit.
    until = run(progress, hours, lambda i: 1.0, stop_at=259, plan_each=1000)
    assert until == rest[:9]
    assert until == pytest.approx(whole[250:259], rel=1e-9)


def test_no_time_at_all_ends_the_run_as_soon_as_that_is_known():
    progress = Progress()
    assert len(run(progress, 1e-9, lambda i: 1.0, plan_each=1)) == 2
    assert progress.ending.last_iteration == progress.iteration
