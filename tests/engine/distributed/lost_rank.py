"""train.py with tiny networks, of which one process comes to grief: lost_rank.py RANK killed|stuck|fails [options]"""

import os
import signal
import sys
import time
from typing import Any

import train
from detection.engine.trainer import Trainer
from detection.process_exit import leave
from tests.engine.tiny_model import make_known


def main() -> int:
    rank, fate = int(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]
    plain = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> None:
        iteration = self.state.progress.iteration
        if iteration == 2 and self.processes.rank == rank:
            self.processes.at("in iteration 2")
            if fate == "killed":
                time.sleep(1.5)  # a sign of life goes out
                os.kill(os.getpid(), signal.SIGKILL)
            if fate == "stuck":
                time.sleep(60)
            raise MemoryError("no more memory")
        plain(self, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]
    make_known()
    return train.main()


if __name__ == "__main__":
    leave(main())
