"""The training that is killed, damaged and resumed: small, and the same bits whenever nothing disturbs it."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from checkout import ROOT
from fault_injection.tagged_processes import kill_tagged, tagged_processes

ITERATIONS_PER_EPOCH = 10
SMALL_MODEL = (
    *("fpn_channels=16", "roi_hidden_channels=32", "roi_samples_per_image=32", "rpn_nms_pre_train=100"),
    *("rpn_nms_pre_test=50", "rpn_proposals_train=60", "rpn_proposals_test=30", "detections_per_image=10"),
)
MARK = "FAULT_TEST_LIFE"
POLL_SECONDS = 0.004
PATIENCE = 300.0
"""Seconds after which a process that should have done something counts as hung."""
_FOLDERS = (str(ROOT / "scripts"), str(ROOT))

Say = Callable[[str], None]
"""Tells on stderr what has happened."""


class FaultTestError(RuntimeError):
    """The test itself cannot go on: no /proc, a training that fails without any fault."""


@dataclass(frozen=True)
class Training:
    """One way of training; every run of it must end with the same bits."""

    name: str
    processes: int
    options: tuple[str, ...]
    data: Path
    device: str
    epochs: int
    checkpoint_iterations: int
    disk_seconds: float = 0.0
    """Seconds that each fsync, link and renaming takes more: a slow disk."""

    def command(self, output: Path, *more: str, resume: bool = True) -> list[str]:
        """train.py and its arguments."""
        settings = (
            "--model faster_rcnn_r18_fpn --weights none --workers 0 --min-size 64 --max-size 96 --batch-size 1 "
            f"--limit-train-batches {ITERATIONS_PER_EPOCH} --log-interval 1 --keep-checkpoints 2 "
            f"--collective-timeout 1 --device {self.device} --max-epochs {self.epochs} "
            f"--checkpoint-iterations {self.checkpoint_iterations}"
        )
        words = ["--data-path", str(self.data), "--output-dir", str(output), *settings.split()]
        words += [word for setting in SMALL_MODEL for word in ("--model-set", setting)]
        words += ["--deterministic"] if self.device != "cpu" else []
        # Of two options of one name the later counts.
        return [str(ROOT / "train.py"), *words, *self.options, *more, *(["--resume", "auto"] if resume else [])]

    @property
    def num_iterations(self) -> int:
        return self.epochs * ITERATIONS_PER_EPOCH


@dataclass
class Position:
    """How far a run is, by what it has written."""

    iterations: int = 0
    """Training iterations in metrics.jsonl."""
    validated: int = 0
    """The iterations after which the last validation in metrics.jsonl was."""

    @property
    def in_validation(self) -> bool:
        return self.iterations > self.validated and self.iterations % ITERATIONS_PER_EPOCH == 0


def position(output: Path) -> Position:
    """Read from metrics.jsonl; a torn last line is not counted."""
    found = Position()
    try:
        text = (output / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return found
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        if line.startswith(b'{"kind": "train"'):
            found.iterations += 1
        elif line.startswith(b'{"kind": "val"'):
            found.validated = json.loads(line)["iteration"] + 1
    return found


def starts(output: Path) -> list[int]:
    """The iterations at which the run was started so far, as its config.json says."""
    try:
        return [start["iteration"] for start in json.loads((output / "config.json").read_text())["starts"]]
    except FileNotFoundError:
        return []


def newest_on_disk(output: Path, without: Collection[str] = ()) -> tuple[int, bool]:
    """(iterations, everything validated) of the checkpoint that is furthest on; (0, False) without any.

    Reads the files by itself: the program's own choice is what is tested. Files named in `without` do not count.
    """
    found = (0, False)
    for path in (output / "checkpoints").glob("*.pt"):
        if path.name in without:
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # whatever a broken file raises; files that should not be broken are found missing
            continue
        found = max(found, (int(state["iteration"]), not state["validation_due"]))
    return found


@dataclass
class Life:
    """One start of a training, up to its end, whatever that is.

    Its processes are forked from one that has imported everything: a start takes a second instead of five.
    """

    training: Training
    output: Path
    log: Path
    more: tuple[str, ...] = ()
    torchrun: bool = False
    """Several ranks are started by torchrun instead of by this program, which sees their exit statuses."""
    resume: bool = True
    file_limit: int | None = None
    """Largest file that it may write, in bytes."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = 0.0
    processes: list[BaseProcess] = field(default_factory=list)

    def start(self) -> Life:
        command = self.training.command(self.output, *self.more, resume=self.resume)
        count = self.training.processes
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        _forking()
        self.began = time.monotonic()
        if count == 1 or self.torchrun:
            agent = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
            self._fork([*agent, *command], {})
            return self
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            port = chosen.getsockname()[1]
        ranks = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        for rank in range(count):
            self._fork(command, {**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)})
        return self

    def _fork(self, words: list[str], environment: dict[str, str]) -> None:
        environment |= {MARK: self.mark, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        arguments = (words, environment, self.log, self.file_limit, self.training.disk_seconds)
        process = _forking().Process(target=_live, args=arguments)
        process.start()
        self.processes.append(process)

    @property
    def is_over(self) -> bool:
        return all(process.exitcode is not None for process in self.processes)

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Whether it happened before the training ended; FaultTestError where neither does."""
        until = time.monotonic() + PATIENCE
        while not happened():
            if self.is_over:
                return False
            if time.monotonic() > until:
                self.kill_all()
                raise FaultTestError(f"nothing happened for {PATIENCE:.0f} s; see {self.log}")
            time.sleep(POLL_SECONDS)
        return True

    def reach(self, happened: Callable[[], bool]) -> None:
        """wait_until, and FaultTestError where the training ends before."""
        if not self.wait_until(happened):
            raise FaultTestError(f"{self.training.name}: it ended before it could be disturbed\n{self.last_words()}")

    def finish(self) -> None:
        """Let it run to its end; FaultTestError where it does not get there."""
        statuses = self.wait()
        if statuses is None or any(statuses):
            raise FaultTestError(f"{self.training.name}: it ended with {statuses}:\n{self.last_words(30)}")

    def wait(self) -> list[int] | None:
        """Exit statuses; None where the training still runs after PATIENCE: it is killed then."""
        until = time.monotonic() + PATIENCE
        while not self.is_over:
            if time.monotonic() > until:
                self.kill_all()
                return None
            time.sleep(0.02)
        return [int(process.exitcode or 0) for process in self.processes]

    def rank_ids(self) -> list[int]:
        """Process ids of the ranks; empty while torchrun has not started them."""
        if len(self.processes) > 1 or self.training.processes == 1:
            return self._own_ids()
        agent, found = str(self._own_ids()[0]), []
        for pid in self.all_ids():
            with contextlib.suppress(OSError):  # ended meanwhile
                parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
                if parent == agent and "train.py" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return sorted(found)

    def loader_ids(self) -> list[int]:
        """Process ids of the loader processes of a training without torchrun."""
        return [pid for pid in self.all_ids() if pid not in self._own_ids()]

    def _own_ids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def all_ids(self) -> list[int]:
        """Process ids of everything that belongs to this life, orphans included."""
        return tagged_processes(MARK, self.mark, self._own_ids())

    def send(self, number: signal.Signals) -> None:
        """A signal to every rank."""
        for pid in self.rank_ids():
            send(pid, number)

    def kill_all(self) -> None:
        """SIGKILL to every process of this life, until none is left."""
        kill_tagged(MARK, self.mark, self._own_ids())
        for process in self.processes:
            process.join()

    def last_words(self, lines: int = 12) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@functools.cache
def _forking() -> multiprocessing.context.ForkServerContext:
    """What forks, once it has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detection.engine", "torch.utils.tensorboard", "fault_injection.training"])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*_FOLDERS, *filter(None, known)]))
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


def _live(
    words: list[str], environment: dict[str, str], log: Path, file_limit: int | None, disk_seconds: float
) -> None:
    """Be the program that `words` names, a file or a module, in a session of its own."""
    os.setsid()
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where this test runs under nohup
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if disk_seconds:
        for name in ("fsync", "link", "replace"):
            setattr(os, name, _delayed(getattr(os, name), disk_seconds))
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _delayed(call: Callable[..., object], seconds: float) -> Callable[..., object]:
    def delayed(*arguments: object, **options: object) -> object:
        time.sleep(seconds)
        return call(*arguments, **options)

    return delayed
