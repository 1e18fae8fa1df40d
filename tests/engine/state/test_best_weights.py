"""best_weights.safetensors: the weights of best.pt alone, whatever was killed when."""

import json

import pytest
import torch

from data import read_coco
from detection.engine.state.best_weights import complete_best_weights, write_best_weights
from detection.engine.state.checkpoint import BEST, LAST
from detection.engine.state.checkpoint_store import CheckpointStore
from detection.models import load_detector
from detection.models.weights.safetensors_files import read_metadata, read_safetensors
from tests.engine.state.checkpoint_states import state_at


def described(path):
    return json.loads(read_metadata(path)["detector"])


def test_a_run_leaves_the_averaged_weights_of_its_best_validation_with_its_facts(start, shapes_set, tmp_path, load):
    assert start(tmp_path / "run", "--ema", "0.5", "--notes", "blue, 2nd try") == 0
    path = tmp_path / "run" / "best_weights.safetensors"
    best = load(tmp_path / "run" / "checkpoints" / BEST)
    tensors = read_safetensors(path)[0]
    assert tensors.keys() == best["ema"].keys()
    assert all(torch.equal(tensors[name], best["ema"][name]) for name in tensors)
    facts = described(path)
    assert facts["notes"] == "blue, 2nd try" and facts["averaged"] and facts["epoch"] == best["best_epoch"]
    annotations = read_coco(shapes_set / "annotations" / "instances_train2017.json")
    assert facts["data_digest"] == annotations.training_view().digest()
    detector = load_detector(path)
    assert detector.class_names == annotations.class_names and (detector.min_size, detector.max_size) == (64, 96)
    assert start(tmp_path / "again", "--val-only", "--weights", str(path)) == 0


def save(folder, iteration, names, target):
    store = CheckpointStore(folder, 3, target)
    assert store.save(state_at(iteration, best_epoch=1), names) is None
    return store.close()


@pytest.mark.parametrize("left", ["older", "cut short", "missing"])
def test_what_a_kill_left_behind_best_is_made_again(left, tmp_path):
    folder, target = tmp_path / "checkpoints", tmp_path / "best_weights.safetensors"
    assert save(folder, 1, [LAST, BEST], target) is None
    assert described(target)["iteration"] == 1
    # best.pt was replaced, and then came the kill.
    assert save(folder, 2, [LAST, BEST], None) is None
    if left == "cut short":
        target.write_bytes(target.read_bytes()[:-1])
    elif left == "missing":
        target.unlink()
    complete_best_weights(target, folder)
    assert described(target)["iteration"] == 2
    assert read_safetensors(target)[0]["w"].unique().tolist() == [2.0]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [target.name]


def test_the_metric_is_the_figure_of_the_validation(tmp_path):
    for metric, value, said in (("mAP_50", 0.5, 0.5), ("loss", -1.25, 1.25)):
        write_best_weights(
            tmp_path / "w", state_at(1, best_epoch=1, ending={"best_metric": metric, "best_value": value})
        )
        assert described(tmp_path / "w")["metric"] == {metric: said}


def test_without_a_best_the_last_weights_are_taken(tmp_path):
    folder, target = tmp_path / "checkpoints", tmp_path / "best_weights.safetensors"
    save(folder, 3, [LAST], target)
    assert not target.exists()
    complete_best_weights(target, folder)
    assert described(target)["iteration"] == 3


def test_a_file_that_cannot_be_written_is_reported_and_written_with_the_next_checkpoint(tmp_path):
    folder, target = tmp_path / "checkpoints", tmp_path / "gone" / "best_weights.safetensors"
    store = CheckpointStore(folder, 3, target)
    store.save(state_at(1, best_epoch=1), [LAST, BEST])
    assert "best_weights" in (store.save(state_at(2, best_epoch=1), [LAST]) or "")
    target.parent.mkdir()
    store.wait()
    store.save(state_at(3, best_epoch=1), [LAST])
    assert store.close() is None
    assert described(target)["iteration"] == 1
