"""Annotation files with random faults: the reader's own error comes out, or arrays that everything after can use."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import AnnotationError, CocoAnnotations, CocoDataset, DatasetError, check_pair, check_split, read_coco
from data.coco.annotations import find_fatal
from tests.data.coco.valid import VALID
from tests.fuzzing import examples, places

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bounded_memory")]

# Written as text of its own into the JSON: json.dumps refuses them.
RAW = {"<deep>": "[" * 100_000, "<deep closed>": "[" * 3000 + "]" * 3000, "<digits>": "7" * 5000, "<bare>": "NaNa"}

ODD_VALUES = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 3, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, -1e308]
        + [5e-324, float("nan"), float("inf"), float("-inf"), "", "7", "..", "../a.jpg", "/a", "\0", "\ud800", "cat"]
        + [[], {}, [[]], [{}], [1, 2, 3, 4], [1e308] * 4, [-1] * 4, 10**6, 10**9, *RAW]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.recursive(st.integers(-3, 9), lambda inner: st.lists(inner, max_size=5), max_leaves=6),
    st.dictionaries(st.sampled_from(["id", "width", "name", "bbox"]), st.integers(-2, 70), max_size=3),
)  # fmt: skip
DELETE, TWICE = object(), object()


PLACES = [path for path in places(VALID) if path]


def mutated(changes: list[tuple[tuple, Any]]) -> str:
    """VALID as JSON, with something else at some places, or nothing, or the same twice."""
    content = copy.deepcopy(VALID)
    for path, value in changes:
        holder = content
        try:
            for key in path[:-1]:
                holder = holder[key]
            if value is DELETE:
                del holder[path[-1]]
            elif value is TWICE:
                holder.append(copy.deepcopy(holder[path[-1]]))  # type: ignore[attr-defined]
            else:
                holder[path[-1]] = copy.deepcopy(value)
        except (AttributeError, TypeError, KeyError, IndexError):
            continue  # an earlier change took the place away, or it is in no list
    text = json.dumps(content)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def assert_sound(annotations: CocoAnnotations) -> None:
    n, m = len(annotations), annotations.num_boxes
    assert n > 0
    assert annotations.offsets.tolist() == sorted(annotations.offsets.tolist())
    assert annotations.offsets[0] == 0 and annotations.offsets[-1] == m
    assert len(set(annotations.image_ids.tolist())) == n and len(set(annotations.annotation_ids.tolist())) == m
    assert (annotations.widths >= 1).all() and (annotations.heights >= 1).all()
    assert np.isfinite(annotations.boxes_xywh).all() and np.isfinite(annotations.areas).all()
    assert set(annotations.labels.tolist()) <= set(range(len(annotations.class_names)))
    for index in range(n):
        name = Path(annotations.file_name(index))
        assert not name.is_absolute() and ".." not in name.parts
    assert (annotations.training_view().boxes_xywh[:, 2:] >= 1).all()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that VALID names."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    Image.new("RGB", (64, 48)).save(folder / "a.jpg")
    Image.new("RGB", (48, 64)).save(folder / "sub" / "b ü.png")
    return folder


def judge(file: Path, images: Path) -> None:
    """What a run does with an annotation file before it begins: reading, checking, making a training set."""
    try:
        annotations = read_coco(file)
    except AnnotationError as error:
        message = str(error)
        assert str(file) in message and "\n" not in message and len(message) < 1000
        fatal = find_fatal(file)
        assert fatal and all(finding.severity == "error" for finding in fatal)
        return
    assert not find_fatal(file)
    assert_sound(annotations)
    findings = check_split(annotations, images, training=True)
    findings += check_pair(annotations, annotations, images, images)
    for finding in findings:
        assert str(finding)
    try:
        dataset = CocoDataset(images, annotations, training=True)
    except DatasetError as error:
        assert str(error)
        return
    assert np.isfinite(dataset.boxes_xyxy).all()
    assert len(dataset.annotations.digest()) == 64


CHANGES = st.tuples(st.sampled_from(PLACES), ODD_VALUES | st.just(DELETE) | st.just(TWICE))


@examples(300)
@given(changes=st.lists(CHANGES, min_size=1, max_size=4), cut=st.none() | st.none() | st.none() | st.integers(0, 900))
def test_odd_values_anywhere_give_sound_arrays_or_the_readers_own_error(
    tmp_path: Path, images: Path, changes: list, cut: int | None
) -> None:
    file = tmp_path / "instances.json"
    file.write_text(mutated(changes)[:cut])
    judge(file, images)


@examples(200)
@given(
    damage=st.lists(
        st.tuples(st.sampled_from(["flip", "write", "insert", "drop"]), st.integers(0, 900), st.binary(max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_bytes_give_sound_arrays_or_the_readers_own_error(tmp_path: Path, images: Path, damage: list) -> None:
    raw = bytearray(json.dumps(VALID, ensure_ascii=False).encode())
    for how, place, bytes_there in damage:
        place %= len(raw)
        if how == "flip":
            raw[place] ^= 1 << (len(bytes_there) * 2 % 8)
        elif how == "write":
            raw[place : place + len(bytes_there)] = bytes_there
        elif how == "insert":
            raw[place:place] = bytes_there
        else:
            del raw[place : place + len(bytes_there)]
    file = tmp_path / "instances.json"
    file.write_bytes(bytes(raw))
    judge(file, images)
