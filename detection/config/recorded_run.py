"""The settings of a run from the config.json that it wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from detection.config.arg_types import Number
from detection.config.mmdet_run import REPLACES
from detection.config.run_config import RunConfig
from detection.config.settings import EACH_START, ConfigError, is_switch, settings_of
from schedules.reading.overrides import SHORT_KEYS

RECORD = "config.json"
_OF_THE_SCHEDULE = ("config_file", "cfg_options")
"""Asked for at each start, and part of what ran: with them a configuration of MMDetection gives its schedule."""
_REPLACES = (
    *REPLACES,
    (("lsj",), ("train_min_sizes",)),
    (("train_min_sizes", "train_scales"), ("lsj_min_visibility", "copy_paste")),
    (("schedule",), ("overrides", "config_file", "cfg_options")),
    (("accumulate",), ("global_batch_size",)),
    (("fast",), ("cuda_graphs",)),
    (("cuda_graphs",), ("fast",)),
    (("photometric_distortion",), ("color_jitter",)),
    (("color_jitter",), ("photometric_distortion",)),
)
"""Options, and the recorded settings that they replace besides their own."""


def with_record(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the run of the config.json in `path` was asked for, by field, with what is `given` over it.

    Overrides of the schedule and settings of the model count key by key. Raises ConfigError.
    """
    values = _read(path)
    if values.get("global_batch_size") is not None:
        values.pop("accumulate", None)  # it followed from the global batch
    for options, replaced in _REPLACES:
        if any(option in given for option in options):
            for name in replaced:
                values.pop(name, None)
    merged = values | {name: value for name, value in given.items() if name not in ("overrides", "settings")}
    merged["settings"] = tuple((dict(values.get("settings", ())) | dict(given.get("settings", ()))).items())
    overrides = {_key(text): text for text in (*values.get("overrides", ()), *given.get("overrides", ()))}
    merged["overrides"] = tuple(overrides.values())
    return merged


def _key(override: str) -> str:
    key = override.partition("=")[0].strip()
    return SHORT_KEYS.get(key, key)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())["config"]
        items = {key: _at(record, key.split(".")) for _, key, _ in settings_of(RunConfig)}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the output directory of a run, or its {RECORD}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{path} is no {RECORD} of a run: give one that train.py wrote") from None
    values = {}
    for _, key, field in settings_of(RunConfig):
        is_of_run = field.metadata["on_resume"] is not EACH_START or field.name in _OF_THE_SCHEDULE
        if is_of_run and items[key] is not None:
            try:
                value = _value(field, items[key])
            except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
                raise ConfigError(f"{path}: {key} is {items[key]!r}: {error}") from None
            if value != field.default:
                values[field.name] = value
    return values


def _at(record: Any, key: list[str]) -> Any:
    for part in key:
        if not isinstance(record, dict):
            raise TypeError
        if part not in record:
            return None
        record = record[part]
    return record


def _value(field: Field[Any], value: Any) -> Any:
    """A field's value from what JSON made of it."""
    if is_switch(field) or isinstance(value, bool):
        if not (is_switch(field) and isinstance(value, bool)):
            raise ValueError("write true or false" if is_switch(field) else "true and false are none")
        return value
    if field.name == "settings":
        return tuple((str(key), item) for key, item in value)
    options = field.metadata["options"]
    # Of --freeze and --frozen-stages the last takes what is recorded; overrides are text, whatever their options.
    words = {} if not options or field.name == "overrides" else options[-1].words
    kind = words.get("type", str)
    takes_several = not options or field.name == "overrides" or words.get("nargs", "?") != "?"
    if takes_several and isinstance(value, str) and field.name != "overrides":
        value = [value]  # recorded before the option took several
    if isinstance(value, list) != takes_several:
        raise ValueError("a list is expected" if takes_several else "one value is expected")
    if takes_several:
        return tuple(_one(kind, each) for each in value)
    one = _one(kind, value)
    if "choices" in words and one not in words["choices"]:
        raise ValueError(f"choose one of {', '.join(map(str, words['choices']))}")
    return one


def _one(kind: Any, value: Any) -> Any:
    if isinstance(value, list):  # two sides of a scale
        return kind("x".join(map(str, value)))
    if isinstance(value, (dict, bool)) or isinstance(value, str) == (kind is int or isinstance(kind, Number)):
        raise ValueError("that is of another kind")
    return kind(str(value))
