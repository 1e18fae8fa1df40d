"""Checkpoint files with damage, or of somebody who means harm: named and passed over, or the run can use them."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from detection.config.run_config import RunConfig
from detection.engine.state.checkpoint import (
    FORMAT,
    LAST,
    PREVIOUS,
    VERSION,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
)
from detection.engine.state.checkpoint_store import CheckpointStore, continue_from
from detection.engine.state.resume import check_resumable, resumed_progress, resumed_settings
from detection.engine.state.train_state import stored_model
from detection.errors import DetectionError
from detection.models import build_model
from tests.engine.state.checkpoint_states import state_at as plain_state
from tests.fuzzing import DAMAGE, SEEDS, Damage, damaged, examples, with_odd_entries

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bounded_memory")]


def state_at(iteration: int) -> dict[str, Any]:
    """What a run would save, in small: tensors of several kinds, states by name, plain types."""
    weights = {
        "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "bn.num_batches_tracked": torch.tensor(iteration),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    momentum = {"conv.weight": {"momentum_buffer": torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))}}
    return plain_state(iteration, model=weights, optimizer={"type": "SGD", "state": momentum}, best_map=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoints folder: last.pt after 2 iterations, previous.pt after 1."""
    folder = tmp_path_factory.mktemp("checkpoints")
    store = CheckpointStore(folder, keep=3)
    for iteration in (1, 2):
        assert store.save(state_at(iteration), [LAST]) is None
    assert store.close() is None
    return folder


@pytest.fixture(scope="module")
def intact(folder: Path) -> bytes:
    return (folder / LAST).read_bytes()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


@examples(300)
@given(damage=DAMAGE)
def test_damage_is_found_or_harmless_and_the_checkpoint_before_is_used(
    folder: Path, intact: bytes, damage: Damage
) -> None:
    content = damaged(intact, damage)
    last = folder / LAST
    last.unlink()
    last.write_bytes(content)
    expected = {"format": "detection-checkpoint", "version": 1, **state_at(2)}
    try:
        loaded = load_checkpoint(last)
    except CheckpointError as error:
        assert str(last) in str(error) and "\n" not in str(error)
        found = newest_checkpoint(folder)
        assert found is not None and found.path == folder / PREVIOUS
        assert found.state["iteration"] == 1
        (reason,) = found.skipped
        assert str(last) in reason
    else:  # padding and time stamps of the zip file may be anything
        assert same(loaded.state, expected)
        found = newest_checkpoint(folder)
        assert found is not None and found.path == last
        assert same(found.state, expected)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A checkpoint of which a run can be resumed, but for most of its weights."""
    model = build_model("tiny", 2)
    weights = dict(list(model.state_dict().items())[:4])
    momentum = {name: {"momentum_buffer": torch.ones_like(tensor)} for name, tensor in weights.items()}
    state = plain_state(
        10,
        model=weights,
        ema=weights,
        optimizer={"type": "SGD", "state": momentum},
        model_config=asdict(model.config),
        best_map=0.5,
        best_epoch=1,
    )
    state["run"] |= {"augmentation": {}, "validation": {"digest": "0", "num_images": 6}}
    return {"format": FORMAT, "version": VERSION, **state}


@examples(50)
@given(seed=SEEDS)
def test_odd_entries_are_found_or_the_run_resumes(whole: dict[str, Any], tmp_path: Path, seed: int) -> None:
    state = with_odd_entries(whole, random.Random(seed))
    file = tmp_path / LAST
    torch.save(state, file)
    try:
        loaded = load_checkpoint(file)
    except CheckpointError as error:
        assert str(file) in str(error) and len(str(error)) < 1000
        with pytest.raises(CheckpointError, match="no checkpoint is intact"):
            newest_checkpoint(tmp_path)
        return
    assert newest_checkpoint(tmp_path) is not None
    try:
        _, lines = resumed_settings(loaded, RunConfig())
        lines += check_resumable(loaded, whole, 100)
        progress = resumed_progress(loaded, whole, 100)
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    assert all(isinstance(line, str) for line in lines)
    continue_from(tmp_path, loaded, progress)
    with pytest.raises(ValueError) as refused:
        stored_model(loaded.state)
    # In the words of the model, where a setting of it cannot be.
    is_own_error = isinstance(refused.value, DetectionError)
    assert is_own_error or "its weights are not of its own model" in str(refused.value)
