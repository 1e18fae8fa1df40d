"""A setting, stated once: a dataclass field that holds its default and what the command line says of it.

The parser of the command line, its --help, docs/options.md and the keys of config.json are all made from such fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import Field
from enum import Enum
from typing import Any, TypeVar

from detection.config.arg_types import NO_LIMIT, Number
from detection.errors import DetectionError

T = TypeVar("T")


class ConfigError(DetectionError):
    """An option that is wrong, or options that contradict each other. The message names them and the remedy."""


class OnResume(Enum):
    """Whose value holds in a resumed run, where the command line differs from the checkpoint's run."""

    COMMAND_LINE = "command line", "what the command line says, or the default without it"
    SCHEDULE = "schedule", "what the command line says; the whole schedules are compared, value by value"
    COMPATIBLE = (
        "command line, if it fits",
        "what the command line says; refused where classes, global batch or iterations an epoch become others",
    )
    KEPT_OFF = (
        "command line, else off stays off",
        "what the command line says; without it a run that began with it off stays so, and others have the default",
    )
    CHECKPOINT = "checkpoint", "what the run began with; the command line has no effect"
    EQUAL = "must be equal", "another value is refused"
    EACH_START = "each start", "what the command line says: it belongs to a start, not to the run"

    def __init__(self, short: str, meaning: str) -> None:
        self.short, self.meaning = short, meaning


COMMAND_LINE, SCHEDULE, COMPATIBLE, KEPT_OFF, CHECKPOINT, EQUAL, EACH_START = OnResume


class Option:
    """How a field is given on the command line.

    help: what it is. flag: the option's name; None: that of the field. unit: of the value, said behind the help. shown:
    what stands in brackets behind both; None: the default. words: keywords of argparse's add_argument.
    """

    def __init__(
        self, help: str, *, flag: str | None = None, unit: str = "", shown: str | None = None, **words: Any
    ) -> None:
        if isinstance(kind := words.get("type"), Number):
            words.setdefault("metavar", kind.metavar)
        self.help, self.flag, self.unit, self.shown, self.words = help, flag, unit, shown, words

    def flag_for(self, field: Field[Any]) -> str:
        """The option's name with its dashes."""
        return self.flag or "--" + field.name.replace("_", "-")

    def meaning(self) -> str:
        """What it is, the unit, and the range of a number."""
        text = f"{self.help}, {self.unit}" if self.unit else self.help
        kind = self.words.get("type")
        return f"{text} ({kind.range})" if isinstance(kind, Number) and kind.high != NO_LIMIT else text

    def default(self, field: Field[Any]) -> str:
        """What holds without the option, for people; empty where nothing is to be said of it."""
        value = field.default
        if self.shown is not None:
            return self.shown
        if "const" in self.words:
            return f"without a value {self.words['const']}"
        if value is None or value is False or value == () or "action" in self.words:
            return ""
        if value is True:
            return "on"
        values = value if isinstance(value, tuple) else (value,)
        return " ".join(each if isinstance(each, str) else f"{each:g}" for each in values)


def setting(default: Any, on_resume: OnResume, *options: str | Option, group: str | None = None, **words: Any) -> Any:
    """A dataclass field that an option decides: the help of one, and `words` as Option takes them.

    Or several options, of which those with the field's name as `dest` exclude each other. on_resume: who decides it in
    a resumed run. group: of the options in --help; None: the field's dataclass.
    """
    made = tuple(Option(each, **words) if isinstance(each, str) else each for each in options)
    return dataclasses.field(default=default, metadata={"options": made, "on_resume": on_resume, "group": group})


def settings_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, str, Field[Any]]]:
    """Group of options, dotted key in config.json and field of every setting of a dataclass and of those inside it."""
    for field in dataclasses.fields(kind):
        if isinstance(field.default_factory, type):
            yield from settings_of(field.default_factory, f"{prefix}{field.name}.")
        else:
            key = prefix + field.name
            yield field.metadata["group"] or key.split(".")[0], key, field


def is_switch(field: Field[Any]) -> bool:
    """Whether it is on or off; None, for one that is neither given on nor off, is a default of its own."""
    return isinstance(field.default, bool) or field.metadata["on_resume"] is OnResume.KEPT_OFF


def add_options(group: argparse._ActionsContainer, field: Field[Any], shown: Container[str] | None = None) -> None:
    """Add a setting's options to a parser. What is not given is left out of the parsed namespace.

    shown: the options that --help shows; None: all.
    """
    options: tuple[Option, ...] = field.metadata["options"]
    if len(options) > 1 and all(option.words.get("dest") == field.name for option in options):
        group = group.add_mutually_exclusive_group()
    for option in options:
        words = option.words
        if is_switch(field):
            words = {"action": "store_true" if field.default is False else argparse.BooleanOptionalAction}
        default = option.default(field)
        flag, text = option.flag_for(field), f"{option.meaning()} [{default}]" if default else option.meaning()
        text = text if shown is None or flag in shown else argparse.SUPPRESS
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **words)


def filled(kind: type[T], given: Mapping[str, Any]) -> T:
    """The dataclass with the values given by field name, and with its defaults for the rest."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if isinstance(field.default_factory, type):
            values[field.name] = filled(field.default_factory, given)
        elif field.name in given:
            value = given[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def plain(config: Any) -> dict[str, Any]:
    """The settings of a dataclass as config.json and checkpoints hold them: lists for tuples, text for paths."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
