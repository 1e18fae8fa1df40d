"""--freeze: what is frozen does not move, the rest does, and the plan says which is which."""

import json
import re

import pytest
import torch

from detection.config import parse_arguments
from detection.config.run_config import FREEZE_CHOICES


@pytest.mark.parametrize(
    ("part", "stages"),
    [("none", -1), ("stem", 0), ("stage1", 1), ("stage2", 2), ("stage3", 3), ("stage4", 4), ("backbone", 4)],
)
def test_a_part_is_the_number_of_stages_that_mmdetection_has_for_it(part, stages):
    assert parse_arguments(["--freeze", part]).model.frozen_stages == stages
    assert FREEZE_CHOICES[part] == stages


def test_without_the_option_the_starting_weights_decide():
    assert parse_arguments([]).model.frozen_stages is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--freeze stage5", "did you mean stage"),
        ("--freeze head", "none of none, stem, stage1"),
        ("--freeze stem --frozen-stages 1", "not allowed with"),
    ],
)
def test_a_wrong_part_is_refused_with_what_there_is(words, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(words.split())
    assert said in capsys.readouterr().err


def _is_frozen(name: str, prefixes: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"backbone.{prefix}" for prefix in prefixes))


@pytest.mark.parametrize(
    ("part", "prefixes"),
    [
        ("none", ()),
        ("stem", ("conv1", "bn1")),
        ("stage2", ("conv1", "bn1", "layer1", "layer2")),
        ("backbone", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
    ],
)
def test_frozen_weights_do_not_move_in_fine_tuning_and_all_others_do(
    part, prefixes, start, finished, tmp_path, load, capsys
):
    weights = finished / "checkpoints" / "last.pt"
    # --norm bn, so that statistics would move as well where a part were not frozen.
    options = ("--weights", weights, "--freeze", part, "--norm", "bn", "--max-epochs", "1", "--lr", "0.02")
    assert start(tmp_path / "run", *options) == 0
    before, after = (load(file)["model"] for file in (weights, tmp_path / "run" / "checkpoints" / "last.pt"))
    moved = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    assert not [name for name in moved if _is_frozen(name, prefixes)]
    trained = {name for name in after if name.endswith(("weight", "bias")) and not _is_frozen(name, prefixes)}
    # The image's few boxes leave some levels' outputs without a gradient; whole modules never are.
    for module in {name.rsplit(".", 1)[0] for name in trained if name.startswith(("backbone", "fpn.lateral", "roi"))}:
        assert any(name.startswith(module + ".") for name in moved), module

    said = re.search(r"frozen: .*; ([\d,]+) parameters frozen, ([\d,]+) trained", capsys.readouterr().out)
    assert said is not None
    frozen_count, trained_count = (int(number.replace(",", "")) for number in said.groups())
    parameters = [name for name in after if name.endswith(("weight", "bias"))]
    assert frozen_count == sum(after[name].numel() for name in parameters if _is_frozen(name, prefixes))
    assert trained_count == sum(after[name].numel() for name in parameters if not _is_frozen(name, prefixes))


def test_weights_for_as_many_classes_under_other_names_keep_the_head_with_a_warning(
    start, finished, shapes_set, tmp_path, capsys
):
    annotations = shapes_set / "annotations" / "instances_train2017.json"
    renamed = tmp_path / "renamed.json"
    renamed.write_text(annotations.read_text().replace('"circle"', '"ball"'))
    sets = ("--train-images", shapes_set / "train2017", "--train-annotations", renamed)
    weights = ("--weights", finished / "checkpoints" / "last.pt")
    assert start(tmp_path / "run", *sets, *weights, "--dry-run") == 0
    assert "'circle' is now 'ball'" in capsys.readouterr().out
    assert start(tmp_path / "run", *weights, "--dry-run") == 0
    assert "is now" not in capsys.readouterr().out


def test_another_number_of_classes_gives_the_model_a_new_head_and_says_so(
    start, finished, shapes_set, tmp_path, capsys, load
):
    content = json.loads((shapes_set / "annotations" / "instances_train2017.json").read_text())
    content["categories"].append({"id": 99, "name": "comet"})
    more = tmp_path / "more.json"
    more.write_text(json.dumps(content))
    sets = ("--train-images", shapes_set / "train2017", "--train-annotations", more)
    weights = finished / "checkpoints" / "last.pt"
    assert start(tmp_path / "run", *sets, "--weights", weights, "--freeze", "stage1", "--max-epochs", "1") == 0
    said = capsys.readouterr().out
    num_classes = len(content["categories"])
    assert f"the file's head is for {num_classes - 1} classes, the model's for {num_classes}" in said
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["class_names"][-1] == "comet"
    assert torch.equal(state["model"]["backbone.conv1.weight"], load(weights)["model"]["backbone.conv1.weight"])


def test_freezing_random_weights_is_warned_of(start, tmp_path, capsys):
    assert start(tmp_path / "run", "--freeze", "backbone", "--dry-run") == 0
    assert "WARNING: what is frozen has random weights" in capsys.readouterr().out
    assert start(tmp_path / "run", "--dry-run") == 0
    assert "WARNING" not in capsys.readouterr().out
