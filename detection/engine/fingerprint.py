"""What a run is, for its checkpoints and for its processes: a resume and all processes must agree in it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from data import CocoDataset, TrainLoader
from detection.config.run_config import RunConfig
from detection.engine.build import Components
from detection.engine.distributed.agreement import RunError
from detection.engine.distributed.comm import Processes
from schedules import Schedule


@dataclass(frozen=True)
class Fingerprint:
    """What of a run decides whether its checkpoints can be gone on from. Part of every checkpoint."""

    model_name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    preprocessing: dict[str, int]
    seed: int
    global_batch_size: int
    world_size: int
    data_digest: str
    """Of the training annotations."""
    augmentation: dict[str, Any]
    """AugmentationConfig.to_dict: what is done to training images at random."""
    validation: dict[str, Any] | None = None
    """Of the validation set: "digest" of its annotations, and "num_images" that are evaluated."""

    def state(self) -> dict[str, Any]:
        """Plain types, under the names that checkpoints use."""
        return {
            "class_names": list(self.class_names),
            "category_ids": list(self.category_ids),
            "preprocessing": dict(self.preprocessing),
            "run": {
                "model_name": self.model_name,
                "seed": self.seed,
                "global_batch_size": self.global_batch_size,
                "world_size": self.world_size,
                "data_digest": self.data_digest,
                "augmentation": dict(self.augmentation),
                "validation": self.validation,
            },
        }


def fingerprint(config: RunConfig, processes: Processes, components: Components, loader: TrainLoader) -> Fingerprint:
    """Those of the training that `config` asks for."""
    return Fingerprint(
        model_name=config.model.model,
        class_names=components.class_names,
        category_ids=components.category_ids,
        preprocessing={"min_size": config.data.min_size, "max_size": config.data.max_size},
        seed=config.train.seed,
        global_batch_size=loader.global_batch_size,
        world_size=processes.world_size,
        data_digest=loader.dataset.annotations.digest(),
        augmentation=config.augmentation.to_dict(),
        validation=_validation_facts(config, processes, components.evaluation_set),
    )


def assert_same_on_all_ranks(
    config: RunConfig, processes: Processes, facts: Fingerprint, schedule: Schedule, iterations_per_epoch: int
) -> None:
    """Raises RunError on every process where one has other data or settings, with which they would train past each
    other or wait for each other in vain."""
    state = facts.state()
    mine = {**state.pop("run"), **state, "schedule": schedule.to_dict(), "iterations_per_epoch": iterations_per_epoch}
    # Paths, loader processes and the like may be each machine's own.
    for group in (config.model, config.train):
        mine |= {each.name: str(getattr(group, each.name)) for each in fields(group) if each.name != "weights"}
    for name in ("log_interval", "checkpoint_minutes", "checkpoint_iterations"):
        mine[name] = getattr(config.output, name)
    first, *others = processes.gather_objects(mine)
    lines = [
        f"process {rank} has another {', '.join(different)} than process 0"
        for rank, other in enumerate(others, start=1)
        if (different := [name for name in first if other[name] != first[name]])
    ]
    if lines:
        raise RunError(
            "\n".join(lines)
            + "\nStart every process with the same options, and put the same annotation files on every "
            "machine (data_digest is of the training annotations)."
        )


def _validation_facts(config: RunConfig, processes: Processes, dataset: CocoDataset | None) -> dict[str, Any] | None:
    if dataset is None:
        return None
    limit = config.data.limit_val_batches
    most = len(dataset) if limit is None else limit * config.train.batch_size * processes.world_size
    return {"digest": dataset.annotations.digest(), "num_images": min(len(dataset), most)}
