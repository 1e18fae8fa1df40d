"""A process of several ends with its own status, whatever taking down the interpreter would do."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As gloo's threads do when they come too late: the end of the interpreter aborts the process.
PROGRAM = """
import atexit, os, sys
sys.path.insert(0, sys.argv[1])
from detection.process_exit import leave
atexit.register(os.abort)
print("last words")
leave(int(sys.argv[2]))
"""


FAILING = """
import atexit, os, sys
sys.path.insert(0, sys.argv[1])
import train, detection.engine
from detection.process_exit import leave
def run(config):
    raise RuntimeError("a fault of its own")
detection.engine.run = run
sys.argv = ["train.py"]
atexit.register(os.abort)
leave(train.main())
"""


@pytest.mark.slow
def test_one_of_several_that_fails_alone_shows_its_traceback_and_leaves_at_once():
    done = subprocess.run(
        [sys.executable, "-c", FAILING, str(ROOT)],
        env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a fault of its own" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "status", "expected"), [("2", 75, 75), ("2", 0, 0), ("1", 0, -signal.SIGABRT)])
def test_one_of_several_leaves_with_its_status_and_its_words(world_size: str, status: int, expected: int):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT), str(status)],
        env={**os.environ, "WORLD_SIZE": world_size}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == expected
    assert done.stdout == "last words\n"
