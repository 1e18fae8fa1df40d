"""A configuration file of MMDetection, read without MMDetection."""

from __future__ import annotations

import os
from typing import Any

from detection.config.settings import ConfigError
from schedules.errors import ScheduleError
from schedules.reading.config_file import read_config


def read_mmdet_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values of a configuration file of MMDetection 3.x and of its base files: what MMEngine's
    Config.fromfile(path).to_dict() gives, custom modules not imported.

    The result holds dicts, lists, tuples, sets, text, numbers, True, False and None. Nothing in the files is executed.
    Read are _base_, _delete_, {{_base_.key}}, names set before, arithmetic, f-strings, subscripts, comprehensions, del,
    the functions dict, len, range and enumerate, and the common methods of dicts and lists. Raises ConfigError, with
    file, line and key, for anything else, for new-style configurations (with read_base()), and beyond the limits of
    size and depth in schedules.reading.values.
    """
    try:
        return read_config(path)[0]
    except ScheduleError as error:
        raise ConfigError(str(error)) from None
