"""Text -> plain values, without executing anything: literals, dict(...), {...}, [...] and (...) only."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from typing import Any

from schedules.errors import Place

MAX_DEPTH = 20

_NAMES_OF_SYNTAX = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.Call: "a call",
    ast.BinOp: "arithmetic",
    ast.JoinedStr: "an f-string",
    ast.FunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.Assign: "an assignment to something other than one plain key",
}


def read_assignments(text: str, place: Place, skip: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """The `key = value` lines of a file's text as {key: plain value}; place.lines is filled.

    Keys for which `skip(key)` holds are left out, their values not looked at. Raises ScheduleError.
    """
    pairs: list[tuple[str, int, ast.expr]] = []
    for statement in _parse(text, place, "exec").body:
        match statement:
            case ast.Expr(ast.Constant(str())):
                continue  # a docstring
            case ast.Assign([ast.Name(key)], value):
                pairs.append((key, statement.lineno, value))
            case _:
                message = "a schedule holds only lines of the form key = value, and nothing in it is executed"
                raise place.error(f"{_describe(statement)} found; {message}", line=statement.lineno)
    return _mapping(pairs, place, skip)


def read_value(text: str, place: Place) -> Any:
    """One value as an override gives it; a bare word that is no literal (AdamW) stands for its text."""
    if not text.strip():
        raise place.error("no value given; write key=value with a Python literal")
    body = _parse(text.strip(), place, "eval").body
    return body.id if isinstance(body, ast.Name) else _value(body, place)


def _parse(text: str, place: Place, mode: str) -> Any:
    if "\0" in text:
        raise place.error("holds a NUL character, so it is no text; give a schedule file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes in text that is never executed
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        raise place.error(f"not readable as Python: {error.msg}", line=error.lineno) from None
    except (RecursionError, MemoryError):
        raise place.error("nested too deeply to be a schedule") from None
    except ValueError as error:
        raise place.error(f"not readable as Python: {error}") from None


def _value(node: ast.expr, place: Place) -> Any:
    if len(place.path) > MAX_DEPTH:
        raise Place(place.source, place.path[:3], place.lines).error(f"nested more than {MAX_DEPTH} deep", node.lineno)
    if place.lines is not None:
        place.lines.setdefault(place.path, node.lineno)
    match node:
        case ast.Constant(str() | int() | float() | None as value):  # bool is an int
            return value
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, ast.Constant(int() | float() as amount)) if not isinstance(
            amount, bool
        ):
            return -amount if isinstance(sign, ast.USub) else amount
        case ast.List(items) | ast.Tuple(items):
            return [_value(item, place.at(i)) for i, item in enumerate(items)]
        case ast.Dict(keys, values):
            return _mapping(
                [(_key(key, place, node), value.lineno, value) for key, value in zip(keys, values, strict=True)],
                place,
            )
        case ast.Call(ast.Name("dict"), args, keywords):
            if args or any(keyword.arg is None for keyword in keywords):
                raise place.error("dict(...) may hold only key=value", node.lineno)
            return _mapping([(str(word.arg), word.value.lineno, word.value) for word in keywords], place)
    raise place.error(
        f"{_describe(node)} found, but only numbers, text, True, False, None, lists, tuples and dict(...) "
        "are read and nothing is executed; write the value itself",
        node.lineno,
    )


def _mapping(
    pairs: list[tuple[str, int, ast.expr]], place: Place, skip: Callable[[str], bool] = lambda key: False
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    first_lines: dict[str, int] = {}
    for key, line, node in pairs:
        inner = place.at(key)
        if key in first_lines:
            raise inner.error(f"set twice, first in line {first_lines[key]}; keep one", line)
        first_lines[key] = line
        if place.lines is not None:
            place.lines[inner.path] = line
        if not skip(key):
            values[key] = _value(node, inner)
    return values


def _key(node: ast.expr | None, place: Place, holder: ast.Dict) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise place.error("every key of a dict must be a text in quotes", (node or holder).lineno)


def _describe(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return f"the name {node.id}"
    return _NAMES_OF_SYNTAX.get(type(node), f"a Python {type(node).__name__}")
