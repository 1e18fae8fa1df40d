"""Single values of a whole configuration replaced from the command line, as MMDetection's --cfg-options does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from schedules.errors import Place, ScheduleError
from schedules.expressions import MAX_DEPTH

SOURCE = "--cfg-options"


def set_options(values: dict[str, Any], place: Place, options: Iterable[str]) -> None:
    """Put each KEY=VALUE into `values` in place; KEY is dotted, and a place in a list is a number.

    A value is written as MMDetection takes it: a number, true, false, None, text, or a list 1,2,3 or [1,2] or (1,2), in
    which may be others. place: of the values; it learns that the key comes from the command line. Raises ScheduleError.
    """
    for option in options:
        key, equals, text = option.partition("=")
        at_option = Place(SOURCE, tuple(key.split(".")), {})
        if not equals or not all(at_option.path):
            raise ScheduleError(
                f"{SOURCE} {option}: write it as KEY=VALUE, e.g. {SOURCE} train_dataloader.batch_size=4"
            )
        if len(at_option.path) > MAX_DEPTH:
            raise Place(SOURCE, at_option.path[:3]).error(f"nested more than {MAX_DEPTH} deep")
        first_new = _put(values, at_option, _value(text.strip(), at_option))
        if place.lines is not None:
            for path in [path for path in place.lines if path[: len(at_option.path)] == at_option.path]:
                del place.lines[path]
            for length in range(first_new + 1, len(at_option.path) + 1):
                place.lines[at_option.path[:length]] = SOURCE, 0


def _put(values: dict[str, Any], place: Place, value: Any) -> int:
    """Returns how many keys of the path there were before; the last one always counts as new."""
    holder: Any = values
    there = 0
    for number, key in enumerate(place.path):
        last = number == len(place.path) - 1
        index: Any = key
        if isinstance(holder, list):
            if not (key.isascii() and key.isdecimal() and len(key) < 6 and int(key) < len(holder)):
                raise place.error(f"{key!r} is no place in a list of {len(holder)}; give 0 to {len(holder) - 1}")
            index = int(key)
        elif not isinstance(holder, dict):
            above = ".".join(place.path[:number])
            raise place.error(f"{above} is neither a dict nor a list, so nothing in it can be set; set {above} itself")
        if last:
            holder[index] = value
        elif isinstance(holder, dict):
            there += key in holder
            holder = holder.setdefault(index, {})
        else:
            there += 1
            holder = holder[index]
    return there


def _value(text: str, place: Place, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise place.error(f"nested more than {MAX_DEPTH} deep")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    is_tuple = text.startswith("(") and text.endswith(")")
    is_list = text.startswith("[") and text.endswith("]")
    inside = text[1:-1] if is_tuple or is_list else text
    parts = _parts(inside, place)
    if is_tuple or is_list or len(parts) > 1:
        items = [_value(part.strip(), place, depth + 1) for part in parts if part.strip()]
        return tuple(items) if is_tuple else items
    if text == "None" or text.lower() in ("true", "false"):
        return None if text == "None" else text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parts(text: str, place: Place) -> list[str]:
    """The text between the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
        if depth < 0:
            break
    if depth:
        raise place.error(f"{text[:40]} has a bracket without the other one")
    return parts
