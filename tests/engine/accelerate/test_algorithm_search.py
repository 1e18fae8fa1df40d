"""The search for cuDNN's algorithms: in the first pass of a size, for few sizes, and never left on."""

import pytest
import torch

from detection.engine.accelerate.algorithm_search import MOST_SIZES, AlgorithmSearch
from detection.models import ImageBatch, TargetBatch

NOTHING = TargetBatch(*(torch.empty(0) for _ in range(4)))


def images(height):
    return ImageBatch(torch.zeros(1, 3, height, 8), torch.tensor([[height, 8]]))


def test_a_size_is_searched_for_once_and_only_the_first_sizes_are():
    searched = []

    def step(batch, targets):
        assert targets is NOTHING
        if torch.backends.cudnn.benchmark:
            searched.append(batch.pixels.shape[2])
        return {"loss": batch.pixels.sum()}

    search = AlgorithmSearch()
    for _ in range(2):
        for height in range(1, MOST_SIZES + 4):
            assert search.run(step, images(height), NOTHING)["loss"] == 0
            assert not torch.backends.cudnn.benchmark
    assert searched == list(range(1, MOST_SIZES + 1))


def test_a_pass_that_fails_does_not_leave_the_search_on():
    def step(batch, targets):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        AlgorithmSearch().run(step, images(3), NOTHING)
    assert not torch.backends.cudnn.benchmark
