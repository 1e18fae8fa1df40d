"""Files read piece by piece: the same values, arrays and messages as by Python's json, wherever the pieces end."""

import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.coco.json_stream
from data.coco.annotations import AnnotationError, read_coco
from data.coco.json_stream import JsonError, JsonStream
from tests.data.coco.test_annotation_fuzz import CHANGES, mutated
from tests.fuzzing import SEEDS, examples

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from(["id", "}, {", "b"]), VALUES, max_size=3) | VALUES, max_size=8)
FORMS: list[dict[str, Any]] = [{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}]


def streamed(content: bytes, fast: bool) -> Any:
    """The whole document by way of the stream; an error as (problem, line, column)."""
    stream = JsonStream(io.BytesIO(content))
    found: dict[str, Any] = {}
    try:
        if stream.peek() != "{":
            found = stream.value()
        else:
            for key in stream.members():
                is_list = stream.peek() == "["
                found[key] = sum(stream.records(json.loads if fast else None), []) if is_list else stream.value()
        stream.require_end()
    except JsonError as error:
        return error.problem, error.line, error.column
    return found


def loaded(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        return error.msg.removesuffix(" starting at"), error.lineno, error.colno


@examples(100)
@given(
    content=st.dictionaries(st.sampled_from(["images", "a", "ü"]), RECORDS | VALUES, max_size=3) | VALUES,
    form=st.sampled_from(FORMS),
    change=st.none() | st.tuples(st.integers(0, 200), st.sampled_from(["", ",", "}", "]", '"', "x", "\n", "{}"])),
    cut=st.none() | st.integers(0, 200),
)
def test_values_and_errors_are_jsons_wherever_a_window_ends(content: Any, form: Any, change: Any, cut: Any) -> None:
    text = json.dumps(content, **form)
    if change is not None:
        text = text[: change[0]] + change[1] + text[change[0] + 1 :]
    raw = text[:cut].encode()
    expected = repr(loaded(raw))  # NaN equals nothing
    with pytest.MonkeyPatch.context() as patch:
        for window in (1, 40, 1 << 20):
            patch.setattr(data.coco.json_stream, "WINDOW_BYTES", window)
            for fast in (False, True):
                assert repr(streamed(raw, fast)) == expected


def outcome(file: Path, masks: bool) -> Any:
    try:
        annotations = read_coco(file, masks=masks)
    except AnnotationError as error:
        return str(error)
    return annotations.digest(), annotations.findings


@pytest.mark.slow
@examples(60)
@given(changes=st.lists(CHANGES, min_size=1, max_size=3), cut=st.none() | st.integers(0, 900), seed=SEEDS)
def test_arrays_findings_and_messages_depend_neither_on_the_window_nor_on_the_decoder(
    tmp_path_factory: pytest.TempPathFactory, changes: list, cut: int | None, seed: int
) -> None:
    dice = random.Random(seed)
    file = tmp_path_factory.getbasetemp() / "stream.json"
    file.write_text(mutated(changes)[:cut])
    masks = dice.random() < 0.5
    with pytest.MonkeyPatch.context() as patch:
        # Both at once: one value after another by Python's json.
        patch.setitem(sys.modules, "msgspec", None)
        expected = outcome(file, masks)
        patch.setattr(data.coco.json_stream, "WINDOW_BYTES", dice.choice([1, 60, 300]))
        assert outcome(file, masks) == expected
        patch.undo()
        patch.setattr(data.coco.json_stream, "WINDOW_BYTES", dice.choice([60, 300, 1 << 20]))
        # What nobody asks for may hold what Python's json refuses: numbers of thousands of digits, deep nesting.
        if not isinstance(expected, str) or ("cannot be read" not in expected and "deeply" not in expected):
            assert outcome(file, masks) == expected


def test_a_record_of_many_windows_is_read_and_the_place_of_a_fault_far_behind_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr(data.coco.json_stream, "WINDOW_BYTES", 256)
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 9, "height": 9, "note": "ä" * n} for n in range(1, 400)]
    content = {"images": images, "categories": [{"id": 1, "name": "a"}]}
    file = tmp_path / "a.json"
    text = json.dumps(content, indent=1, ensure_ascii=False)
    file.write_text(text)
    assert read_coco(file).image_ids.tolist() == list(range(1, 400))
    images[300]["width"], images[350]["width"], images[398]["width"] = 0.5, -1, "x"
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=r'images\[300\] \(id 301\): "width" is 0.5, .*\(1 more like it\)'):
        read_coco(file)
    broken = text.replace('"categories"', "?")
    file.write_text(broken)
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(broken)
    with pytest.raises(AnnotationError, match=f"line {caught.value.lineno}, column {caught.value.colno}"):
        read_coco(file)
    file.write_bytes(text.encode()[:-40] + b"\xff" + text.encode()[-40:])
    with pytest.raises(AnnotationError, match=f"not UTF-8 text .byte {len(text.encode()) - 40}"):
        read_coco(file)
