"""What a schedule says: how long to train, how the learning rate moves, when to validate. Standard library
only.
"""

from schedules.errors import ScheduleError
from schedules.paramwise import ParameterFacts, ParamwiseSettings, parameter_multipliers, unmatched_custom_keys
from schedules.reading.overrides import with_overrides
from schedules.reading.reader import config_schedule, load_schedule, schedule_from_dict
from schedules.schedule import Schedule
from schedules.schedulers import LinearLR, MultiStepLR

__all__ = [
    "LinearLR",
    "MultiStepLR",
    "ParameterFacts",
    "ParamwiseSettings",
    "Schedule",
    "ScheduleError",
    "config_schedule",
    "load_schedule",
    "parameter_multipliers",
    "schedule_from_dict",
    "unmatched_custom_keys",
    "with_overrides",
]
