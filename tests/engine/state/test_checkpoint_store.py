"""Checkpoint files that are saved: whole or not there, and never the last good one lost."""

import os
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from detection.engine import RunError
from detection.engine.state import checkpoint, checkpoint_store
from detection.engine.state.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    load_checkpoint,
    newest_checkpoint,
)
from detection.engine.state.checkpoint_store import CheckpointStore, continue_from
from detection.engine.state.train_state import Progress
from tests.engine.state.checkpoint_states import damage, iterations, save, state_at


def test_what_is_saved_is_checksummed(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    with zipfile.ZipFile(tmp_path / LAST) as archive:
        assert all(entry.CRC for entry in archive.infolist() if entry.file_size)


def test_a_state_may_change_while_it_is_written(tmp_path: Path):
    store = CheckpointStore(tmp_path, 3)
    state = state_at(1)
    store.save(state, [LAST])
    state["model"]["w"].zero_()
    assert store.close() is None
    assert torch.equal(load_checkpoint(tmp_path / LAST).state["model"]["w"], torch.ones(4, 4))


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_files_and_is_reported_once(failing: str, tmp_path: Path, monkeypatch):
    save(tmp_path, 1, [LAST, BEST])
    store = CheckpointStore(tmp_path, 3)
    with monkeypatch.context() as context:
        break_disk(context, failing)
        assert store.save(state_at(2), [LAST, BEST]) is None
        problem = store.wait()
        assert problem is not None and "No space left" in problem and str(tmp_path) in problem
    assert set(iterations(tmp_path).values()) == {1}
    # The disk has room again: the next save goes through.
    assert store.save(state_at(3), [LAST, BEST]) is None
    assert store.close() is None
    assert iterations(tmp_path)[LAST] == iterations(tmp_path)[BEST] == 3
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".pt"]


