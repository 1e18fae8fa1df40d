import resource
import subprocess
import sys

import pytest
import torch

from detection.engine.accelerate import allocator

FAULTS_OF_A_STEP = """
import resource, torch
from detection.engine.accelerate.allocator import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(12 << 20) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = [faults() for _ in range(3)][-1]
assert keep_freed_memory()
kept = [faults() for _ in range(3)][-1]
assert return_freed_memory()
print(usual, kept, [faults() for _ in range(3)][-1])
"""


@pytest.mark.slow
@pytest.mark.skipif(allocator._glibc() is None, reason="not the GNU C library")
def test_a_second_step_finds_the_memory_of_the_first():
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_A_STEP], capture_output=True, text=True, check=True)
    usual, kept, again = map(int, done.stdout.split())
    pages = 2 * (12 << 22) // resource.getpagesize()
    assert kept < pages / 100
    # Huge pages, where the system gives them unasked, make usual faults few.
    if usual > pages / 2:
        assert again > pages / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not allocator.keep_freed_memory()
    assert not allocator.return_freed_memory()
    assert torch.ones(3).sum() == 3
