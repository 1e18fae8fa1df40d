"""Single values of a schedule replaced by their dotted keys in the schedule file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from schedules.errors import Place, ScheduleError, UnknownKey
from schedules.reading.expressions import read_value
from schedules.reading.reader import OPTIMIZERS, SCHEDULE_KEYS, schedule_from_dict
from schedules.schedule import Schedule, idle_schedulers

SHORT_KEYS = {
    "lr": "optim_wrapper.optimizer.lr",
    "max_epochs": "train_cfg.max_epochs",
    "val_interval": "train_cfg.val_interval",
}


def with_overrides(schedule: Schedule, overrides: Mapping[str, str]) -> tuple[Schedule, list[str]]:
    """The schedule with other values, and a line for each change ("train_cfg.max_epochs: 12 -> 6").

    Keys are the dotted keys of the schedule file, or lr, max_epochs, val_interval; places in lists are
    numbers (param_scheduler.1.milestones). Values are Python literals or dict(...) in text; a bare word
    stands for itself. Where max_epochs changes, the end of a scheduler by epoch that ended with the run goes
    along; milestones and T_max stay, and a line warns of what never acts then. Raises ScheduleError for an
    unknown key, naming the nearest known one, and for a value that does not fit.
    """
    values = schedule.to_dict()
    lines: list[str] = []
    given_as: dict[str, str] = {}
    for given, text in overrides.items():
        key = SHORT_KEYS.get(given, given)
        if key in given_as:
            raise ScheduleError(f"override: {key} is given twice, once as {given}; keep one")
        given_as[key] = given
        value = read_value(text, Place("override", tuple(key.split("."))))
        old = _replace(values, key, value, given)
        lines.append(f"{key}: {_written(old)}" + (f" -> {_written(value)}" if value != old else ", as it was"))
        if key == "optim_wrapper.optimizer.type" and str(value) in OPTIMIZERS:
            optimizer = values["optim_wrapper"]["optimizer"]
            foreign = [name for name in optimizer if name != "type" and name not in OPTIMIZERS[value]]
            lines += _drop(optimizer, "optim_wrapper.optimizer", foreign, f", {value} has none")
        if key == "optim_wrapper.type" and value == "OptimWrapper":
            lines += _drop(values["optim_wrapper"], "optim_wrapper", ("dtype", "loss_scale"))
    lines += _follow_max_epochs(schedule.max_epochs, values, given_as.keys())
    try:
        changed = schedule_from_dict(values, schedule.name, schedule.source, Place("override"))
    except UnknownKey as error:
        if (key := ".".join(error.path)) in given_as:
            raise _unknown(values, given_as[key], key) from None
        raise
    before = idle_schedulers(schedule)
    lines += [line for line in idle_schedulers(changed) if line not in before]
    return replace(changed, notes=schedule.notes), lines


def _replace(values: dict[str, Any], key: str, value: Any, given: str) -> Any:
    """Puts `value` at `key` and returns what was there; a None on the way becomes a dict."""
    *holders, last = key.split(".")
    holder: Any = values if (holders or [last])[0] in SCHEDULE_KEYS else None
    for part in holders:
        if isinstance(holder, dict) and part in holder and holder[part] is None:
            holder[part] = {}
        holder = _at(holder, part)
    if isinstance(holder, dict):
        old, holder[last] = holder.get(last), value
    elif isinstance(holder, list) and _at(holder, last) is not None:
        old, holder[int(last)] = holder[int(last)], value
    else:
        raise _unknown(values, given)
    return old


def _at(holder: Any, part: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(part)
    if isinstance(holder, list) and part.isdecimal() and part.isascii() and len(part) < 6 and int(part) < len(holder):
        return holder[int(part)]
    return None


def _unknown(values: dict[str, Any], given: str, wrong: str = "") -> ScheduleError:
    known = [*SHORT_KEYS, *(key for key in _keys(values, "") if key != wrong)]
    leaf = given.rsplit(".", 1)[-1]
    close = [key for key in known if key.rsplit(".", 1)[-1] == leaf and key != given]
    close = close or difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"keys begin with {', '.join(SCHEDULE_KEYS)}"
    return ScheduleError(f"override: the schedule has no key {given}; {hint}")


def _keys(value: Any, prefix: str) -> Iterator[str]:
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield f"{prefix}{key}"
        yield from _keys(item, f"{prefix}{key}.")


def _drop(holder: dict[str, Any], prefix: str, keys: Iterable[str], why: str = "") -> list[str]:
    return [f"{prefix}.{key}: {_written(holder.pop(key))} -> removed{why}" for key in keys if key in holder]


def _follow_max_epochs(old: int, values: dict[str, Any], overridden: Iterable[str]) -> list[str]:
    new = values["train_cfg"].get("max_epochs") if isinstance(values["train_cfg"], dict) else None
    schedulers = values["param_scheduler"]
    if type(new) is not int or new == old or not isinstance(schedulers, list):
        return []
    lines = []
    for place, scheduler in enumerate(schedulers):
        key = f"param_scheduler.{place}"
        replaced = {key, f"{key}.end", "param_scheduler"} & set(overridden)
        if not isinstance(scheduler, dict) or replaced or not scheduler.get("by_epoch", True):
            continue
        if scheduler.get("T_max") == old:
            lines.append(f"warning: {key}.T_max stays {old}: the cosine was made for {old} epochs")
        if scheduler.get("end") == old and new > scheduler.get("begin", 0):
            scheduler["end"] = new
            lines.append(f"{key}.end: {old} -> {new} (goes along with max_epochs)")
    return lines


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={_written(item)}' for key, item in value.items())})"
    return repr(value)
