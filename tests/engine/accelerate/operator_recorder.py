"""A stand-in for CUDA graphs on a CPU.

It records operators and does them again with the very tensors: it too knows nothing of what the host did in between.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class OperatorRecorder:
    """As CudaGraphBackend, on a CPU."""

    def __init__(self) -> None:
        self.replays = 0

    def warm_up(self, step: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return step()

    def capture(self, step: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        written = [parameter.clone() for parameter in self.untouched()]
        with Operators() as operators:
            recorded = step()
        # A recording does nothing.
        for parameter, before in zip(self.untouched(), written, strict=True):
            parameter.copy_(before)

        # The casts are among what was recorded.
        @torch.autocast("cpu", enabled=False)
        @torch.no_grad()
        def replay() -> dict[str, Tensor]:
            self.replays += 1
            for func, args, kwargs, result in operators.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
            return {name: value.clone() for name, value in recorded.items()}

        return replay

    untouched: Callable[[], list[Tensor]] = staticmethod(list)
    """The tensors outside a step that it writes to."""
