"""The converters' programs, called in this process."""

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def convert(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """main() of the program that the test's file is named for, given its words."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    main = importlib.import_module(request.path.stem.removeprefix("test_")).main
    return lambda *words: main(list(map(str, words)))
