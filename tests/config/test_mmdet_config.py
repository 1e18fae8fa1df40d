"""detection.config.read_mmdet_config: equal to MMEngine's reading, or an error; nothing is executed."""

import hashlib
import importlib.util
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detection.config import ConfigError, read_mmdet_config
from tests.fuzzing import examples

REFERENCE = Path(__file__).parents[1] / "reference" / "mmdet_configs"
OWN = sorted((REFERENCE / "configs").rglob("*.py"))


def canonical(value):
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [canonical(item) for item in value]}
    if isinstance(value, set):
        return {"__set__": sorted(json.dumps(item) for item in value)}
    return [canonical(item) for item in value] if isinstance(value, list) else value


def text_of(values):
    return json.dumps(canonical(values), sort_keys=True, separators=(",", ":"))


@pytest.fixture
def read(tmp_path):
    def reader(text, **others):
        for name, content in {"mine": text, **others}.items():
            (tmp_path / f"{name}.py").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_mmdet_config(tmp_path / "mine.py")

    return reader


@pytest.mark.parametrize("path", OWN, ids=[path.stem for path in OWN])
def test_a_configuration_is_what_mmengine_makes_of_it(path):
    name = path.relative_to(REFERENCE / "configs").as_posix()
    expected = json.loads((REFERENCE / "resolved.json").read_text())[name]
    assert json.loads(text_of(read_mmdet_config(path))) == expected


def wheel_configs():
    if folder := os.environ.get("MMDET_CONFIGS"):
        return Path(folder)
    spec = importlib.util.find_spec("mmdet")
    return Path(spec.origin).parent / ".mim" / "configs" if spec and spec.origin else Path("nowhere")


@pytest.mark.slow
@pytest.mark.skipif(not wheel_configs().is_dir(), reason="MMDET_CONFIGS names no folder: mmdet/.mim/configs of a wheel")
def test_every_configuration_of_the_wheel_is_equal_or_refused_by_name():
    expected = json.loads((REFERENCE / "hashes.json").read_text())
    equal, refused, different = [], [], []
    for path in sorted(wheel_configs().rglob("*.py")):
        name = path.relative_to(wheel_configs()).as_posix()
        try:
            digest = hashlib.sha256(text_of(read_mmdet_config(path)).encode()).hexdigest()[:16]
        except ConfigError as error:
            assert str(wheel_configs()) in str(error)
            refused.append(name)
        else:
            (equal if expected.get(name) == digest else different).append(name)
    print(f"{len(equal)} of {len(expected)} equal, {len(refused)} refused, {len(different)} different")
    assert different == []
    assert len(equal) == len(expected) == 857
    assert len(refused) == 12


def test_variables_of_the_environment_fill_in(read, monkeypatch):
    text = "root = '{{$MY_ROOT:/data}}/x'\nclasses = {{$MY_CLASSES:80}}"
    assert read(text) == {"root": "/data/x", "classes": 80}
    monkeypatch.setenv("MY_ROOT", "/disk")
    monkeypatch.setenv("MY_CLASSES", "3")
    assert read(text) == {"root": "/disk/x", "classes": 3}
    with pytest.raises(ConfigError, match=r"mine\.py, line 2: the environment has no NOT_SET; set it"):
        read("a = 1\nroot = '{{$NOT_SET:}}'")


def test_a_base_file_that_is_changed_does_not_change_for_another(read):
    base, copy = "x = dict(a=dict(b=1))", "_base_ = 'base.py'\n_base_.x.a.b = 2"
    assert read("_base_ = 'copy.py'\ny = _base_.x\ny.a.c = 3", base=base, copy=copy)["x"] == {"a": {"b": 2, "c": 3}}
    assert read("_base_ = 'base.py'", base=base) == {"x": {"a": {"b": 1}}}


