from datetime import datetime

import pytest

from detection.reporting.forecast import Forecast


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def told(total, *, first=0, slow_start=30.0, pace=0.5, every=1, pause_at=None):
    """All that a forecast says over a run whose first five iterations take slow_start seconds together."""
    clock = Clock()
    forecast = Forecast(first, total, clock=clock, now=lambda: datetime(2026, 1, 1))
    lines = []
    for done in range(first + 1, total + 1):
        clock.now += slow_start / 5 if done - first <= 5 else pace
        if done == pause_at:
            clock.now += 1000
            forecast.leave_out(1000)
        if done % every == 0 and (line := forecast.report(done)):
            lines.append((done, line))
    return lines


@pytest.mark.parametrize("every", [1, 20])
def test_one_forecast_after_a_hundred_iterations_leaves_the_slow_start_out(every):
    ((done, line),) = told(1000, every=every)
    assert done == 100
    assert line == (
        "after 100 iterations: 0.5 s each, so the remaining 900 take about 7:30, to Thu 01 Jan 00:07; "
        "validations come on top"
    )


def test_a_resumed_run_counts_from_where_it_goes_on():
    ((done, line),) = told(2000, first=1500)
    assert done == 1600
    assert "the remaining 400 take about 3:20" in line


def test_a_validation_in_between_is_no_training_time():
    assert told(1000, pause_at=50) == told(1000)


def test_a_run_of_a_few_iterations_gets_none():
    assert told(199) == []
