"""Runs every shell command of README.md and docs/, on small generated data, and says which of them fail.

    python tests/documentation/run_commands.py                      all; a step of .ci/run
    python tests/documentation/run_commands.py schedules.md         the pages whose names end so
    python tests/documentation/run_commands.py --list               how each would be run

The commands of a page run one after the other in a folder like a fresh checkout, several pages at a time. In what the
runs differ from the pages is said in stand_ins.py. Exit status 1: a command failed, or has no way to be run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.documentation.documented_commands import ROOT, ShellCommand, shell_commands_of
from tests.documentation.stand_ins import NoWay, Way, is_done_elsewhere, missing_extras, program_key, way_of
from tests.documentation.tree import Trees

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Programs that leave nothing behind for the commands after them: the same command on two pages is run once.
ALONE = ("scripts/benchmark.py", "scripts/plot_schedule.py", "scripts/two_node_test.sh")
# Seconds for a command; the slowest takes about 70.
TIME_LIMIT = 400
SHOWN_LINES = 60


@dataclass
class Step:
    """A command and how it is run. same_as: it is run already, there."""

    command: ShellCommand
    way: Way
    same_as: ShellCommand | None = None


@dataclass
class Outcome:
    """What came of a step. seconds: wall clock and CPU. failure: "" where there is none."""

    step: Step
    seconds: float
    cpu_seconds: float
    failure: str


def plan(pages: Sequence[Path]) -> list[list[Step]]:
    """The steps of each page in its order.

    Raises NoWay, with all of them, where commands have no way to be run.
    """
    seen: dict[str, ShellCommand] = {}
    steps, lost = [], []
    for page in pages:
        # What fetches COCO comes first: a page may speak of training before it.
        commands = sorted(shell_commands_of(page), key=lambda command: "download_coco.py" not in command.text)
        steps.append([])
        for command in commands:
            try:
                way = way_of(command)
            except NoWay as error:
                lost.append(str(error))
                continue
            anywhere = _in_effect(way.text)
            on_this_page = f"{page} {anywhere}"
            same_as = None
            if way.kind not in ("elsewhere", "extras"):
                same_as = seen.get(anywhere if _stands_alone(command, commands) else on_this_page)
                seen.setdefault(anywhere, command)
                seen.setdefault(on_this_page, command)
            steps[-1].append(Step(command, way, same_as))
    if lost:
        raise NoWay("\n".join(lost))
    return steps


def _in_effect(text: str) -> str:
    """The text, equal for two that do the same: options in any order, and for benchmarks each at its last value."""
    words = text.replace("python3 ", "python ").split()
    if "scripts/benchmark.py" not in words:
        return " ".join(sorted(words))
    options: dict[str, list[str]] = {"": []}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word
            options[name] = []
        else:
            options[name].append(word)
    return repr(sorted(options.items()))


def _stands_alone(command: ShellCommand, commands: Sequence[ShellCommand]) -> bool:
    """Whether no other of its page's commands needs what it leaves."""
    if program_key(command).startswith(ALONE):
        return True
    return (
        program_key(command) == "train.py"
        and not {"--output-dir", "--resume"} & set(command.words)
        and f"{command.text} --resume" not in {other.text for other in commands}
    )


