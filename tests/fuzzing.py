"""How hard the tests with random damage try: a few hundred examples, or FUZZ_EXAMPLES of them."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings


def examples(usual: int) -> Callable[[Any], Any]:
    """Settings of a test with `usual` examples, always the same ones; FUZZ_EXAMPLES=10000 in the environment makes it
    that many."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", usual)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
