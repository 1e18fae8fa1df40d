import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from detection.reporting import Console, ProgressBar


class Stream(io.StringIO):
    """A stream that is, or is not, a terminal."""

    def __init__(self, terminal, encoding="utf-8"):
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return self._terminal


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def log(tmp_path):
    """log(): the lines of the log file without their times."""
    return lambda: [line[21:] for line in (tmp_path / "train.log").read_text().splitlines()]


def make_console(tmp_path, stream=None, **settings):
    stream = Stream(False) if stream is None else stream
    return Console(tmp_path / "train.log", stream=stream, error_stream=type(stream)(stream.isatty()), **settings)


def run_progress(console, total, seconds_a_step, **settings):
    now = 0.0
    progress = ProgressBar(console, total, clock=lambda: now, **settings)
    for _ in range(progress.initial, total):
        now += seconds_a_step
        progress.update(loss=1.25, lr=0.02)
    progress.close()
    return console.stream.getvalue().splitlines()


def test_what_is_said_is_on_the_stream_and_in_the_log_with_the_time(tmp_path, log):
    for text in ("one\ntwo", "of a later process"):
        console = make_console(tmp_path)
        console.say(text)
        assert console.stream.getvalue() == text + "\n"
    assert log() == ["one", "two", "of a later process"]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  one\n", (tmp_path / "train.log").read_text())


def test_other_ranks_print_nothing_but_warnings_with_their_number(tmp_path, log):
    console = make_console(tmp_path, is_main=False, rank=3)
    console.say("hello")
    with console.progress(2) as bar:
        bar.update(2)
    assert not (tmp_path / "train.log").exists()
    console.warn("image 7 is unreadable")
    assert console.stream.getvalue() == ""
    assert console.error_stream.getvalue() == "[rank 3] warning: image 7 is unreadable\n"
    assert log() == ["[rank 3] warning: image 7 is unreadable"]


@pytest.mark.parametrize(
    ("variable", "value", "colored"), [("ANY", "1", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)]
)
def test_colors_and_bars_are_only_where_the_terminal_takes_them(tmp_path, monkeypatch, log, variable, value, colored):
    monkeypatch.setenv(variable, value)
    console = make_console(tmp_path, Stream(True))
    console.warn("careful")
    assert ("\x1b[" in console.error_stream.getvalue()) == colored
    assert log() == ["warning: careful"]
    with console.progress(10) as bar:
        bar.update(10)
    assert ("\r" in console.stream.getvalue()) == (value != "dumb")


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path):
    console = make_console(tmp_path / "missing")
    console.say("one")
    console.say("two")
    assert console.stream.getvalue() == "one\ntwo\n"
    assert console.error_stream.getvalue().count("lacks lines from here on") == 1


def test_the_log_goes_on_in_a_new_line_when_there_is_room_again(tmp_path, monkeypatch, log):
    console = make_console(tmp_path)
    console.say("one")

    class Full(io.FileIO):
        def write(self, content):
            return super().write(content[: len(content) // 2])

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering: Full(self, mode.replace("b", "")))
    console.say("two, of which half is written")
    monkeypatch.undo()
    console.say("three")
    console.say("four")
    lines = log()
    assert (lines[:1], lines[2:]) == (["one"], ["three", "four"])
    assert console.error_stream.getvalue().count("warning") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_who_listens_does_not_end_the_run(tmp_path, log, terminal):
    class Deaf(Stream):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    console = make_console(tmp_path, Deaf(terminal))
    console.say("one")
    console.warn("two")
    with console.progress(3) as bar:
        for _ in range(3):
            bar.update(loss=1.0)
    lines = log()
    assert lines[:2] == ["one", "warning: two"]
    assert "3/3 it  100%" in lines[2]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["/dev/full", "a pipe that is closed"])
