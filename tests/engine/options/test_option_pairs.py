"""Every two values of two options in one training: it ends with status 0 or with an own error, never with a traceback.

A part of the combinations is tried by default. OPTION_PAIRS=1/1 tries all, 2/3 the second third of them.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from detection.config import ConfigError, parse_arguments
from detection.engine import USER_ERRORS, run
from detection.models import MODELS
from detection.models.config import TORCHVISION_RECIPE
from tests.engine.options.choices import OF_A_RUN, TRIED
from tests.engine.options.covering import covering_rows
from tests.engine.tiny_model import TINY

Row = dict[str, str]
ROWS: list[Row] = [
    {group: values[place] for (group, values), place in zip(TRIED.items(), row, strict=True)}
    for row in covering_rows([len(values) for values in TRIED.values()], seed=0)
]
PART, PARTS = map(int, os.environ.get("OPTION_PAIRS", "1/22").split("/"))


@pytest.fixture(scope="module", autouse=True)
def _tiny_as_torchvisions() -> None:
    MODELS["tiny_like_torchvision"] = {**TORCHVISION_RECIPE, **TINY}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def outcome(arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., str]:
    """outcome(row, *more): "" for status 0, or the message of the program's own error; anything else is raised."""

    def begin(row: Row, *more: str) -> str:
        words = " ".join(row.values()).split()
        try:
            status = run(parse_arguments(arguments(tmp_path / "run", *words, *more)))
        except (ConfigError, *USER_ERRORS) as error:
            return str(error)
        assert status == 0
        return ""

    return begin


def test_every_two_values_of_two_options_are_tried_together():
    together = {frozenset(pair) for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for one, other in itertools.combinations(TRIED, 2):
        for pair in itertools.product(TRIED[one], TRIED[other]):
            assert frozenset(zip((one, other), pair, strict=True)) in together


@pytest.mark.parametrize("number", range(PART - 1, len(ROWS), PARTS))
def test_a_combination_trains_and_resumes_or_is_refused_by_a_dry_run_too(number, outcome):
    row = ROWS[number]
    planned = outcome(row, "--dry-run")
    trained = outcome(row)
    assert planned == trained or "not finite" in trained
    if not trained:
        # Resumed with other options, but for those without which it is another run; evaluated with any.
        other = ROWS[(number + 1) % len(ROWS)]
        outcome({**other, **{group: row[group] for group in OF_A_RUN}}, "--resume")
        outcome(other, "--val-only", "--resume")
