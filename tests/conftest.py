"""What every test shares: one torch thread a process, and the cuda marker's meaning."""

import random
import resource
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def begin_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def random_numbers_of_a_module() -> None:
    """What fixtures of a whole module draw is the same in every run."""
    begin_random_numbers()


@pytest.fixture(autouse=True)
def random_numbers_of_a_test(random_numbers_of_a_module: None) -> None:
    """What a test draws is the same in every run, and whatever ran before it."""
    begin_random_numbers()


@pytest.fixture(scope="module")
def bounded_memory() -> Iterator[None]:
    """However many hostile files, all of them small, the tests of a module try: they take no more memory than this."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    print(f"memory grew by {grown} MiB at most")
    assert grown < 512


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
