"""Every setting of a run: frozen dataclasses, which the command line fills and config.json holds."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detection.config.arg_types import (
    AUTO_BATCH_SIZE,
    NameList,
    Number,
    above_0,
    batch_size,
    inner_fraction,
    name_pair,
    positive_int,
    side,
    whole,
)
from detection.config.augmentation import AugmentationConfig
from detection.config.settings import (
    CHECKPOINT,
    COMMAND_LINE,
    COMPATIBLE,
    EACH_START,
    EQUAL,
    KEPT_OFF,
    SCHEDULE,
    ConfigError,
    OnResume,
    Option,
    plain,
    setting,
)

FREEZE_CHOICES = {"none": -1, "stem": 0, "stage1": 1, "stage2": 2, "stage3": 3, "stage4": 4, "backbone": 4}
"""What --freeze takes, and the number of frozen stages that it means."""
DATA_FORMATS = ("coco", "yolo", "voc", "imagefolder", "labelme")
"""Those of data.layouts, whose import takes as long as PyTorch's."""
WORKERS = {"cuda": 4, "cpu": 1}
LOG_INTERVALS = {"cuda": 20, "cpu": 1}
"""Defaults by the type of the device."""
MINUTES_A_WEEK = 7 * 24 * 60.0


def _by_device(defaults: dict[str, int]) -> str:
    return "GPU {cuda}, CPU {cpu}".format(**defaults)


def _frozen_stages(text: str) -> int:
    if text not in FREEZE_CHOICES:
        near = difflib.get_close_matches(text, FREEZE_CHOICES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(FREEZE_CHOICES)}{meant}")
    return FREEZE_CHOICES[text]


def _files(on_resume: OnResume, text: str) -> Any:
    metavar = "DIR" if text.startswith("image folder") else "FILE"
    return setting(None, on_resume, text, type=Path, nargs="+", metavar=metavar)


def names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """What sets are called: by their folders, or those of their annotation files; by the files where these are one."""
    folders = []
    for path in paths:
        folder = path.absolute().parent if path.suffix in (".json", ".txt") else path.absolute()
        while folder.name in ("annotations", "Main", "ImageSets"):
            folder = folder.parent
        folders.append(folder.name)
    names = folders if len(set(folders)) == len(folders) else [path.stem for path in paths]
    while len(set(names)) < len(names):
        names = [name if names.count(name) == 1 else f"{name}_{i + 1}" for i, name in enumerate(names)]
    return tuple(names)


