"""Checkpoint files with random damage: found and named, or harmless; the one before them is used.

FUZZ_EXAMPLES=10000 python -m pytest tests/engine/test_checkpoint_fuzz.py tries as many files as that in each test.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from detection.engine.checkpoint import (
    LAST,
    PREVIOUS,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
)
from detection.engine.checkpoint_store import CheckpointStore
from detection.engine.train_state import REQUIRED
from detection.models import FasterRCNN, WeightsError, build_model, load_weights
from tests.fuzzing import examples


def state_at(iteration: int) -> dict[str, Any]:
    """What a run would save, in small: tensors of several kinds, states by name, plain types."""
    weights = {
        "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "bn.num_batches_tracked": torch.tensor(iteration),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
    }
    momentum = {"conv.weight": {"momentum_buffer": torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))}}
    return {
        **dict.fromkeys(REQUIRED),
        "iteration": iteration,
        "iterations_per_epoch": 10,
        "validation_due": False,
        "best_map": 0.25,
        "model": weights,
        "optimizer": {"type": "SGD", "state": momentum},
        "schedule": {"train_cfg": {"max_epochs": 12}, "param_scheduler": [{"type": "LinearLR"}]},
        "class_names": ["circle", "dreieck ü"],
        "config": {"train": {"batch_size": 2}},
    }


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


Damage = list[tuple[str, float, int, int]]
PLACE = st.floats(0, 1, exclude_max=True)
"""As a share of the file; the second half of a zip file is its directory, the first the pickle and the tensors."""
CUT = st.tuples(st.just("cut"), PLACE, st.just(0), st.just(0))
FLIP = st.tuples(st.just("flip"), PLACE, st.integers(0, 7), st.just(0))
WRITE = st.tuples(st.sampled_from(["zero", "fill", "drop", "repeat"]), PLACE, st.just(0), st.integers(1, 600))
DAMAGE = st.one_of(
    st.lists(CUT, min_size=1, max_size=1),
    st.lists(FLIP, min_size=1, max_size=1),
    st.lists(FLIP | WRITE, min_size=1, max_size=8),
    st.lists(FLIP | WRITE | CUT, min_size=1, max_size=3),
)


def damaged(content: bytes, damage: Damage) -> bytes:
    altered = bytearray(content)
    for how, share, bit, length in damage:
        place = int(share * len(altered))
        end = min(place + length, len(altered))
        if how == "cut" or not altered:
            del altered[place:]
        elif how == "flip":
            altered[place] ^= 1 << bit
        elif how == "zero":
            altered[place:end] = bytes(end - place)
        elif how == "fill":
            altered[place:end] = b"\xff" * (end - place)
        elif how == "drop":
            del altered[place:end]
        else:
            altered[place:place] = altered[place:end]
    return bytes(altered)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


@pytest.mark.slow
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
def model() -> FasterRCNN:
    return build_model("tiny", 2)


@pytest.fixture(scope="module", params=["zip", "pickle"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of weights, in torch's present format and in the one of before 1.6."""
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(
        {
            "state_dict": {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.ones(3)},
            "meta": {"epoch": 1},
        },
        file,
        _use_new_zipfile_serialization=request.param == "zip",
    )
    return file


@examples(150)
@given(damage=DAMAGE)
@example(damage=[("cut", share, 0, 0) for share in (0.25, 0.25, 0.1875)])  # inside a number of an old file
@example(damage=[("cut", share, 0, 0) for share in (0.25, 0.25, 0.125)])
def test_damaged_weights_are_refused_with_the_readers_own_error_or_read(
    model: FasterRCNN, weights: Path, tmp_path: Path, damage: Damage
) -> None:
    file = tmp_path / "damaged.pth"
    file.write_bytes(damaged(weights.read_bytes(), damage))
    try:
        load_weights(model, str(file))
    except WeightsError as error:
        assert str(file) in str(error)
