"""Gradients averaged over 2, 3 and 4 processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detection.engine.distributed.comm import Processes
from detection.engine.optim.gradient_buckets import GradientBuckets
from tests.engine.distributed.test_two_ranks import free_ports


@pytest.fixture(scope="module", params=[2, 3, 4])
def folder(request, tmp_path_factory, program: Callable[..., Any], arguments: Callable[..., list[str]]) -> Path:
    """Has what exchange_ranks.py found on each process."""
    folder = tmp_path_factory.mktemp("exchange")
    words = arguments(
        folder, "--max-epochs", "1", "--limit-train-batches", "3", "--batch-size", "1", "--model", "tiny_mask"
    )
    place = words.index("--output-dir")
    del words[place : place + 2]
    with program(
        "distributed/exchange_ranks.py", folder, json.dumps(free_ports(3)), *words, ranks=request.param
    ) as processes:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, out[-3000:] + err[-6000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(file, weights_only=False) for file in sorted(folder.glob("[0-9].pt"))]


@pytest.mark.parametrize("how", ["plain", "in rank order", "accumulated"])
def test_every_process_has_the_mean_of_the_gradients_in_every_iteration(how, ranks, same_state):
    parts = [rank[how]["own"] for rank in ranks]
    for result in ranks[0][how]["results"]:
        for name, gradient in result.items():
            own = [torch.zeros_like(gradient) if part[name] is None else part[name] for part in parts]
            expected = torch.stack([part.double() for part in own]).mean(0)
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
        assert not result["nowhere.weight"].any() and result["only_on_0.weight"].any()
    for rank in ranks:
        # The first iteration adds in the order of all later ones.
        for result in rank[how]["results"]:
            same_state(result, ranks[0][how]["results"][0])


def test_in_rank_order_the_sum_has_the_bits_of_adding_process_by_process(ranks):
    parts = [rank["in rank order"]["own"] for rank in ranks]
    for name, gradient in ranks[0]["in rank order"]["results"][0].items():
        total = torch.zeros_like(gradient)
        for part in parts:
            total += 0 if part[name] is None else part[name] / len(ranks)
        assert torch.equal(gradient, total), name


@pytest.mark.parametrize("how", ["plain", "in rank order", "accumulated"])
def test_buckets_leave_while_the_backward_pass_runs(how, ranks):
    sent = [rank[how]["in_backward"] for rank in ranks]
    # The last bucket waits for a layer that takes no part. Where the first bucket waits, all others do.
    assert sent[0] == ranks[0][how]["buckets"] - 1 >= 2
    assert sent[1:] == [0] * (len(ranks) - 1)


def test_graphs_recorded_at_other_times_on_each_process_agree_with_eager_passes(ranks):
    captured = [rank["graphs"]["graphs"]["captured"] for rank in ranks]
    assert captured[0] != captured[1] and captured[0][-1] == captured[1][-1] == 2
    for rank in ranks:
        found = rank["graphs"]
        assert torch.equal(found["graphs"]["gradients"], found["eager"]["gradients"])
        assert torch.equal(found["graphs"]["gradients"], ranks[0]["graphs"]["graphs"]["gradients"])


def test_a_training_that_was_stopped_and_resumed_ends_with_the_bits_of_one_that_was_not(
    ranks, folder, load, same_state, records_of
):
    assert [rank["trainings"] for rank in ranks] == [[0, 75, 0]] * len(ranks)
    states = [load(folder / name / "checkpoints" / "last.pt") for name in ("whole", "halves")]
    for state in states:
        del state["config"]  # has the output directory in it
    same_state(*states)
    assert records_of(folder / "whole") == records_of(folder / "halves")


def test_gradients_that_stay_lie_as_their_parameters_and_begin_at_multiples_of_four():
    weight = nn.Parameter(torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    bias, other = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))
    gradients = GradientBuckets([weight, bias, other], Processes(0, 0, 1, 1, torch.device("cpu")), stay=True)
    for number, parameter in enumerate((weight, bias, other), 1):
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride()
        assert parameter.grad.data_ptr() % 16 == 0
        parameter.grad.fill_(number)
    assert [parameter.grad.unique().tolist() for parameter in (weight, bias, other)] == [[1.0], [2.0], [3.0]]
    (weight.sum() * 2 + bias.sum()).backward()
    assert weight.grad.unique().tolist() == [3.0] and bias.grad.unique().tolist() == [3.0]
    gradients.zero()
    assert not any(parameter.grad.any() for parameter in (weight, bias, other))
    gradients.check()
    bias.grad = None
    with pytest.raises(RuntimeError, match="was replaced"):
        gradients.check()
