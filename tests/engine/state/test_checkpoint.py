"""Checkpoint files that are found and read: a broken one is named, and the one before it used."""

import errno
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from detection.engine import RunError
from detection.engine.state import checkpoint
from detection.engine.state.checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
)
from detection.engine.state.checkpoint_store import continue_from
from detection.engine.state.train_state import Progress
from tests.engine.state.checkpoint_states import damage, iterations, save, state_at

DAMAGES = ["truncated", "empty", "bit-flipped", "foreign", "half-written", "other-version", "incomplete"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_newest_file_is_named_and_the_one_before_it_used(how: str, tmp_path: Path):
    save(tmp_path, 1, [LAST])
    save(tmp_path, 2, [LAST])
    damage(tmp_path / LAST, how)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.state["iteration"]) == (PREVIOUS, 1)
    (reason,) = found.skipped
    assert str(tmp_path / LAST) in reason
    with pytest.raises(CheckpointError, match=LAST):
        load_checkpoint(tmp_path / LAST)


def test_where_every_file_is_broken_all_are_named_and_a_way_out(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    save(tmp_path, 2, [LAST, "epoch_0001.pt"])
    for name in (LAST, PREVIOUS, "epoch_0001.pt"):
        damage(tmp_path / name, "truncated")
    with pytest.raises(CheckpointError) as failed:
        newest_checkpoint(tmp_path)
    assert all(name in str(failed.value) for name in (LAST, PREVIOUS, "epoch_0001.pt", "--overwrite"))


def test_no_file_at_all_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="/dev/null: not a regular file"):
        load_checkpoint(Path("/dev/null"))
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_the_furthest_checkpoint_is_the_newest_and_a_validated_one_before_an_unvalidated(tmp_path: Path):
    save(tmp_path, 3, ["epoch_0001.pt"])
    save(tmp_path, 6, ["epoch_0002.pt"], due=True)
    save(tmp_path, 6, [BEST])
    save(tmp_path, 5, [LAST])
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.path.name == BEST


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": checkpoint.FORMAT, "version": 1, **state_at(1), "config": Trap()}, tmp_path / LAST)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap()))
    for name in (LAST, "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError):
        newest_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iteration": "2"}, "iteration is a str"),
        ({"validation_due": 1}, "validation_due is a int"),
        ({"model": {"w": [1.0]}}, "model.w is a list"),
        ({"model": {1: torch.ones(1)}}, "model has a key that is not text"),
        ({"ema": {"w": None}}, "ema.w is a NoneType"),
        ({"class_names": ["a", 1]}, "class_names.1 is a int"),
        ({"run": {}}, "run lacks global_batch_size, world_size, data_digest"),
        ({"schedule": {"lr": torch.ones(1)}}, "schedule holds other than plain values"),
        ({"skipped_steps": None}, "skipped_steps is a NoneType"),
    ],
)
def test_a_checkpoint_with_entries_of_another_kind_is_a_broken_one(changes: dict, words: str, tmp_path: Path):
    save(tmp_path, 1, ["epoch_0001.pt"])
    torch.save({"format": checkpoint.FORMAT, "version": 1, **state_at(2), **changes}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=f"{LAST}: an incomplete or altered checkpoint: {words}"):
        load_checkpoint(tmp_path / LAST)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.state["iteration"] == 1 and len(found.skipped) == 1


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    with zipfile.ZipFile(tmp_path / LAST) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / LAST, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"last\.pt: not a readable checkpoint \(its member .* is compressed"):
        load_checkpoint(tmp_path / LAST)


def test_a_file_that_cannot_be_read_at_the_moment_is_not_taken_for_a_broken_one(tmp_path: Path, monkeypatch):
    save(tmp_path, 1, [LAST])
    save(tmp_path, 2, [LAST])
    plain = Path.open

    def fail_at_last(path, *arguments, **named):
        if path.name == LAST:
            raise OSError(errno.EIO, "Input/output error")
        return plain(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", fail_at_last)
    for attempt in (lambda: newest_checkpoint(tmp_path), lambda: load_checkpoint(tmp_path / LAST)):
        with pytest.raises(CheckpointError, match=r"last\.pt: cannot be read now .*Input/output error.*--resume FILE"):
            attempt()
    monkeypatch.undo()
    assert iterations(tmp_path) == {LAST: 2, PREVIOUS: 1}


def test_want_of_memory_does_not_make_a_checkpoint_a_broken_one(tmp_path: Path, monkeypatch):
    save(tmp_path, 1, [LAST])

    def no_memory(*sizes, **named):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: not enough memory: you tried ...")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(CheckpointError, match="cannot be read now"):
        newest_checkpoint(tmp_path)


def test_what_only_looks_like_a_checkpoint_is_passed_over(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere")
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.path.name == LAST and not found.skipped


def test_a_broken_last_file_does_not_replace_the_good_one_before_it(tmp_path: Path):
    save(tmp_path, 1, [LAST])
    save(tmp_path, 2, [LAST])
    damage(tmp_path / LAST, "truncated")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    continue_from(tmp_path, found, Progress())
    save(tmp_path, 3, [LAST])
    assert iterations(tmp_path) == {LAST: 3, PREVIOUS: 1}


def test_a_resume_names_the_broken_file_it_skips(start, finished, tmp_path: Path, capsys):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "checkpoints" / LAST).unlink()
    (output / "checkpoints" / LAST).write_bytes(b"")
    assert start(output, "--resume") == 0
    assert f"skipped: {output / 'checkpoints' / LAST}" in capsys.readouterr().out


def test_a_resume_with_nothing_but_broken_files_fails_and_does_not_begin_anew(start, finished, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for path in (output / "checkpoints").iterdir():
        path.write_bytes(b"rubbish")
    with pytest.raises(RunError, match="no checkpoint is intact"):
        start(output, "--resume")


def test_a_checkpoint_whose_weights_are_not_of_its_model_is_refused(start, finished, tmp_path: Path, load):
    state = load(finished / "checkpoints" / LAST)
    del state["model"]["fpn.output.0.weight"]
    torch.save(state, tmp_path / "strange.pt")
    with pytest.raises(RunError, match="strange.pt: its weights are not of its own model"):
        start(tmp_path / "run", "--resume", tmp_path / "strange.pt")