def test_a_process_ends_with_its_own_status_though_nobody_can_hear_it(output):
    if output == "/dev/full" and not Path(output).exists():
        pytest.skip("the system has no /dev/full")
    code = (
        "from detection.process_exit import leave\nfrom detection.reporting import Console\n"
        "for _ in range(9): Console().say('x' * 9999)\nleave(7)"
    )
    if output == "/dev/full":
        with Path(output).open("w") as stream:
            assert subprocess.run([sys.executable, "-c", code], stdout=stream, check=False).returncode == 7
        return
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait(60) == 7


def test_characters_that_the_stream_cannot_show_are_replaced():
    console = Console(None, stream=Stream(False, encoding="ascii"), error_stream=Stream(False))
    assert not console.has_unicode
    console.say("§ 5")
    assert console.stream.getvalue() == "? 5\n"


def test_without_a_terminal_progress_is_a_line_each_ten_percent_and_the_last(tmp_path):
    lines = run_progress(make_console(tmp_path), 100, 1.0, description="epoch 1/12", unit="iterations")
    assert [re.search(r"(\d+)/100", line).group(1) for line in lines] == [str(n) for n in range(10, 101, 10)]
    assert lines[4] == "epoch 1/12   50/100 iterations   50%  0:50 < 0:50  loss 1.2500  lr 0.02"


def test_slow_progress_is_a_line_each_half_minute_and_fast_progress_one_line(tmp_path):
    lines = run_progress(make_console(tmp_path), 1000, 10.0)
    assert [int(line.split("/")[0]) for line in lines[:33]] == list(range(3, 100, 3))
    (line,) = run_progress(make_console(tmp_path), 1000, 0.001)
    assert line.startswith("1000/1000")


def test_progress_that_starts_in_the_middle_counts_its_pace_from_there(tmp_path):
    lines = run_progress(make_console(tmp_path), 100, 1.0, initial=80)
    assert lines[0].startswith(" 90/100 it   90%  0:10 < 0:10")


def test_progress_that_ends_early_says_how_far_it_came_and_a_huge_loss_is_short(tmp_path):
    console = make_console(tmp_path)
    with console.progress(10) as bar:
        bar.update(3, loss=2.3e31)
    shown = console.stream.getvalue()
    assert shown.startswith(" 3/10 it   30%") and shown.endswith("loss 2.300e+31\n")


@pytest.mark.parametrize(("columns", "shown"), [(80, {"loss"}), (120, {"loss", "images/s", "lr"})])
def test_a_bar_leaves_out_what_it_cannot_show_whole(tmp_path, monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    console = make_console(tmp_path, Stream(True))
    with console.progress(90, description="training") as bar:
        time.sleep(0.2)  # tqdm draws ten times a second
        bar.update(90, loss=2.89041, images_per_second=31.5, lr=0.000280123)
    drawn = console.stream.getvalue()
    assert {word for word in ("loss", "images/s", "lr") if re.search(rf"[ ,]{word}\b", drawn)} == shown
    assert "loss 2.8904" in drawn and ("lr 0.0002801" in drawn) == ("lr" in shown)


def test_on_a_terminal_progress_is_a_bar_and_the_log_gets_lines(tmp_path, log):
    console = make_console(tmp_path, Stream(True))
    with console.progress(10, description="validation") as bar:
        for _ in range(10):
            bar.update(loss=0.5)
        console.say("a line in between")
    shown = console.stream.getvalue()
    assert "\r" in shown
    assert "a line in between\n" in shown
    assert any("validation  10/10" in line for line in log())
    assert "\r" not in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(("size", "no_color"), [((24, 80), False), ((0, 0), True)])
def test_a_bar_is_drawn_on_a_real_terminal_also_of_unknown_size_and_colors_follow_no_color(size, no_color, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        with Console(stream=stream).progress(3, description="epoch") as bar:
            for _ in range(3):
                bar.update(loss=0.5)
        shown = os.read(controller, 65536)
    os.close(controller)
    assert b"epoch" in shown
    assert b"\r" in shown.replace(b"\r\n", b"")
    assert (b"\x1b[32m" in shown or b"\x1b[38;" in shown) != no_color
