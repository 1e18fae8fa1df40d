"""The AdamW schedule that ships as a file beside 1x."""

from pathlib import Path

import pytest

import schedules
from schedules import ParameterFacts, load_schedule, parameter_multipliers

FILE = Path(schedules.__file__).with_name("schedule_1x_adamw.py")


def test_it_is_the_1x_curve_at_adamws_rate():
    adamw, plain = load_schedule(FILE), load_schedule("1x")
    for iteration in (*range(0, 600, 7), 7330 * 8 - 1, 7330 * 8, 7330 * 11, 7330 * 12 - 1):
        rate = plain.learning_rate(iteration, 7330) * 1e-4 / 0.02
        assert adamw.learning_rate(iteration, 7330) == pytest.approx(rate, rel=1e-12)
    assert (adamw.max_epochs, adamw.val_interval, adamw.base_batch_size) == (12, 1, 16)
    assert adamw.notes == ()


def test_weights_decay_by_a_tenth_and_norms_not_at_all():
    adamw = load_schedule(FILE)
    assert (adamw.optimizer.type, adamw.optimizer.lr, adamw.optimizer.kwargs["weight_decay"]) == ("AdamW", 1e-4, 0.1)
    norm, convolution = "backbone.layer2.0.bn1.weight", "backbone.layer2.0.conv1.weight"
    layers = [ParameterFacts(norm, is_norm=True), ParameterFacts(convolution)]
    assert parameter_multipliers(adamw.paramwise, layers) == {norm: (1.0, 0.0), convolution: (1.0, 1.0)}
