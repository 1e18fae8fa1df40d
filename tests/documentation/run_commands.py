"""Runs every shell command of README.md, CONTRIBUTING.md and docs/, on small generated data. A step of .ci/run.

    python -m pytest tests/documentation/run_commands.py                    all
    python -m pytest tests/documentation/run_commands.py -k schedules.md    one page

Each page is a test. Its commands run one after the other in a folder like a fresh checkout. stand_ins.py says in what
the runs differ from the pages.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documentation.documented_commands import PAGES, ROOT, Command, commands_of
from tests.documentation.stand_ins import NoWay, program_key, way_of
from tests.documentation.tree import Trees

# Programs that leave nothing behind for the commands after them: the same command on two pages is run once.
ALONE = ("scripts/benchmark.py", "scripts/plot_schedule.py", "scripts/two_node_test.sh")
# Seconds for a command; the slowest takes about 70.
TIME_LIMIT = 400
SHOWN_LINES = 60


@dataclass
class Step:
    """A command, and what a shell runs in its place; "" where another test runs it.

    same_as: an earlier command that does the same; this one is not run.
    """

    command: Command
    text: str
    same_as: Command | None = None


def plan(pages: Sequence[Path]) -> dict[Path, list[Step]]:
    """The steps of each page in its order.

    Raises NoWay, with all of them, where stand_ins.py does not say how commands are run.
    """
    seen: dict[str, Command] = {}
    lost = []
    steps: dict[Path, list[Step]] = {page: [] for page in pages}
    for page in pages:
        commands = commands_of(page)
        for command in commands:
            try:
                text = way_of(command)
            except NoWay as error:
                lost.append(str(error))
                continue
            effect = _effect(text)
            here = f"{page} {effect}"
            steps[page].append(Step(command, text, seen.get(effect if _stands_alone(command, commands) else here)))
            if text:
                seen = {effect: command, here: command} | seen
    if lost:
        raise NoWay("\n".join(lost))
    return steps


def _effect(text: str) -> str:
    """The same text for commands that do the same: options may stand in any order, and the last of two counts."""
    start, *options = re.split(r" (?=--\w)", text.replace("python3 ", "python "))
    repeatable = ("--set", "--model-set")
    last = {option if option.startswith(repeatable) else option.split(" ")[0]: option for option in options}
    return " ".join([start, *sorted(last.values())])


def _stands_alone(command: Command, commands: Sequence[Command]) -> bool:
    """Whether no other of its page's commands needs what it leaves."""
    if program_key(command).startswith(ALONE):
        return True
    return (
        program_key(command) == "train.py"
        and not {"--output-dir", "--resume"} & set(command.words)
        and f"{command.text} --resume" not in {other.text for other in commands}
    )


def run(step: Step, folder: Path, environment: Mapping[str, str]) -> str:
    """What was wrong with the command; "" where nothing was."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    text = step.text.replace("{port}", port)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bash", "-c", text], cwd=folder, env={**environment, "SLURM_PORT": port}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIME_LIMIT)
            is_late = process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it left behind
            process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace").replace("\r", "\n")
    message = step.command.remark.removeprefix("refused:").strip()
    if is_late:
        wrong = f"not done after {TIME_LIMIT} seconds"
    elif step.command.is_refused and process.returncode == 0:
        wrong = "exit status 0, and the page says that it is refused"
    elif step.command.is_refused and message not in said:
        wrong = f"it does not say {message!r}"
    elif process.returncode and not step.command.is_refused:
        wrong = f"exit status {process.returncode}"
    else:
        return ""
    return "\n  | ".join([f"{step.command}\n  {text}\n  {wrong}", *said.splitlines()[-SHOWN_LINES:]])


@pytest.fixture(scope="session")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trees]:
    with tempfile.TemporaryDirectory(prefix="documented_commands.") as work:
        yield Trees(Path(work))


@pytest.mark.timeout(0)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_the_page_run(page: Path, trees: Trees, tmp_path: Path) -> None:
    steps = [step for step in plan(PAGES)[page] if step.text and not step.same_as]
    trees.lay_out(tmp_path / "checkout")
    failures = [run(step, tmp_path / "checkout", trees.environment) for step in steps]
    assert not any(failures), "\n".join(filter(None, failures))
