"""data.yaml, obj.data and lists of class names: what a YOLO set says of itself.

data.yaml is read by a reader of just the YAML that such files use (keys with a text, a number, or a list or table
of these), so that no YAML library is needed and no tag of theirs is ever followed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.convert.conversion import ConversionError
from data.convert.files import checked_class_names, read_class_file, read_text

CLASS_FILES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")
PLAIN_KEY = re.compile(r"""^(?P<key>"[^"]*"|'[^']*'|[^\s:#'"\[\]{},][^:#]*?)\s*:(?:\s+(?P<value>.*))?$""")
REFUSED = ("&", "*", "!", "|", ">", "%", "@", "`")


@dataclass(frozen=True)
class YoloSettings:
    """Class names by index, and where the splits are, as written (folders, lists of images, several of these)."""

    source: Path
    class_names: list[str]
    splits: dict[str, list[str]] = field(default_factory=dict)
    path: str | None = None


def read_settings(file: Path) -> YoloSettings:
    """data.yaml (any .yaml or .yml), obj.data, or a list of class names.

    Raises ConversionError, which names file and line.
    """
    remedy = "Give data.yaml or a list of class names"
    if file.suffix.lower() in (".yaml", ".yml"):
        return _of_yaml(file, parse_simple_yaml(read_text(file, remedy), str(file)))
    if file.suffix.lower() == ".data":
        return _of_darknet(file, read_text(file, remedy))
    return YoloSettings(file, read_class_file(file))


def parse_simple_yaml(text: str, source: str) -> dict[str, Any]:
    """The top-level keys of a small YAML file, with texts, numbers, lists and tables of texts and numbers.

    Keys and texts may be quoted; comments may follow. Raises ConversionError at the first line that holds anything
    else.
    """

    content: dict[str, Any] = {}
    key = ""
    for number, line in _logical_lines(text):
        try:
            if line[0] in " \t" or line.startswith("- "):
                _add_to(content, key, line.strip())
            else:
                name, value = _pair(line)
                key = str(name)
                content[key] = _value(value)
        except (ValueError, KeyError):
            raise ConversionError(
                f"{source}, line {number}: {line.strip()[:60]!r} is not understood. Write plain keys, lists and "
                "tables, or give the class names as a text file, one a line (--classes FILE)"
            ) from None
    return content


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that says something; brackets that span several lines as one, without comments."""
    opened, whole = 0, ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = _without_comment(raw)
        if opened:
            whole = f"{whole} {line.strip()}"
        elif line.strip() and line.strip() not in ("---", "..."):
            opened, whole = number, line
        else:
            continue
        match = PLAIN_KEY.match(whole)
        if match is None or (match["value"] or "")[:1] not in ("[", "{") or _is_closed(match["value"]):
            yield opened, whole
            opened = 0
    if opened:
        yield opened, whole


def yaml_text(class_names: list[str], splits: dict[str, str]) -> str:
    """A data.yaml: the splits' folders, relative to the file, and the class names by index."""
    lines = [f"{split}: {json.dumps(folder, ensure_ascii=False)}" for split, folder in splits.items()]
    lines += [f"nc: {len(class_names)}", "names:"]
    # A JSON text is a double-quoted YAML text, whatever it holds.
    lines += [f"  {index}: {json.dumps(name, ensure_ascii=False)}" for index, name in enumerate(class_names)]
    return "\n".join(lines) + "\n"


def _of_yaml(file: Path, content: dict[str, Any]) -> YoloSettings:
    names = content.get("names")
    if isinstance(names, dict):
        if not names or sorted(names) != list(range(len(names))):
            raise ConversionError(f"{file}: the keys under names are not 0, 1, 2, ...: give every class its index")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise ConversionError(f'{file}: has no "names", the list of classes. Add it, or give --classes FILE')
    num_classes = content.get("nc", len(names))
    if num_classes != len(names):
        raise ConversionError(f"{file}: nc is {num_classes}, and there are {len(names)} names. Correct one of the two")
    splits: dict[str, list[str]] = {}
    for split, key in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")):
        value = content.get(key)
        if value not in (None, "", []):
            splits.setdefault(split, [str(item) for item in (value if isinstance(value, list) else [value])])
    path = content.get("path")
    names = checked_class_names([str(name).strip() for name in names], lambda number: f"{file}: class {number}", file)
    return YoloSettings(file, names, splits, None if path in (None, "") else str(path))


def _of_darknet(file: Path, text: str) -> YoloSettings:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    content = {key.strip(): value.strip() for key, value in pairs}
    if "names" not in content:
        raise ConversionError(f'{file}: has no line "names = FILE". Give --classes FILE')
    named = [base / content["names"] for base in (file.parent, file.parent.parent)]
    names = next((path for path in named if path.is_file()), file.parent / Path(content["names"]).name)
    splits = {split: [content[key]] for split, key in (("train", "train"), ("val", "valid")) if content.get(key)}
    return YoloSettings(file, read_settings(names).class_names, splits)


def _add_to(content: dict[str, Any], key: str, line: str) -> None:
    """One line of the list or table under `key`. Raises ValueError, or KeyError where there is no key."""
    is_item = line.startswith("- ")
    if content[key] == "":
        content[key] = [] if is_item else {}
    if is_item and isinstance(content[key], list):
        content[key].append(_scalar(line[2:]))
    elif not is_item and isinstance(content[key], dict):
        name, value = _pair(line)
        content[key][name] = _scalar(value)
    else:
        raise ValueError


def _pair(text: str) -> tuple[Any, str]:
    match = PLAIN_KEY.match(text)
    if match is None:
        raise ValueError
    return _scalar(match["key"]), (match["value"] or "").strip()


def _value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_scalar(item) for item in _items(text[1:-1])]
    if text.startswith("{") and text.endswith("}"):
        return {key: _scalar(value) for key, value in map(_pair, _items(text[1:-1]))}
    return _scalar(text)


def _scalar(text: str) -> Any:
    text = text.strip()
    if text[:1] in ('"', "'") and (len(text) < 2 or text[-1] != text[0]):
        raise ValueError
    if text[:1] == '"':
        return str(json.loads(text))
    if text[:1] == "'":
        return text[1:-1].replace("''", "'")
    if text[:1] in REFUSED or text[:1] in ("[", "{") or text in ("-", "?"):
        raise ValueError
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    return "" if text in ("null", "~") else text


def _items(text: str) -> list[str]:
    """The parts between commas that stand outside of quotes; an empty last one counts as none."""
    items, start = [], 0
    for place in _outside_quotes(text):
        if text[place] == ",":
            items.append(text[start:place].strip())
            start = place + 1
    items.append(text[start:].strip())
    if not items[-1]:
        items.pop()
    return items


def _is_closed(text: str) -> bool:
    return any(text[place] in "]}" for place in _outside_quotes(text))


def _without_comment(line: str) -> str:
    for place in _outside_quotes(line):
        if line[place] == "#" and (place == 0 or line[place - 1] in " \t"):
            return line[:place].rstrip()
    return line.rstrip()


def _outside_quotes(text: str) -> list[int]:
    """Places of the characters that no quotes enclose. A quote opens only where a text can begin."""
    places, quote, escaped = [], "", False
    for place, letter in enumerate(text):
        if quote:
            if quote == '"' and letter == "\\" and not escaped:
                escaped = True
                continue
            if letter == quote and not escaped:
                quote = ""
            escaped = False
        elif letter in "\"'" and (place == 0 or text[:place].rstrip()[-1:] in ("", ":", ",", "[", "{", "-")):
            quote = letter
        else:
            places.append(place)
    return places
