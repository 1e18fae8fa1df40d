"""Trainings in which one process waits for data for ever and another one is asked to stop; statuses in RANK.json.

waiting_rank.py FOLDER PORTS [options]
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import EvalLoader, TrainLoader
from detection.config import parse_arguments
from detection.engine import run
from detection.process_exit import leave
from tests.engine.tiny_model import make_known


def main() -> None:
    folder, ports, words = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    rank, last_rank = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    make_known()
    plain_train, plain_val = TrainLoader.batches, EvalLoader.batches

    def stop_once_it_exists(mark: Path) -> None:
        while not mark.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    def begin(name: str, mark: Path, asked: int, *more: str) -> int:
        os.environ["MASTER_PORT"] = ports.pop()
        if rank == asked:
            threading.Thread(target=stop_once_it_exists, args=(mark,), daemon=True).start()
        return run(parse_arguments([*words, "--output-dir", str(folder / name), *more]))

    def stuck(batches: Iterator[Any], mark: Path, number: int) -> Iterator[Any]:
        for place, batch in enumerate(batches):
            if place == number:
                mark.touch()
                threading.Event().wait()
            yield batch

    found = {}
    mark = folder / "waits_in_training"
    if rank == last_rank:
        # The mosaic at the start takes its images from the first epoch alone.
        TrainLoader.batches = lambda self, first, last: (  # type: ignore[method-assign]
            stuck(plain_train(self, first, last), mark, 3 if last > self.iterations_per_epoch else -1)
        )
    found["training"] = begin("run", mark, 0)
    TrainLoader.batches = plain_train  # type: ignore[method-assign]

    val_mark = folder / "waits_in_validation"
    if rank == 0:
        EvalLoader.batches = lambda self: stuck(plain_val(self), val_mark, 0)  # type: ignore[method-assign]
    found["validation"] = begin("run", val_mark, last_rank, "--resume")
    EvalLoader.batches = plain_val  # type: ignore[method-assign]

    found["resumed"] = begin("run", mark, -1, "--resume")
    found["whole"] = begin("whole", mark, -1)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
