"""A configuration file of MMDetection 3.x and its base files -> the values that MMEngine's Config.fromfile gives.

The files are parsed and evaluated (schedules.reading.expressions), and never executed.
"""

from __future__ import annotations

import ast
import operator
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schedules.errors import Place, ScheduleError
from schedules.reading.expressions import Evaluator, describe, parse, path_of
from schedules.reading.values import MAX_DEPTH, SCALARS, BaseDict, BaseReference, Budget, Unread, kind_of

SOURCE = "--cfg-options"  # of what the command line sets in a configuration
MAX_BYTES = 256 * 1024  # of a file; MMDetection's longest has 29 kB
MAX_FILES = 100  # that a configuration is made of; MMDetection's have 8 at most

_RESERVED = ("filename", "text", "pretty_text", "env_variables")  # attributes of MMEngine's Config
# Both are put into the text before it is parsed, as MMEngine does. The counts are limits against hostile files.
_FILE_VARIABLE = re.compile(r"\{\{\s{0,99}(fileDirname|fileBasename|fileBasenameNoExtension|fileExtname)\s{0,99}\}\}")
_ENVIRONMENT = re.compile(r"\{\{['\"]?\s{0,9}\$(\w{1,99})\s{0,9}:\s{0,9}(\S{0,199}?)\s{0,9}['\"]?\}\}")
_REFERENCE_IN_TEXT = re.compile(r"\{\{\s*_base_\.")


def read_config(
    path: str | os.PathLike[str], wanted: Callable[[str], bool] = lambda key: True, options: Iterable[str] = ()
) -> tuple[dict[str, Any], Place]:
    """The values of the file by top-level key, and a place that knows file and line of each key.

    options: KEY=VALUE each, over what the file says (set_options). A key that is not `wanted` and cannot
    be read is Unread. Raises ScheduleError for anything else that cannot be read.
    """
    place = Place(os.fspath(path), lines={})
    reading = _Reading(wanted, {})
    try:
        whole = reading.file(Path(os.path.normpath(Path.cwd() / place.source)), place, ())
        for key in _RESERVED:
            if key in whole:
                raise place.at(key).error("is a name that MMEngine keeps for itself; take another")
        place = Place(place.source, (), reading.lines)
        values = reading.settled(whole, dict, place)
        set_options(values, place, [each for each in options if wanted(re.split("[.=]", each)[0])])
        return values, place
    except RecursionError:
        raise place.error("nested too deeply to be a configuration") from None


