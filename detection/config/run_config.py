"""The run's configuration: frozen dataclasses, which the command line fills."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detection.config.augmentation import AugmentationConfig
from detection.config.errors import ConfigError

MODEL_DEFAULT = "faster_rcnn_r50_fpn"
FREEZE_CHOICES = {"none": -1, "stem": 0, "stage1": 1, "stage2": 2, "stage3": 3, "stage4": 4, "backbone": 4}
"""What --freeze takes, and the number of frozen stages that it means."""


@dataclass(frozen=True)
class DataConfig:
    """Where images and annotations are, and the scale the network sees them at."""

    dataset: str = "coco"
    """coco: a COCO-format set on disk; shapes: the procedural set, made on first use."""
    data_path: Path | None = None
    """Folder of the standard layout. None: datasets/coco, or datasets/shapes."""
    train_images: Path | None = None
    train_annotations: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None
    test_images: Path | None = None
    test_annotations: Path | None = None
    min_size: int = 800
    """Pixels of the shorter side after the keep-ratio resize, unless max_size binds first."""
    max_size: int = 1333
    workers: int | None = None
    """Loader processes a training process. None: 4 beside a GPU, 1 on a CPU."""
    limit_train_batches: int | None = None
    """Iterations an epoch at most (the schedule's epoch is shortened to it)."""
    limit_val_batches: int | None = None
    """Batches a process in validation and test at most."""
    max_bad_images: int = 10
    """Distinct images that may turn out unreadable in mid-run; one more ends the run."""


@dataclass(frozen=True)
class ModelConfig:
    """Which detector, from which weights, and what of it is trained."""

    model: str = MODEL_DEFAULT
    weights: str = "imagenet"
    """none, imagenet, a torchvision weights name, or a file."""
    norm: str = "auto"
    """auto, frozen_bn, bn or gn. auto: frozen_bn from pretrained weights, bn from none."""
    frozen_stages: int | None = None
    """-1 nothing, 0 the stem, 1 the stem and the first stage, ... None: 1 from pretrained weights, -1 from none."""
    sync_bn: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    """Fields of the model's configuration and their values, of --model-set."""


@dataclass(frozen=True)
class TrainConfig:
    """How the schedule is followed on this machine."""

    schedule: str = "1x"
    overrides: tuple[str, ...] = ()
    """KEY=VALUE of --set, in order; --lr, --max-epochs, --val-interval and the like are appended."""
    batch_size: int = 2
    """Images a process and micro-step."""
    auto_scale_lr: bool = False
    accumulate: int | None = None
    """Micro-steps an iteration. None: the schedule's accumulative_counts."""
    global_batch_size: int | None = None
    """Images an iteration, whatever the number of processes; batch_size is then the most that a process takes at once.
    See RunConfig.for_processes."""
    clip_grad: float | None = None
    """Largest gradient norm. None: the schedule's clip_grad."""
    skip_nonfinite: bool = False
    """An iteration whose loss or gradient is not finite makes no step, instead of ending the run."""
    amp: str | None = None
    """off, bf16 or fp16. None: the schedule's optim_wrapper."""
    ema: float | None = None
    """Decay of the averaged weights an iteration. None: no averaging."""
    compile: bool = False
    cuda_graphs: bool = False
    """Forward and backward passes are recorded and replayed, for a few padded sizes."""
    channels_last: bool = True
    seed: int = 0
    deterministic: bool = False


@dataclass(frozen=True)
class OutputConfig:
    """What is written where, and when."""

    output_dir: Path | None = None
    resume: str | None = None
    """None, "auto", or a checkpoint file."""
    overwrite: bool = False
    keep_checkpoints: int = 3
    checkpoint_minutes: float | None = None
    checkpoint_iterations: int | None = None
    log_interval: int | None = None
    """Iterations between two readings of the losses. None: 20 on a GPU, 1 on a CPU."""
    eval_backend: str = "auto"


@dataclass(frozen=True)
class RunConfig:
    """Everything the command line says."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    device: str = "auto"
    mode: str = "train"
    """train, val or test."""
    dry_run: bool = False
    collective_timeout: float = 15.0
    """Minutes that a process waits for the others before the run ends with an error."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def for_processes(self, world_size: int) -> RunConfig:
        """The same with batch_size and accumulate such that `world_size` processes make up the global batch asked for.

        The configuration itself where no global batch is asked for, or nothing is trained.

        Raises:
            ConfigError: the global batch cannot be divided evenly.
        """
        total = self.train.global_batch_size
        if total is None or self.mode != "train":
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

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return str(value) if isinstance(value, Path) else value

        return plain(dataclasses.asdict(self))

    @property
    def output_dir(self) -> Path:
        """The output directory: the one given, or runs/<model>_<schedule>[_<dataset>]."""
        if self.output.output_dir is not None:
            return self.output.output_dir
        parts = [self.model.model, Path(self.train.schedule).stem.removeprefix("schedule_")]
        if self.data.dataset != "coco":
            parts.append(self.data.dataset)
        return Path("runs") / "_".join(parts)
