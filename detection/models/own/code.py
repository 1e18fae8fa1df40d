"""Code of a user's own by its name: package.module:function."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detection.errors import DetectionError

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class OwnCodeError(DetectionError):
    """Code of a user's own that is not there, or does not do what is asked of it."""


def is_own(name: str) -> bool:
    """Whether a name is one of code of a user's own, package.module:function."""
    return _NAME.fullmatch(name) is not None


def imported(name: str) -> Callable[..., Any]:
    """The function that `name` (package.module:function) means. Modules are looked for where Python does, and in the
    current folder.

    Only names that a user has given come here: none out of a file. Raises OwnCodeError.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises
        raise OwnCodeError(f"{name}: the module {module_name} cannot be imported: {error!r}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise OwnCodeError(f"{name}: {module.__file__} has no function {function_name}")
    return function


def called(name: str, **keywords: Any) -> Any:
    """What the function of that name gives. Raises OwnCodeError, with what it raised."""
    function = imported(name)
    try:
        return function(**keywords)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise OwnCodeError(f"{name}({given}) failed: {error!r}") from error