def break_disk(context, failing: str) -> None:
    def refuse(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    def write_half(state, stream):
        stream.write(b"PK half a file")
        refuse()

    if failing == "torch.save":
        context.setattr(torch, "save", write_half)
    elif failing == "os.fsync":
        context.setattr(os, "fsync", refuse)
    else:
        context.setattr(Path, "replace", refuse)


def test_a_best_checkpoint_that_could_not_be_written_is_written_with_the_next(tmp_path: Path, monkeypatch):
    store = CheckpointStore(tmp_path, 3)
    with monkeypatch.context() as context:
        break_disk(context, "os.fsync")
        store.save(state_at(1), [LAST, BEST])
        store.wait()
    store.save(state_at(2), [LAST])
    assert store.close() is None
    assert iterations(tmp_path) == {LAST: 2, BEST: 1}


def test_a_failed_best_is_overtaken_by_a_better_one(tmp_path: Path, monkeypatch):
    store = CheckpointStore(tmp_path, 3)
    with monkeypatch.context() as context:
        break_disk(context, "os.fsync")
        store.save(state_at(1), [LAST, BEST])
        assert store.save(state_at(2), [LAST]) is not None
        assert store.save(state_at(3), [LAST, BEST]) is not None
        store.wait()
    assert store.close() is None
    assert not iterations(tmp_path)
    store = CheckpointStore(tmp_path, 3)
    store.save(state_at(4), [LAST])
    assert store.close() is None
    assert iterations(tmp_path) == {LAST: 4}


def test_the_last_write_is_tried_once_more_at_the_end(tmp_path: Path, monkeypatch):
    plain, failures = torch.save, []

    def save_second_time(state, stream):
        if not failures:
            failures.append(1)
            raise OSError(28, "No space left on device")
        plain(state, stream)

    monkeypatch.setattr(torch, "save", save_second_time)
    store = CheckpointStore(tmp_path, 3)
    store.save(state_at(1), [LAST])
    assert store.close() is None
    assert iterations(tmp_path) == {LAST: 1}


def test_a_last_write_that_fails_twice_is_reported_at_the_end(tmp_path: Path, monkeypatch):
    break_disk(monkeypatch, "os.fsync")
    store = CheckpointStore(tmp_path, 3)
    store.save(state_at(1), [LAST])
    problem = store.close()
    assert problem is not None and "No space left" in problem


def test_a_file_system_that_is_full_is_named_and_the_old_file_stays(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    store = CheckpointStore(tmp_path, 3)
    large = {**state_at(2), "model": {"w": torch.zeros(100_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        store.save(large, [LAST])
        problem = store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert problem is not None and "File too large" in problem
    assert iterations(tmp_path) == {LAST: 1}
    assert store.close() is None


def test_only_the_newest_epochs_stay_and_last_and_best_whatever_their_age(tmp_path: Path):
    for epoch in range(1, 6):
        names = [LAST, f"epoch_{epoch:04d}.pt", *([BEST] if epoch == 1 else [])]
        save(tmp_path, epoch, names, keep=2)
    assert iterations(tmp_path) == {"epoch_0004.pt": 4, "epoch_0005.pt": 5, LAST: 5, PREVIOUS: 4, BEST: 1}


OWN_NAMES = ["my_copy.pt", "last_backup.pt", "epoch_final.pt", "epoch_7.pt", "epoch_00007.pt", "best.pt.new.pt"]


@pytest.mark.parametrize("content", ["further on", "broken"])
def test_files_under_a_name_of_the_users_own_are_neither_chosen_nor_moved_nor_deleted(content: str, tmp_path: Path):
    for name in [*OWN_NAMES, ".mine.new"]:
        if content == "broken":
            (tmp_path / name).write_bytes(b"rubbish")
        else:
            torch.save({"format": checkpoint.FORMAT, "version": 1, **state_at(99)}, tmp_path / name)
    assert newest_checkpoint(tmp_path) is None  # so --resume auto begins anew
    before = {name: (tmp_path / name).read_bytes() for name in [*OWN_NAMES, ".mine.new"]}
    save(tmp_path, 1, [LAST, "epoch_0001.pt"], keep=1)
    save(tmp_path, 2, [LAST, "epoch_0002.pt"], keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.state["iteration"] == 2 and not found.skipped
    assert continue_from(tmp_path, load_checkpoint(tmp_path / "epoch_0002.pt"), Progress()).aside is None
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    if content == "further on":  # given by name it is a checkpoint as any other
        assert load_checkpoint(tmp_path / "my_copy.pt").state["iteration"] == 99


def test_epochs_are_told_by_their_number_and_other_files_left_alone(tmp_path: Path):
    save(tmp_path, 1, ["epoch_9998.pt"])
    shutil.copy(tmp_path / "epoch_9998.pt", tmp_path / "epoch_9998_before_the_drop.pt")
    for epoch in (9999, 10000, 10001):
        save(tmp_path, epoch, [f"epoch_{epoch:04d}.pt"], keep=2)
    assert set(iterations(tmp_path)) == {"epoch_9998_before_the_drop.pt", "epoch_10000.pt", "epoch_10001.pt"}


def test_keeping_one_does_not_delete_the_good_one_when_the_new_one_fails(tmp_path: Path, monkeypatch):
    save(tmp_path, 1, ["epoch_0001.pt"], keep=1)
    store = CheckpointStore(tmp_path, 1)
    with monkeypatch.context() as context:
        break_disk(context, "os.fsync")
        store.save(state_at(2), ["epoch_0002.pt"])
        assert store.wait() is not None
    assert iterations(tmp_path)["epoch_0001.pt"] == 1


def test_a_file_system_without_hard_links_gets_copies(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "not supported")))
    save(tmp_path, 1, [LAST])
    save(tmp_path, 2, [LAST, BEST])
    assert iterations(tmp_path) == {LAST: 2, BEST: 2, PREVIOUS: 1}


def test_going_on_from_an_older_file_moves_later_and_broken_ones_aside(tmp_path: Path):
    for iteration, name in ((1, "epoch_0001.pt"), (2, "epoch_0002.pt"), (3, "epoch_0003.pt")):
        save(tmp_path, iteration, [LAST, name])
    damage(tmp_path / "epoch_0002.pt", "foreign")
    aside = continue_from(tmp_path, load_checkpoint(tmp_path / "epoch_0001.pt"), Progress()).aside
    assert aside is not None and aside.parent == tmp_path
    assert iterations(tmp_path) == {"epoch_0001.pt": 1, LAST: 1}
    assert {path.name for path in aside.iterdir()} == {LAST, PREVIOUS, "epoch_0002.pt", "epoch_0003.pt"}


def test_going_on_from_the_newest_file_moves_nothing(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    save(tmp_path, 2, [LAST, "epoch_0002.pt"])
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    found = newest_checkpoint(tmp_path)
    assert found is not None and continue_from(tmp_path, found, Progress()).aside is None
    assert before == {path.name: path.stat().st_ino for path in tmp_path.iterdir()}


def best(epoch: int) -> Progress:
    return Progress(best_epoch=epoch, best_map=0.1 * epoch)


def best_state(epoch: int, best_epoch: int) -> dict:
    return state_at(10 * epoch) | {"iterations_per_epoch": 10, "best_epoch": best_epoch, "best_map": 0.1 * best_epoch}


@pytest.fixture
def three_epochs(tmp_path: Path) -> Path:
    """A run of three epochs, of which the first and the last were the best so far."""
    store = CheckpointStore(tmp_path / "run", 3)
    for epoch, best in ((1, 1), (2, 1), (3, 3)):
        names = [LAST, f"epoch_{epoch:04d}.pt", *([BEST] if best == epoch else [])]
        assert store.save(best_state(epoch, best), names) is None
    assert store.close() is None
    return tmp_path / "run"


def test_going_on_from_before_the_best_epoch_brings_back_the_best_before_it(three_epochs: Path, tmp_path: Path):
    chosen = load_checkpoint(three_epochs / "epoch_0002.pt")
    done = continue_from(three_epochs, chosen, best(1))
    assert done.has_best
    assert iterations(three_epochs) == {"epoch_0001.pt": 10, "epoch_0002.pt": 20, LAST: 20, BEST: 10, PREVIOUS: 20}
    # In a folder of its own too.
    assert continue_from(tmp_path / "new", chosen, best(1)).has_best
    assert iterations(tmp_path / "new") == {LAST: 20, BEST: 10}


def test_a_best_of_another_run_or_of_before_a_kill_is_set_aside(three_epochs: Path, tmp_path: Path):
    # A folder whose best.pt is of another run, with a higher mAP.
    store = CheckpointStore(tmp_path / "other", 3)
    assert store.save(best_state(1, 1) | {"best_map": 0.9}, [LAST, BEST, "epoch_0001.pt"]) is None
    assert store.close() is None
    done = continue_from(tmp_path / "other", load_checkpoint(three_epochs / LAST), best(3))
    assert done.has_best and done.aside is not None
    assert iterations(tmp_path / "other")[BEST] == 30 and iterations(done.aside) == {BEST: 10}
    # A best.pt that is older than the best epoch that the run knows of.
    (three_epochs / BEST).unlink()
    shutil.copy(three_epochs / "epoch_0001.pt", three_epochs / BEST)
    assert continue_from(three_epochs, load_checkpoint(three_epochs / LAST), best(3)).has_best
    assert iterations(three_epochs)[BEST] == 30


def test_a_best_that_is_no_longer_there_is_told(three_epochs: Path):
    (three_epochs / "epoch_0001.pt").unlink()
    assert not continue_from(three_epochs, load_checkpoint(three_epochs / "epoch_0002.pt"), best(1)).has_best
    assert BEST not in iterations(three_epochs)


def test_a_best_that_counts_no_more_is_set_aside(three_epochs: Path):
    done = continue_from(three_epochs, load_checkpoint(three_epochs / LAST), Progress())
    assert done.aside is not None and iterations(done.aside) == {BEST: 30}
    assert LAST in iterations(three_epochs)


def test_a_run_goes_on_where_the_disk_is_full_for_a_while(start, tmp_path: Path, monkeypatch, capsys, load):
    plain, failures = torch.save, []

    def save_later(state, stream):
        if len(failures) < 2:
            failures.append(1)
            raise OSError(28, "No space left on device")
        plain(state, stream)

    monkeypatch.setattr(torch, "save", save_later)
    assert start(tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "No space left on device" in said and "tries again at the next checkpoint" in said
    assert load(tmp_path / "run" / "checkpoints" / LAST)["iteration"] == 6


def test_a_run_whose_last_state_cannot_be_saved_fails_at_the_end(start, tmp_path: Path, monkeypatch, records_of):
    break_disk(monkeypatch, "torch.save")
    with pytest.raises(RunError, match="NOT saved"):
        start(tmp_path / "run")
    assert len(records_of(tmp_path / "run", "train")) == 6  # and yet it went on to its end
    assert "NOT saved" in (tmp_path / "run" / "train.log").read_text()


def killed_while_saving(folder: Path, iteration: int, *, at_step: int) -> bool:
    """Save in a process that ends, as a SIGKILL ends it, before its `at_step`th change of the folder (0: in the
    middle of the file's bytes); whether it came so far."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    steps = 0

    def or_end(action):
        def counted(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == at_step:
                os._exit(9)
            return action(*arguments, **options)

        return counted

    def half(state, stream):
        stream.write(b"half of a file")
        stream.flush()
        os._exit(9)

    try:
        os.link, os.fsync = or_end(os.link), or_end(os.fsync)
        Path.unlink, Path.replace = or_end(Path.unlink), or_end(Path.replace)
        if at_step == 0:
            checkpoint_store._save = half
        CheckpointStore(folder, keep=1)._write(state_at(iteration), [LAST, BEST, f"epoch_{iteration:04d}.pt"])
    finally:
        os._exit(0)


@pytest.mark.slow
def test_a_kill_at_any_step_of_a_save_and_another_in_the_next_one_lose_nothing(tmp_path):
    save(tmp_path / "before", 1, [LAST, "epoch_0001.pt"])
    save(tmp_path / "before", 2, [LAST, "epoch_0002.pt"])
    at_step, was_killed, newest = 0, True, []
    while was_killed:
        folder = tmp_path / f"killed_{at_step}"
        shutil.copytree(tmp_path / "before", folder)
        was_killed = killed_while_saving(folder, 3, at_step=at_step)
        found = newest_checkpoint(folder)
        assert found is not None and not found.skipped
        newest.append(found.state["iteration"])
        assert newest[-1] < 3 or iterations(folder)[BEST] == 3  # it was the best
        assert killed_while_saving(folder, 4, at_step=0)
        again = newest_checkpoint(folder)
        assert again is not None and not again.skipped, f"a file was damaged after a kill at step {at_step}"
        assert again.state["iteration"] == newest[-1]
        save(folder, 4, [LAST])
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        at_step += 1
    assert newest[0] == 2 and newest[-1] == 3 and newest == sorted(newest) and at_step > 10
