"""Python expressions -> plain values, evaluated node by node over the syntax tree: no code of a file ever runs."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from schedules.errors import Place
from schedules.reading.values import MAX_DEPTH, SCALARS, BaseDict, BaseReference, Budget, Pass, Unread, kind_of

MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 99  # in the format of an f-string

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"len": len, "range": range, "enumerate": enumerate}
_CONVERSIONS: dict[int, Callable[[Any], str]] = {ord("s"): str, ord("r"): repr, ord("a"): ascii}  # of f-strings: {x!r}
_NAMES_OF_SYNTAX = {
    ast.Import: "an import",
    ast.ImportFrom: "an import",
    ast.Call: "a call",
    ast.BinOp: "arithmetic",
    ast.JoinedStr: "an f-string",
    ast.FunctionDef: "a function",
    ast.Lambda: "a function",
    ast.ClassDef: "a class",
    ast.If: "a condition",
    ast.IfExp: "a condition",
    ast.Compare: "a comparison",
    ast.For: "a loop",
    ast.AugAssign: "+= or the like",
    ast.Assign: "an assignment to something other than one plain key",
}
_WITHOUT_NAMES = (
    "but only numbers, text, True, False, None, lists, tuples and dict(...) are read and nothing is executed"
)


def parse(text: str, place: Place, mode: str = "exec") -> Any:
    """The syntax tree. Raises ScheduleError."""
    if "\0" in text:
        raise place.error("holds a NUL character, so it is no text; give a text file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes in text that is never executed
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        raise place.error(f"not readable as Python: {error.msg}", line=error.lineno) from None
    except (RecursionError, MemoryError):
        raise place.error("nested too deeply to be read") from None
    except ValueError as error:
        raise place.error(f"not readable as Python: {error}") from None


def read_assignments(tree: ast.Module, place: Place) -> dict[str, Any]:
    """The `key = value` lines of a file of literals as {key: plain value}; place.lines is filled. Raises
    ScheduleError.
    """
    values: dict[str, Any] = {}
    for statement in tree.body:
        match statement:
            case ast.Expr(ast.Constant(str())):
                continue  # a docstring
            case ast.Assign([ast.Name(key)], value):
                inner = place.at(key)
                if key in values:
                    assert place.lines is not None
                    raise inner.error(f"set twice, first in line {place.lines[inner.path][1]}; keep one", value.lineno)
                inner.mark(statement.lineno)
                values[key] = Evaluator(None, Budget()).value(value, inner)
            case _:
                message = "a schedule holds only lines of the form key = value, and nothing in it is executed"
                raise place.error(f"{describe(statement)} found; {message}", line=statement.lineno)
    return values


def read_value(text: str, place: Place) -> Any:
    """One value as an override gives it; a bare word that is no literal (AdamW) stands for its text."""
    if not text.strip():
        raise place.error("no value given; write key=value with a Python literal")
    body = parse(text.strip(), place, "eval").body
    return body.id if isinstance(body, ast.Name) else _lists(Evaluator(None, Budget()).value(body, place))


def _lists(value: Any) -> Any:
    """A schedule knows no difference between tuples and lists."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def describe(node: ast.AST) -> str:
    """A piece of Python, in words."""
    if isinstance(node, ast.Name):
        return f"the name {node.id}"
    return _NAMES_OF_SYNTAX.get(type(node), f"a Python {type(node).__name__}")