class Runner:
    """Runs the steps of pages, and stops what it started."""

    def __init__(self, trees: Trees) -> None:
        self._trees = trees
        self._printing = threading.Lock()
        self._running: set[Process] = set()
        self._is_stopped = False

    def run_page(self, steps: list[Step]) -> list[Outcome]:
        """The outcomes of a page's steps; those after a failure are run all the same."""
        if not steps:
            return []
        page = steps[0].command.place.partition(":")[0]
        with_coco = not any("download_coco.py" in step.command.text for step in steps)
        folder = self._trees.of_page(page.replace("/", "_"), with_coco=with_coco)
        outcomes = [self._run_step(step, folder) for step in steps if not self._is_stopped]
        if not any(outcome.failure for outcome in outcomes):
            shutil.rmtree(folder)
        return outcomes

    def stop(self) -> None:
        """Kills what is running, and starts nothing more."""
        self._is_stopped = True
        for process in list(self._running):
            process.stop(signal.SIGKILL)

    def _run_step(self, step: Step, folder: Path) -> Outcome:
        way, command = step.way, step.command
        start, cpu_seconds, failure = time.monotonic(), 0.0, ""
        if step.same_as is not None:
            pass
        elif way.kind == "elsewhere":
            failure = "" if is_done_elsewhere(way) else f"{way.file} does not hold {way.text!r}"
        elif way.kind == "extras":
            missing = missing_extras(command)
            failure = f"setup.cfg has no extra {', '.join(sorted(missing))}" if missing else ""
        else:
            text = way.text.replace("{port}", str(_free_port())).replace("{coco_port}", str(self._trees.coco_port))
            processes = [Process(text, folder, self._environment()) for _ in range(2 if way.kind == "twice" else 1)]
            self._running.update(processes)
            answer = _asked(text, processes[0]) if way.kind == "serve" else ""
            # Each is waited for, also after another's failure.
            failures = [process.failure(command.remark if command.is_refused else "") for process in processes]
            failure = "\n".join(filter(None, failures)) if way.kind != "serve" else answer and answer + failures[0]
            self._running.difference_update(processes)
            cpu_seconds = sum(process.cpu_seconds for process in processes)
        outcome = Outcome(step, time.monotonic() - start, cpu_seconds, failure)
        with self._printing:
            print(_line(outcome), flush=True)
            if failure:
                print(f"  {way.text}\n{failure}\n  (in {folder})", flush=True)
        return outcome

    def _environment(self) -> dict[str, str]:
        return self._trees.environment | {"SLURM_PORT": str(_free_port())}


