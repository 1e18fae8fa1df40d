"""Text -> plain values, without executing anything: literals, dict(...), {...}, [...] and (...) only."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from schedules.errors import ScheduleError

MAX_BYTES = 256 * 1024  # the longest schedules of MMDetection have some 3 kB
MAX_DEPTH = 20

Path = tuple[str, ...]


def dotted(path: Path) -> str:
    """The path as messages and overrides write it: param_scheduler.1.milestones."""
    return ".".join(path)


@dataclass
class Origin:
    """Where values came from, so that a message can name file, line and key."""

    name: str
    lines: dict[Path, int] = field(default_factory=dict)
    has_lines: bool = True  # False for a value of the command line

    def error(self, message: str, path: Path = (), line: int | None = None) -> ScheduleError:
        known = path
        while line is None and known:
            line = self.lines.get(known)
            known = known[:-1]
        where = self.name + (f", line {line}" if line is not None and self.has_lines else "")
        return ScheduleError(f"{where}: {dotted(path)}: {message}" if path else f"{where}: {message}")


def read_assignments(text: str, origin: Origin, skip: Callable[[str], bool] = lambda key: False) -> dict[str, Any]:
    """The `key = value` lines of a schedule's text as {key: plain value}; origin.lines is filled.

    Keys for which `skip(key)` holds are passed over, their values not looked at. Raises ScheduleError.
    """
    values: dict[str, Any] = {}
    for statement in _parse(text, origin, "exec").body:
        if isinstance(statement, ast.Expr) and _is_text(statement.value):
            continue  # a docstring
        if (
            not isinstance(statement, ast.Assign)
            or len(statement.targets) != 1
            or not isinstance(statement.targets[0], ast.Name)
        ):
            raise origin.error(
                f"{_describe(statement)} found; a schedule holds only lines of the form key = value, and "
                "nothing in it is executed",
                line=statement.lineno,
            )
        key = statement.targets[0].id
        if (key,) in origin.lines:
            raise origin.error(
                f"set twice, first in line {origin.lines[(key,)]}; keep one", (key,), line=statement.lineno
            )
        origin.lines[(key,)] = statement.lineno
        if not skip(key):
            values[key] = _value(statement.value, (key,), origin, 0)
    return values


def read_value(text: str, origin: Origin, path: Path) -> Any:
    """One value as an override gives it; a bare word that is no literal (AdamW) stands for its text."""
    if not text.strip():
        raise origin.error("no value given; write key=value with a Python literal", path)
    tree = _parse(text.strip(), origin, "eval", path)
    if isinstance(tree.body, ast.Name):
        return tree.body.id
    return _value(tree.body, path, origin, 0)


def _parse(text: str, origin: Origin, mode: str, path: Path = ()) -> Any:
    if "\0" in text:
        raise origin.error("holds a NUL character, so it is no text; give a schedule file", path)
    if len(text) > MAX_BYTES:
        raise origin.error(f"is longer than {MAX_BYTES} characters, so it is no schedule", path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes in text that is never executed
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        line = error.lineno if mode == "exec" else None
        raise origin.error(f"not readable as Python: {error.msg}", path, line=line) from None
    except (RecursionError, MemoryError):
        raise origin.error("nested too deeply to be a schedule", path) from None
    except ValueError as error:
        raise origin.error(f"not readable as Python: {error}", path) from None


def _value(node: ast.expr, path: Path, origin: Origin, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise origin.error(f"nested more than {MAX_DEPTH} deep", path[:3], line=node.lineno)
    origin.lines.setdefault(path, node.lineno)
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value  # bool is an int
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        amount = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(amount, (int, float)) and not isinstance(amount, bool):
            return -amount if isinstance(node.op, ast.USub) else amount
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, (*path, str(i)), origin, depth + 1) for i, item in enumerate(node.elts)]
    if isinstance(node, ast.Dict):
        pairs = [
            (_key(key, path, origin, node.lineno), value) for key, value in zip(node.keys, node.values, strict=True)
        ]
        return _mapping(pairs, path, origin, depth)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        if node.args or any(keyword.arg is None for keyword in node.keywords):
            raise origin.error("dict(...) may hold only key=value", path, line=node.lineno)
        return _mapping([(k.arg, k.value) for k in node.keywords if k.arg is not None], path, origin, depth)
    raise origin.error(
        f"{_describe(node)} found, but only numbers, text, True, False, None, lists, tuples and dict(...) "
        "are read and nothing is executed; write the value itself",
        path,
        line=node.lineno,
    )


def _mapping(pairs: list[tuple[str, ast.expr]], path: Path, origin: Origin, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, node in pairs:
        inner = (*path, key)
        if key in values:
            raise origin.error(f"set twice, first in line {origin.lines[inner]}; keep one", inner, line=node.lineno)
        values[key] = _value(node, inner, origin, depth + 1)
    return values


def _key(node: ast.expr | None, path: Path, origin: Origin, line: int) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise origin.error("every key of a dict must be a text in quotes", path, line=node.lineno if node else line)
    return node.value


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _describe(node: ast.AST) -> str:
    names: dict[type, str] = {
        ast.Import: "an import",
        ast.ImportFrom: "an import",
        ast.Name: f"the name {getattr(node, 'id', '')}",
        ast.Call: "a call",
        ast.BinOp: "arithmetic",
        ast.JoinedStr: "an f-string",
        ast.FunctionDef: "a function",
        ast.ClassDef: "a class",
        ast.Assign: "an assignment to something other than one plain key",
    }
    return names.get(type(node), f"a Python {type(node).__name__}")
