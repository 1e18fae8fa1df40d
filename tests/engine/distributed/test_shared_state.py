"""A state that process 0 has read reaches every other process bit for bit, and all plan the same end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def assert_same_bits(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same_bits(one[name], other[name])
    else:
        assert one == other


@pytest.mark.parametrize("ranks", [2, 3])
def test_process_0_gives_its_state_to_all_and_gets_the_arrays_of_all(
    ranks: int, program: Callable[..., Any], tmp_path: Path
) -> None:
    with program("distributed/shared_state.py", tmp_path, ranks=ranks) as processes:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks))
    assert first["names"] == ["cat", "dog"]
    assert first["plan"]["ending"]["last_iteration"] == 360
    for other in others:
        assert_same_bits(first, other)
    whole, *others = (torch.load(tmp_path / f"gathered_{rank}.pt", weights_only=True) for rank in range(ranks))
    assert all(value is None for other in others for value in other.values())
    assert whole["unequal"].tolist() == [100 * rank + place for rank in range(ranks) for place in range(3 + 2 * rank)]
    assert torch.equal(whole["main one without"], torch.full((ranks * (ranks - 1), 4), 7.5))
    assert whole["none has"].shape == (0, 3)
    assert whole["large, of the first"].tolist() == [*range(2**53, 2**53 + 6), *[2**53] * (ranks - 1)]
