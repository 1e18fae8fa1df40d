"""The command line of train.py: its options, what they exclude, and the configuration they make."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from detection.config import augmentation
from detection.config.arg_types import AUTO_BATCH_SIZE
from detection.config.mmdet_run import read_run
from detection.config.run_config import RunConfig
from detection.config.settings import ConfigError, add_options, filled, settings_of
from schedules.reader import SCHEDULE_KEYS

GROUPS = {
    "config": "whole run from a file",
    "schedule": "schedule (how long, which learning rate, when to validate)",
    "data": "data",
    "augmentation": augmentation.TITLE,
    "model": "model",
    "train": "training step",
    "output": "output and resume",
    "mode": "instead of training",
}
"""Names of the groups of options, and their titles, in the order of --help."""


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped option."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized arguments:"):
            for word in message.split(":", 1)[1].split():
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                if near:
                    message += f" (did you mean {near[0]}?)"
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice and (near := difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)):
            message += f": did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists every option)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line of train.py, made from the fields of RunConfig. What is not given is not in the namespace."""
    parser = _Parser(
        prog="train.py",
        description="Train, validate and test Faster R-CNN on COCO-format data. One process: python train.py ...; "
        "N processes: torchrun --nproc_per_node=N train.py ...",
        allow_abbrev=False,
    )
    for name, title in GROUPS.items():
        group = parser.add_argument_group(title)
        for group_name, _, field in settings_of(RunConfig):
            if group_name == name:
                add_options(group, field)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> RunConfig:
    """The configuration that `argv` (default: the process's arguments) asks for.

    Raises ConfigError where options contradict each other; argparse's own errors leave with status 2.
    """
    given = vars(build_parser().parse_args(sys.argv[1:] if argv is None else list(argv)))
    if "val_only" in given and "test_only" in given:
        raise ConfigError("--val-only and --test-only exclude each other: give one of them")
    given["mode"] = "val" if "val_only" in given else "test" if "test_only" in given else "train"
    given["settings"] = tuple(_model_setting(text) for text in given.get("settings", ()))
    for text in given.get("set", ()):
        if "=" not in text:
            raise ConfigError(f"--set {text}: write it as KEY=VALUE, e.g. --set optim_wrapper.optimizer.weight_decay=0")
    shorter = [f"{key}={given[key]}" for key in ("lr", "max_epochs", "val_interval") if key in given]
    given["overrides"] = (*given.get("set", ()), *shorter)
    given = _with_config_file(given)
    if ":" in given.get("model", "") or ":" in given.get("backbone", ""):
        given.setdefault("weights", "none")  # the user's function loads what it wants to begin with
    config = filled(RunConfig, given)
    augmentation.check_effect(config.augmentation, given, config.data.max_size)
    _check_options(config, given)
    return config


def _with_config_file(given: dict[str, Any]) -> dict[str, Any]:
    """What is given, over what the file of --config says."""
    path, options = given.get("config_file"), given.get("cfg_options", ())
    if path is None:
        if options:
            raise ConfigError(
                f"--cfg-options {options[0]} has no effect without --config: give --config FILE, or --set"
            )
        return given
    if "model" in given:
        raise ConfigError("--model and --config both choose the model: leave --model away, or give --cfg-options")
    flags = {
        field.name: option.flag_for(field)
        for _, _, field in settings_of(RunConfig)
        for option in field.metadata["options"]
    }
    values, lines = read_run(path, options, given["mode"]).under(given, flags)
    if "schedule" in given:
        of_schedule = [each for each in options if each.partition("=")[0].split(".")[0] in SCHEDULE_KEYS]
        if of_schedule:
            raise ConfigError(f"--cfg-options {of_schedule[0]} has no effect beside --schedule: give it as --set")
        lines.append(f"--schedule {given['schedule']} in place of the schedule of {path}")
    values.setdefault("schedule", str(path))
    return values | {"config_notes": tuple(lines)}


def _model_setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return key.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # whatever a text's parser raises
        raise ConfigError(
            f"--model-set {text}: write it as KEY=VALUE with a Python literal, e.g. --model-set score_threshold=0.01 "
            "or --model-set anchor_sizes=[16,32,64,128,256]"
        ) from None


def _check_own_model(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raises ConfigError for options that a detector of one's own does not take."""
    model, train = config.model, config.train
    if ":" not in model.model:
        return
    own = f"--model {model.model} is a detector of your own"
    for name, flag in (("norm", "--norm"), ("backbone", "--backbone"), ("frozen_stages", "--freeze")):
        if name in given:
            raise ConfigError(f"{own}: {flag} is nothing that it is known to have. Let the function do it")
    if model.weights == "imagenet":
        raise ConfigError(f"{own}: let the function load such weights, or give --weights FILE")
    for name in ("compile", "cuda_graphs"):
        if getattr(train, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{own}, which takes lists of images, of any sizes: leave {flag} away")


def _check_options(config: RunConfig, given: Mapping[str, Any]) -> None:
    data, model, output = config.data, config.model, config.output
    _check_own_model(config, given)
    if output.resume is not None and not output.resume.strip():
        raise ConfigError("--resume is given an empty value: write --resume, or --resume FILE")
    if output.resume is not None and output.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite starts anew: give one of them")
    if data.max_size < data.min_size:
        raise ConfigError(f"--max-size {data.max_size} is below --min-size {data.min_size}")
    if config.train.global_batch_size is not None and config.train.accumulate is not None:
        raise ConfigError(
            "--global-batch-size decides the number of micro-steps: leave --accumulate away (--batch-size is the most "
            "images that a process takes at once)"
        )
    if model.sync_bn and model.norm not in ("auto", "bn"):
        raise ConfigError(f"--sync-bn needs trained batch norm, and --norm {model.norm} has none: use --norm bn")
    for split in ("train", "val", "test"):
        if (f"{split}_images" in given) != (f"{split}_annotations" in given):
            raise ConfigError(f"--{split}-images and --{split}-annotations go together: give both")
    if config.mode != "train":
        which = f"--{config.mode}-only"
        if output.resume is None and model.weights in ("none", "imagenet"):
            raise ConfigError(f"{which} needs the weights of a whole detector: give --weights FILE, or --resume")
        if config.train.batch_size == AUTO_BATCH_SIZE:
            raise ConfigError(f"--batch-size auto is found by training steps: give {which} a number")
        if output.overwrite:
            raise ConfigError(f"{which} starts no run: leave --overwrite away")
    if config.mode == "test" and data.test_annotations is None:
        raise ConfigError("--test-only needs --test-images DIR and --test-annotations FILE")
    if data.dataset == "shapes" and (data.train_images or data.val_images):
        raise ConfigError("--dataset shapes brings its own images: leave --train-images and --val-images away")
