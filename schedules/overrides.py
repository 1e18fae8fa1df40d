"""Schedule.with_overrides: single values of a schedule replaced by their dotted keys in the schedule file."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from schedules.errors import ScheduleError
from schedules.literals import Origin, dotted, read_value
from schedules.schedule import Schedule
from schedules.vocabulary import SCHEDULE_KEYS, optimizer_keys, schedule_from_values, settings_without_effect

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
    origin = Origin("override", has_lines=False)
    values = schedule.to_dict()
    lines: list[str] = []
    overridden: set[str] = set()
    for given, text in overrides.items():
        key = SHORT_KEYS.get(given, given)
        if key in overridden:
            raise ScheduleError(f"override: {key} is given twice, once as {given}; keep one")
        overridden.add(key)
        path = tuple(key.split("."))
        value = read_value(text, origin, path)
        old = _replace(values, path, value, given)
        lines.append(
            f"{key}: {_shown(old)} -> {_shown(value)}" if value != old else f"{key}: {_shown(value)}, as it was"
        )
        if key == "optim_wrapper.optimizer.type":
            lines += _drop_foreign_settings(values["optim_wrapper"]["optimizer"], value)
        if key == "optim_wrapper.type" and value == "OptimWrapper":
            lines += _drop(values["optim_wrapper"], "optim_wrapper", ("dtype", "loss_scale"))
    lines += _follow_max_epochs(schedule.max_epochs, values, overridden)
    changed = schedule_from_values(values, schedule.name, schedule.source, origin)
    before = settings_without_effect(schedule)
    lines += [line for line in settings_without_effect(changed) if line not in before]
    return replace(changed, notes=schedule.notes), lines


def _replace(values: dict[str, Any], path: tuple[str, ...], value: Any, given: str) -> Any:
    """Puts `value` at `path` and returns what was there; a None on the way becomes a dict."""
    if path[0] not in SCHEDULE_KEYS:
        raise _unknown(values, given)
    holder: Any = values
    for place, part in enumerate(path[:-1]):
        below = _at(holder, part)
        if below is None and isinstance(holder, dict) and part in holder:
            below = holder[part] = {}
        if not isinstance(below, (dict, list)):
            raise _unknown(values, given, path[: place + 1])
        holder = below
    last = path[-1]
    if isinstance(holder, list):
        if _at(holder, last) is None:
            raise _unknown(values, given)
        old, holder[int(last)] = holder[int(last)], value
        return old
    old = holder.get(last)
    known_before = last in holder
    holder[last] = value
    if not known_before:
        _refuse_unless_known(values, path, given)
    return old


def _refuse_unless_known(values: dict[str, Any], path: tuple[str, ...], given: str) -> None:
    """A key that the resolved file does not show may still be one (fused, ...): the vocabulary decides."""
    try:
        schedule_from_values(copy.deepcopy(values), "override", "", Origin("override"))
    except ScheduleError as error:
        if f"{dotted(path)}: unknown key" in str(error):
            raise _unknown(values, given, path) from None


def _at(holder: Any, part: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(part)
    if isinstance(holder, list) and part.isdecimal() and part.isascii() and len(part) < 6 and int(part) < len(holder):
        return holder[int(part)]
    return None


def _unknown(values: dict[str, Any], given: str, path: tuple[str, ...] = ()) -> ScheduleError:
    known = [*SHORT_KEYS, *(key for key in _keys(values, "") if key != dotted(path))]
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


def _drop_foreign_settings(optimizer: dict[str, Any], kind: Any) -> list[str]:
    known = optimizer_keys(str(kind))
    foreign = [key for key in optimizer if known and key not in known]
    return _drop(optimizer, "optim_wrapper.optimizer", foreign, f", {kind} has none")


def _drop(holder: dict[str, Any], prefix: str, keys: Any, why: str = "") -> list[str]:
    return [f"{prefix}.{key}: {_shown(holder.pop(key))} -> removed{why}" for key in keys if key in holder]


def _follow_max_epochs(old: int, values: dict[str, Any], overridden: set[str]) -> list[str]:
    new = values["train_cfg"].get("max_epochs") if isinstance(values["train_cfg"], dict) else None
    schedulers = values["param_scheduler"]
    if type(new) is not int or new == old or not isinstance(schedulers, list):
        return []
    lines = []
    for place, scheduler in enumerate(schedulers):
        key = f"param_scheduler.{place}"
        whole_replaced = {key, f"{key}.end", "param_scheduler"} & overridden
        if not isinstance(scheduler, dict) or whole_replaced or not scheduler.get("by_epoch", True):
            continue
        if scheduler.get("T_max") == old:
            lines.append(f"warning: {key}.T_max stays {old}: the cosine was made for {old} epochs")
        if scheduler.get("end") == old and new > scheduler.get("begin", 0):
            scheduler["end"] = new
            lines.append(f"{key}.end: {old} -> {new} (goes along with max_epochs)")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={_shown(item)}' for key, item in value.items())})"
    return repr(value)
