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
def test_every_process_gets_the_state_of_process_0(ranks: int, program: Callable[..., Any], tmp_path: Path) -> None:
    with program("distributed/shared_state.py", tmp_path, ranks=ranks) as processes:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks))
    assert first["names"] == ["cat", "dog"]
    assert first["plan"]["ending"]["last_iteration"] == 360
    for other in others:
        assert_same_bits(first, other)
