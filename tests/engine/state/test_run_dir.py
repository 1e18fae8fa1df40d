"""One run in a folder, one process group at work on it."""

import errno
import fcntl
import json
import multiprocessing
import os
import platform
import threading
import time
from pathlib import Path

import pytest

import detection.engine.state.run_dir
from detection.engine import RunError
from detection.engine.distributed.comm import start_processes
from detection.engine.state.run_dir import RunDir, RunDirError


def used(folder: Path) -> RunDir:
    """A folder that a run has left something in."""
    output = RunDir(folder)
    folder.mkdir(parents=True)
    output.metrics.write_text('{"kind": "train", "iteration": 0}\n')
    output.checkpoints.mkdir()
    (output.checkpoints / "last.pt").write_bytes(b"precious")
    return output


def test_a_used_folder_is_refused_with_three_ways_out(tmp_path: Path):
    output = used(tmp_path / "run")
    with pytest.raises(RunDirError, match=r"--resume.*--overwrite.*--output-dir"):
        output.claim(overwrite=False, resume=False)


def test_a_used_folder_may_be_gone_on_with(tmp_path: Path):
    output = used(tmp_path / "run")
    assert output.claim(overwrite=False, resume=True) == []
    assert output.metrics.exists()
    output.release()


def test_overwriting_moves_the_earlier_run_aside_and_loses_nothing(tmp_path: Path):
    for attempt in (1, 2, 3):  # within one second
        output = used(tmp_path / "run")
        (moved,) = output.claim(overwrite=True, resume=False)
        output.release()
        assert [path.name for path in output.path.iterdir()] == [".lock"]
        aside = [path for path in tmp_path.iterdir() if path != output.path]
        assert len(aside) == attempt
        assert all((folder / "checkpoints" / "last.pt").read_bytes() == b"precious" for folder in aside)
        assert any(str(folder) in moved for folder in aside)
        (output.path / ".lock").unlink()
        output.path.rmdir()


