"""torchrun restarts a job of which a rank was killed, and the job goes on from its last checkpoint."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]
PATIENCE = 250.0
"""Seconds; a machine that does much else takes long to start four processes one after the other."""

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks through /proc"),
    pytest.mark.timeout(600),
]


def ranks_of(agent: int) -> dict[int, int]:
    """Rank -> process id of what torchrun has started."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) != agent:
                continue
            variables = (entry / "environ").read_bytes().split(b"\0")
            found[int(next(v[5:] for v in variables if v.startswith(b"RANK=")))] = int(entry.name)
    return found


@pytest.mark.parametrize("begun_with", ["--overwrite", "--resume FILE"])
def test_a_killed_rank_restarts_the_job_from_the_last_checkpoint(
    begun_with: str, start: Callable[..., int], arguments: Callable[..., list[str]], tmp_path: Path, records_of, load
):
    output = tmp_path / "run"
    words = arguments(
        output, "--batch-size", "1", "--max-epochs", "2", "--limit-train-batches", "6", "--checkpoint-iterations", "1",
        "--limit-val-batches", "1", *begun_with.split()[:1],
    )  # fmt: skip
    output.mkdir()
    first = 0
    if begun_with == "--resume FILE":
        # Of one process, with the same global batch.
        assert start(tmp_path / "old", "--max-epochs", "1", "--limit-train-batches", "6") == 0
        words.append(str(tmp_path / "old" / "checkpoints" / "epoch_0001.pt"))
        first = 6
    if begun_with == "--overwrite":
        (output / "metrics.jsonl").write_text('{"kind": "old"}\n')
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
    with (tmp_path / "log.txt").open("w") as log:
        agent = subprocess.Popen(
            [sys.executable, *torchrun, str(FOLDER / "tiny_model.py"), *words],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            until = time.monotonic() + PATIENCE
            metrics = output / "metrics.jsonl"
            while not (metrics.is_file() and metrics.read_bytes().count(b'"kind": "train"') >= 3):
                assert agent.poll() is None and time.monotonic() < until, (tmp_path / "log.txt").read_text()[-3000:]
                time.sleep(0.01)
            os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
            status = agent.wait(PATIENCE)
        finally:
            if agent.poll() is None:
                agent.terminate()  # it ends its ranks, which a SIGKILL would leave behind
                agent.wait(60)
    said = (tmp_path / "log.txt").read_text()
    assert status == 0, said[-3000:]
    assert "resumed   at iteration" in said
    assert [r["iteration"] for r in records_of(output, "train")] == list(range(first, 12))
    assert [r["iteration"] for r in records_of(output, "val")] == [5, 11][first // 6 :]
    assert said.count("started again by torchrun: the run resumes from its own newest checkpoint") == 1
    assert load(output / "checkpoints" / "last.pt")["iteration"] == 12
    # What was moved aside is the old run, and not what this one had done before the kill.
    aside = [(folder / "metrics.jsonl").read_text() for folder in tmp_path.glob("run.before_*")]
    assert aside == (['{"kind": "old"}\n'] if begun_with == "--overwrite" else [])
