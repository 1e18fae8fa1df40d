"""Training images at random, from the command line to the batches: what is asked for, refused, shown and resumed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data import Augmentation, ColorJitter, LargeScaleJitter, PhotometricDistortion, ScaleSampling
from detection.config import parse_arguments
from detection.config.augmentation import AugmentationConfig
from detection.engine.inputs.augmentation import augmentation_of

EVERYTHING = [
    *("--lsj", "80", "--lsj-range", "0.3", "2.0", "--lsj-min-visibility", "0.2", "--vertical-flip-probability", "0.5"),
    *("--photometric-distortion", "--repeat-threshold", "0.9"),
]


def asked_for(words: str) -> Augmentation:
    config = parse_arguments(words.split())
    return augmentation_of(config.augmentation, config.data.max_size)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Augmentation()),
        ("--train-min-sizes 640 800", Augmentation(scales=ScaleSampling(((1333, 640), (1333, 800))))),
        (
            "--train-min-sizes 64 80 --min-size 64 --max-size 100 --train-scale-sampling range",
            Augmentation(scales=ScaleSampling(((100, 64), (100, 80)), "range")),
        ),
        (
            "--train-scales 1333x640 800X1333 500x500",
            Augmentation(scales=ScaleSampling(((1333, 640), (800, 1333), (500, 500)))),
        ),
        ("--lsj --flip-probability 0", Augmentation(jitter=LargeScaleJitter(1024, 0.1, 2.0), flip_probability=0)),
        (
            "--lsj 640 --lsj-range 0.5 1.5 --lsj-min-visibility 0.25 --vertical-flip-probability 0.5",
            Augmentation(jitter=LargeScaleJitter(640, 0.5, 1.5, 0.25), vertical_flip_probability=0.5),
        ),
        ("--photometric-distortion", Augmentation(color=PhotometricDistortion())),
        ("--color-jitter 0.4 0.3 0.2 0.1", Augmentation(color=ColorJitter(0.4, 0.3, 0.2, 0.1))),
    ],
)
def test_options_become_the_augmentation_they_name(words: str, expected: Augmentation) -> None:
    assert asked_for(words) == expected


def test_a_run_with_everything_on_resumes_in_mid_epoch_to_the_same_bits_and_says_what_differs(
    start, start_and_kill, tmp_path, load, same_state, records_of, capsys
) -> None:
    arguments = [*EVERYTHING, "--checkpoint-iterations", "1"]
    assert start(tmp_path / "whole", *arguments) == 0
    shown = capsys.readouterr().out
    assert "augment   large-scale jitter x0.3 to x2 of 80 pixels" in shown
    assert "flip probability: horizontal 0.5, vertical 0.5" in shown
    assert "photometric distortion" in shown and "repeat factors for classes in less than 0.9" in shown

    start_and_kill(4, tmp_path / "run", *arguments)
    capsys.readouterr()
    others = ["--lsj", "64", "--photometric-distortion", "--repeat-threshold", "0.9", "--dry-run", "--resume"]
    assert start(tmp_path / "run", *others) == 0
    shown = capsys.readouterr().out
    for line in (
        "--lsj: 80 in the checkpoint, 64 now; the command line wins",
        "--lsj-range: 0.3 2.0 in the checkpoint, 0.1 2.0 now; the command line wins",
        "--vertical-flip-probability: 0.5 in the checkpoint, 0.0 now; the command line wins",
    ):
        assert line in shown
    assert "--photometric-distortion:" not in shown
    assert start(tmp_path / "run", *arguments, "--resume") == 0
    assert "in the checkpoint" not in capsys.readouterr().out
    one, other = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "run"))
    for state in (one, other):
        del state["config"]
    same_state(one, other)
    assert records_of(tmp_path / "whole") == records_of(tmp_path / "run")


def test_the_images_at_the_start_are_the_augmented_ones(start, tmp_path) -> None:
    mosaics = {}
    for name, options in (("plain", []), ("dark", ["--color-jitter", "0", "0", "1", "0"]), ("lsj", ["--lsj", "64"])):
        assert start(tmp_path / name, "--max-epochs", "1", "--limit-train-batches", "1", *options) == 0
        events = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        (image,) = events.Images("train/batch/0")
        file = tmp_path / f"{name}.png"
        file.write_bytes(image.encoded_image_string)
        mosaics[name] = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert mosaics["plain"].shape == mosaics["dark"].shape
    assert np.abs(mosaics["plain"] - mosaics["dark"]).mean() > 0.5
    assert mosaics["lsj"].shape != mosaics["plain"].shape or np.abs(mosaics["lsj"] - mosaics["plain"]).mean() > 5


def test_a_checkpoint_from_before_there_was_a_choice_is_one_without(start, tmp_path, load, capsys) -> None:
    assert start(tmp_path / "run", "--max-epochs", "1") == 0
    file = Path(tmp_path / "run" / "checkpoints" / "last.pt")
    state = load(file)
    assert state["config"]["augmentation"] == AugmentationConfig().to_dict()
    del state["config"]["augmentation"]
    torch.save(state, tmp_path / "old.pt")
    capsys.readouterr()
    assert start(tmp_path / "run", "--max-epochs", "1", "--dry-run", "--resume", str(tmp_path / "old.pt")) == 0
    assert "in the checkpoint" not in capsys.readouterr().out
