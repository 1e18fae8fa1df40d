"""--data-path as train.py takes it, for the programs here."""

import argparse
from pathlib import Path
from typing import Any, Literal, overload

from data import CocoAnnotations
from data.layouts.found_set import FoundSet
from detection.config.run_config import DataConfig
from detection.config.settings import add_options, filled, settings_of
from detection.engine.inputs.datasets import find_folder

OPTIONS = ("data_path", "data_format", "classes", "val_fraction", "split_seed")


def add_data_path(parser: Any, *, without: tuple[str, ...] = ()) -> None:
    """Adds --data-path and the options that say how to read the folder. What is not given is not in the namespace."""
    for _, _, field in settings_of(DataConfig):
        if field.name == "data_path":
            text = "the folder of a set, in any layout that docs/own_data.md lists"
            parser.add_argument("--data-path", default=argparse.SUPPRESS, type=Path, metavar="DIR", help=text)
        elif field.name in OPTIONS and field.name not in without:
            add_options(parser, field)


def chosen(annotations: CocoAnnotations, arguments: argparse.Namespace) -> CocoAnnotations:
    """The classes of --classes alone, where that is given."""
    return annotations.of_classes(arguments.classes) if "classes" in arguments else annotations


@overload
def found_set(arguments: argparse.Namespace, *, needed: Literal[True]) -> FoundSet: ...
@overload
def found_set(arguments: argparse.Namespace) -> FoundSet | None: ...
def found_set(arguments: argparse.Namespace, *, needed: bool = False) -> FoundSet | None:
    """What the folder of --data-path holds; where it is not given None, or the usual folder where the set is `needed`.

    Raises what train.py shows as an error.
    """
    given = {name: value for name, value in vars(arguments).items() if name in (*OPTIONS, "dataset")}
    if "data_path" in given:
        given["data_path"] = (given["data_path"],)
    elif not needed:
        return None
    config = filled(DataConfig, given)
    return find_folder(config, config.folders[0])


def described(found: FoundSet) -> str:
    """What was found, in lines."""
    first = f"found: {found.title}: {', '.join(found.splits)}"
    return "\n".join([first, *(f"       {remark}" for remark in found.remarks)])
