"""The shell commands of a Markdown page, and the parser of the program that each of them starts."""

import argparse
import contextlib
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = re.compile(r"^(\./)?(train\.py|scripts/[\w./-]+\.(py|sh))$")
# What stands for a value of the reader's own, and a value that a parser takes for it.
PLACEHOLDERS = {"N": "1", "X": "0.5", "KEY=VALUE": "max_epochs=3", "NAME": "1x"}


@dataclass(frozen=True)
class Command:
    """A command of a page that starts a program of this repository."""

    page: Path
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {self.program} {' '.join(self.arguments)}"


def commands_of(page: Path) -> list[Command]:
    """The commands in a page's code blocks (indented or fenced) that start train.py or something in scripts/."""
    found = []
    for line in _code_lines(page.read_text()):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an unbalanced quote: program text or output, no command
            continue
        words = _up_to_the_end(words)
        places = [number for number, word in enumerate(words) if PROGRAM.match(word)]
        if places:
            arguments = [word for word in words[places[0] + 1 :] if word != "..."]
            found.append(Command(page, words[places[0]].removeprefix("./"), tuple(arguments)))
    return found


def parser_of(program: str, arguments: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The argument parser of a Python program, as it stands when the program is started with these arguments."""
    if program == "train.py":
        from detection.config import build_parser

        return build_parser()
    file = ROOT / program
    scripts = str(file.parent)
    if scripts not in sys.path:
        sys.path.insert(0, scripts)
    spec = importlib.util.spec_from_file_location(f"documented_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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


def _code_lines(text: str) -> list[str]:
    lines, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return "\n".join(lines).replace("\\\n", " ").splitlines()


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
