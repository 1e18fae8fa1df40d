"""The average of the weights."""

import torch
from torch import nn

from detection.engine.optim.ema import AveragedModel


def test_the_average_follows_its_formula_with_a_decay_that_grows_to_the_one_given():
    model = nn.Linear(2, 1, bias=False).double()
    average = AveragedModel(model, decay=0.5)
    expected = model.weight.detach().clone()
    for iteration in range(20):
        with torch.no_grad():
            model.weight.add_(iteration + 1.0)
        average.update(model, iteration)
        decay = min(0.5, (1 + iteration) / (10 + iteration))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.module.weight, expected, rtol=1e-12, atol=0)


def test_statistics_are_averaged_and_counters_copied():
    model = nn.BatchNorm2d(1)
    average = AveragedModel(model, decay=0.9)
    model.running_mean.fill_(10.0)
    model.num_batches_tracked.fill_(7)
    average.update(model, 0)  # decay 0.1
    assert average.module.running_mean.item() == 9.0
    assert average.module.num_batches_tracked.item() == 7


def test_the_average_is_not_trained_and_stays_in_evaluation_mode():
    average = AveragedModel(nn.BatchNorm2d(1).train(), decay=0.9)
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
