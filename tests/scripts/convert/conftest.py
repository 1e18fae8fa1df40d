"""The converters' programs, called in this process."""

from collections.abc import Callable

import pytest


@pytest.fixture
def convert(request: pytest.FixtureRequest, program: Callable[..., int]) -> Callable[..., int]:
    """main() of the program that the test's file is named for, given its words."""
    return lambda *words: program(request.path.stem.removeprefix("test_"), *words)