class Process:
    """A command in a shell, with everything that it starts in one group."""

    def __init__(self, text: str, folder: Path, environment: dict[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the object)
        self._process = subprocess.Popen(
            ["bash", "-c", text], cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._is_late = False
        self.cpu_seconds = 0.0

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal to everything that the command started."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def failure(self, expected: str = "") -> str:
        """Waits for the end, and says what was wrong with it; "" where nothing was.

        expected: "refused: MESSAGE", where it must fail, with that message.
        """
        timer = threading.Timer(TIME_LIMIT, self._give_up)
        timer.start()
        # wait4 counts the CPU time of everything that was started and waited for.
        _, status, usage = os.wait4(self._process.pid, 0)
        timer.cancel()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.stop(signal.SIGKILL)  # what it left behind
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        message = expected.removeprefix("refused:").strip()
        if self._is_late:
            return f"  not done after {TIME_LIMIT} seconds\n{self._tail()}"
        if not expected:
            return f"  exit status {self._process.returncode}\n{self._tail()}" if self._process.returncode else ""
        if self._process.returncode == 0:
            return f"  exit status 0, and the page says that it is refused\n{self._tail()}"
        return "" if message in self._text() else f"  it does not say {message!r}\n{self._tail()}"

    def has_ended(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _give_up(self) -> None:
        self._is_late = True
        self.stop(signal.SIGKILL)

    def _text(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace").replace("\r", "\n")

    def _tail(self) -> str:
        return "\n".join(f"  | {line}" for line in self._text().splitlines()[-SHOWN_LINES:])


def _asked(text: str, server: Process) -> str:
    """What is wrong with TensorBoard's pages, which the text's last word is the port of; the server is stopped."""
    address = f"http://127.0.0.1:{text.split()[-1]}/data/runs"
    until = time.monotonic() + 60
    answer = b""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not answer.startswith(b'["') and time.monotonic() < until and not server.has_ended():
        time.sleep(0.2)
        try:
            with opener.open(address, timeout=10) as page:
                answer = page.read()
        except OSError:
            continue  # not up yet
    server.stop(signal.SIGKILL)
    # A list of the runs' names.
    return "" if answer.startswith(b'["') else f"  {address} showed no run, but {answer[:200]!r}\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _line(outcome: Outcome) -> str:
    step = outcome.step
    text = step.command.text if len(step.command.text) < 90 else f"{step.command.text[:87]}..."
    note = ""
    if step.same_as is not None:
        note = f"  [as {step.same_as.place}]"
    elif step.way.kind == "elsewhere":
        note = f"  [run by {step.way.file}]"
    elif step.way.reason:
        note = f"  [{step.way.reason}]"
    state = "FAILED" if outcome.failure else "ok"
    return f"{state:6s} {outcome.seconds:6.1f} {outcome.cpu_seconds:6.1f}  {step.command.place:44s} {text}{note}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="ends of pages' names (default: all)")
    parser.add_argument("--list", action="store_true", help="print how each command would be run")
    # Commands that wait (for a time limit, a network) leave the cores to another page's.
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="pages at a time [cores + 1]")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="an empty folder, which stays [temporary]")
    arguments = parser.parse_args(argv)
    chosen = [page for page in PAGES if str(page).endswith(tuple(arguments.pages or [""]))]
    if not chosen:
        parser.error(f"no page ends in {' or '.join(arguments.pages)}")
    try:
        steps = plan(chosen)
    except (NoWay, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.list:
        for step in (step for page in steps for step in page):
            how = f"as {step.same_as.place}" if step.same_as else f"{step.way.kind}: {step.way.text}"
            print(f"{step.command}\n    {how}" + (f"  ({step.way.reason})" if step.way.reason else ""))
        return 0
    start = time.monotonic()
    work = arguments.work_dir or Path(tempfile.mkdtemp(prefix="documented_commands."))
    work.mkdir(parents=True, exist_ok=True)
    runner = Runner(Trees(work.resolve()))
    print(f"laid out in {time.monotonic() - start:.0f} s; state, seconds, CPU-seconds, place, command:", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        # Longest first, so that none is left over at the end.
        pages = sorted(steps, key=_weight, reverse=True)
        try:
            outcomes = [outcome for page in pool.map(runner.run_page, pages) for outcome in page]
        except BaseException:  # Ctrl-C, SIGTERM
            runner.stop()
            raise
    outcomes.sort(key=lambda outcome: (outcome.step.command.place.partition(":")[0], outcome.step.command.line))
    print(_summary(outcomes, time.monotonic() - start))
    failed = [outcome for outcome in outcomes if outcome.failure]
    if failed:
        print("\n".join(f"FAILED {outcome.step.command}\n{outcome.failure}" for outcome in failed), file=sys.stderr)
    elif arguments.work_dir is None:
        shutil.rmtree(work)
    return 1 if failed else 0


def _weight(steps: list[Step]) -> int:
    """Roughly the processes that the steps start one after the other."""
    weights = {"scripts/two_node_test.sh": 10, "scripts/benchmark.py train": 2}
    return sum(
        0 if step.same_as or step.way.kind in ("elsewhere", "extras")
        else weights.get(program_key(step.command), 2 if "torchrun" in step.way.text else 1)
        for step in steps
    )  # fmt: skip


def _summary(outcomes: list[Outcome], seconds: float) -> str:
    kinds = [("same" if o.step.same_as else o.step.way.kind) for o in outcomes]
    not_run = sum(kind in ("elsewhere", "extras") for kind in kinds)
    return "\n".join(
        [
            *("", "state   wall    CPU  place, command"),
            *map(_line, outcomes),
            "",
            f"{len(kinds)} commands on {len({o.step.command.page for o in outcomes})} pages: "
            f"{len(kinds) - not_run - kinds.count('same')} run, {kinds.count('same')} the same as one of these, "
            f"{not_run} not run here; {sum(bool(o.failure) for o in outcomes)} failed. "
            f"{seconds:.0f} seconds, {sum(o.cpu_seconds for o in outcomes):.0f} CPU-seconds.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
