"""The shell commands and Python blocks of a Markdown page, and the parser of the program that a command starts."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile, groupby, takewhile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROGRAM = re.compile(r"^(\./)?(train\.py|scripts/[\w./-]+\.(py|sh))$")
# What stands for a value of the reader's own, and a value that a parser takes for it.
PLACEHOLDERS = {"N": "1", "X": "0.5", "KEY=VALUE": "max_epochs=3", "NAME": "1x"}
# First words by which a line is a command. A block of code with a command in it holds nothing else but remarks.
STARTERS = {
    *("python", "python3", "torchrun", "bash", "sh", "source", "tensorboard", "pip", "sbatch", "srun", "scontrol"),
    *("git", "docker", "cd", "ls", "cp", "mv", "ln", "mkdir", "export", "wget", "curl", "tar", "unzip", "ssh", "scp"),
    *("nohup", "sudo", "apt-get", "conda", "uv", "make"),
}
# The same for inline code, which also holds names of other programs' commands.
INLINE_STARTERS = {"python", "python3", "torchrun", "bash", "tensorboard", "pip", "sbatch"}
INLINE_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# A line up to a # outside quotes, and what follows it.
REMARK = re.compile(r"""((?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)#)*)(?:#(.*))?""")


@dataclass(frozen=True)
class Command:
    """A line of a page that a reader pastes into a shell.

    line: where it starts, from 1. text: lines that a backslash joins are joined, the remark at the end is off.
    remark: what follows the #.
    """

    page: Path
    line: int
    text: str
    remark: str = ""

    @property
    def place(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else Path(self.page.name)
        return f"{page}:{self.line}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def is_refused(self) -> bool:
        """Whether the page shows it as a mistake: "refused: MESSAGE" is its remark."""
        return self.remark.startswith("refused:")

    @property
    def program(self) -> str:
        """The program of this repository that it starts (train.py or something in scripts/); "" where none."""
        return next((word.removeprefix("./") for word in self.words if PROGRAM.match(word)), "")

    @property
    def arguments(self) -> tuple[str, ...]:
        """The program's, up to a pipe, a redirection or another command."""
        words = dropwhile(lambda word: not PROGRAM.match(word), self.words)
        return tuple(takewhile(lambda word: word not in ("|", "&&", ";", ">", "&", "2>&1"), words))[1:]

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def blocks_of(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(number of the first line from 1, kind, lines) of the page's blocks.

    Kinds: "python" and "code" (other fenced and indented lines), "table", "text".
    """
    fence, kinds, lines = "", [], page.read_text().splitlines()
    for line in lines:
        if line.lstrip().startswith("```"):
            fence = "" if fence else "python" if line.strip() == "```python" else "code"
            kinds.append("")
        elif fence or not line.strip():
            kinds.append(fence)
        else:
            kinds.append("code" if line.startswith("    ") else "table" if line.startswith("|") else "text")
    for kind, group in groupby(range(len(lines)), key=kinds.__getitem__):
        numbers = list(group)
        if kind:
            yield numbers[0] + 1, kind, [lines[number] for number in numbers]


def commands_of(page: Path) -> list[Command]:
    """The page's commands in the order of its lines: those in code blocks, and those of a sentence's inline code.

    Inline code in a table names things, and with ... in it shows the form of a command: neither is taken.

    Raises ValueError for a line among commands that is none, so that no command is passed over.
    """
    found = []
    for first, kind, lines in blocks_of(page):
        if kind == "text":
            text = "\n".join(lines)
            for code in INLINE_CODE.finditer(text):
                inline = " ".join(code[1].split())
                if " " in inline and "..." not in inline and _starts_a_command(inline, INLINE_STARTERS):
                    found.append(Command(page, first + text[: code.start()].count("\n"), inline))
        elif kind == "code":
            commands, others = [], []
            text = "\n".join(lines)
            for whole in re.finditer(r"(?:.*\\\n)*.+", text):  # a backslash at a line's end goes on in the next
                line = first + text.count("\n", 0, whole.start())
                parts = REMARK.match(re.sub(r"\s*\\\n\s*", " ", whole[0].strip()))
                assert parts is not None
                command = Command(page, line, parts[1].strip(), (parts[2] or "").strip())
                if _starts_a_command(command.text, STARTERS):
                    commands.append(command)
                elif command.text:
                    others.append(f"{page.name}:{line}: {command.text}")
            if commands and others:
                raise ValueError(
                    f"{others[0]!r} stands among commands and starts with no word of STARTERS in {Path(__file__).name}"
                )
            found += commands
    return found


def _starts_a_command(text: str, starters: set[str]) -> bool:
    word = re.sub(r"^([A-Z_]+=\S* )*", "", text).partition(" ")[0]
    return word in starters or word.startswith((".venv/bin/", "./"))


class _Found(BaseException):
    """Carries a parser out of the program that made it; not to be caught by a program's own error handling."""


def parser_of(program: str, arguments: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The argument parser of a Python program, as it stands when the program is started with these arguments."""
    if program == "train.py":
        from detection.config.cli import build_parser

        return build_parser()
    if str(folder := (ROOT / program).parent) not in sys.path:
        sys.path.insert(0, str(folder))
    module = importlib.import_module(Path(program).stem)

    def give_up(self: argparse.ArgumentParser, *_: object) -> None:
        raise _Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", give_up):
        try:
            module.main(list(arguments))
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{program} parsed no arguments")


def check_options(command: Command) -> None:
    """Raises ValueError where the program would refuse the command's options."""
    words = []
    for word in command.arguments:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(option + equals + PLACEHOLDERS.get(value, value))
    # Values of the reader's own need not exist; what is asked here is whether the words fit.
    parser, said = parser_of(command.program, tuple(words)), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            parser.parse_args(words)
        except SystemExit as end:
            if end.code:
                raise ValueError(said.getvalue()) from None
