"""Trainings of processes with a pretended memory each; what every process found in RANK.json.

trial_rank.py FOLDER PORTS [options]
"""

import json
import os
import sys
from pathlib import Path

from detection.config import parse_arguments
from detection.engine import RunError, run
from detection.process_exit import leave
from tests.engine.accelerate.pretended_memory import PretendedMemory, bytes_of, pretended
from tests.engine.tiny_model import make_known


def main() -> None:
    folder, ports, words = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    rank = int(os.environ["RANK"])
    make_known()

    def begin(name: str, num_images: float, *more: str) -> str:
        """A training where this process's memory takes so many images."""
        os.environ["MASTER_PORT"] = ports.pop()
        memory = PretendedMemory(int(num_images * bytes_of((1, 3, 64, 96))))
        with pretended(memory):
            try:
                return str(run(parse_arguments([*words, "--output-dir", str(folder / name), *more])))
            except RunError as error:
                return str(error)

    found = {
        # The last process has the least.
        "auto": begin("auto", 4.5 - rank, "--batch-size", "auto"),
        "resumed": begin("auto", 100, "--batch-size", "auto", "--resume", "--max-epochs", "2"),
        "one does not fit": begin("short", 2.5 - rank, "--batch-size", "2"),
        "synchronized": begin("synchronized", 5, "--norm", "bn", "--sync-bn"),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
