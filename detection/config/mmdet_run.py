"""A whole configuration of MMDetection 3.x -> the settings of a run here.

Every key that is known stands in a table, here or in detection.config.mmdet. Any other key is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detection.config.arg_types import NO_LIMIT
from detection.config.mmdet.data import CLASSES_OF_FILE, evaluator, loader
from detection.config.mmdet.keys import (
    NEAREST,
    OWN,
    Found,
    Idle,
    absent,
    found_in,
    idle,
    keyed,
    local_file,
    only,
    same,
    text,
    to,
    typed,
    united,
)
from detection.config.mmdet.model import model_of
from detection.config.settings import ConfigError
from schedules import ScheduleError, config_schedule
from schedules.checks import Keys, dictionary, flag, optional, read_dict, read_typed, whole
from schedules.errors import Place, shown
from schedules.reading.config_file import SOURCE, read_config
from schedules.reading.reader import SCHEDULE_KEYS


def _kept(value: Any, place: Place) -> int:
    return NO_LIMIT if value == -1 and value is not True else whole(1)(value, place)


_CHECKPOINT_HOOK: Keys = {
    "max_keep_ckpts": to("keep_checkpoints", _kept, NO_LIMIT),
    "by_epoch": (flag, True),
    **{key: only(True, hint="a checkpoint is always whole") for key in ("save_optimizer", "save_param_scheduler")},
    **idle("checkpoint hook"),
}


def _checkpoint_hook(value: Any, place: Place) -> Any:
    found = read_typed(value, place, {"CheckpointHook": _CHECKPOINT_HOOK}, "CheckpointHook")
    interval = value.get("interval", -1)
    if found["by_epoch"] or interval == -1:
        return found
    return [found, Found("checkpoint_iterations", whole(1)(interval, place.at("interval")), place.at("interval"))]


_LOGGER_HOOK: Keys = {"interval": to("log_interval", whole(1), 10), **idle("logger hook")}
_HOOKS: Keys = {
    "checkpoint": (
        optional(_checkpoint_hook),
        Found("keep_checkpoints", NO_LIMIT),
    ),
    "logger": (optional(typed({"LoggerHook": _LOGGER_HOOK}, "LoggerHook")), Found("log_interval", 10)),
    **idle("hooks"),
}


def _custom_hooks(value: Any, place: Place) -> list[Idle]:
    idles = []
    for i, hook in enumerate(value or [] if isinstance(value, (list, tuple, type(None))) else [value]):
        at = place.at(i)
        kind = dictionary(hook, at).get("type")
        if kind not in ("NumClassCheckHook", "EmptyCacheHook"):
            near = f"; {NEAREST}--ema" if "EMAHook" in str(kind) else ""
            raise at.at("type").error(f"{shown(kind)} is a hook that is not here{near}; take it out")
        idles.append(Idle(OWN, at))
    return idles


def _resume(value: Any, place: Place) -> Found | None:
    return Found("resume", "auto", place) if flag(value, place) else None


def _weights(value: Any, place: Place) -> Found:
    return Found("load_from", text(value, place), place)


def _parts(mode: str) -> Keys:
    """The top-level keys."""
    evaluation: dict[str, Any] = {}
    for split in ("val", "test"):
        evaluation[f"{split}_dataloader"] = (optional(loader(split)), None)
        evaluation[f"{split}_evaluator"] = (optional(evaluator(split)), None)
    return {
        "model": model_of,
        "train_dataloader": loader("train"),
        **evaluation,
        "default_hooks": (keyed(_HOOKS), [Found("keep_checkpoints", NO_LIMIT), Found("log_interval", 10)]),
        "custom_hooks": (_custom_hooks, None),
        "load_from": (optional(_weights), None),
        "resume": (_resume, None),
        "randomness": (
            keyed(
                {
                    "seed": (optional(to("seed", whole(0))), None),
                    "deterministic": to("deterministic", flag, False),
                    "diff_rank_seed": only(False),
                }
            ),
            None,
        ),
        "work_dir": (optional(to("output_dir", lambda value, place: Path(local_file(value, place)))), None),
        "compile": only(False, None, hint=f"{NEAREST}--compile"),
        "sync_bn": only(None, hint=f"{NEAREST}norm_cfg=dict(type='SyncBN'), or --sync-bn"),
        "custom_imports": absent("code of one's own is"),
        **idle(""),
    }


_OF_JITTER = ("lsj", "lsj_range", "lsj_boxes_of_masks")
REPLACES = (
    (
        ("data_path", "dataset"),
        tuple(f"{split}_{what}" for split in ("train", "val", "test") for what in ("images", "annotations")),
    ),
    (("train_min_sizes", "lsj"), ("train_scales", "train_scale_sampling", *_OF_JITTER)),
    (("train_scales",), ("train_scale_sampling", *_OF_JITTER)),
)
"""Options of the command line, and those settings of a file that they replace."""


@dataclass
class FileRun:
    """What a configuration says of a run. settings: by field of RunConfig; the model's are under "model.KEY"."""

    path: Path
    settings: dict[str, Found]
    idle: list[Idle] = field(default_factory=list)

    def under(self, given: Mapping[str, Any], flags: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
        """The file's settings with those `given` on the command line over them, and lines that say what was replaced
        and what has no effect. flags: the option of each field. Raises ConfigError.
        """
        lines = []
        mine = dict(self.settings)
        for options, replaced in REPLACES:
            if any(option in given for option in options):
                for name in replaced:
                    mine.pop(name, None)
        model = {name[6:]: each for name, each in mine.items() if name.startswith("model.")}
        values = {name: each.value for name, each in mine.items() if not name.startswith("model.")}
        for name, value in given.items():
            if name in values and name != "settings":
                if not same(value, values[name]):
                    lines.append(f"{flags[name]} {_written(value)} in place of {self._said(mine[name])}")
                values[name] = value
            elif name not in values:
                values[name] = value
        chosen = dict(given.get("settings", ()))
        for name, value in chosen.items():
            if name in model and not same(value, model[name].value):
                lines.append(f"--model-set {name}={value} in place of {self._said(model[name])}")
        values.setdefault("output_dir", Path("runs") / self.path.stem)
        values["settings"] = tuple(({name: each.value for name, each in model.items()} | chosen).items())
        _require_file(values, mine, given)
        groups: dict[str, list[str]] = {}
        for each in self.idle:
            groups.setdefault(each.reason, []).append(".".join(each.place.path))
        lines += [f"without effect, as {reason}: {', '.join(dict.fromkeys(keys))}" for reason, keys in groups.items()]
        return values, lines

    def _said(self, found: Found) -> str:
        if found.place is None:
            return f"MMDetection's {_written(found.value)}"
        return str(found.place.error(_written(found.value)))


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return str(value)


def _require_file(values: dict[str, Any], mine: Mapping[str, Found], given: Mapping[str, Any]) -> None:
    """The starting weights must be on this machine; where the command line names some, the file's do not matter."""
    load_from = mine.get("load_from")
    values.pop("load_from", None)
    found = mine["weights"]
    if load_from is not None and "resume" in mine and "resume" not in given:
        values["resume"] = load_from.value  # that checkpoint, as in MMEngine, in place of the newest
    if "weights" in given:
        return
    if load_from is not None:
        found = load_from
        values["weights"] = found.value
    if "://" in found.value and not found.value.startswith(("http://", "https://")) and "resume" not in given:
        assert found.place is not None
        message = f"{found.value} is not fetched here; download it, and give --weights FILE"
        raise ConfigError(str(found.place.error(message)))


def read_run(path: Path, options: Iterable[str], mode: str) -> FileRun:
    """What the configuration in the file says of a run. options: KEY=VALUE of --cfg-options. mode: train, val or test.

    Raises ConfigError, with file, line and key, for whatever this product does not have.
    """
    try:
        options = tuple(options)
        values, place = read_config(path, options=options)
        keys = _parts(mode)
        known = {key: value for key, value in values.items() if key in keys}
        names = [*keys, *SCHEDULE_KEYS]
        helpers = [key for key in values if key not in names]
        for key in helpers:
            _judge_helper(key, values, place, names)
        settings = list(found_in(read_dict(known, place, keys)))
        config_schedule(path, options)
        found = united(settings)
    except ScheduleError as error:
        raise ConfigError(str(error)) from None
    _finish(found, mode)
    return FileRun(path, found, [each for each in settings if isinstance(each, Idle)])


def _judge_helper(key: str, values: Mapping[str, Any], place: Place, names: Iterable[str]) -> None:
    """A name that the file gives to a value of its own has no effect by itself."""
    at = place.at(key)
    if key == "data_preprocessor":
        model = values.get("model")
        if not isinstance(model, dict) or model.get(key) != values[key]:
            raise at.error("is read in model alone; write model=dict(data_preprocessor=...)")
    elif difflib.get_close_matches(key, names, n=1, cutoff=0.85) and not key.endswith("_pipeline"):
        raise at.unknown(names)
    elif any(path[:1] == (key,) and source == SOURCE for path, (source, _) in (place.lines or {}).items()):
        message = "is only a name in the file, whose other keys have their values already"
        raise at.error(f"{message}; set the key that counts, e.g. train_dataloader.dataset.data_root")


def _finish(found: dict[str, Found], mode: str) -> None:
    """Settings that follow from several keys together."""
    pad, jitter, scales = found.pop("pad_to", None), found.get("lsj"), found.get("train_scales")
    if pad is not None and (jitter is None or pad.value != (jitter.value, jitter.value)):
        assert pad.place is not None
        message = "is done as part of large-scale jitter alone (RandomResize, RandomCrop), with the size of its crop"
        raise ConfigError(str(pad.place.error(message)))
    if "max_size" not in found:
        if scales is None:
            scales = Found("train_scales", ((jitter.value, jitter.value),)) if jitter is not None else scales
        assert scales is not None
        longer, shorter = (max(side) for side in zip(*scales.value, strict=True))
        found["max_size"], found["min_size"] = (Found(n, v) for n, v in (("max_size", longer), ("min_size", shorter)))
    if scales is not None and scales.value == ((found["max_size"].value, found["min_size"].value),):
        del found["train_scales"], found["train_scale_sampling"]
    known, count = found.pop("data set", None), found.pop("num_classes")
    classes = known or found["classes"]
    num_classes = CLASSES_OF_FILE[known.value] if known is not None else len(classes.value)
    if num_classes != count.value:
        at = count.place or classes.place
        assert at is not None
        message = f"is {count.value}, and the data sets have {num_classes} classes; give the same, and"
        message += " metainfo=dict(classes=(...)) in the data sets where they are not COCO's"
        raise ConfigError(str(at.error(message)))
    if mode != "test":
        for name in ("test_images", "test_annotations"):
            found.pop(name, None)
