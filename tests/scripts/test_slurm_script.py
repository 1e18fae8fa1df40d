"""docs/slurm/train_1x.sbatch with stand-ins for Slurm's commands: what it does after an end, a failure, a signal."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm" / "train_1x.sbatch"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

SRUN = """#!/bin/bash
echo "$@" > "$STUBS/srun_arguments"
trap 'echo TERM > "$STUBS/srun_signal"; sleep 0.3; exit "$AFTER_SIGNAL"' TERM
touch "$STUBS/running"
for _ in $(seq "$STEPS"); do sleep 0.05; done
exit "$BY_ITSELF"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node17\\nnode18\\n'; else echo "$@" >> "$STUBS/scontrol_calls"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path):
    """slurm(steps=, by_itself=, after_signal=): the job script as a process, with the folder of what it called."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(*, steps: int, by_itself: int = 0, after_signal: int = 1) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "STUBS": str(tmp_path),
            "STEPS": str(steps),
            "BY_ITSELF": str(by_itself),
            "AFTER_SIGNAL": str(after_signal),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[17-18]",
        }
        job = subprocess.Popen(
            ["bash", str(SCRIPT), "--data-path", "/data/my coco"],
            env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(job)
        return job

    yield start
    for job in started:
        if job.poll() is None:
            job.kill()
        job.communicate()


def requeued(folder: Path) -> list[str]:
    file = folder / "scontrol_calls"
    return file.read_text().splitlines() if file.exists() else []


def signalled(job: subprocess.Popen[str], folder: Path, number: signal.Signals) -> int:
    until = time.monotonic() + 60
    while not (folder / "running").exists():
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)  # the script has come to its waiting
    job.send_signal(number)
    return job.wait(60)


def test_the_script_is_bash_and_starts_a_torchrun_on_every_node(slurm, tmp_path):
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    assert slurm(steps=1).wait(60) == 0
    words = (tmp_path / "srun_arguments").read_text()
    assert "torchrun --nnodes=2 --nproc_per_node=8" in words
    assert "--rdzv_endpoint=node17:29500" in words
    assert words.rstrip().endswith("--resume auto --checkpoint-minutes 15 --data-path /data/my coco")
    assert requeued(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_the_run_and_requeues_the_job(slurm, tmp_path, number):
    job = slurm(steps=600, after_signal=1)
    assert signalled(job, tmp_path, number) == 0
    assert (tmp_path / "srun_signal").read_text() == "TERM\n"
    assert requeued(tmp_path) == ["requeue 4711"]


def test_a_run_that_ends_as_the_signal_comes_is_not_requeued(slurm, tmp_path):
    assert signalled(slurm(steps=600, after_signal=0), tmp_path, signal.SIGUSR1) == 0
    assert requeued(tmp_path) == []


def test_a_failure_is_passed_on_and_not_requeued(slurm, tmp_path):
    job = slurm(steps=1, by_itself=3)
    assert job.wait(60) == 3
    assert "not requeued" in job.stdout.read()
    assert requeued(tmp_path) == []
