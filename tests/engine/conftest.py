"""Runs of the whole program on a set of a few small images, with a network that a CPU trains in no time."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data import make_shapes
from detection.config import parse_arguments
from detection.engine import run
from detection.engine.trainer import Trainer
from tests.engine.tiny_model import Killed, make_known

FOLDER = Path(__file__).parent
TIMINGS = ("images_per_second", "data_seconds", "idle_share", "seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that train are slow, wherever they stand in this folder."""
    for item in items:
        names = getattr(item, "fixturenames", ())
        if item.path.is_relative_to(FOLDER) and {"start", "program", "arguments"} & set(names):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _tiny_models() -> None:
    make_known()


@pytest.fixture(scope="session")
def shapes_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images to train on, 6 to validate on, in the standard layout."""
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", num_train=16, num_val=6, size=(128, 96))


@pytest.fixture(scope="session")
def arguments(shapes_set: Path) -> Callable[..., list[str]]:
    """arguments(output folder, *more): a training of 2 epochs x 3 iterations x 2 images."""

    def make(output: Path, *more: str) -> list[str]:
        settings = {
            "--data-path": shapes_set,
            "--output-dir": output,
            "--model": "tiny",
            "--weights": "none",
            "--device": "cpu",
            "--workers": 0,
            "--min-size": 64,
            "--max-size": 96,
            "--batch-size": 2,
            "--max-epochs": 2,
            "--limit-train-batches": 3,
            "--limit-val-batches": 1,
        }
        words = list(map(str, more))
        pairs = [(name, value) for name, value in settings.items() if name not in words]
        return [*(str(word) for pair in pairs for word in pair), *words]

    return make


@pytest.fixture(scope="session")
def start(arguments: Callable[..., list[str]]) -> Callable[..., int]:
    """start(output folder, *more): train in this process; the exit status."""

    def begin(output: Path, *more: str) -> int:
        return run(parse_arguments(arguments(output, *more)))

    return begin


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., int]) -> Path:
    """Output of a training that went through without a stop; not to be changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert start(output, "--checkpoint-iterations", "1") == 0
    return output


@pytest.fixture(scope="session")
def records_of() -> Callable[..., list[dict[str, Any]]]:
    """records_of(output folder, kind=None): metrics.jsonl without what depends on the clock."""

    def read(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
        lines = (output / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return [
            {name: value for name, value in record.items() if name not in TIMINGS}
            for record in records
            if kind in (None, record["kind"])
        ]

    return read


@pytest.fixture(scope="session")
def load() -> Callable[[Path], dict[str, Any]]:
    """load(file): what a checkpoint holds."""
    return lambda path: torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def same_state() -> Callable[[Any, Any], None]:
    """same_state(a, b): fails unless both hold the same, tensors bit for bit."""

    def compare(one: Any, other: Any, place: str = "") -> None:
        assert type(one) is type(other), place
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), place
        elif isinstance(one, dict):
            assert list(one) == list(other), place
            for name in one:
                compare(one[name], other[name], f"{place}/{name}")
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other), place
            for number, (left, right) in enumerate(zip(one, other, strict=True)):
                compare(left, right, f"{place}/{number}")
        else:
            assert one == other, place

    return compare


@pytest.fixture(scope="session")
def start_and_kill(start: Callable[..., int]) -> Callable[..., None]:
    """start_and_kill(iteration, output folder, *more): a training that is gone before it does this iteration."""

    def begin(iteration: int, output: Path, *more: str) -> None:
        plain = Trainer.train_step

        def train_step(self: Trainer, batches: Any) -> None:
            if self.state.progress.iteration == iteration:
                raise Killed
            plain(self, batches)

        with pytest.MonkeyPatch.context() as context:
            context.setattr(Trainer, "train_step", train_step)
            with pytest.raises(Killed):
                start(output, *more)

    return begin


@pytest.fixture(scope="session")
def program() -> Callable[..., subprocess.Popen[str]]:
    """program(script below this folder, *arguments, ranks=1, cwd=None): its processes, started as torchrun would."""

    @contextlib.contextmanager
    def begin(script: str, *words: Any, ranks: int = 1, cwd: Path | None = None) -> Iterator[list[subprocess.Popen]]:
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            port = chosen.getsockname()[1]
        started = []
        for rank in range(ranks):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1])}
            if ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            command = [sys.executable, str(FOLDER / script), *map(str, words)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, cwd=cwd, **pipes))  # type: ignore[call-overload]
        try:
            yield started
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.communicate()

    return begin