REFUSED = {
    "import": ("import os", r"line 1: an import found"),
    "function": ("def f():\n    pass", r"line 1: a function found"),
    "condition": ("if 1:\n    a = 1", r"line 1: a condition found"),
    "loop": ("for a in [1]:\n    b = a", r"line 1: a loop found"),
    "augmented": ("a = 1\na += 1", r"line 2: \+= or the like found"),
    "lambda": ("a = 1\nb = dict(c=lambda: 1)", r"line 2: b\.c: a function found"),
    "if inside": ("a = [x for x in [1] if x]", r"line 1: a: a condition in a comprehension"),
    "choice": ("a = 1 if 2 else 3", r"line 1: a: a condition found"),
    "call": ("a = dict(b=[open('x')])", r"line 1: a\.b\.0: a call found, open\(\.\.\.\)"),
    "method": ("a = 'x'\nb = a.format(1)", r"line 2: b: a call found, \.format\(\.\.\.\) of a str"),
    "dunder": ("a = ().__class__", r"line 1: a: a tuple of this file has no attribute __class__"),
    "attribute": ("a = dict(b=1)\nc = a.b", r"line 2: c: a dict of this file has no attribute b; write \['b'\]"),
    "name": ("a = dict(\n  b=c)", r"line 2: a\.b: the name c found, which no line before sets"),
    "missing key": ("a = dict(b=1)['c']", r"line 1: a: there is no key 'c'"),
    "index": ("a = [1][3]", r"line 1: a: cannot be computed: list index out of range"),
    "division": ("a = 1 // 0", r"line 1: a: cannot be computed: .*by zero"),
    "root": ("a = (-8) ** 0.5", r"line 1: a: the root of a negative number"),
    "format by %": ("a = '%9999999999d' % 1", r"line 1: a: arithmetic with a str and a int"),
    "bytes": ("a = b'x'", r"line 1: a: a Python Constant found"),
    "range": ("a = dict(b=range(3))", r"a\.b: a range, which no configuration can hold"),
    "enumerate": ("a = enumerate([1])", r"line 1: a: enumerate\(\.\.\.\) is not kept"),
    "base missing": ("\n_base_ = 'gone.py'", r"line 2: _base_: there is no file 'gone\.py' beside this one"),
    "base no text": ("_base_ = ['other.py', 3]", r"line 1: _base_: must be the name of a file"),
    "base twice": ("_base_ = []\n_base_ = []", r"line 2: _base_: set twice, first in line 1"),
    "other package": ("_base_ = 'mmdet::a/b.py'", r"_base_: 'mmdet::a/b\.py' is a file of another package"),
    "yaml": ("_base_ = 'mine.yaml'", r"_base_: there is no file 'mine\.yaml'"),
    "two bases": ("_base_ = ['other.py', './third.py']", r"line 1: _base_: two of the base files set x"),
    "error of a base": ("_base_ = 'broken.py'", r"broken\.py, line 2: b: the name zz found"),
    "dict over number": ("_base_ = 'other.py'\nx = dict(a=1)", r"line 2: x: is a dict here and none in the base"),
    "base key": ("_base_ = 'other.py'\na = _base_.y", r"line 2: a: the base files have no y there"),
    "reference": ("_base_ = 'other.py'\na = dict(b={{_base_.y.z}})", r"line 2: a\.b: the base files have no y\.z"),
    "reference in text": ("_base_ = 'other.py'\na = '{{_base_.x}}'", r"line 2: \{\{_base_\.\.\.\}\} inside a text"),
    "reference computed": ("_base_ = 'other.py'\na = {{_base_.x}} + 1", r"line 2: a: arithmetic with a BaseReference"),
    "key that is a method": ("_base_ = 'other.py'\n_base_.keys = 1", r"line 2: keys: \.keys is no key"),
    "reserved": ("filename = 'a'", r"line 1: filename: is a name that MMEngine keeps"),
    "twice": ("a = dict(b=1, b=2)", r"line 1: a\.b: set twice"),
    "itself": ("_base_ = 'mine.py'", r"inherits from itself: .*mine\.py -> .*mine\.py"),
    "syntax": ("a = (1", r"line 1: not readable as Python"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_with_file_line_and_key(read, case):
    text, message = case
    with pytest.raises(ConfigError, match=message) as caught:
        read(text, other="x = 1", third="x = 2", broken="a = 1\nb = zz")
    assert ".py" in str(caught.value)


def test_a_new_style_configuration_is_refused_with_its_old_style_equivalent(read):
    text = (
        "from mmengine.config import read_base\nwith read_base():\n    from .._base_.r50 import *\n    from .b import x"
    )
    with pytest.raises(ConfigError, match=r"line 2: is a new-style .* _base_ = \['\.\./_base_/r50\.py', '\./b\.py'\]"):
        read(text)


@pytest.mark.parametrize("name", ["gone.py", ".", "mine.yaml", "a\0b.py"])
def test_a_path_that_is_no_configuration_is_an_error(name, tmp_path):
    with pytest.raises(ConfigError):
        read_mmdet_config(tmp_path / name)


def test_nothing_in_a_file_is_executed(read, tmp_path):
    trace = tmp_path / "executed"
    touch = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    for text in (touch, f"a = {touch}", f"a = f'{{{touch}}}'", f"a = [1 for x in {touch}]", f"_base_ = {touch}"):
        with pytest.raises(ConfigError):
            read(text)
    assert not trace.exists()


DOUBLING = "a = [1]\n" + "a = [a, a]\n" * 40
HOSTILE = {
    "power": "a = 9 ** 9 ** 9",
    "product": "a = 10 ** 300\n" + "a = a * a\n" * 40,
    "long text": "a = 'x' * 10**12",
    "long list": "a = [0] * 10**9",
    "text again and again": "a = 'xx'\n" + "a = a + a\n" * 60,
    "numbers": "a = [x for x in range(10**15)]",
    "members": "a = {**{x: 1 for x in range(10**12)}}",
    "unpacked": "a = [*range(10**12)]",
    "enumerated": "a = [x for x in enumerate(range(10**12))]",
    "length": "a = len(range(10**40))",
    "width": "a = f'{1:999999999}'",
    "width in a name": "w = 10**9\na = f'{1:{w}}'",
    "doubling": DOUBLING,
    "doubling in a text": DOUBLING + "b = f'{a}'",
    "doubling as a key": DOUBLING.replace("[", "(").replace("]", ",)") + "b = {a: 1}",
    "doubling of dicts": "a = dict(x=1)\n" + "a = dict(x=a, y=a)\n" * 40,
    "into itself": "a = dict()\na['a'] = a",
    "list into itself": "a = []\na.append(a)",
    "while it is gone through": "a = [1]\nb = [a.append(1) for x in a]",
    "deep data": "a = []\n" + "a = [a]\n" * 3000,
    "deep base data": "_base_ = 'other.py'\na = dict()\n" + "a = dict(a=a)\n" * 3000 + "_base_.b = a",
    "brackets": "a = " + "[" * 150 + "]" * 150,
    "sum": "a = 1" + "+1" * 3000,
    "attributes": "a = b" + ".c" * 3000,
    "files": "_base_ = [" + "'other.py'," * 200 + "]",
    "NUL": "a = '\0'",
    "surrogate": "a = {'\\ud800': zz}",
    "too large": "#" * 300_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_an_error_that_can_be_printed(read, text):
    with pytest.raises(ConfigError) as caught:
        read(text, other="")
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text", ["{{" + " " * 200_000 + "$x:" + " " * 50_000, "{{$a:" * 9_000], ids=["spaces", "variables"]
)
def test_a_text_that_is_hard_to_search_for_variables_is_read(read, text):
    assert read(f"a = {text!r}") == {"a": text}


def test_files_that_each_read_the_next_twice_end(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.py").write_text(f"_base_ = ['{number + 1}.py', '{number + 1}.py']")
    with pytest.raises(ConfigError):
        read_mmdet_config(tmp_path / "0.py")


TOKENS = """( ) [ ] { } , = : . dict( _base_ _base_. {{_base_.model}} .update( .pop( .copy() del * ** -1 // 0 1e999 0x
None 'x' f'{1}' 'base/data.py' for x in range(3) enumerate( lambda: __class__ import if else \\ # == ; @ 9**9 é"""
PIECES = [*TOKENS.split(), "\n", "\0", " for "]


@given(seed=st.integers(0, 2**32))
@examples(150)
def test_a_mutated_configuration_gives_values_or_an_error(tmp_path_factory, seed):
    draw = random.Random(seed)
    text = draw.choice(OWN).read_text()
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(text))
        text = text[:start] + draw.choice(PIECES) + text[start + draw.choice((0, 0, 1, 5, 40)) :]
    path = tmp_path_factory.getbasetemp() / "mutated.py"
    path.write_bytes(text.replace("base/", f"{REFERENCE}/configs/base/").encode())
    try:
        assert isinstance(read_mmdet_config(path), dict)
    except ConfigError as error:
        assert ".py" in str(error)
