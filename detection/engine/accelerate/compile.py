"""torch.compile in a training: for a few padded sizes, with a cache that outlives the run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

from data.cache.packed_file import cache_folder
from detection.models import FasterRCNN

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Padded sizes of one compiled part, with room for batches that fit no bucket; beyond it the part runs uncompiled.
_MOST_SHAPES = 32


def compile_for_training(model: FasterRCNN, *, by_stage: bool, warn: Callable[[str], None]) -> None:
    """Compiles the dense parts, and what is between them, each padded size when it first occurs.

    The data side keeps the sizes few (data.loading.shape_buckets).

    Args:
        by_stage: the stages of the backbone are parts of their own.
        warn: is told, once, that the compiler failed between the dense parts; from then on these run uncompiled.
    """
    prepare_compiler()
    model.backbone.compiled_by_stage = by_stage
    model.compile_dense_parts(dynamic=False)
    model.glue.compile(lambda function, stage: _compiled_or_plain(function, model, warn))


def _compiled_or_plain(function: Callable[_P, _R], model: FasterRCNN, warn: Callable[[str], None]) -> Callable[_P, _R]:
    compiled = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            model.glue.leave_uncompiled()
            cause = getattr(error, "inner_exception", error)
            problem = next(iter(str(cause).splitlines()), type(cause).__name__)
            warn(f"the compiler failed in {function.__name__}; only the dense parts run compiled: {problem}")
        return function(*args, **kwargs)

    return run


def compile_for_evaluation(model: FasterRCNN) -> None:
    """Compiles the dense parts, from the second padded size on for any: an evaluation has dozens of them."""
    prepare_compiler()
    model.compile_dense_parts()


def prepare_compiler() -> None:
    """Room for all padded sizes, and a folder for what the compiler makes: the user's cache folder
    (TORCHINDUCTOR_CACHE_DIR, if that is set), so that the next run has it at once."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)


def uncompiled(run: Callable[_P, _R]) -> Callable[_P, _R]:
    """`run` with everything in it uncompiled.

    For validations: their batches have dozens of padded sizes, each of which would be compiled for a few batches.
    """

    @functools.wraps(run)
    def in_eager_mode(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.compiler.set_stance("force_eager"):
            return run(*args, **kwargs)

    return in_eager_mode
