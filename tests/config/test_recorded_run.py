"""A run again from its config.json."""

import dataclasses
import json
from pathlib import Path

import pytest

from detection.config import ConfigError, RunConfig, parse_arguments
from detection.config.cli import words_of

WORDS = (
    "--schedule 2x --max-epochs 5 --lr 0.1 --set param_scheduler.0.end=7 --train-images a --train-annotations b.json "
    "--train-scales 96x64 40x33 --train-scale-sampling range --color-jitter 0.4 0.4 0.4 0.1 --freeze stage2 --norm gn "
    "--model-set anchor_sizes=[8,16,32,64,128] --model-set fpn_norm=gn --no-channels-last --ema 0.5 --seed 7 "
    "--global-batch-size 8 --batch-size 4 --checkpoint-minutes 2.5"
)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """runs/x/config.json of a run with options of every kind."""
    file = tmp_path / "x" / "config.json"
    file.parent.mkdir()
    config = parse_arguments([*WORDS.split(), "--output-dir", "elsewhere", "--overwrite"]).for_processes(2)
    file.write_text(json.dumps({"config": config.to_dict()}))
    return file


def test_a_recorded_run_has_the_settings_that_its_options_gave(record):
    assert parse_arguments(["--config", str(record)]).train == parse_arguments(WORDS.split()).train
    repeated = parse_arguments(["--config", str(record.parent)])
    asked = dataclasses.replace(parse_arguments(WORDS.split()), config_notes=repeated.config_notes)
    assert repeated.to_dict() == asked.to_dict()


def test_options_count_over_the_record_key_by_key(record):
    words = "--lr 0.2 --set param_scheduler.0.start_factor=0.1 --model-set fpn_norm=None --lsj 64 --accumulate 1"
    config = parse_arguments(["--config", str(record), *words.split()])
    keys = ["param_scheduler.0.end=7", "lr=0.2", "max_epochs=5", "param_scheduler.0.start_factor=0.1"]
    assert sorted(config.train.overrides) == sorted(keys)
    assert dict(config.model.settings) == {"anchor_sizes": [8, 16, 32, 64, 128], "fpn_norm": None}
    assert (config.augmentation.train_scales, config.augmentation.lsj) == (None, 64)
    assert (config.train.global_batch_size, config.train.accumulate) == (None, 1)
    assert parse_arguments(["--config", str(record), "--schedule", "1x"]).train.overrides == ()


def test_resume_of_a_folder_takes_its_record_and_stays_in_it(record):
    config = parse_arguments(["--resume", str(record.parent)])
    assert (config.output.resume, config.output_dir, config.train.seed) == ("auto", record.parent, 7)
    other = parse_arguments(["--resume", str(record.parent), "--output-dir", "y"])
    assert (other.output.resume, other.output_dir) == (str(record.parent), Path("y"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", -1), ("seed", "x"), ("seed", [1]), ("amp", "half"), ("channels_last", "no"), ("overrides", [1])],
)
def test_a_value_that_cannot_be_is_refused_with_file_and_key(record, key, value):
    content = json.loads(record.read_text())
    content["config"]["train"][key] = value
    record.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"config.json: train.{key} is"):
        parse_arguments(["--config", str(record)])


@pytest.mark.parametrize("text", ["", "[]", '{"config": 3}', '{"config": {"train": []}}', "[" * 5000])
def test_a_file_that_is_no_record_is_refused(record, text):
    record.write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        parse_arguments(["--config", str(record)])


def test_options_of_python_are_those_of_the_command_line():
    words = words_of(
        {"schedule": "2x", "max_epochs": 5, "ema": True, "channels_last": False, "frozen_stages": -1, "amp": None}
        | {"set": {"lr": 0.1}, "model_set": ["fpn_norm=gn"], "train_min_sizes": [64, 96], "lsj": False}
    )
    asked = "--schedule 2x --max-epochs 5 --ema --no-channels-last --frozen-stages -1 --set lr=0.1"
    asked += " --model-set fpn_norm=gn --train-min-sizes 64 96"
    assert parse_arguments(words) == parse_arguments(asked.split()) != RunConfig()
    with pytest.raises(ConfigError, match="did you mean --max-epochs"):
        parse_arguments(words_of({"max_epoch": 3}), raises=True)