def test_of_a_link_the_folder_that_it_means_is_moved(tmp_path: Path):
    used(tmp_path / "disk" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    output = RunDir(tmp_path / "link")
    assert len(output.claim(overwrite=True, resume=False)) == 1
    output.release()
    assert (tmp_path / "link").is_symlink() and not output.holds_a_run
    (aside,) = (tmp_path / "disk").glob("run.before_*")
    assert (aside / "checkpoints" / "last.pt").read_bytes() == b"precious"


@pytest.mark.parametrize("path", [".", "..", "../run"])
def test_the_folder_that_the_program_works_in_is_not_moved(path: str, tmp_path: Path, monkeypatch):
    used(tmp_path / "run")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "iteration": 0}\n')
    monkeypatch.chdir(tmp_path / "run")
    output = RunDir(Path(path))
    with pytest.raises(RunDirError, match="start it from another one, or give another --output-dir"):
        output.claim(overwrite=True, resume=False)
    output.release()
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_an_evaluation_keeps_out_of_the_folder_of_a_training_at_work(start, finished, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = in_another_process(hold, tmp_path / "run", 60.0, held, done)
    try:
        assert held.wait(60)
        with pytest.raises(RunError, match=r"another run is writing here .*or give another --output-dir"):
            start(tmp_path / "run", "--val-only", "--weights", finished / "checkpoints" / "last.pt")
    finally:
        done.set()
        process.join()
    assert start(tmp_path / "other", "--val-only", "--weights", finished / "checkpoints" / "last.pt") == 0


def test_overwriting_a_folder_without_a_run_moves_nothing(tmp_path: Path):
    (tmp_path / "run").mkdir()
    output = RunDir(tmp_path / "run")
    assert output.claim(overwrite=True, resume=False) == []
    output.release()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def hold(folder: Path, seconds: float, held, done) -> None:
    output = RunDir(folder)
    output.claim(overwrite=False, resume=True)
    held.set()
    done.wait(seconds)


def in_another_process(target, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_works(tmp_path: Path):
    output = used(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = in_another_process(hold, output.path, 60, held, done)
    assert held.wait(30)
    try:
        for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(RunDirError, match=f"writing here .process {process.pid} on {platform.node()}; lock: "):
                output.claim(**options)
        assert output.metrics.exists()
    finally:
        done.set()
        process.join()
    assert output.claim(overwrite=False, resume=True) == []
    output.release()


def claim_and_leave_a_child(folder: Path, child_is_there) -> None:
    RunDir(folder).claim(overwrite=False, resume=True)
    if os.fork() == 0:  # as a loader process, which outlives a killed run for some seconds
        child_is_there.set()
        time.sleep(3)
        os._exit(0)
    child_is_there.wait()
    os._exit(9)


def test_a_killed_runs_loader_processes_do_not_keep_its_restart_out(tmp_path: Path):
    child_is_there = multiprocessing.get_context("fork").Event()
    process = in_another_process(claim_and_leave_a_child, tmp_path / "run", child_is_there)
    process.join()
    assert process.exitcode == 9
    output = RunDir(tmp_path / "run")
    output.claim(overwrite=False, resume=True)
    output.release()


def test_a_folder_moved_aside_between_opening_and_locking_is_not_taken_for_the_own_one(tmp_path: Path, monkeypatch):
    output = RunDir(tmp_path / "run")
    plain, moved = fcntl.lockf, []

    def lock_after_a_move(file, mode):
        if not moved:
            moved.append(True)
            output.path.rename(tmp_path / "aside")
            output.path.mkdir()
        return plain(file, mode)

    monkeypatch.setattr(fcntl, "lockf", lock_after_a_move)
    output.claim(overwrite=False, resume=False)
    assert (output.path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}"
    output.release()


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be used as output directory"):
        RunDir(tmp_path / "file" / "run").claim(overwrite=False, resume=False)


def test_a_second_training_is_refused_and_overwrite_starts_anew(start, tmp_path: Path, records_of):
    folder = used(tmp_path / "run").path
    with pytest.raises(RunError, match="--overwrite"):
        start(folder, "--max-epochs", "1")
    assert start(folder, "--max-epochs", "1", "--overwrite") == 0
    assert len(records_of(folder, "train")) == 3
    (aside,) = [path for path in tmp_path.iterdir() if path != folder]
    assert (aside / "checkpoints" / "last.pt").read_bytes() == b"precious"


def test_a_start_that_fails_moves_nothing_aside(start, tmp_path: Path):
    output = used(tmp_path / "run")
    with pytest.raises(RunError, match="nowhere"):
        start(output.path, "--overwrite", "--data-path", tmp_path / "nowhere")
    assert (output.checkpoints / "last.pt").read_bytes() == b"precious"
    assert not (output.path / ".lock").exists()


def test_the_starts_of_a_run_are_kept_even_when_the_record_is_torn(start, tmp_path: Path):
    folder = tmp_path / "run"
    assert start(folder, "--max-epochs", "1") == 0
    (folder / "config.json").write_text("{torn")
    assert start(folder, "--max-epochs", "1", "--resume") == 0
    assert len(json.loads((folder / "config.json").read_text())["starts"]) == 1


def test_only_the_torchrun_that_began_a_run_starts_it_again_on_any_of_its_machines(tmp_path: Path, monkeypatch):
    output = RunDir(tmp_path)
    assert not output.was_begun_by_torchrun(["a", "b"])
    output.mark_as_begun(["a", "a", "b", "b"])
    assert not output.was_begun_by_torchrun(["a", "b"])  # there is none
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "coco1x")
    assert output.was_begun_by_torchrun(["a", "b"])
    assert output.was_begun_by_torchrun(["b"])  # process 0's machine is gone
    assert output.was_begun_by_torchrun(["0", "b"])  # and another one has process 0
    assert not output.was_begun_by_torchrun(["c"])
    output.mark_as_begun(["b", "c"])
    assert output.was_begun_by_torchrun(["c"])
    assert not output.was_begun_by_torchrun(["a"])


def test_a_torchrun_is_known_by_the_moment_of_its_start(monkeypatch):
    own = start_processes("cpu").nodes
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "coco1x")
    (node,) = start_processes("cpu").nodes
    assert start_processes("cpu").nodes == (node,) != own
    # The same run id and the same number of the process, as in a container, but begun at another time.
    stat = Path(f"/proc/{os.getppid()}/stat")
    begun = stat.read_text().rsplit(")", 1)[1].split()[19]
    assert f"process {os.getppid()}, begun {begun} " in node


def keep_locked(folder: Path, held, done) -> None:
    platform.node = lambda: "elsewhere"
    output = RunDir(folder)
    output.lock()
    held.set()
    done.wait(60)


@pytest.fixture
def locked_elsewhere(tmp_path: Path):
    """A folder locked by a process of another machine, and an event that ends it."""
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = in_another_process(keep_locked, tmp_path / "run", held, done)
    assert held.wait(30)
    yield tmp_path / "run", done
    done.set()
    process.join()


def test_a_lock_of_another_machine_is_waited_for_since_that_may_be_dead(locked_elsewhere, capfd):
    folder, done = locked_elsewhere
    threading.Timer(1.0, done.set).start()
    output = RunDir(folder)
    assert output.lock() == []
    output.release()
    said = capfd.readouterr().err
    assert f" on elsewhere holds the lock {folder}/.lock; waiting, 2 minutes at most" in said


def test_a_lock_of_another_machine_is_not_waited_for_without_end(locked_elsewhere, monkeypatch):
    folder, _ = locked_elsewhere
    monkeypatch.setattr(detection.engine.state.run_dir, "LEASE_SECONDS", 0.1)
    with pytest.raises(RunDirError, match=r"another run is writing here \(process \d+ on elsewhere; lock: .*/\.lock\)"):
        RunDir(folder).lock()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch, error: int):
    def lockf(_file, _mode):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    output = used(tmp_path / "run")
    (warning,) = output.claim(overwrite=False, resume=True)
    assert warning.startswith(f"warning: {output.path}: the file system has no locks ({os.strerror(error)})")
    moved = output.claim(overwrite=True, resume=False)
    assert len(moved) == 2 and not output.holds_a_run
    output.release()


def test_another_error_of_the_lock_refuses_the_folder(tmp_path: Path, monkeypatch):
    def lockf(_file, _mode):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(RunDirError, match="cannot be used as output directory: .*Input/output error"):
        RunDir(tmp_path / "run").lock()
