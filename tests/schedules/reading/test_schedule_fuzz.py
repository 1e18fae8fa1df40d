"""Schedule files with text that does not belong there: the reader's own error comes out, or a schedule."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import schedules
from schedules import ScheduleError, load_schedule, schedule_from_dict
from tests.fuzzing import examples

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bounded_memory")]

SOURCES = [(Path(schedules.__file__).parent / f"schedule_{name}.py").read_text() for name in ("1x", "2x", "20e")]
SNIPPETS = st.sampled_from(
    ["(", ")", "[", "]", "{", "}", ",", "=", "dict(", "-", "1e999", "None", "True", "'", '"""', "\n", "\0", "lambda:0",
     "*", "**", ":", "0x", "\\", "é", "type", "0.5", "99999999999999999999", "end", "by_epoch", "#", "f'{1}'", "-1"]
)  # fmt: skip


@st.composite
def mutated(draw):
    text = draw(st.sampled_from(SOURCES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.integers(0, 12))
        text = text[:start] + draw(st.one_of(SNIPPETS, st.text(max_size=5))) + text[stop:]
    return text.encode("utf-8", "surrogatepass")


@examples(300)
@given(content=mutated())
def test_a_mutated_file_gives_a_schedule_or_a_schedule_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "mutated.py"
    path.write_bytes(content)
    try:
        schedule = load_schedule(path)
    except ScheduleError as error:
        assert str(path) in str(error)
        return
    assert schedule_from_dict(schedule.to_dict()) == schedule
    for iteration in (0, 1, 499, 5000):
        assert isinstance(schedule.learning_rate(iteration, 50), float)
