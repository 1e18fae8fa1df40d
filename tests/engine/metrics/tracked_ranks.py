"""A training with a tracker of its own in every process: run by test_trackers.py, calls left in <folder>/<rank>.txt."""

import os
import sys
from pathlib import Path

from detection.config import parse_arguments
from detection.engine import run
from tests.engine.tiny_model import make_known


class Noting:
    def __init__(self, file):
        self.file = file

    def _note(self, *words):
        with self.file.open("a") as file:
            print(*words, file=file)

    def start(self, run):
        self._note("start", run.identifier)
        return "number 1"

    def scalars(self, iteration, values):
        self._note("scalars", iteration)

    def images(self, iteration, tag, images):
        self._note("images", tag)

    def finish(self, is_done):
        self._note("finish", is_done)


if __name__ == "__main__":
    make_known()
    folder, *words = sys.argv[1:]
    sys.exit(run(parse_arguments(words), trackers=[Noting(Path(folder) / f"{os.environ['RANK']}.txt")]))
