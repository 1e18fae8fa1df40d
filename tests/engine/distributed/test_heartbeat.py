"""A process that is lost, stuck or fails alone: the others end soon, and say which it was and what they waited for."""

import json
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from detection.engine.distributed import heartbeat


@pytest.mark.parametrize(
    ("fate", "lost", "said"),
    [
        ("killed", 1, r"process 1 \(pid {pid} on \S+\) gives no sign of life; the last was in iteration 2"),
        ("stuck", 1, r"process 1 \(pid {pid} on \S+\) is alive and elsewhere: in iteration 2, does not wait"),
        ("fails", 1, r"process 1 \(pid {pid} on \S+\) ended in iteration 2: MemoryError: no more memory"),
        (
            "killed",
            0,
            "the store of the run, on process 0's machine, does not answer; process 0 .* has ended",
        ),
    ],
)
def test_the_others_end_soon_and_name_it(
    fate: str,
    lost: int,
    said: str,
    tmp_path: Path,
    program: Callable[..., Any],
    arguments: Callable[..., list[str]],
) -> None:
    words = arguments(tmp_path / "run", "--norm", "gn", "--max-epochs", "1", "--collective-timeout", "0.05")
    with program("distributed/lost_rank.py", lost, fate, *words, ranks=2) as processes:
        other = processes[1 - lost]
        out, err = other.communicate(timeout=120)
        pid = processes[lost].pid
    assert other.returncode == 1, out + err
    assert re.search(said.format(pid=pid), err), err
    assert re.search(
        rf"error: process {1 - lost}, in iteration [12], waited for "
        r"(the gradients of every process|every process to reach this iteration|the losses of every process) "
        r"without an answer: ",
        err,
    ), err
    assert "--resume" in err
    assert "Traceback" not in err


class SilentStore:
    """As PyTorch's, where the network has begun to lose its packets."""

    def set(self, key: str, value: str) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        threading.Event().wait()
        return False


class StoreOfTheDead:
    """Process 0 has written its last sign."""

    def __init__(self) -> None:
        self.content = {"0": json.dumps({"beats": 7, "pid": 4, "host": "node0", "at": "starting", "last_words": None})}

    def set(self, key: str, value: str) -> None:
        self.content[key] = value

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.content

    def get(self, key: str) -> str:
        return self.content[key]


class StoreThatHasEnded:
    """As PyTorch's, once the process that keeps it was killed."""

    def set(self, key: str, value: str) -> None:
        raise dist.DistNetworkError("Connection was likely closed")

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("failed to recv, got 0 bytes")


def test_a_store_that_never_answers_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STORE_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    here = heartbeat.Heartbeat(SilentStore(), 1, 3, timedelta(minutes=1))  # type: ignore[arg-type]
    assert "store of the run, on process 0's machine, does not answer" in here.report("nothing came")
    here.close("lost contact as well")


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (StoreOfTheDead(), "process 0 (pid 4 on node0) gives no sign of life"),
        (StoreThatHasEnded(), "process 0 or its torchrun has ended"),
    ],
)
def test_what_may_take_hours_is_not_waited_for_where_its_process_is_gone(
    store: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    is_over = threading.Event()
    monkeypatch.setattr(heartbeat.os, "_exit", lambda status: is_over.set())
    here = heartbeat.Heartbeat(store, 1, 2, timedelta(seconds=0.2))
    with here.waiting("what process 0 does alone", timedelta(hours=3)):
        assert is_over.wait(10)
    here.close()
    assert said in capsys.readouterr().err