@dataclass(frozen=True)
class DataConfig:
    """Where images and annotations are, and the scale the network sees them at."""

    dataset: str = setting("coco", COMPATIBLE, "shapes is made on first use", choices=("coco", "shapes"))
    data_path: tuple[Path, ...] | None = setting(
        None,
        COMPATIBLE,
        "the folder of a set, in any layout that docs/own_data.md lists; several are trained on together",
        shown="datasets/coco, or datasets/shapes",
        type=Path,
        nargs="+",
        metavar="DIR",
    )
    data_format: str | None = setting(
        None, COMPATIBLE, "how to read --data-path, where several ways are possible", choices=DATA_FORMATS
    )
    val_fraction: float | None = setting(
        None,
        COMMAND_LINE,
        "share of the images of --data-path to validate on, where it does not say which",
        shown="0.1",
        type=inner_fraction,
        metavar="X",
    )
    split_seed: int = setting(0, COMMAND_LINE, "of that choice: another one chooses other images", type=whole(0))
    train_images: tuple[Path, ...] | None = _files(COMPATIBLE, "image folder of the train set; of several, one each")
    train_annotations: tuple[Path, ...] | None = _files(COMPATIBLE, "COCO JSON of the train set, or of each")
    val_images: tuple[Path, ...] | None = _files(COMMAND_LINE, "image folder of the val set, or of each")
    val_annotations: tuple[Path, ...] | None = _files(COMMAND_LINE, "COCO JSON of the val set, or of each")
    test_images: tuple[Path, ...] | None = _files(
        COMMAND_LINE, "image folder of the test set, which a training evaluates at its end with the best weights"
    )
    test_annotations: tuple[Path, ...] | None = _files(COMMAND_LINE, "COCO JSON of the test set, or of each")
    min_size: int = setting(800, COMMAND_LINE, "shorter side", unit="pixels", type=side)
    max_size: int = setting(1333, COMMAND_LINE, "longer side at most", unit="pixels", type=side)
    workers: int | None = setting(
        None, COMMAND_LINE, "loader processes a process", shown=_by_device(WORKERS), type=whole(0, 256)
    )
    classes: tuple[str, ...] | None = setting(
        None,
        COMPATIBLE,
        "names of the classes to train on and to evaluate; annotations of others do not count",
        shown="those of the annotations",
        nargs="+",
        action=NameList,
        metavar="A,B",
    )
    class_map: tuple[str, ...] = setting(
        (),
        COMPATIBLE,
        "other names for classes, so that several become one: Coin=coin; a class mapped to itself stays apart from one "
        "of like spelling",
        type=name_pair,
        nargs="+",
        metavar="OLD=NEW",
    )
    min_box_side: float = setting(
        1.0,
        COMPATIBLE,
        "boxes with a shorter side are not trained on",
        unit="pixels of the stored image",
        type=Number(float, 1.0, 16384.0),
    )
    limit_train_batches: int | None = setting(None, COMPATIBLE, "iterations an epoch at most", type=positive_int)
    limit_val_batches: int | None = setting(
        None, COMMAND_LINE, "evaluation batches a process at most", type=positive_int
    )
    max_bad_images: int = setting(
        10,
        COMMAND_LINE,
        "images that may turn out unreadable in mid-run: each is reported and replaced by the next of its shape; "
        "one more ends the run",
        type=whole(0),
    )

    def workers_on(self, device: str) -> int:
        """Loader processes beside a device of this type: those asked for, or the default."""
        return WORKERS[device] if self.workers is None else self.workers

    @property
    def set_name(self) -> str:
        """What the set is called, or several together: by its folder, or that of its annotation file; shapes, coco."""
        if self.train_annotations is not None:
            return "_".join(names_of(self.train_annotations))
        return self.dataset if self.data_path is None or self.dataset == "shapes" else "_".join(names_of(self.folders))

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of data_path, or datasets/<dataset>."""
        return self.data_path or (Path("datasets") / self.dataset,)

    @property
    def new_names(self) -> dict[str, str]:
        """Those of class_map."""
        return {old: new for old, _, new in (pair.partition("=") for pair in self.class_map)}


@dataclass(frozen=True)
class ModelConfig:
    """Which detector, from which weights, and what of it is trained."""

    model: str = setting(
        "faster_rcnn_r50_fpn",
        EQUAL,
        "the detector; package.module:function makes one of your own (docs/extend.md)",
        metavar="NAME",
    )
    backbone: str | None = setting(
        None,
        EQUAL,
        "another one under the detector's pyramid: timm/NAME, or package.module:function of your own (docs/extend.md)",
        shown="the detector's",
        metavar="NAME",
    )
    weights: str = setting(
        "imagenet",
        CHECKPOINT,
        "none, imagenet, a torchvision weights name, a file of ours, torchvision's, MMDetection's, its address, or "
        "the output directory of a run: its best weights",
        metavar="SPEC",
    )
    norm: str = setting(
        "auto",
        CHECKPOINT,
        "auto: frozen_bn from pretrained weights, bn from none",
        choices=("auto", "frozen_bn", "bn", "gn"),
    )
    frozen_stages: int | None = setting(
        None,
        CHECKPOINT,
        Option(
            f"{'|'.join(FREEZE_CHOICES)}: the backbone up to this part keeps its weights; backbone is stage4",
            flag="--freeze",
            shown="stage1 from pretrained weights, none from --weights none",
            dest="frozen_stages",
            type=_frozen_stages,
            metavar="PART",
        ),
        Option(
            "the same as MMDetection's number: -1 none, 0 stem, 1 stem and stage 1, ... 4",
            dest="frozen_stages",
            type=int,
            choices=range(-1, 5),
            metavar="N",
        ),
    )
    sync_bn: bool = setting(False, CHECKPOINT, "trained batch norm over all processes")
    settings: tuple[tuple[str, Any], ...] = setting(
        (),
        CHECKPOINT,
        "any field of the model's configuration in detection/models/config.py, e.g. score_threshold=0.01 (repeatable)",
        flag="--model-set",
        dest="settings",
        action="append",
        metavar="KEY=VALUE",
    )


@dataclass(frozen=True)
class TrainConfig:
    """How the schedule is followed on this machine."""

    schedule: str = setting(
        "1x",
        SCHEDULE,
        "1x, 2x, 20e, finetune, or a file of MMDetection: a schedule or a configuration",
        group="schedule",
        metavar="NAME|FILE",
    )
    overrides: tuple[str, ...] = setting(
        (),
        SCHEDULE,
        Option("override the schedule's epochs", flag="--max-epochs", type=whole(1, 100_000)),
        Option("validate each N epochs", flag="--val-interval", type=positive_int),
        Option("override the schedule's learning rate", flag="--lr", type=above_0(1000)),
        Option(
            "override any field of the schedule, e.g. optim_wrapper.optimizer.weight_decay=0 (repeatable)",
            flag="--set",
            action="append",
            metavar="KEY=VALUE",
        ),
        group="schedule",
    )
    """KEY=VALUE each: those of --set in order, then the others."""
    patience: int | None = setting(
        None,
        COMMAND_LINE,
        "end after N validations without a better --best-metric",
        group="schedule",
        type=whole(1, 100_000),
    )
    max_hours: float | None = setting(
        None,
        COMMAND_LINE,
        "hours of training and validation, over all starts, after which the run ends; the rest of the schedule is then "
        "walked through faster, so that the learning rate still drops",
        group="schedule",
        type=above_0(24 * 366),
        metavar="H",
    )
    best_metric: str = setting(
        "mAP",
        COMMAND_LINE,
        "figure of the validation that best.pt and --patience go by, as TensorBoard names it: mAP_50, AP/dog",
        group="schedule",
        metavar="NAME",
    )
    batch_size: int = setting(
        2,
        COMPATIBLE,
        "images a process; auto: on GPUs, in a new run, the most that fit into memory, with the learning rate scaled "
        "as by --auto-scale-lr",
        type=batch_size,
    )
    auto_scale_lr: bool = setting(
        False, SCHEDULE, "learning rate x (global batch / the schedule's base batch)", group="schedule"
    )
    accumulate: int | None = setting(
        None, COMPATIBLE, "micro-steps an iteration", shown="the schedule's, 1", type=whole(1, 4096)
    )
    global_batch_size: int | None = setting(
        None,
        COMPATIBLE,
        "images an iteration over all processes: batch and micro-steps a process follow from it, also where a resumed "
        "run has another number of processes; --batch-size is then the most a process takes at once",
        type=whole(1, 1_048_576),
    )
    clip_grad: float | None = setting(
        None, SCHEDULE, "largest gradient norm", shown="the schedule's, none", type=above_0(1e9)
    )
    skip_nonfinite: bool = setting(
        False,
        COMMAND_LINE,
        "an iteration whose loss or gradient is NaN or infinite makes no step and is counted, instead of ending the "
        "run",
    )
    amp: str | None = setting(
        None, SCHEDULE, "mixed precision", shown="the schedule's, off", choices=("off", "bf16", "fp16")
    )
    ema: float | None = setting(
        None,
        COMMAND_LINE,
        "average the weights; validation uses the average",
        shown="the schedule's, none; without a value 0.9998",
        type=inner_fraction,
        nargs="?",
        const=0.9998,
        metavar="DECAY",
    )
    compile: bool = setting(False, COMMAND_LINE, "torch.compile the dense parts, for a few padded sizes")
    cuda_graphs: bool | None = setting(
        None,
        KEPT_OFF,
        "record the passes on a GPU and replay them, for a few padded sizes; off: batches keep their own sizes",
        shown="on with one GPU, where the model allows it",
    )
    fast: bool = setting(
        False,
        COMMAND_LINE,
        "on a GPU all that is faster and equal to rounding: --cuda-graphs and --compile, where the model allows them",
    )
    channels_last: bool = setting(True, COMMAND_LINE, "memory layout of the images")
    seed: int = setting(0, COMMAND_LINE, "of all that is drawn at random", type=whole(0, 2**63 - 1))
    deterministic: bool = setting(False, COMMAND_LINE, "bit-equal repeats on a GPU too, slower")


@dataclass(frozen=True)
class OutputConfig:
    """What is written where, and when."""

    output_dir: Path | None = setting(
        None, EACH_START, "where the run's files go", shown="runs/<model>_<schedule>_<set>", type=Path, metavar="DIR"
    )
    resume: str | None = setting(
        None,
        EACH_START,
        "auto: the newest intact checkpoint of the output directory, a fresh start where there is none; DIR: the run "
        "of this output directory with its own settings, over which other options count",
        shown="",
        nargs="?",
        const="auto",
        metavar="auto|FILE|DIR",
    )
    overwrite: bool = setting(False, EACH_START, "start anew; what the output directory holds is moved aside first")
    keep_checkpoints: int = setting(3, COMMAND_LINE, "epoch files kept", type=positive_int)
    checkpoint_minutes: float | None = setting(
        None, COMMAND_LINE, "also save each N minutes", type=above_0(MINUTES_A_WEEK), metavar="N"
    )
    checkpoint_iterations: int | None = setting(None, COMMAND_LINE, "also save each N iterations", type=positive_int)
    log_interval: int | None = setting(
        None, COMMAND_LINE, "iterations between readings", shown=_by_device(LOG_INTERVALS), type=positive_int
    )
    tracker: str | None = setting(
        None,
        COMMAND_LINE,
        "also sends figures, images and configuration there, from a thread; its own variables say where and as whom",
        choices=("wandb", "mlflow", "trackio"),
    )
    notes: str | None = setting(
        None, COMMAND_LINE, "text that the run's config.json and best_weights.safetensors carry", metavar="TEXT"
    )
    val_loss: bool = setting(
        True, COMMAND_LINE, "the losses on the validation set, as val/loss beside train/loss in TensorBoard"
    )
    voc_metric: str | None = setting(
        None,
        COMMAND_LINE,
        "also Pascal VOC's mAP at IoU 0.5, as voc_mAP: by 11 points (VOC2007), or by the area under the curve",
        choices=("11points", "area"),
    )
    eval_backend: str = setting(
        "auto", COMMAND_LINE, "COCO metrics", choices=("auto", "pycocotools", "hotcoco", "both")
    )

    def log_interval_on(self, device: str) -> int:
        """Iterations between readings on a device of this type: those asked for, or the default."""
        return self.log_interval or LOG_INTERVALS[device]


@dataclass(frozen=True)
class RunConfig:
    """Everything the command line says."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    device: str = setting("auto", COMMAND_LINE, "where to compute", group="train", choices=("auto", "cpu", "cuda"))
    threads: int | None = setting(
        None,
        COMMAND_LINE,
        "CPU threads a process",
        shown="GPU PyTorch's, CPU the cores of the machine / its processes",
        group="train",
        type=whole(1, 1024),
    )
    mode: str = setting(
        "train",
        EACH_START,
        Option("run the validation loop once", flag="--val-only", action="store_true"),
        Option("run the test loop once", flag="--test-only", action="store_true"),
    )
    """train, val or test."""
    dry_run: bool = setting(False, EACH_START, "check everything, print the plan, write nothing", group="mode")
    collective_timeout: float = setting(
        15.0,
        COMMAND_LINE,
        "how long a process waits for the others before the run ends and says who is missing",
        unit="minutes",
        group="train",
        type=Number(float, 0.01, MINUTES_A_WEEK),
        metavar="MIN",
    )
    config_file: Path | None = setting(
        None,
        EACH_START,
        "the whole run: a configuration of MMDetection 3.x, or the config.json of a run; options count over it",
        flag="--config",
        group="config",
        type=Path,
        metavar="FILE",
        dest="config_file",
    )
    cfg_options: tuple[str, ...] = setting(
        (),
        EACH_START,
        "with --config: set keys of the configuration, e.g. train_dataloader.batch_size=4",
        group="config",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
    )
    config_notes: tuple[str, ...] = setting((), EACH_START)
    """What of the configuration other options replace, and what has no effect: lines for the start of the run."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def for_processes(self, world_size: int) -> RunConfig:
        """The same with batch_size and accumulate such that `world_size` processes make up the global batch asked for.

        The configuration itself where no global batch is asked for, or nothing is trained.

        Raises:
            ConfigError: the global batch cannot be divided evenly.
        """
        total = self.train.global_batch_size
        if total is None or self.mode != "train" or self.train.batch_size == AUTO_BATCH_SIZE:
            return self
        if total % world_size:
            possible = ", ".join(str(count) for count in range(1, total + 1) if total % count == 0)
            raise ConfigError(
                f"--global-batch-size {total} cannot be divided evenly over {world_size} processes: start as many as "
                f"one of {possible}"
            )
        images = total // world_size
        batch_size = next(size for size in range(min(self.train.batch_size, images), 0, -1) if images % size == 0)
        train = dataclasses.replace(self.train, batch_size=batch_size, accumulate=images // batch_size)
        return dataclasses.replace(self, train=train)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for config.json and checkpoints."""
        return plain(self)

    @property
    def output_dir(self) -> Path:
        """The output directory: the one given, or runs/<model>_<schedule>[_<set>]; the name of any set but COCO."""
        if self.output.output_dir is not None:
            return self.output.output_dir
        parts = [re.sub(r"[^\w.-]+", "_", self.model.model), Path(self.train.schedule).stem.removeprefix("schedule_")]
        if self.data.set_name != "coco":
            parts.append(self.data.set_name)
        return Path("runs") / "_".join(parts)
