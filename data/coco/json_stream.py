"""A JSON file read piece by piece: its top-level object member by member, and long lists some thousand records at a
time, so that memory holds a window of the file and not the whole of it."""

import codecs
import gc
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

WINDOW_BYTES = 1 << 22
"""Read at a time; a value that is larger makes the window grow."""
_CUT_SHOWS_WITHIN = 16
"""Characters: an error nearer to the window's end may be the end's doing (of a number, `false`, a Unicode escape)."""
_NUM_ENDS_TRIED = 64
_SPACE = re.compile(r"[ \t\n\r]*")
_NEXT_RECORD = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=\{)")


class JsonError(ValueError):
    """Text that is not JSON: what is wrong, and its line and column, counted from 1."""

    def __init__(self, problem: str, line: int, column: int) -> None:
        super().__init__(problem, line, column)
        self.problem, self.line, self.column = problem, line, column


class JsonStream:
    """Reads one value after another, in the order of the file. Every value is as json.loads has it.

    All methods raise JsonError, UnicodeDecodeError (`start` counted from the file's
    beginning), RecursionError, and ValueError for an integer that is longer than Python converts.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._is_last = "", 0, False
        self._line, self._column = 1, 1  # of the window's first character

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._is_last:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + _CUT_SHOWS_WITHIN > len(self._text)
                if self._is_last or not is_cut:
                    raise self._error(error.msg.removesuffix(" starting at"), error.pos) from None
            else:
                if end + _CUT_SHOWS_WITHIN <= len(self._text) or self._is_last:  # a number may go on
                    self._at = end
                    return value
            self._read_on()

    def members(self) -> Iterator[str]:
        """The keys of an object; after each the caller takes its value, by `value` or `records`."""
        self._at += 1
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._error("Expecting property name enclosed in double quotes", self._at)
            key = self.value()
            if self.peek() != ":":
                raise self._error("Expecting ':' delimiter", self._at)
            self._at += 1
            self.peek()
            yield key
            if self._ends("}"):
                return

    def records(self, decode: Callable[[str], list[Any]] | None) -> Iterator[list[Any]]:
        """The values of a list, some at a time.

        decode: a faster way to read a list of objects; what it raises ValueError or RecursionError for is read by
        Python's own.
        """
        self._at += 1
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            fast = self._decoded(decode) if decode is not None else []
            if fast:
                yield fast
            slow, end = [], len(self._text)
            is_end = False
            # What is behind the last record that begins in the window is for the fast way, once it is read.
            while not is_end and (self._at < end or not fast):
                size = len(self._text)
                slow.append(self.value())
                is_end = self._ends("]")
                if len(self._text) != size:
                    break
            if slow:
                yield slow
            if is_end:
                return

    def require_end(self) -> None:
        """That nothing follows."""
        if self.peek():
            raise self._error("Extra data", self._at)

    def _decoded(self, decode: Callable[[str], list[Any]]) -> list[Any]:
        """The records up to the last one that ends in the window, and another one follows; empty where that fails."""
        end = len(self._text)
        for _ in range(_NUM_ENDS_TRIED):
            end = self._text.rfind("}", self._at, end)
            if end < 0:
                return []
            follows = _NEXT_RECORD.match(self._text, end + 1)
            if follows is not None:
                try:
                    # If the text up to here is a list, its last record ends here: a list has one reading only.
                    records = decode(f"[{self._text[self._at : end + 1]}]")
                except (ValueError, RecursionError):
                    return []
                self._at = follows.end()
                return records
        return []

    def _ends(self, closing: str) -> bool:
        """Passes the comma or the closing bracket behind a value; whether it was the bracket."""
        found = self.peek()
        if found not in (",", closing) or not found:
            raise self._error("Expecting ',' delimiter", self._at)
        self._at += 1
        if found == ",":
            self.peek()
        return found == closing

    def _read_on(self) -> None:
        passed = self._text[: self._at]
        if newlines := passed.count("\n"):
            self._line += newlines
            self._column = len(passed) - passed.rindex("\n")
        else:
            self._column += len(passed)
        rest = self._text[self._at :]
        content = self._file.read(max(WINDOW_BYTES, len(rest)))
        self._is_last = not content
        try:
            new = self._utf8.decode(content, final=self._is_last)
        except UnicodeDecodeError as error:
            error.start += self._file.tell() - len(error.object)
            raise
        self._text, self._at = rest + new, 0

    def _error(self, problem: str, position: int) -> JsonError:
        before = self._text[:position]
        newlines = before.count("\n")
        column = len(before) - before.rindex("\n") if newlines else self._column + len(before)
        return JsonError(problem, self._line + newlines, column)


def record_decoder(fields: Iterable[str], absent: Any, unread: Sequence[str]) -> Callable[[str], list[Any]] | None:
    """A faster way to read lists of records, as objects of these fields; None where msgspec is missing.

    absent: what an object has where the record leaves the field out. unread: fields that stay JSON text.
    """
    try:
        import msgspec
    except ImportError:
        return None
    kinds = [(field, msgspec.Raw if field in unread else Any, absent) for field in fields]
    return msgspec.json.Decoder(list[msgspec.defstruct("Record", kinds, gc=False)]).decode  # type: ignore[misc]


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For the time of a parse."""
    # The parser makes millions of objects without a cycle; the collector would walk them over and over.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


KINDS: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "an integer",
    float: "a number with a fraction or exponent", type(None): "null",
}  # fmt: skip


def kind_of(value: Any) -> str:
    """What JSON calls it, with its article."""
    return KINDS.get(type(value), type(value).__name__)
