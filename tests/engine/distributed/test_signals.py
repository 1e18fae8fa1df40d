"""Signals: the run saves itself and leaves with a status that says so."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from data import CocoDataset, EvalLoader, TrainLoader
from detection.engine import STOPPED_EXIT_CODE
from detection.engine.distributed import signals
from detection.engine.distributed.signals import StopRequest
from detection.engine.trainer import Trainer


@pytest.fixture(autouse=True)
def heard_hangups():
    """Also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_in_training_saves_and_leaves_with_status_75(
    name, start, tmp_path, monkeypatch, load, capsys, finished, records_of
):
    plain = Trainer.train_step

    def train_step(self, batches):
        iteration = self.state.progress.iteration
        plain(self, batches)
        if iteration == 3:
            os.kill(os.getpid(), signal.Signals[name])

    with monkeypatch.context() as context:
        context.setattr(Trainer, "train_step", train_step)
        assert start(tmp_path / "run") == STOPPED_EXIT_CODE == 75
    said = capsys.readouterr().out
    assert f"stopped by {name}" in said and "--resume" in said
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 4
    if name == "SIGTERM":
        assert start(tmp_path / "run", "--resume") == 0
        assert records_of(tmp_path / "run") == records_of(finished)


def test_a_signal_inside_validation_stops_it_and_the_resume_repeats_it(
    start, tmp_path, monkeypatch, load, finished, records_of
):
    batches = []

    plain = EvalLoader.batches

    def signalled(self):
        for batch in plain(self):
            batches.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as context:
        context.setattr(EvalLoader, "batches", signalled)
        assert start(tmp_path / "run", "--limit-val-batches", "2") == STOPPED_EXIT_CODE
    assert 1 <= len(batches) <= 2
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert (state["iteration"], state["validation_due"]) == (3, True)
    assert not records_of(tmp_path / "run", "val")
    assert start(tmp_path / "run", "--resume") == 0
    assert records_of(tmp_path / "run") == records_of(finished)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stop_ends_a_wait_for_data_and_leaves_nothing_of_an_unfinished_iteration(
    accumulate, start, tmp_path, monkeypatch, load, same_state
):
    plain = TrainLoader.batches

    def never_ending(self, first, last):
        for number, batch in enumerate(plain(self, first, last)):
            # The mosaic at the start takes its images from the first epoch alone.
            if number == 3 and last > self.iterations_per_epoch:
                signal.raise_signal(signal.SIGTERM)
                threading.Event().wait()
            yield batch

    words = ("--norm", "bn", "--accumulate", str(accumulate))
    with monkeypatch.context() as context:
        context.setattr(TrainLoader, "batches", never_ending)
        assert start(tmp_path / "run", *words) == STOPPED_EXIT_CODE
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert load(last)["iteration"] == 3 // accumulate
    assert start(tmp_path / "run", "--resume", *words) == 0
    assert start(tmp_path / "whole", *words) == 0
    same_state(load(last)["model"], load(tmp_path / "whole" / "checkpoints" / "last.pt")["model"])


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_stop_ends_the_wait_for_a_disk_that_does_not_answer(split, workers, start, tmp_path, monkeypatch, load):
    plain, main_process, metrics = CocoDataset.image, os.getpid(), tmp_path / "run" / "metrics.jsonl"

    def image(self, index, out=None):
        if f"{split}2017" in str(self.images_dir) and metrics.exists() and metrics.stat().st_size:
            os.kill(main_process, signal.SIGTERM)
            threading.Event().wait()
        return plain(self, index, out)

    monkeypatch.setattr(CocoDataset, "image", image)
    assert start(tmp_path / "run", "--workers", workers, "--max-epochs", "50") == STOPPED_EXIT_CODE
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["validation_due"] == (split == "val")
    assert not multiprocessing.active_children()


def test_a_stop_before_the_first_batch_has_nothing_to_save(start, tmp_path, monkeypatch):
    def image(self, index, out=None):
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait()

    with monkeypatch.context() as context:
        context.setattr(CocoDataset, "image", image)
        assert start(tmp_path / "run") == STOPPED_EXIT_CODE
    assert not list((tmp_path / "run").glob("checkpoints/*.pt"))
    assert start(tmp_path / "run", "--resume", "--max-epochs", "1") == 0


def test_signals_mean_again_what_they_meant_before_once_the_run_is_over():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested and stop.signal_name == "SIGUSR1"
    assert before == [signal.getsignal(number) for number in numbers]


def test_a_run_under_nohup_outlives_its_terminal(monkeypatch):
    signal_before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, signal_before)


def test_the_echo_of_an_interrupt_is_not_a_second_one_and_a_second_one_leaves_at_once(monkeypatch):
    left, now = [], [100.0]
    monkeypatch.setattr(signals.os, "_exit", left.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and not left
        now[0] += 2.0
        signal.raise_signal(signal.SIGINT)
        assert left == [130]


def test_an_interrupted_program_with_loader_processes_saves(program, arguments, tmp_path: Path, load):
    words = arguments(tmp_path / "run", "--max-epochs", "500", "--workers", "1")
    with program("tiny_model.py", *words) as (process,):
        wait_for(tmp_path / "run" / "metrics.jsonl", process)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by SIGINT" in out and "Traceback" not in err
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] > 0


def test_a_closed_terminal_stops_the_run_which_saves(arguments, tmp_path: Path, load):
    """Its own output fails from then on, and its loader process has got the signal too."""
    ours, terminal = os.openpty()
    program = Path(__file__).parents[1] / "tiny_model.py"
    process = subprocess.Popen(
        [sys.executable, program, *arguments(tmp_path / "run", "--max-epochs", "500", "--workers", "1")],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[2]), "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(ours, False)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                os.read(ours, 1 << 16)
            time.sleep(0.05)
        os.close(ours)
        assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()
    assert "stopped by SIGHUP" in (tmp_path / "run" / "train.log").read_text()
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] > 0


def wait_for(file: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
