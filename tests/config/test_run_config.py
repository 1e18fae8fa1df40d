"""The command line: what it says, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from detection.config import ConfigError, RunConfig, parse_arguments
from detection.config.options_page import PAGE, options_page
from detection.config.run_config import names_of
from detection.config.settings import settings_of

ROOT = Path(__file__).parents[2]


def test_the_page_of_options_is_the_one_that_the_settings_make():
    written = PAGE.read_text() == options_page()
    assert written, "docs/options.md is not up to date: python3 -m detection.config.options_page"


def test_help_does_not_wait_for_torch():
    program = "import sys, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_without_options_the_configuration_is_that_of_the_defaults():
    assert parse_arguments([]) == RunConfig()


def test_options_arrive_in_their_fields():
    words = (
        "--schedule 2x --batch-size 4 --amp bf16 --ema 0.9 --clip-grad 35 --accumulate 2 --seed 7 --workers 0 "
        "--min-size 300 --max-size 500 --train-images a --train-annotations b.json --no-channels-last "
        "--frozen-stages -1 --resume --checkpoint-minutes 2.5"
    )
    config = parse_arguments(words.split())
    assert (config.train.schedule, config.train.batch_size, config.train.accumulate) == ("2x", 4, 2)
    assert (config.train.amp, config.train.ema, config.train.clip_grad, config.train.seed) == ("bf16", 0.9, 35.0, 7)
    assert (config.data.min_size, config.data.max_size, config.data.workers) == (300, 500, 0)
    assert (config.data.train_images, config.data.train_annotations) == ((Path("a"),), (Path("b.json"),))
    assert not config.train.channels_last
    assert config.model.frozen_stages == -1
    assert (config.output.resume, config.output.checkpoint_minutes) == ("auto", 2.5)


@pytest.mark.parametrize(
    ("world_size", "most_at_once", "batch_size", "accumulate"),
    [(8, 2, 2, 1), (4, 2, 2, 2), (2, 8, 8, 1), (1, 2, 2, 8), (16, 2, 1, 1), (1, 3, 2, 8), (1, 99, 16, 1)],
)
def test_a_global_batch_is_divided_over_any_number_of_processes(world_size, most_at_once, batch_size, accumulate):
    words = ["--global-batch-size", "16", "--batch-size", str(most_at_once)]
    train = parse_arguments(words).for_processes(world_size).train
    assert (train.batch_size, train.accumulate) == (batch_size, accumulate)
    assert world_size * batch_size * accumulate == 16


def test_a_global_batch_that_cannot_be_divided_evenly_is_refused_with_the_numbers_that_can():
    with pytest.raises(ConfigError, match=r"16 cannot be divided evenly over 7 processes.*1, 2, 4, 8, 16"):
        parse_arguments(["--global-batch-size", "16"]).for_processes(7)


def test_without_a_global_batch_every_process_keeps_its_own():
    config = parse_arguments(["--batch-size", "3"])
    assert config.for_processes(5) is config


def test_ema_without_a_value_has_a_default_decay():
    assert parse_arguments(["--ema"]).train.ema == 0.9998


def test_overrides_of_the_schedule_keep_their_order_short_options_last():
    config = parse_arguments(["--lr", "0.1", "--set", "lr=0.3", "--set", "a.b=[1,2]", "--max-epochs", "6"])
    assert config.train.overrides == ("lr=0.3", "a.b=[1,2]", "lr=0.1", "max_epochs=6")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--val-only --test-only", "exclude each other"),
        ("--resume --overwrite", "one of them"),
        ("--min-size 900 --max-size 500", "--max-size 500 is below --min-size 900"),
        ("--set weight_decay", "KEY=VALUE"),
        ("--model-set nms_iou", "write it as KEY=VALUE with a word or a Python literal"),
        ("--model-set nms_iou={[]:1}", "write it as KEY=VALUE with a word or a Python literal"),
        ("--model-set nms_iou=" + "-" * 5000 + "1", "write it as KEY=VALUE with a word or a Python literal"),
        ("--sync-bn --norm gn", "--norm bn"),
        ("--train-images x", "--train-annotations"),
        ("--val-annotations x", "go together"),
        ("--dataset shapes --train-images x --train-annotations y", "--dataset shapes"),
        ("--test-only --resume", "--test-annotations"),
        ("--val-only", "--weights FILE"),
        ("--val-only --weights imagenet", "--resume"),
        ("--val-only --resume x.pt --dataset shapes --weights f --overwrite", "one of them"),
        ("--val-only --weights f --overwrite", "leave --overwrite away"),
        ("--global-batch-size 16 --accumulate 2", "leave --accumulate away"),
        ("--train-min-sizes 640 800 --train-scales 1333x800", "--train-min-sizes and --train-scales each decide"),
        ("--train-min-sizes 640 --lsj", "--train-min-sizes and --lsj each decide the scale"),
        ("--train-scales 640x640 --lsj 512", "give one of them"),
        ("--train-min-sizes 640 1400", "1400 is above --max-size 1333"),
        ("--train-scale-sampling range", "no effect by itself"),
        ("--train-min-sizes 640 700 800 --train-scale-sampling range", "3 were given: give two"),
        ("--train-scales 640x640 --train-scale-sampling range", "1 were given: give two"),
        ("--lsj-range 0.1 2", "no effect without --lsj"),
        ("--lsj-min-visibility 0.5", "--lsj-min-visibility has no effect without --lsj"),
        ("--lsj --lsj-range 2 0.1", "the first must not be above the second"),
        ("--photometric-distortion --color-jitter 0.4 0.4 0.4 0.1", "both change the colors"),
        ("--color-jitter 0.4 0.4 0.4 0.6", "the hue, is 0.6 turns: give 0 to 0.5"),
        ("--repeat-threshold 0", "repeats nothing"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_a_remedy(words: str, said: str):
    with pytest.raises(ConfigError, match=said):
        parse_arguments(words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batchsize 4", "did you mean --batch-size?"),
        ("--dataset shaps", "did you mean shapes?"),
        ("--bach-size=4", "did you mean --batch-size?"),
        ("--batch-size 0", "0 is not a whole number from 1 to 4096"),
        ("--lsj --lsj-range 0 1", "0 is not a number from 0.01 to 100"),
        ("--color-jitter -1 0.4 0.4 0.1", "-1 is not a number from 0 to 10"),
        ("--lr nan", "nan is not a number above 0, at most 1000"),
        ("--collective-timeout 1e300", "1e300 is not a number from 0.01 to 10080"),
        ("--workers 1000000", "from 0 to 256"),
        ("--min-size 1000000", "from 33 to 16384"),
        ("--lr -1", "above 0"),
        ("--ema 1.5", "between 0 and 1"),
        ("--seed -1", "whole number"),
        ("--workers -1", "-1 is not a whole number from 0"),
        ("--workers two", "two is not a whole number from 0"),
        ("--amp fp8", "invalid choice"),
        ("--frozen-stages 9", "invalid choice"),
        ("--train-scales 1333", "'1333' is no scale: write two sides in pixels, e.g. 1333x800"),
        ("--train-scales 0x800", "0 is not a whole number from 33"),
        ("--flip-probability 1.5", "1.5 is not a number from 0 to 1"),
        ("--train-min-sizes 32", "32 is not a whole number from 33"),
        ("--repeat-threshold 2", "2 is not a number from 0 to 1"),
    ],
)
def test_a_wrong_option_ends_with_status_2_and_says_what_is_meant(words: str, said: str, capsys):
    with pytest.raises(SystemExit) as left:
        parse_arguments(words.split())
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_every_numeric_option_has_a_range():
    options = [option for _, _, field in settings_of(RunConfig) for option in field.metadata["options"]]
    kinds = {option.words.get("type") for option in options if "choices" not in option.words}
    assert not kinds & {int, float}


def test_options_are_not_abbreviated():
    with pytest.raises(SystemExit):
        parse_arguments(["--sched", "1x"])


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("", "runs/faster_rcnn_r50_fpn_1x"),
        ("--schedule 2x --model faster_rcnn_r18_fpn", "runs/faster_rcnn_r18_fpn_2x"),
        ("--schedule my/schedule_long.py", "runs/faster_rcnn_r50_fpn_long"),
        ("--dataset shapes", "runs/faster_rcnn_r50_fpn_1x_shapes"),
        ("--data-path sets/coins", "runs/faster_rcnn_r50_fpn_1x_coins"),
        ("--data-path /shared/coco", "runs/faster_rcnn_r50_fpn_1x"),
        (
            "--train-images i --train-annotations coins/annotations/instances_train.json",
            "runs/faster_rcnn_r50_fpn_1x_coins",
        ),
        ("--output-dir elsewhere", "elsewhere"),
    ],
)
def test_the_output_directory_is_named_for_model_schedule_and_set(words: str, folder: str):
    assert parse_arguments(words.split()).output_dir == Path(folder)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/coins", "b/keys"], ("coins", "keys")),
        (["a/coins", "b/coins"], ("coins_1", "coins_2")),
        (["a/x", "b/x", "c/x_1"], ("x_1_1", "x_2", "x_1_3")),
    ],
)
def test_every_set_has_a_name_of_its_own(paths: list[str], names: tuple[str, ...]):
    assert names_of([Path(path) for path in paths]) == names


def test_the_configuration_is_plain_types_for_json():
    words = "--data-path d --set a=1 --ema --model-set x=(1,'b') --train-scales 1333x640 800x800"
    config = parse_arguments(words.split())
    record = json.loads(json.dumps(config.to_dict()))
    assert record == config.to_dict()
    assert record["data"]["data_path"] == ["d"]
    assert record["train"]["overrides"] == ["a=1"]
    assert record["model"]["settings"] == [["x", [1, "b"]]]
    assert record["augmentation"] == config.augmentation.to_dict()
    assert record["augmentation"]["train_scales"] == [[1333, 640], [800, 800]]
