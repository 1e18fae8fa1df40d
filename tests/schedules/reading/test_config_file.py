"""--cfg-options: values as MMEngine's DictAction reads them, put where Config.merge_from_dict puts them."""

import pytest

from schedules import ScheduleError
from schedules.errors import Place
from schedules.reading.config_file import set_options


def changed(values, *options):
    set_options(values, Place("file.py", lines={}), options)
    return values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-2", -2),
        ("1e-3", 0.001),
        ("true", True),
        ("False", False),
        ("None", None),
        ("none", "none"),
        ("text", "text"),
        ("'1'", "1"),
        ("1,2", [1, 2]),
        ("[1,a]", [1, "a"]),
        ("(1,2.5)", (1, 2.5)),
        ("[(1,2),(3,4)]", [(1, 2), (3, 4)]),
        ("[]", []),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_is_what_mmdetection_takes_it_for(text, value):
    found = changed({}, f"key={text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_keys_go_into_dicts_and_lists_and_new_ones_are_made():
    values = changed({"a": [{"b": 1}, {"b": 2}], "c": {}}, "a.1.b=3", "c.d.e=4", "f=5", "a.0=6")
    assert values == {"a": [6, {"b": 3}], "c": {"d": {"e": 4}}, "f": 5}


def test_errors_name_the_option_as_the_source_of_what_it_set():
    place = Place("file.py", lines={("a",): ("file.py", 1), ("a", "b"): ("file.py", 2), ("c",): ("file.py", 3)})
    set_options({"a": {"b": 1}, "c": {}}, place, ["a.b=2", "c.d.e=1"])
    assert str(place.at("a").at("b").error("wrong")) == "--cfg-options: a.b: wrong"
    assert str(place.at("c").at("d").error("wrong")) == "--cfg-options: c.d: wrong"
    assert str(place.at("a").error("wrong")) == "file.py, line 1: a: wrong"


@pytest.mark.parametrize("option", ["a", "=1", "a..b=1", "a.5=1", "a.x=1", "b.c=1", "a=[1", "a=1]", "a=" + "[" * 500])
def test_what_cannot_be_set_is_an_error(option):
    with pytest.raises(ScheduleError, match="--cfg-options"):
        changed({"a": [1, 2], "b": 3}, option)
