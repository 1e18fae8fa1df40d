"""What the tests of scripts/ share: the programs as modules, and files of small detectors."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from detection.models import build_model
from detection.models.weights.stored import stripped_file

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Modules of scripts/ by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def program(script: Callable[[str], ModuleType]) -> Callable[..., int]:
    """program("export", *arguments): the exit status."""
    return lambda name, *arguments: script(name).main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def detector_content() -> Callable[..., dict[str, Any]]:
    """detector_content(model, seed, class_names, category_ids, **settings): a stripped file of a small detector."""

    def content(
        name: str, seed: int, class_names: list[str], category_ids: list[int], **settings: Any
    ) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = build_model(name, len(class_names), **settings)
        return stripped_file(
            model.state_dict(),
            model_config=dataclasses.asdict(model.config),
            class_names=class_names,
            category_ids=category_ids,
            preprocessing={"min_size": 64, "max_size": 96},
        )

    return content
