"""Every number at the ends of its range, and beyond: a plan or an own error, never a traceback."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from detection.config import ConfigError, RunConfig, parse_arguments
from detection.config.arg_types import Number
from detection.config.settings import Option, settings_of
from detection.engine import USER_ERRORS, run
from detection.models.config import FasterRCNNConfig, ModelError, model_config
from tests.engine.options.test_option_pairs import PART, PARTS

NUMBERS: list[tuple[str, Option]] = [
    (option.flag_for(field), option)
    for _, _, field in settings_of(RunConfig)
    for option in field.metadata["options"]
    if isinstance(option.words.get("type"), Number)
]
LIMITED = [field for field in dataclasses.fields(FasterRCNNConfig) if field.metadata.get("limits")]
# What the highest number costs gigabytes of.
COSTLY = ("fpn_channels", "roi_hidden_channels")


def beside(number: Number) -> Iterator[str]:
    """What is no number of the range."""
    step = 1 if number.kind is int else 0.001
    yield from ("", "x", "nan", "inf", "1" + "0" * 400)
    yield from map(str, (number.low - step, number.high + number.high * step, *number.excluded))


@pytest.mark.parametrize(("flag", "option"), NUMBERS, ids=[flag for flag, _ in NUMBERS])
def test_a_number_outside_its_range_is_refused_with_the_range(flag, option, capsys):
    number = option.words["type"]
    count = option.words.get("nargs") if isinstance(option.words.get("nargs"), int) else 1
    for text in beside(number):
        with pytest.raises(SystemExit) as left:
            parse_arguments([flag, *[text] * count])
        assert left.value.code == 2 and number.range in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "option"), NUMBERS[PART - 1 :: PARTS], ids=lambda given: given if isinstance(given, str) else ""
)
@pytest.mark.parametrize("end", ["low", "high"])
def test_the_ends_of_a_range_can_be_planned(flag, option, end, arguments: Callable[..., list[str]], tmp_path: Path):
    number = option.words["type"]
    value = getattr(number, end)
    if value in number.excluded:
        value = math.nextafter(value, 0.5)
    count = option.words.get("nargs") if isinstance(option.words.get("nargs"), int) else 1
    words = [flag, *[str(value)] * count]
    try:
        assert run(parse_arguments(arguments(tmp_path / "run", *words, "--dry-run"))) == 0
    except (ConfigError, *USER_ERRORS):
        pass  # some go only together with another option


@pytest.mark.parametrize("field", LIMITED, ids=lambda field: field.name)
def test_a_setting_of_the_model_outside_its_range_is_refused(field):
    low, high = field.metadata["limits"]
    size = field.metadata["length"] or 1
    is_list = "tuple" in str(field.type)
    for value in (low - 1e-9, low - 1, high + 1, math.nan, math.inf, "1", [], {}, True, [None]):
        for given in (value, [value] * size, [value] * (size + 1)):
            with pytest.raises(ModelError, match=f"{field.name} is .*, expected .* from {low} to {high}"):
                model_config("faster_rcnn_r50_fpn", **{field.name: given})
    if is_list:
        with pytest.raises(ModelError, match="expected a list"):
            model_config("faster_rcnn_r50_fpn", **{field.name: low})


@pytest.mark.parametrize("field", LIMITED[PART - 1 :: PARTS], ids=lambda field: field.name)
@pytest.mark.parametrize("end", [0, 1])
def test_a_model_with_a_setting_at_the_end_of_its_range_trains(field, end, arguments, tmp_path):
    if field.name == "num_classes" or (end and field.name in COSTLY):
        pytest.skip("the data decides it, or it takes too much memory")
    value = field.metadata["limits"][end]
    value = [value] * (field.metadata["length"] or 1) if "tuple" in str(field.type) else value
    words = ["--model-set", f"{field.name}={value}", "--max-epochs", "1", "--limit-train-batches", "1"]
    try:
        assert run(parse_arguments(arguments(tmp_path / "run", *words))) == 0
    except (ConfigError, *USER_ERRORS):
        pass  # a loss that is not finite, or settings that contradict it
