"""The command line of train.py: its options, what they exclude, and the configuration they make."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from detection.config import augmentation
from detection.config.arg_types import AUTO_BATCH_SIZE
from detection.config.mmdet_run import read_run
from detection.config.recorded_run import RECORD, with_record
from detection.config.run_config import RunConfig
from detection.config.settings import ConfigError, add_options, filled, settings_of
from schedules.errors import Place, ScheduleError
from schedules.reading.expressions import read_value
from schedules.reading.reader import SCHEDULE_KEYS

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
COMMON = frozenset(
    f"--{name}"
    for name in (
        *("config", "schedule", "max-epochs", "lr", "set", "auto-scale-lr"),
        *("data-path", "train-images", "train-annotations", "val-images", "val-annotations", "min-size"),
        *("model", "weights", "freeze", "batch-size", "amp", "fast", "ema", "device"),
        *("output-dir", "resume", "val-only", "dry-run"),
    )
)
"""What --help shows; --help-all shows every option."""


class _Help(argparse.Action):
    """Prints the help, of the common options or of all."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        build_parser(None if self.const else COMMON).print_help()
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped option. raises: a ConfigError in place of the process's end."""

    raises = False

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
        if self.raises:
            raise ConfigError(message)
        self.exit(2, f"{self.prog}: error: {message}\n(--help-all lists every option)\n")


def build_parser(shown: frozenset[str] | None = None) -> _Parser:
    """The command line of train.py, made from the fields of RunConfig. What is not given is not in the namespace.

    shown: the options in its help; None: all.
    """
    parser = _Parser(
        prog="train.py",
        description="Train, validate and test Faster R-CNN on COCO-format data. One process: python train.py ...; "
        "N processes: torchrun --nproc_per_node=N train.py ...",
        allow_abbrev=False,
        add_help=False,
    )
    help_words: dict[str, Any] = {"action": _Help, "nargs": 0, "default": argparse.SUPPRESS}
    parser.add_argument("-h", "--help", **help_words, const=False, help="the options that most runs need")
    parser.add_argument("--help-all", **help_words, const=True, help="every option")
    for name, title in GROUPS.items():
        group = parser.add_argument_group(title)
        for group_name, _, field in settings_of(RunConfig):
            if group_name == name:
                add_options(group, field, shown)
    return parser


