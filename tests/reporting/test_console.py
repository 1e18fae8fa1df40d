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
from pathlib import Path

import pytest

from detection.reporting import Console, ProgressBar, duration, remaining

ROOT = Path(__file__).resolve().parents[2]


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


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def make_console(tmp_path, terminal=False, **settings):
    return Console(tmp_path / "train.log", stream=Stream(terminal), error_stream=Stream(terminal), **settings)


def run_progress(console, total, seconds_a_step, **settings):
    clock = Clock()
    progress = ProgressBar(console, total, clock=clock, **settings)
    for _ in range(progress.initial, total):
        clock.now += seconds_a_step
        progress.update(loss=1.25, lr=0.02)
    progress.close()
    return console.stream.getvalue().splitlines()


def test_what_is_said_is_on_the_stream_and_in_the_log_with_the_time(tmp_path):
    console = make_console(tmp_path)
    console.say("one\ntwo")
    assert console.stream.getvalue() == "one\ntwo\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines] == ["one", "two"]
    assert lines[0] != "one"


def test_the_log_of_an_earlier_process_is_continued(tmp_path):
    make_console(tmp_path).say("first")
    make_console(tmp_path).say("second")
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


def test_other_ranks_print_nothing_but_warnings_and_errors_with_their_number(tmp_path):
    console = make_console(tmp_path, is_main=False, rank=3)
    console.say("hello")
    with console.progress(2) as bar:
        bar.update(2)
    assert not (tmp_path / "train.log").exists()
    console.warn("image 7 is unreadable")
    console.error("out of memory")
    assert console.stream.getvalue() == ""
    assert console.error_stream.getvalue().splitlines() == [
        "[rank 3] warning: image 7 is unreadable",
        "[rank 3] error: out of memory",
    ]
    assert "[rank 3] warning: image 7 is unreadable" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    ("variable", "value", "colored"), [("ANY", "1", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)]
)
def test_warnings_are_colored_only_where_color_is_wanted(tmp_path, monkeypatch, variable, value, colored):
    monkeypatch.setenv(variable, value)
    console = make_console(tmp_path, terminal=True)
    console.warn("careful")
    assert ("\x1b[" in console.error_stream.getvalue()) == colored
    assert "\x1b[" not in (tmp_path / "train.log").read_text()


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path):
    console = Console(tmp_path / "missing" / "train.log", stream=Stream(False), error_stream=Stream(False))
    console.say("one")
    console.say("two")
    assert console.stream.getvalue() == "one\ntwo\n"
    assert console.error_stream.getvalue().count("lacks lines from here on") == 1


def test_the_log_goes_on_in_a_new_line_when_there_is_room_again(tmp_path, monkeypatch):
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
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[21:] for line in lines[0:1] + lines[2:]] == ["one", "three", "four"]
    assert len(lines) == 4
    assert console.error_stream.getvalue().count("warning") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_who_listens_does_not_end_the_run(tmp_path, terminal):
    class Deaf(Stream):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    console = Console(tmp_path / "train.log", stream=Deaf(terminal), error_stream=Deaf(terminal))
    console.say("one")
    console.warn("two")
    with console.progress(3) as bar:
        for _ in range(3):
            bar.update(loss=1.0)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[21:] for line in lines[:2]] == ["one", "warning: two"]
    assert "3/3 it  100%" in lines[2]


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


def test_characters_that_the_stream_cannot_show_are_replaced(tmp_path):
    console = Console(None, stream=Stream(False, encoding="ascii"), error_stream=Stream(False))
    assert not console.has_unicode
    console.say("§ 5")
    assert console.stream.getvalue() == "? 5\n"


def test_without_a_terminal_progress_is_a_line_each_ten_percent_and_the_last(tmp_path):
    lines = run_progress(make_console(tmp_path), 100, 1.0, description="epoch 1/12", unit="iterations")
    assert [re.search(r"(\d+)/100", line).group(1) for line in lines] == [str(n) for n in range(10, 101, 10)]
    assert lines[4] == "epoch 1/12   50/100 iterations   50%  0:50 < 0:50  loss 1.2500  lr 0.02"


