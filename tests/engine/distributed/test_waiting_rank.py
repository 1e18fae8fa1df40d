"""One process waits for data that do not come, another one is asked to stop: all leave, at one iteration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.distributed.test_two_ranks import free_ports


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_stop_before_the_batch_that_one_does_not_get_and_nothing_is_lost(
    num_ranks: int,
    tmp_path: Path,
    program: Callable[..., Any],
    arguments: Callable[..., list[str]],
    records_of: Callable[..., list[dict[str, Any]]],
    load: Callable[[Path], dict[str, Any]],
    same_state: Callable[..., None],
) -> None:
    words = arguments(tmp_path, "--limit-train-batches", "2", "--norm", "bn", "--accumulate", "2")
    place = words.index("--output-dir")
    del words[place : place + 2]
    ports = json.dumps(free_ports(4))
    with program("distributed/waiting_rank.py", tmp_path, ports, *words, ranks=num_ranks) as processes:
        said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * num_ranks, said
    for rank in range(num_ranks):
        statuses = json.loads((tmp_path / f"{rank}.json").read_text())
        assert statuses == {"training": 75, "validation": 75, "resumed": 0, "whole": 0}
    out = said[0][0]
    assert "stopped by SIGTERM with 1 of 4 iterations done" in out
    assert "stopped by a signal to another process while validating" in out
    assert records_of(tmp_path / "run") == records_of(tmp_path / "whole")
    run, whole = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("run", "whole"))
    same_state(run["model"], whole["model"])