class Evaluator:
    """Evaluates expressions within a budget. Every method raises ScheduleError with file, line and key.

    names: what the names of an expression stand for; None: only literals and dict(...) are read.
    """

    def __init__(self, names: dict[str, Any] | None, budget: Budget) -> None:
        self.names, self.budget = names, budget
        self._loops: list[dict[str, Any]] = []  # the variables of the comprehensions around an expression
        self._depth = 0

    def value(self, node: ast.expr, place: Place) -> Any:
        if self._depth >= MAX_DEPTH:
            short = Place(place.source, place.path[:3], place.lines)
            raise short.error(f"nested more than {MAX_DEPTH} deep", node.lineno)
        self.budget.spend(1, place, node.lineno)
        place.mark(node.lineno, anew=False)
        self._depth += 1
        try:
            match node:
                case ast.Constant(str() | int() | float() | None as value):  # bool is an int
                    return self._small(value, node, place)
                case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
                    amount = self.value(operand, place)
                    if isinstance(amount, (int, float)):
                        return -amount if isinstance(sign, ast.USub) else +amount
                    raise place.error(f"a sign before a {kind_of(amount)}; it takes a number", node.lineno)
                case ast.List(items):
                    return self._items(items, place)
                case ast.Tuple(items):
                    return tuple(self._items(items, place))
                case ast.Dict(keys, values):
                    return self._dict([*zip(keys, values, strict=True)], node, place)
                case ast.Call(ast.Name("dict"), args, words) if not args or self.names is not None:
                    return self._dict_call(args, words, node, place)
                case _ if self.names is not None:
                    return self._computed(node, place)
        finally:
            self._depth -= 1
        found = "dict(...) with more than key=value" if _is_dict_call(node) else describe(node)
        raise place.error(f"{found} found, {_WITHOUT_NAMES}; write the value itself", node.lineno)

    def _computed(self, node: ast.expr, place: Place) -> Any:
        match node:
            case ast.Name(name):
                return self._look_up(name, node, place)
            case ast.Attribute(holder, name):
                return self._attribute(self.value(holder, place), name, node, place)
            case ast.Subscript(holder, index):
                return self._subscript(self.value(holder, place), index, node, place)
            case ast.BinOp(left, sign, right) if type(sign) in _OPERATORS:
                return self._binary(self.value(left, place), type(sign), self.value(right, place), node, place)
            case ast.JoinedStr(parts):
                text = "".join(self._formatted(part, place) for part in parts)
                self.budget.spend(len(text), place, node.lineno)
                return text
            case ast.Set([ast.Set([ast.Attribute() as chain])]) if (keys := path_of(chain))[0] == "_base_":
                return BaseReference(keys[1:])
            case ast.Set(items):
                return {self._key(item, node, place) for item in self._items(items, place)}
            case ast.ListComp(item, generators):
                return self._comprehension(generators, lambda: self.value(item, place), place)
            case ast.GeneratorExp(item, generators):
                return Pass(self._comprehension(generators, lambda: self.value(item, place), place))
            case ast.SetComp(item, generators):
                return set(
                    self._comprehension(generators, lambda: self._key(self.value(item, place), node, place), place)
                )
            case ast.DictComp(key, item, generators):
                pair = lambda: (self._key(self.value(key, place), node, place), self.value(item, place))  # noqa: E731
                return dict(self._comprehension(generators, pair, place))
            case ast.Call(ast.Attribute(holder, method), args, words):
                return self._method(self.value(holder, place), method, args, words, node, place)
            case ast.Call(ast.Name(name), args, words):
                return self._function(name, args, words, node, place)
        raise place.error(f"{describe(node)} found; it is not read here, so write the value itself", node.lineno)

    def _small(self, value: Any, node: ast.expr, place: Place) -> Any:
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise place.error(f"a whole number of more than {MAX_BITS} bits", node.lineno)
        return value

    def _items(self, nodes: list[ast.expr], place: Place) -> list[Any]:
        result: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred) and self.names is not None:
                result += self._each(self.value(node.value, place), node, place)
            else:
                result.append(self.value(node, place.at(len(result))))
        return result

    def _dict(
        self, pairs: list[tuple[ast.expr | str | None, ast.expr]], node: ast.expr, place: Place
    ) -> dict[Any, Any]:
        """pairs: keys and values; a key is None before a dict that is unpacked, and a str in a call."""
        values: dict[Any, Any] = {}
        first_lines: dict[Any, int] = {}
        is_call = isinstance(node, ast.Call)
        for key_node, value_node in pairs:
            if key_node is None:
                if self.names is None:
                    raise place.error("dict(...) may hold only key=value", node.lineno)
                other = self._whole_dict(self.value(value_node, place), node, place)
                if is_call and (twice := [key for key in other if key in values or not isinstance(key, str)]):
                    raise place.at(twice[0]).error("set twice, or no text, in **", node.lineno)
                values.update(other)
                continue
            if isinstance(key_node, str):
                key = key_node
            elif self.names is not None or (isinstance(key_node, ast.Constant) and isinstance(key_node.value, str)):
                key = self._key(self.value(key_node, place), key_node, place)
            else:
                raise place.error("every key of a dict must be a text in quotes", key_node.lineno)
            inner = place.at(key)
            if key in first_lines or (is_call and key in values):
                line = first_lines.get(key, node.lineno)
                raise inner.error(f"set twice, first in line {line}; keep one", value_node.lineno)
            first_lines[key] = value_node.lineno
            inner.mark(value_node.lineno)
            values[key] = self.value(value_node, inner)
        return values

    def _dict_call(
        self, args: list[ast.expr], words: list[ast.keyword], node: ast.Call, place: Place
    ) -> dict[Any, Any]:
        if self.names is not None:
            self._require_built_in("dict", node, place)
        if len(args) > 1:
            raise place.error(f"dict(...) takes one dict at most, not {len(args)}", node.lineno)
        values: dict[Any, Any] = {}
        if args:
            given = self.value(args[0], place)
            pairs = given.items() if isinstance(given, dict) else self._each(given, node, place)
            for pair in pairs:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise place.error("dict(...) takes a dict, or pairs of a key and a value", node.lineno)
                self.budget.spend(1, place, node.lineno)
                values[self._key(pair[0], node, place)] = pair[1]
        return values | self._keywords(words, node, place)

    def _keywords(self, words: list[ast.keyword], node: ast.expr, place: Place) -> dict[Any, Any]:
        return self._dict([(word.arg, word.value) for word in words], node, place)

    def _whole_dict(self, value: Any, node: ast.expr, place: Place) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise place.error(f"a {kind_of(value)} where a dict is needed", node.lineno)
        self.budget.spend(len(value), place, node.lineno)
        return value

    def _key(self, value: Any, node: ast.expr, place: Place) -> Any:
        """A key of a dict or a member of a set. Tuples are not taken: to hash nested ones can take forever."""
        if not isinstance(value, SCALARS):
            raise place.error(f"a {kind_of(value)} as a key, an index or in a set; take text or a number", node.lineno)
        return value

    def _got(self, value: Any) -> Any:
        if isinstance(value, Unread):
            raise value.error
        return value

    def _look_up(self, name: str, node: ast.expr, place: Place) -> Any:
        for names in (*reversed(self._loops), self.names or {}):
            if name in names:
                return self._got(names[name])
        raise place.error(f"the name {name} found, which no line before sets", node.lineno)

    def _attribute(self, holder: Any, name: str, node: ast.expr, place: Place) -> Any:
        self.require_attribute(holder, name, node, place)
        if name not in holder:
            raise place.error(f"the base files have no {name} there", node.lineno)
        return self._got(holder[name])

    def require_attribute(self, holder: Any, name: str, node: ast.expr, place: Place) -> None:
        """holder.name must be a key of a base file's dict."""
        if not isinstance(holder, BaseDict):
            hint = f"; write [{name!r}]" if isinstance(holder, dict) else ""
            raise place.error(f"a {kind_of(holder)} of this file has no attribute {name}{hint}", node.lineno)
        if name in BaseDict.NO_ATTRIBUTES or name.startswith("__"):
            raise place.error(f".{name} is no key; write [{name!r}]", node.lineno)

    def _subscript(self, holder: Any, index_node: ast.expr, node: ast.expr, place: Place) -> Any:
        if not isinstance(holder, (str, list, tuple, dict, range)):
            raise place.error(f"a {kind_of(holder)} has no [...]", node.lineno)
        index = self.index(index_node, place)
        result = self._got(self.attempt(operator.getitem, node, place, holder, index))
        if isinstance(index, slice) and not isinstance(holder, range):
            self.budget.spend(len(result), place, node.lineno)
        return result

    def index(self, node: ast.expr, place: Place) -> Any:
        """What stands in [...]."""
        if isinstance(node, ast.Slice):
            parts = (node.lower, node.upper, node.step)
            return slice(*(part and self.value(part, place) for part in parts))
        return self._key(self.value(node, place), node, place)

    def attempt(
        self, operation: Callable[..., Any], node: ast.expr | ast.stmt, place: Place, *operands: Any, **words: Any
    ) -> Any:
        """The operation's result; Python's own complaint as an error of the file."""
        try:
            return operation(*operands, **words)
        except KeyError as error:
            raise place.error(f"there is no key {error}", node.lineno) from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise place.error(f"cannot be computed: {error}", node.lineno) from None

    def _binary(self, left: Any, sign: type[ast.operator], right: Any, node: ast.expr, place: Place) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if sign is ast.Add and type(left) is type(right) and type(left) in (str, list, tuple):
            self.budget.spend(len(left) + len(right), place, node.lineno)
        elif sign is ast.Mult and not numbers and any(isinstance(each, int) for each in (left, right)):
            sequence, count = (left, right) if isinstance(right, int) else (right, left)
            if type(sequence) not in (str, list, tuple):
                raise place.error(f"a {kind_of(sequence)} cannot be repeated", node.lineno)
            self.budget.spend(len(sequence) * max(count, 0), place, node.lineno)
        elif not numbers:
            message = (
                f"arithmetic with a {kind_of(left)} and a {kind_of(right)}; it takes numbers, and + joins two texts"
            )
            raise place.error(f"{message}, lists or tuples", node.lineno)
        elif sign is ast.Pow and isinstance(left, int) and isinstance(right, int) and right > 0:
            self._small(1 << min(left.bit_length() * right, MAX_BITS + 1), node, place)
        result = self._small(self.attempt(_OPERATORS[sign], node, place, left, right), node, place)
        if isinstance(result, complex):
            raise place.error("the root of a negative number", node.lineno)
        return result

    def _formatted(self, part: ast.expr, place: Place) -> str:
        """One part of an f-string."""
        if not isinstance(part, ast.FormattedValue):
            return str(self.value(part, place))
        value = self.value(part.value, place)
        if not isinstance(value, SCALARS):
            raise place.error(f"a {kind_of(value)} in an f-string; it takes text and numbers", part.lineno)
        layout = str(self.value(part.format_spec, place)) if part.format_spec else ""
        if any(len(digits) > 2 for digits in re.findall(r"\d+", layout)):
            raise place.error(f"an f-string with a width above {MAX_WIDTH}", part.lineno)
        if part.conversion in _CONVERSIONS:
            value = _CONVERSIONS[part.conversion](value)
        return str(self.attempt(format, part, place, value, layout))

    def _each(self, value: Any, node: ast.expr, place: Place) -> Iterator[Any]:
        if not isinstance(value, (str, list, tuple, dict, range)):
            raise place.error(f"a {kind_of(value)} cannot be gone through", node.lineno)
        for item in tuple(value) if isinstance(value, dict) else value:
            self.budget.spend(1, place, node.lineno)
            yield item

    def _comprehension(self, generators: list[ast.comprehension], make: Callable[[], Any], place: Place) -> list[Any]:
        self._loops.append({})
        try:
            return [make() for _ in self._rounds(generators, place)]
        finally:
            self._loops.pop()

    def _rounds(self, generators: list[ast.comprehension], place: Place) -> Iterator[None]:
        first, *inner = generators
        if first.ifs or first.is_async:
            raise place.error("a condition in a comprehension, which is not read here", first.iter.lineno)
        for item in self._each(self.value(first.iter, place), first.iter, place):
            self.bind(first.target, item, self._loops[-1], place)
            if inner:
                yield from self._rounds(inner, place)
            else:
                yield

    def bind(self, target: ast.expr, value: Any, names: dict[str, Any], place: Place) -> None:
        """Give a name its value, or the names of a tuple theirs."""
        if isinstance(value, Pass):
            raise place.error("enumerate(...) is not kept; write the list itself", target.lineno)
        match target:
            case ast.Name(name):
                if name == "_base_":
                    raise place.error("_base_ takes its files in one plain line", target.lineno)
                names[name] = value
            case ast.Tuple(targets) | ast.List(targets):
                items = [*self._each(value, target, place)]
                if len(items) != len(targets):
                    raise place.error(f"{len(items)} values for {len(targets)} names", target.lineno)
                for each, item in zip(targets, items, strict=True):
                    self.bind(each, item, names, place)
            case _:
                raise place.error(f"{describe(target)} cannot be set there", target.lineno)

    def _require_built_in(self, name: str, node: ast.expr, place: Place) -> None:
        if any(name in names for names in (*self._loops, self.names or {})):
            raise place.error(f"{name}(...) found, but {name} is a key of the file", node.lineno)

    def _function(self, name: str, args: list[ast.expr], words: list[ast.keyword], node: ast.expr, place: Place) -> Any:
        if name not in _FUNCTIONS:
            raise place.error(f"a call found, {name}(...); only dict, len, range and enumerate are known", node.lineno)
        self._require_built_in(name, node, place)
        values = [self.value(arg, place) for arg in args]
        if name == "enumerate":
            values[:1] = [[*self._each(value, node, place)] for value in values[:1]]
        elif any(isinstance(value, Pass) for value in values):
            raise place.error(f"{name}(...) does not take that", node.lineno)
        result = self.attempt(_FUNCTIONS[name], node, place, *values, **self._keywords(words, node, place))
        return Pass(result) if name == "enumerate" else result

    def _method(
        self, holder: Any, name: str, args: list[ast.expr], words: list[ast.keyword], node: ast.expr, place: Place
    ) -> Any:
        values = [self.value(arg, place) for arg in args]
        named = self._keywords(words, node, place)
        if isinstance(holder, dict) and name == "update" and len(values) <= 1:
            return self._update(holder, {**self._whole_dict(values[0] if values else {}, node, place), **named}, place)
        if not named and isinstance(holder, dict):
            if name in ("get", "pop") and len(values) in (1, 2):
                self._key(values[0], node, place)
                if isinstance(holder, BaseDict):
                    values = [*values, None][:2]
                return self._got(self.attempt(getattr(dict, name), node, place, holder, *values))
            if name in ("keys", "values", "items", "copy") and not values:
                self.budget.spend(len(holder), place, node.lineno)
                if name == "copy":
                    return self.put(dict(holder), place) if isinstance(holder, BaseDict) else dict(holder)
                return Pass(getattr(holder, name)())
        if not named and type(holder) is list:
            if name == "extend" and len(values) == 1:
                values = [[*self._each(values[0], node, place)]]
            if name in ("append", "extend", "insert", "pop"):
                return self.attempt(getattr(list, name), node, place, holder, *values)
        message = (
            "known are update, pop, get, copy, keys, values, items of a dict and append, extend, insert, pop of a list"
        )
        raise place.error(f"a call found, .{name}(...) of a {kind_of(holder)}; {message}", node.lineno)

    def _update(self, holder: dict[Any, Any], other: dict[Any, Any], place: Place) -> None:
        for key, value in other.items():
            self.budget.spend(1, place)
            if not isinstance(holder, BaseDict):
                holder[key] = value
            elif isinstance(inner := holder.get(key), dict) and isinstance(value, dict):
                self._update(inner, dict(value), place)
            else:
                holder[key] = self.put(value, place)

    def put(self, value: Any, place: Place) -> Any:
        """A value as a BaseDict holds it."""
        if type(value) is dict:
            self.budget.spend(len(value), place)
            return BaseDict({key: self.put(item, place) for key, item in value.items()})
        if type(value) in (list, tuple):
            self.budget.spend(len(value), place)
            return type(value)([self.put(item, place) for item in value])
        return value


def path_of(node: ast.expr) -> tuple[str, ...]:
    """a.b['c'] as the names (a, b, c), as far as they are plain; a call's method is left out."""
    match node:
        case ast.Name(name):
            return (name,)
        case ast.Call(ast.Attribute(holder)):
            return path_of(holder)
        case ast.Attribute(holder, name):
            return (*path_of(holder), name)
        case ast.Subscript(holder, ast.Constant(str() | int() as key)):
            return (*path_of(holder), str(key))
        case ast.Subscript(holder):
            return path_of(holder)
    return ("",)


def _is_dict_call(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict"