def parse_arguments(argv: Sequence[str] | None = None, *, raises: bool = False) -> RunConfig:
    """The configuration that `argv` (default: the process's arguments) asks for.

    Raises ConfigError where options contradict each other. argparse's own errors leave with status 2, or with `raises`
    are ConfigErrors too.
    """
    parser = build_parser()
    parser.raises = raises
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    if "val_only" in given and "test_only" in given:
        raise ConfigError("--val-only and --test-only exclude each other: give one of them")
    given["mode"] = "val" if "val_only" in given else "test" if "test_only" in given else "train"
    given["settings"] = tuple(model_setting(text) for text in given.get("settings", ()))
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


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options of Python as words of the command line: max_epochs=3, ema=True, set={"lr": 0.1}, channels_last=False.

    None and False leave an option away; a list gives several values, and a dictionary KEY=VALUE each.
    """
    actions = build_parser()._actions
    repeated = {a.option_strings[0] for a in actions if isinstance(a, argparse._AppendAction)}
    switches = {flag for a in actions if a.nargs == 0 for flag in a.option_strings}
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, Mapping):
            value = [f"{key}={each!r}" for key, each in value.items()]
        if value is False and f"--no-{flag[2:]}" in switches:
            words.append(f"--no-{flag[2:]}")
        elif value is True:
            words.append(flag)
        elif value is None or value is False:
            continue
        elif isinstance(value, (list, tuple)):
            texts = list(map(str, value))
            words += [f"{flag}={text}" for text in texts] if flag in repeated else [flag, *texts]
        else:
            words.append(f"{flag}={value}")
    return words


def _with_config_file(given: dict[str, Any]) -> dict[str, Any]:
    """What is given, over what the file of --config says, or the record of the run that --resume names."""
    path, options = given.get("config_file"), given.get("cfg_options", ())
    record = _record(path)
    if record is None and path is None and (record := _record(given.get("resume"))) is not None:
        given = dict(given)
        if given.setdefault("output_dir", record.parent).resolve() == record.parent.resolve():
            given["resume"] = "auto"
    elif record is not None:
        given = {name: value for name, value in given.items() if name != "config_file"}
    if record is not None:
        if options:
            raise ConfigError(f"--cfg-options {options[0]} is for configurations of MMDetection: give --set instead")
        return with_record(record, given) | {"config_notes": (f"settings of {record}; options count over them",)}
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


def _record(path: str | Path | None) -> Path | None:
    """The config.json of a run that a path names by its folder or itself; None where it names something else."""
    if path is None:
        return None
    path = Path(path)
    file = path / RECORD if path.is_dir() else path
    return file if file.suffix == ".json" and (path.suffix == ".json" or file.is_file()) else None


def model_setting(text: str) -> tuple[str, Any]:
    """Name and value of a field of the model, of the text behind --model-set. Raises ConfigError."""
    key, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return key.strip(), read_value(value, Place("--model-set", (key.strip(),)))
    except (ValueError, ScheduleError):
        raise ConfigError(
            f"--model-set {text}: write it as KEY=VALUE with a word or a Python literal, e.g. --model-set "
            "score_threshold=0.01, --model-set fpn_norm=gn or --model-set anchor_sizes=[16,32,64,128,256]"
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
    for name in ("compile", "cuda_graphs", "fast"):
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
    if config.train.fast and config.train.cuda_graphs is False:
        raise ConfigError("--fast turns on CUDA graphs: leave --no-cuda-graphs away, or give --compile in its place")
    if model.sync_bn and model.norm not in ("auto", "bn"):
        raise ConfigError(f"--sync-bn needs trained batch norm, and --norm {model.norm} has none: use --norm bn")
    for split in ("train", "val", "test"):
        if (f"{split}_images" in given) != (f"{split}_annotations" in given):
            raise ConfigError(f"--{split}-images and --{split}-annotations go together: give both")
        images, files = getattr(data, f"{split}_images") or (), getattr(data, f"{split}_annotations") or ()
        if len(images) != len(files):
            raise ConfigError(
                f"--{split}-images names {len(images)} folders and --{split}-annotations {len(files)} files: give one "
                "folder for each file, the same folder again where it holds the images of several"
            )
    if config.mode != "train":
        which = f"--{config.mode}-only"
        if output.resume is None and model.weights in ("none", "imagenet"):
            raise ConfigError(f"{which} needs the weights of a whole detector: give --weights FILE, or --resume")
        if config.train.batch_size == AUTO_BATCH_SIZE:
            raise ConfigError(f"--batch-size auto is found by training steps: give {which} a number")
        if output.overwrite:
            raise ConfigError(f"{which} starts no run: leave --overwrite away")
    if config.mode == "test" and data.test_annotations is None and data.data_path is None:
        raise ConfigError(
            "--test-only needs --test-images DIR and --test-annotations FILE, or a --data-path with a test split"
        )
    searched = data.train_annotations is None if config.mode == "train" else data.data_path is not None
    for name in ("data_format", "val_fraction", "split_seed"):
        if name in given and not (searched and data.dataset != "shapes"):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is for the folder of --data-path: give that in place of the files, or leave {flag} away"
            )
    augmentation = config.augmentation
    named = {
        "--class-map": [pair.partition("=")[0] for pair in data.class_map],
        "--class-shares": [pair.rpartition("=")[0] for pair in augmentation.class_shares or ()],
        "--set-shares": [pair.rpartition("=")[0] for pair in augmentation.set_shares or ()],
    }
    for flag, names in named.items():
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"{flag} names {twice[0]!r} twice: give it once")
    num_sets = len(data.train_annotations or data.folders)
    if config.augmentation.set_shares is not None and num_sets == 1:
        raise ConfigError("--set-shares is for several data sets, and there is one: leave it away")
    if data.dataset == "shapes" and len(data.folders) > 1:
        raise ConfigError("--dataset shapes is one folder: leave it away to train on several")
    if data.dataset == "shapes" and (data.train_images or data.val_images):
        raise ConfigError("--dataset shapes brings its own images: leave --train-images and --val-images away")
