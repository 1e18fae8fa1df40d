"""The command line of train.py: its options, what they exclude, and the configuration they make."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from detection.config.arg_types import inner_fraction, not_negative_int, positive_float, positive_int, seed
from detection.config.augmentation import add_augmentation_options, augmentation_config
from detection.config.errors import ConfigError
from detection.config.run_config import (
    FREEZE_CHOICES,
    MODEL_DEFAULT,
    DataConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TrainConfig,
)

EMA_DECAY_DEFAULT = 0.9998


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


def _frozen_stages(text: str) -> int:
    if text not in FREEZE_CHOICES:
        near = difflib.get_close_matches(text, FREEZE_CHOICES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(FREEZE_CHOICES)}{meant}")
    return FREEZE_CHOICES[text]


def build_parser() -> argparse.ArgumentParser:
    """The command line of train.py."""
    parser = _Parser(
        prog="train.py",
        description="Train, validate and test Faster R-CNN on COCO-format data. One process: python train.py ...; "
        "N processes: torchrun --nproc_per_node=N train.py ...",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("schedule (how long, which learning rate, when to validate)")
    group.add_argument("--schedule", default="1x", metavar="NAME|FILE", help="1x, 2x, 20e, or a schedule file [1x]")
    group.add_argument("--max-epochs", type=positive_int, metavar="N", help="override the schedule's epochs")
    group.add_argument("--val-interval", type=positive_int, metavar="N", help="validate each N epochs")
    group.add_argument("--lr", type=positive_float, metavar="X", help="override the schedule's learning rate")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any field of the schedule, e.g. optim_wrapper.optimizer.weight_decay=0 (repeatable)",
    )
    group.add_argument(
        "--auto-scale-lr", action="store_true", help="learning rate x (global batch / the schedule's base batch)"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", choices=["coco", "shapes"], default="coco", help="shapes is made on first use [coco]"
    )
    group.add_argument(
        "--data-path", type=Path, metavar="DIR", help="standard COCO layout [datasets/coco, or datasets/shapes]"
    )
    for split in ("train", "val", "test"):
        group.add_argument(f"--{split}-images", type=Path, metavar="DIR", help=f"image folder of the {split} set")
        group.add_argument(f"--{split}-annotations", type=Path, metavar="FILE", help=f"COCO JSON of the {split} set")
    group.add_argument("--min-size", type=positive_int, default=800, metavar="N", help="shorter side, pixels [800]")
    group.add_argument(
        "--max-size", type=positive_int, default=1333, metavar="N", help="longer side at most, pixels [1333]"
    )
    group.add_argument(
        "--workers", type=not_negative_int, metavar="N", help="loader processes a process [GPU 4, CPU 1]"
    )
    group.add_argument("--limit-train-batches", type=positive_int, metavar="N", help="iterations an epoch at most")
    group.add_argument(
        "--limit-val-batches", type=positive_int, metavar="N", help="evaluation batches a process at most"
    )
    group.add_argument(
        "--max-bad-images",
        type=not_negative_int,
        default=10,
        metavar="N",
        help="images that may turn out unreadable in mid-run: each is reported and replaced by the next of its shape; "
        "one more ends the run [10]",
    )

    add_augmentation_options(parser)

    group = parser.add_argument_group("model")
    group.add_argument("--model", default=MODEL_DEFAULT, metavar="NAME", help=f"[{MODEL_DEFAULT}]")
    group.add_argument(
        "--weights",
        default="imagenet",
        metavar="SPEC",
        help="none, imagenet, a torchvision weights name, or a file of ours, torchvision's, MMDetection's [imagenet]",
    )
    group.add_argument(
        "--norm",
        choices=["auto", "frozen_bn", "bn", "gn"],
        default="auto",
        help="auto: frozen_bn from pretrained weights, bn from none [auto]",
    )
    freezing = group.add_mutually_exclusive_group()
    freezing.add_argument(
        "--freeze",
        dest="frozen_stages",
        type=_frozen_stages,
        metavar="PART",
        help=f"{'|'.join(FREEZE_CHOICES)}: the backbone up to this part keeps its weights; backbone is stage4 "
        "[stage1 from pretrained weights, none from --weights none]",
    )
    freezing.add_argument(
        "--frozen-stages",
        type=int,
        choices=range(-1, 5),
        metavar="N",
        help="the same as MMDetection's number: -1 none, 0 stem, 1 stem and stage 1, ... 4",
    )
    group.add_argument(
        "--model-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any field of the model's configuration in detection/models/config.py, e.g. score_threshold=0.01 "
        "(repeatable)",
    )
    group.add_argument("--sync-bn", action="store_true", help="trained batch norm over all processes")

    group = parser.add_argument_group("training step")
    group.add_argument("--batch-size", type=positive_int, default=2, metavar="N", help="images a process [2]")
    group.add_argument(
        "--accumulate", type=positive_int, metavar="N", help="micro-steps an iteration [the schedule's, 1]"
    )
    group.add_argument(
        "--global-batch-size",
        type=positive_int,
        metavar="N",
        help="images an iteration over all processes: batch and micro-steps a process follow from it, also where a "
        "resumed run has another number of processes; --batch-size is then the most a process takes at once",
    )
    group.add_argument(
        "--clip-grad", type=positive_float, metavar="X", help="largest gradient norm [the schedule's, none]"
    )
    group.add_argument(
        "--skip-nonfinite",
        action="store_true",
        help="an iteration whose loss or gradient is NaN or infinite makes no step and is counted, instead of ending "
        "the run",
    )
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], help="mixed precision [the schedule's, off]")
    group.add_argument(
        "--ema",
        type=inner_fraction,
        nargs="?",
        const=EMA_DECAY_DEFAULT,
        metavar="DECAY",
        help=f"average the weights; validation uses the average [without a value {EMA_DECAY_DEFAULT}]",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the dense parts, for a few padded sizes")
    group.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="record and replay the passes on a GPU, for a few padded sizes: for few images a GPU",
    )
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory layout of the images [on]"
    )
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[auto]")
    group.add_argument(
        "--collective-timeout",
        type=positive_float,
        default=15.0,
        metavar="MIN",
        help="minutes that a process waits for the others before the run ends and says who is missing [15]",
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="[0]")
    group.add_argument("--deterministic", action="store_true", help="bit-equal repeats on a GPU too, slower")

    group = parser.add_argument_group("output and resume")
    group.add_argument("--output-dir", type=Path, metavar="DIR", help="[runs/<model>_<schedule>]")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|FILE",
        help="auto: the newest intact checkpoint of the output directory, a fresh start where there is none",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="start anew; what the output directory holds is moved aside first"
    )
    group.add_argument("--keep-checkpoints", type=positive_int, default=3, metavar="N", help="epoch files kept [3]")
    group.add_argument("--checkpoint-minutes", type=positive_float, metavar="N", help="also save each N minutes")
    group.add_argument("--checkpoint-iterations", type=positive_int, metavar="N", help="also save each N iterations")
    group.add_argument(
        "--log-interval", type=positive_int, metavar="N", help="iterations between readings [GPU 20, CPU 1]"
    )
    group.add_argument(
        "--eval-backend", choices=["auto", "pycocotools", "hotcoco", "both"], default="auto", help="COCO metrics [auto]"
    )

    group = parser.add_argument_group("instead of training")
    group.add_argument("--val-only", action="store_true", help="run the validation loop once")
    group.add_argument("--test-only", action="store_true", help="run the test loop once")
    group.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    return parser


def _model_setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return key.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"--model-set {text}: write it as KEY=VALUE with a Python literal, e.g. --model-set score_threshold=0.01 "
            "or --model-set anchor_sizes=[16,32,64,128,256]"
        ) from None


def parse_arguments(argv: Sequence[str] | None = None) -> RunConfig:
    """The configuration that `argv` (default: the process's arguments) asks for.

    Raises ConfigError where options contradict each other; argparse's own errors leave with status 2.
    """
    options = build_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    if options.val_only and options.test_only:
        raise ConfigError("--val-only and --test-only exclude each other: give one of them")
    if options.resume is not None and not options.resume.strip():
        raise ConfigError("--resume is given an empty value: write --resume, or --resume FILE")
    if options.resume is not None and options.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite starts anew: give one of them")
    if options.max_size < options.min_size:
        raise ConfigError(f"--max-size {options.max_size} is below --min-size {options.min_size}")
    augmentation = augmentation_config(options)
    overrides = list(options.set)
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"--set {text}: write it as KEY=VALUE, e.g. --set optim_wrapper.optimizer.weight_decay=0")
    for name, key in (("lr", "lr"), ("max_epochs", "max_epochs"), ("val_interval", "val_interval")):
        value = getattr(options, name)
        if value is not None:
            overrides.append(f"{key}={value}")
    if options.global_batch_size is not None and options.accumulate is not None:
        raise ConfigError(
            "--global-batch-size decides the number of micro-steps: leave --accumulate away (--batch-size is the most "
            "images that a process takes at once)"
        )
    if options.sync_bn and options.norm not in ("auto", "bn"):
        raise ConfigError(f"--sync-bn needs trained batch norm, and --norm {options.norm} has none: use --norm bn")
    for split in ("train", "val", "test"):
        images, annotations = getattr(options, f"{split}_images"), getattr(options, f"{split}_annotations")
        if (images is None) != (annotations is None):
            raise ConfigError(f"--{split}-images and --{split}-annotations go together: give both")
    if options.val_only or options.test_only:
        which = "--val-only" if options.val_only else "--test-only"
        if options.resume is None and options.weights in ("none", "imagenet"):
            raise ConfigError(f"{which} needs the weights of a whole detector: give --weights FILE, or --resume")
        if options.overwrite:
            raise ConfigError(f"{which} starts no run: leave --overwrite away")
    if options.test_only and options.test_annotations is None:
        raise ConfigError("--test-only needs --test-images DIR and --test-annotations FILE")
    if options.dataset == "shapes" and any(getattr(options, f"{s}_images") for s in ("train", "val")):
        raise ConfigError("--dataset shapes brings its own images: leave --train-images and --val-images away")
    data = DataConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(DataConfig)})
    model = ModelConfig(
        settings=tuple(_model_setting(text) for text in options.model_set),
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(ModelConfig) if f.name != "settings"},
    )
    train = TrainConfig(
        overrides=tuple(overrides),
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(TrainConfig) if f.name != "overrides"},
    )
    output = OutputConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(OutputConfig)})
    mode = "val" if options.val_only else "test" if options.test_only else "train"
    return RunConfig(
        data,
        model,
        train,
        output,
        options.device,
        mode,
        options.dry_run,
        collective_timeout=options.collective_timeout,
        augmentation=augmentation,
    )
