"""What a run says: lines on the terminal and in train.log, and progress as a bar or, where there is no
terminal, as lines."""

import contextlib
import itertools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from detection.reporting.words import duration

PLAIN_PERCENT = 10  # a plain progress line each so many percent of the work ...
PLAIN_PERCENT_SECONDS = 5.0  # ... but no sooner than this after the last one,
PLAIN_SECONDS = 30.0  # and in any case after this long

BAR_COLUMNS = 42  # a bar of ten columns, and tqdm's own "100%", "[1:23:45<1:23:45, 12.34it/s"

_YELLOW, _RESET = "\x1b[33m", "\x1b[0m"

_LARGE = 1e6  # losses of a run that diverges

_FIGURE_FORMATS = {
    "lr": "lr {:.4g}",
    "loss": "loss {:.4f}",
    "images_per_second": "{:.1f} images/s",
    "memory_gb": "{:.1f} GB",
}


class Console:
    """The voice of one process.

    The main process speaks on `stream` (standard output) and in the log file. Other processes are silent
    but for warnings, which go to `error_stream` (standard error) with the rank's number. The log
    file gets every line of the main process and every warning of all, with the time, in single appends, so
    that processes do not cut into each other's lines; it is created at the first line. Neither a full disk nor a
    reader that is gone (a closed terminal, `| head`) ends a run for the sake of its words: what cannot be said is lost.
    """

    def __init__(
        self,
        log_file: str | Path | None = None,
        *,
        is_main: bool = True,
        rank: int = 0,
        stream: TextIO | None = None,
        error_stream: TextIO | None = None,
    ) -> None:
        self.is_main = is_main
        self.rank = rank
        self.stream = sys.stdout if stream is None else stream
        self.error_stream = sys.stderr if error_stream is None else error_stream
        self.log_file = None if log_file is None else Path(log_file)
        self._lock = threading.Lock()
        self._log_is_whole = True

    @property
    def has_unicode(self) -> bool:
        """Whether the stream can show block characters."""
        return (getattr(self.stream, "encoding", None) or "ascii").lower().replace("-", "") == "utf8"

    @property
    def width(self) -> int:
        """Columns to fill: the terminal's, at most 120; 100 where there is none."""
        return min(shutil.get_terminal_size((100, 24)).columns, 120)

    def say(self, text: str = "") -> None:
        """One or more lines for whoever watches the run."""
        if self.is_main:
            self._print(text, self.stream)
            self.log(text)

    def warn(self, text: str) -> None:
        """Something that the run survives and its owner should know."""
        text = f"warning: {text}" if self.is_main else f"[rank {self.rank}] warning: {text}"
        self._print(f"{_YELLOW}{text}{_RESET}" if _may_color(self.error_stream) else text, self.error_stream)
        self.log(text)

    def progress(self, total: int, *, initial: int = 0, description: str = "", unit: str = "it") -> "ProgressBar":
        """A bar over `total` steps of which `initial` are done; silent on other processes than the main one."""
        return ProgressBar(self, total, initial, description, unit)

    def _print(self, text: str, stream: TextIO) -> None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):
            tqdm.write(text.encode(encoding, "replace").decode(encoding), file=stream)
            stream.flush()

    def log(self, text: str) -> None:
        """One or more lines for the log file alone."""
        if self.log_file is None:
            return
        now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{now}  {line}".rstrip() + "\n" for line in (text.splitlines() or [""]))
        # A line of which a part was written before the disk was full is ended first.
        content = (lines if self._log_is_whole else "\n" + lines).encode()
        try:
            with self._lock, self.log_file.open("ab", buffering=0) as file:
                if file.write(content) != len(content):
                    raise OSError("no space for the whole line")
        except OSError as error:
            if self._log_is_whole:
                self._print(f"warning: {self.log_file} lacks lines from here on ({error})", self.error_stream)
            self._log_is_whole = False
        else:
            self._log_is_whole = True


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """Progress over a known number of steps, made by Console.progress; a context manager.

    On a terminal a tqdm bar; elsewhere a line each PLAIN_PERCENT percent or PLAIN_SECONDS seconds, and one
    at the end. The log file gets the lines in both cases.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        initial: int = 0,
        description: str = "",
        unit: str = "it",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.initial, self.done = total, initial, initial
        self.description, self.unit = description, unit
        self._console, self._clock = console, clock
        self._figures: dict[str, Any] = {}
        self._started = self._last_time = clock()
        self._last_done = initial
        self._bar = None
        if console.is_main and _is_terminal(console.stream):
            has_size = _has_size(console.stream)
            with contextlib.suppress(OSError):
                self._bar = tqdm(
                    total=total,
                    initial=initial,
                    desc=description or None,
                    unit=unit,
                    file=console.stream,
                    dynamic_ncols=has_size,
                    ncols=None if has_size else console.width,
                    nrows=None if has_size else 24,
                    ascii=not console.has_unicode,
                    colour="green" if _may_color(console.stream) else None,
                    leave=False,
                )

    def update(self, steps: int = 1, **figures: Any) -> None:
        """`steps` more are done. Figures given are shown from now on: loss=1.2, lr=0.02, images_per_second=31.5, ..."""
        self.done += steps
        self._figures |= figures
        if self._bar is not None:
            if figures:
                self._bar.set_postfix_str(self._figures_that_fit(), refresh=False)
            with contextlib.suppress(OSError):
                self._bar.update(steps)
        if self._line_is_due():
            self._put_line()

    def close(self) -> None:
        """Ends the bar, and says how far it came where the last line did not."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
        if self.done != self._last_done:
            self._put_line()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def line(self) -> str:
        """The progress as one plain line, e.g. "epoch 2/12  500/7330   7%  2:30 < 34:10  loss 0.8123  lr 0.02"."""
        elapsed = self._clock() - self._started
        percent = 100 * self.done // self.total if self.total else 100
        times = duration(elapsed)
        if self.initial < self.done < self.total:
            times += " < " + duration(elapsed / (self.done - self.initial) * (self.total - self.done))
        count = f"{self.done:>{len(str(self.total))}}/{self.total} {self.unit}"
        return "  ".join([*filter(None, [self.description]), count, f"{percent:3d}%", times, *self._shown_figures()])

    def _shown_figures(self) -> list[str]:
        return [_shown_figure(name, value) for name, value in self._figures.items() if value is not None]

    def _figures_that_fit(self) -> str:
        """Those that leave the bar some columns; the bar itself would cut one off in the middle of its digits."""
        room = self._console.width - len(self.description) - len(f"{self.total}/{self.total}") - BAR_COLUMNS
        lengths = itertools.accumulate(len(figure) + 2 for figure in self._shown_figures())
        pairs = zip(self._shown_figures(), lengths, strict=True)
        return ", ".join(figure for figure, length in pairs if length <= room)

    def _line_is_due(self) -> bool:
        seconds = self._clock() - self._last_time
        before, now = (100 * done // max(self.total, 1) // PLAIN_PERCENT for done in (self._last_done, self.done))
        least_seconds = PLAIN_PERCENT_SECONDS if now > before else PLAIN_SECONDS
        return self.done >= self.total or seconds >= least_seconds

    def _put_line(self) -> None:
        self._last_time, self._last_done = self._clock(), self.done
        if self._bar is None:
            self._console.say(self.line())
        else:
            self._console.log(self.line())


def _has_size(terminal: TextIO) -> bool:
    """Whether the terminal knows its size: in some containers it says 0 x 0, where tqdm would draw nothing."""
    try:
        return 0 not in os.get_terminal_size(terminal.fileno())
    except (OSError, ValueError):
        return False


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _may_color(stream: TextIO) -> bool:
    return _is_terminal(stream) and not os.environ.get("NO_COLOR")


def _shown_figure(name: str, value: Any) -> str:
    if isinstance(value, float) and abs(value) >= _LARGE:
        return f"{name} {value:.3e}"
    if name in _FIGURE_FORMATS:
        with contextlib.suppress(TypeError, ValueError):
            return _FIGURE_FORMATS[name].format(value)
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
