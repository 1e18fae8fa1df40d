"""The shell commands of a Markdown page, and the parser of the program that each of them starts."""

import argparse
import contextlib
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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


@dataclass(frozen=True)
class ShellCommand:
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

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Command:
    """A command of a page that starts a program of this repository."""

    page: Path
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {self.program} {' '.join(self.arguments)}"


def shell_commands_of(page: Path) -> list[ShellCommand]:
    """The page's commands in the order of its lines: those in code blocks (indented, or fenced and not Python), and
    those of a sentence's inline code.

    Inline code in a table names things, and with ... in it shows the form of a command: neither is taken.

    Raises ValueError for a line among commands that is none, so that no command is passed over.
    """
    found = []
    for first, lines in _code_blocks(page.read_text()):
        commands, others = [], []
        for line, text in _joined(first, lines):
            command, remark = _without_remark(text)
            if _starts_a_command(command):
                commands.append(ShellCommand(page, line, command, remark))
            elif command:
                others.append(f"{page.name}:{line}: {command}")
        if commands and others:
            raise ValueError(
                f"{others[0]!r} stands among commands and starts with no word of STARTERS in {Path(__file__).name}"
            )
        found += commands
    for line, paragraph in _paragraphs(page.read_text()):
        for code in INLINE_CODE.finditer(paragraph):
            text = " ".join(code[1].split())
            if " " in text and "..." not in text and _starts_a_command(text, INLINE_STARTERS):
                found.append(ShellCommand(page, line + paragraph[: code.start()].count("\n"), text))
    return sorted(found, key=lambda command: command.line)


def commands_of(page: Path) -> list[Command]:
    """Those of the page's commands that start train.py or something in scripts/, without those it shows as mistakes."""
    return [
        program_of(command) for command in shell_commands_of(page) if _program_at(command) and not command.is_refused
    ]


def program_of(command: ShellCommand) -> Command:
    """The program of this repository that the command starts, and its arguments.

    Raises ValueError where it starts none.
    """
    place = _program_at(command)
    if place is None:
        raise ValueError(f"{command} starts nothing of this repository")
    words = _up_to_the_end(command.words)
    return Command(command.page, words[place].removeprefix("./"), tuple(words[place + 1 :]))


def parser_of(program: str, arguments: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The argument parser of a Python program, as it stands when the program is started with these arguments."""
    if program == "train.py":
        from detection.config.cli import build_parser

        return build_parser()
    file = ROOT / program
    scripts = str(file.parent)
    if scripts not in sys.path:
        sys.path.insert(0, scripts)
    spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return _first_parser(module.main, list(arguments))


def with_subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and those of its sub-commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += list(action.choices.values())
    return found


def accepted(command: Command) -> None:
    """Raises ValueError where the program would refuse the command's options."""
    words = [_filled_in(word) for word in command.arguments]
    parser = parser_of(command.program, tuple(words))
    # Values of the reader's own need not exist; what is asked here is whether the words fit.
    for words_parser in with_subparsers(parser):
        words_parser.error = _refuse  # type: ignore[method-assign]
        words_parser.exit = _leave  # type: ignore[method-assign]
    with contextlib.suppress(_Left):
        parser.parse_args(words)


def _code_blocks(text: str) -> list[tuple[int, list[str]]]:
    """(number of the first line from 1, lines) of every block of code but Python's."""
    blocks: list[tuple[int, list[str]]] = []
    fence, inside = "", False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fence, inside = ("" if fence else line.strip()), False
        elif line.strip() and (fence or line.startswith("    ")) and fence != "```python":
            if not inside:
                blocks.append((number, []))
            blocks[-1][1].append(line.strip())
            inside = True
        else:
            inside = False
    return blocks


def _joined(first: int, lines: list[str]) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    goes_on = False
    for number, line in enumerate(lines, start=first):
        text = line.removesuffix("\\").rstrip()
        if goes_on:
            found[-1] = (found[-1][0], f"{found[-1][1]} {text}")
        else:
            found.append((number, text))
        goes_on = line.endswith("\\")
    return found


def _without_remark(text: str) -> tuple[str, str]:
    """The line up to a # outside quotes, and what follows it."""
    quote = ""
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and (place == 0 or text[place - 1].isspace()):
            return text[:place].strip(), text[place + 1 :].strip()
    return text.strip(), ""


def _starts_a_command(text: str, starters: set[str] = STARTERS) -> bool:
    words = text.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return bool(words) and (words[0] in starters or words[0].startswith((".venv/bin/", "./")))


def _paragraphs(text: str) -> list[tuple[int, str]]:
    """(number of the first line from 1, text) of what is neither code nor a table."""
    found: list[tuple[int, str]] = []
    fenced, inside = False, False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced, inside = not fenced, False
        elif fenced or not line.strip() or line.startswith(("    ", "|")):
            inside = False
        elif inside:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{line}")
        else:
            found.append((number, line))
            inside = True
    return found


def _program_at(command: ShellCommand) -> int | None:
    words = _up_to_the_end(command.words)
    return next((place for place, word in enumerate(words) if PROGRAM.match(word)), None)


def _up_to_the_end(words: list[str]) -> list[str]:
    ends = [number for number, word in enumerate(words) if word in ("|", "&&", ";", ">", "&", "2>&1")]
    return words[: ends[0]] if ends else words


def _filled_in(word: str) -> str:
    option, equals, value = word.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={PLACEHOLDERS.get(value, value)}"
    return PLACEHOLDERS.get(word, word)


class _Left(Exception):
    """The parser printed its help, or its version."""


class _Found(BaseException):
    """Carries a parser out of the program that made it; not to be caught by a program's own error handling."""


def _first_parser(main: object, arguments: list[str]) -> argparse.ArgumentParser:
    original = argparse.ArgumentParser.parse_args

    def give_up(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        raise _Found(self)

    argparse.ArgumentParser.parse_args = give_up  # type: ignore[method-assign, assignment]
    try:
        main(arguments)  # type: ignore[operator]
    except _Found as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    raise AssertionError("the program parsed no arguments")


def _refuse(message: str) -> None:
    raise ValueError(message)


def _leave(status: int = 0, message: str | None = None) -> None:
    raise _Left if status == 0 else ValueError(message)
