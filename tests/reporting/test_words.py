import pytest

from detection.reporting import counted, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00"), (90061, "1 d 01:01:01")),
        *((float("inf"), "?"), (float("nan"), "?"), (-1, "?")),
    ],
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_one_thing_and_several_are_told_apart():
    assert [counted(1, "image"), counted(2000, "image")] == ["1 image", "2,000 images"]
    assert counted(0, "process", "processes") == "0 processes"