def read_text(path: Path, place: Place, instead: str) -> str:
    """The text of a file. Raises ScheduleError; instead: what to give where there is no file."""
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
            raise place.error(f"{what}; {instead}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise place.error(f"cannot be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise place.error(f"is larger than {MAX_BYTES} bytes, so it is no schedule or configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise place.error("is not UTF-8 text; save it as UTF-8", line) from None


@dataclass
class _Reading:
    """One configuration while it is read. lines: file and line of each key, of all files read so far."""

    wanted: Callable[[str], bool]
    lines: dict[tuple[str, ...], tuple[str, int]]
    budget: Budget = field(default_factory=Budget)
    num_files: int = 0

    def file(self, path: Path, place: Place, above: tuple[Path, ...]) -> BaseDict:
        """What the file at the absolute `path` and its base files say. above: the files that inherit from it."""
        self.num_files += 1
        if path in above:
            raise place.error("inherits from itself: " + " -> ".join(map(str, [*above[above.index(path) :], path])))
        if self.num_files > MAX_FILES:
            raise place.error(f"the {MAX_FILES + 1}th file of one configuration; a configuration has fewer")
        if path.suffix != ".py":
            raise place.error("is no .py file, and configurations in JSON or YAML are not read; write it in Python")
        text = read_text(path, place, "give a configuration file")
        tree = parse(_with_variables(text, path, place), place)
        _refuse_new_style(tree, place)
        base = self._base(tree, path, place, (*above, path))
        names: dict[str, Any] = {"_base_": base}
        for statement in tree.body:
            if not _is_base_line(statement):
                self._run(statement, names, place)
        own = {key: value for key, value in names.items() if key != "_base_" and not key.startswith("__")}
        own.pop("_deprecation_", None)
        merged = self.settled(own, dict, place, base)
        merged = self._merged(merged, base, place)
        self.lines.update(place.lines or {})
        return self.settled(merged, BaseDict, place)

    def _base(self, tree: ast.Module, path: Path, place: Place, above: tuple[Path, ...]) -> BaseDict:
        """The values of all base files together."""
        lines = [each for each in tree.body if isinstance(each, ast.Assign) and _is_base_line(each)]
        result = BaseDict()
        if not lines:
            return result
        at_base = place.at("_base_")
        at_base.mark(lines[0].lineno)
        if len(lines) > 1:
            raise at_base.error(f"set twice, first in line {lines[0].lineno}; keep one", lines[1].lineno)
        names = Evaluator({}, self.budget).value(lines[0].value, at_base)
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str):
                raise at_base.error("must be the name of a file, or a list of such names")
            if "::" in name:
                raise at_base.error(f"{name!r} is a file of another package; give the path of that file")
            file = Path(os.path.normpath(path.parent / name))
            if not file.is_file():
                message = f"there is no file {name!r} beside this one; give its path, or make this one flat file"
                raise at_base.error(f"{message} that says everything")
            source = os.path.normpath(Path(place.source).parent / name)
            values = self.file(file, Place(source, lines={}), above)
            if twice := values.keys() & result.keys():
                key = min(twice)
                raise at_base.error(f"two of the base files set {key}; a key may be in one of them")
            result.update(values)
        return result

    def _run(self, statement: ast.stmt, names: dict[str, Any], place: Place) -> None:
        """One line of a file."""
        targets: list[ast.expr] = []
        match statement:
            case ast.Expr(ast.Constant(str())):
                return  # a docstring
            case ast.Assign():
                targets = statement.targets
            case ast.Delete():
                targets = statement.targets
            case ast.Expr(ast.Call() as call):
                targets = [call]
            case _:
                message = "a configuration sets keys (key = value), and nothing in it is executed"
                raise place.error(f"{describe(statement)} found; {message}", statement.lineno)
        root, *keys = path_of(targets[0])
        holder: dict[str, Any] = names
        if root == "_base_" and keys:
            holder, root = names["_base_"], keys.pop(0)
        inner = Place(place.source, (root, *keys), place.lines)
        try:
            self._change(statement, targets, names, inner)
        except ScheduleError as error:
            if not root or self.wanted(root):
                raise
            holder[root] = Unread(error)

    def _change(self, statement: ast.stmt, targets: list[ast.expr], names: dict[str, Any], place: Place) -> None:
        evaluator = Evaluator(names, self.budget)
        if isinstance(statement, ast.Expr):
            evaluator.value(statement.value, place)
            return
        if isinstance(statement, ast.Assign):
            place.mark(statement.lineno)
            value = evaluator.value(statement.value, place)
        for target in targets:
            match target:
                case ast.Attribute(holder_node, name):
                    holder, key = evaluator.value(holder_node, place), name
                    evaluator.require_attribute(holder, name, target, place)
                case ast.Subscript(holder_node, index):
                    holder, key = evaluator.value(holder_node, place), evaluator.index(index, place)
                    if not isinstance(holder, (dict, list)) or isinstance(key, slice):
                        raise place.error(f"{describe(target)} cannot be set or deleted here", target.lineno)
                case ast.Name(name) if isinstance(statement, ast.Delete) and name != "_base_":
                    holder, key = names, name
                case _ if isinstance(statement, ast.Assign):
                    evaluator.bind(target, value, names, place)
                    continue
                case _:
                    raise place.error(f"{describe(target)} cannot be deleted", target.lineno)
            if isinstance(statement, ast.Delete):
                evaluator.attempt(operator.delitem, target, place, holder, key)
            else:
                kept = evaluator.put(value, place) if isinstance(holder, BaseDict) else value
                evaluator.attempt(operator.setitem, target, place, holder, key, kept)

    def _merged(self, own: dict[Any, Any], base: dict[Any, Any], place: Place) -> dict[Any, Any]:
        """A file's values over those of its base files."""
        result = dict(base)
        for key, value in own.items():
            if isinstance(value, dict) and key in result and not value.pop("_delete_", False):
                if isinstance(result[key], dict):
                    result[key] = self._merged(value, result[key], place.at(key))
                elif not isinstance(result[key], Unread):
                    message = "is a dict here and none in the base files; set _delete_=True in it to replace theirs"
                    error = place.at(key).error(message)
                    if self.wanted((*place.path, key)[0]):
                        raise error
                    result[key] = Unread(error)
            else:
                result[key] = value
        return result

    def settled(self, value: Any, kind: type[dict[Any, Any]], place: Place, base: dict[str, Any] | None = None) -> Any:
        """A copy in which no list or dict is in two places, and each dict is of that kind.

        base: what references to base files stand for.
        """
        self.budget.spend(len(value) if isinstance(value, (dict, list, tuple)) else 1, place)
        if len(place.path) > MAX_DEPTH:
            raise Place(place.source, place.path[:3], place.lines).error(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            return kind({key: self._settled_item(key, item, kind, place, base) for key, item in value.items()})
        if type(value) in (list, tuple):
            return type(value)([self._settled_item(i, item, kind, place, base) for i, item in enumerate(value)])
        if isinstance(value, BaseReference) and base is not None:
            found: Any = base
            for key in value.keys:
                if not isinstance(found, dict) or key not in found:
                    raise place.error(f"the base files have no {'.'.join(value.keys)}")
                found = found[key]
            return found
        if isinstance(value, Unread):
            raise value.error
        if isinstance(value, (str, bool, int, float, type(None), set)):
            return value
        raise place.error(f"a {kind_of(value)}, which no configuration can hold; write the value itself")

    def _settled_item(
        self, key: Any, value: Any, kind: type[dict[Any, Any]], place: Place, base: dict[str, Any] | None
    ) -> Any:
        if isinstance(value, SCALARS):
            return value
        if place.path:
            return self.settled(value, kind, place.at(key), base)
        try:
            return self.settled(value, kind, place.at(key), base)
        except ScheduleError as error:
            if self.wanted(key):
                raise
            return Unread(error)


def _is_base_line(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "_base_"


def _with_variables(text: str, path: Path, place: Place) -> str:
    """The text with {{fileBasename}} and the like, and {{$NAME:default}} of the environment, filled in."""
    of_file = {
        "fileDirname": str(path.parent),
        "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem,
        "fileExtname": path.suffix,
    }

    def environment(match: re.Match[str]) -> str:
        if not (value := os.environ.get(match[1], match[2])):
            line = text.count("\n", 0, match.start()) + 1
            raise place.error(f"the environment has no {match[1]}; set it, or write a default behind the colon", line)
        return value

    text = _FILE_VARIABLE.sub(lambda match: of_file[match[1]], text)
    return _ENVIRONMENT.sub(environment, text)


def _refuse_new_style(tree: ast.Module, place: Place) -> None:
    """Configurations that import their base files, and what no reader can know: references inside a text."""
    imports: list[str] = []
    first_line = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and not first_line:
            first_line = node.lineno
        if isinstance(node, ast.ImportFrom) and (node.level or ".configs." in f".{node.module}"):
            first_line = first_line or node.lineno
            up = "../" * (node.level - 1) or "./" * node.level
            imports.append(f"{up}{(node.module or '').replace('.', '/')}.py")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _REFERENCE_IN_TEXT.search(node.value):
            raise place.error("{{_base_...}} inside a text; write it without quotes, or use an f-string", node.lineno)
    if first_line:
        bases = ", ".join(map(repr, imports)) or "'the/base/file.py'"
        message = "is a new-style configuration, which only Python itself could read: write it in the old style, "
        message += f"beginning with _base_ = [{bases}] in place of the imports, and each type as text (type='ResNet')"
        raise place.error(message, first_line)


def set_options(values: dict[str, Any], place: Place, options: Iterable[str]) -> None:
    """Put each KEY=VALUE into `values` in place; KEY is dotted, and a place in a list is a number.

    A value is written as MMDetection takes it: a number, true, false, None, text, or a list 1,2,3 or [1,2] or (1,2), in
    which may be others. place: of the values; it learns that the key comes from the command line. Raises ScheduleError.
    """
    for option in options:
        key, equals, text = option.partition("=")
        at_option = Place(SOURCE, tuple(key.split(".")), {})
        if not equals or not all(at_option.path):
            raise ScheduleError(
                f"{SOURCE} {option}: write it as KEY=VALUE, e.g. {SOURCE} train_dataloader.batch_size=4"
            )
        if len(at_option.path) > MAX_DEPTH:
            raise Place(SOURCE, at_option.path[:3]).error(f"nested more than {MAX_DEPTH} deep")
        first_new = _put(values, at_option, _value(text.strip(), at_option))
        if place.lines is not None:
            for path in [path for path in place.lines if path[: len(at_option.path)] == at_option.path]:
                del place.lines[path]
            for length in range(first_new + 1, len(at_option.path) + 1):
                place.lines[at_option.path[:length]] = SOURCE, 0


def _put(values: dict[str, Any], place: Place, value: Any) -> int:
    """Returns how many keys of the path there were before; the last one always counts as new."""
    holder: Any = values
    there = 0
    for number, key in enumerate(place.path):
        last = number == len(place.path) - 1
        index: Any = key
        if isinstance(holder, list):
            if not (key.isascii() and key.isdecimal() and len(key) < 6 and int(key) < len(holder)):
                raise place.error(f"{key!r} is no place in a list of {len(holder)}; give 0 to {len(holder) - 1}")
            index = int(key)
        elif not isinstance(holder, dict):
            above = ".".join(place.path[:number])
            raise place.error(f"{above} is neither a dict nor a list, so nothing in it can be set; set {above} itself")
        if last:
            holder[index] = value
        elif isinstance(holder, dict):
            there += key in holder
            holder = holder.setdefault(index, {})
        else:
            there += 1
            holder = holder[index]
    return there


def _value(text: str, place: Place, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise place.error(f"nested more than {MAX_DEPTH} deep")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    is_tuple = text.startswith("(") and text.endswith(")")
    is_list = text.startswith("[") and text.endswith("]")
    inside = text[1:-1] if is_tuple or is_list else text
    parts = _parts(inside, place)
    if is_tuple or is_list or len(parts) > 1:
        items = [_value(part.strip(), place, depth + 1) for part in parts if part.strip()]
        return tuple(items) if is_tuple else items
    if text == "None" or text.lower() in ("true", "false"):
        return None if text == "None" else text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _parts(text: str, place: Place) -> list[str]:
    """The text between the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
        if depth < 0:
            break
    if depth:
        raise place.error(f"{text[:40]} has a bracket without the other one")
    return parts