@pytest.mark.parametrize(("columns", "shown"), [(80, ["loss"]), (120, ["loss", "images/s", "lr 0.00028012"])])
def test_a_bar_leaves_out_what_it_cannot_show_whole(tmp_path, monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    console = make_console(tmp_path, terminal=True)
    with console.progress(90, description="training") as bar:
        bar.update(loss=2.89041, images_per_second=31.5, lr=0.000280123)
        drawn = bar._bar.postfix
    for word in ("loss", "images/s", "lr"):
        assert (word in drawn) == any(word in each for each in shown), drawn
    assert "loss 2.8904" in drawn


def test_a_loss_beyond_all_bounds_is_short(tmp_path):
    console = make_console(tmp_path)
    with console.progress(1) as bar:
        bar.update(loss=2.3e31)
    assert console.stream.getvalue().endswith("loss 2.300e+31\n")


def test_slow_progress_is_a_line_each_half_minute(tmp_path):
    lines = run_progress(make_console(tmp_path), 1000, 10.0)
    counts = [int(line.split("/")[0]) for line in lines]
    assert counts[:3] == [3, 6, 9]
    assert counts[-1] == 1000
    assert {3} <= {after - before for before, after in zip(counts, counts[1:], strict=False)} <= {1, 2, 3}


def test_fast_progress_is_one_line(tmp_path):
    assert len(run_progress(make_console(tmp_path), 1000, 0.001)) == 1


def test_progress_that_starts_in_the_middle_counts_its_pace_from_there(tmp_path):
    lines = run_progress(make_console(tmp_path), 100, 1.0, initial=80)
    assert lines[0].startswith(" 90/100 it   90%  0:10 < 0:10")


def test_progress_that_ends_early_says_how_far_it_came(tmp_path):
    console = make_console(tmp_path)
    with console.progress(10) as bar:
        bar.update(3)
    assert console.stream.getvalue().startswith(" 3/10 it   30%")


def test_on_a_terminal_progress_is_a_bar_and_the_log_gets_lines(tmp_path):
    console = make_console(tmp_path, terminal=True)
    with console.progress(10, description="validation") as bar:
        for _ in range(10):
            bar.update(loss=0.5)
        console.say("a line in between")
    shown = console.stream.getvalue()
    assert "\r" in shown
    assert "a line in between\n" in shown
    log = (tmp_path / "train.log").read_text()
    assert "validation  10/10" in log
    assert "\r" not in log


def test_a_dumb_terminal_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = make_console(tmp_path, terminal=True)
    with console.progress(10) as bar:
        bar.update(10)
    assert "\r" not in console.stream.getvalue()


@pytest.mark.parametrize(("size", "no_color"), [((24, 80), False), ((0, 0), True)])
def test_a_bar_is_drawn_on_a_real_terminal_also_of_unknown_size_and_colors_follow_no_color(no_color, size):
    program = (
        "from detection.reporting.console import Console\n"
        "console = Console()\n"
        "with console.progress(3, description='epoch') as bar:\n"
        "    for _ in range(3):\n"
        "        bar.update(loss=0.5)\n"
    )
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    if no_color:
        environment["NO_COLOR"] = "1"
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=terminal, stderr=subprocess.STDOUT, env=environment
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                block = os.read(controller, 65536)
            except OSError:  # how Linux says that the other end of a pseudo-terminal is closed
                break
            if not block:
                break
            shown += block
    os.close(controller)
    assert process.returncode == 0, shown.decode()
    assert b"epoch" in shown
    assert b"\r" in shown.replace(b"\r\n", b"")
    assert (b"\x1b[32m" in shown or b"\x1b[38;" in shown) != no_color


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.4, "59:59"),
        (3600, "1:00:00"),
        (90061, "1 d 01:01:01"),
        (float("inf"), "?"),
        (float("nan"), "?"),
        (-1, "?"),
    ],
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_remaining_time_follows_the_pace_so_far():
    assert remaining(60, 10, 40) == "3:00"
    assert remaining(60, 0, 40) == "?"
