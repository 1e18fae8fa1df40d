"""Interleaved timing: every variant once a round, medians with their spread, ratios from pairs of the same round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked for."""


@dataclass
class Samples:
    """One variant's seconds by round: on the wall clock, and of all threads of this process together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def by(self, clock: str) -> list[float]:
        """clock: wall or cpu."""
        return self.wall if clock == "wall" else self.cpu


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    wait: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    settle: Mapping[str, Callable[[Callable[[], object]], None]] | None = None,
) -> dict[str, Samples]:
    """Time each of `runs` once a round, `repeats` rounds, after one untimed round.

    Whatever else slows the machine for a while slows all variants of a round alike, and the order rotates from round
    to round. `wait` ends when the device has done all it was given. `settle` has, by name, what goes before each
    timed run and does not count; it is given the run.
    """
    names = list(runs)
    settle = settle or {}
    samples = {name: Samples() for name in names}
    for name in names:
        start = time.perf_counter()
        runs[name]()
        wait()
        say(f"warm: {name} ({time.perf_counter() - start:.1f} s)")
    for number in range(repeats):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            if name in settle:
                settle[name](runs[name])
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            wait()
            samples[name].cpu.append(time.process_time() - cpu)
            samples[name].wall.append(time.perf_counter() - wall)
        say(f"round {number + 1} of {repeats}")
    return samples


def spread(values: Sequence[float]) -> dict[str, Any]:
    """median, min, max and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def pairwise_ratio(values: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """How many times faster than the peer: the peer's seconds over ours, round by round."""
    return spread([theirs / ours for ours, theirs in zip(values, peer, strict=True)])


def timing_rows(
    samples: Mapping[str, Samples], peers: Sequence[str], *, units: float, clock: str = "wall"
) -> list[dict[str, Any]]:
    """JSON rows: seconds and cpu_seconds a unit (a step, an image, ...; a round holds `units` of them), and the ratio
    to each of `peers` by `clock`."""
    rows = []
    for name, sample in samples.items():
        seconds = sample.by(clock)
        rows.append(
            {
                "name": name,
                "seconds": spread([value / units for value in sample.wall]),
                "cpu_seconds": spread([value / units for value in sample.cpu]),
                "ratios": {peer: pairwise_ratio(seconds, samples[peer].by(clock)) for peer in peers if peer in samples},
            }
        )
    return rows


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for cells in (headers, ["-" * width for width in widths], *rows):
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def timing_table(rows: Sequence[Mapping[str, Any]], *, clock: str = "wall", rate: str = "", units: float = 1.0) -> str:
    """The rows as a table in milliseconds.

    Args:
        rate: heading of a column of `units` per second; none without.
    """
    key = "seconds" if clock == "wall" else "cpu_seconds"
    peers = list(rows[0]["ratios"])
    headers = ["", f"ms ({clock})", "min..max", *([rate] if rate else []), *[f"x {peer}" for peer in peers]]
    cells = []
    for row in rows:
        seconds = row[key]
        line = [row["name"], f"{seconds['median'] * 1e3:.2f}"]
        line.append(f"{seconds['min'] * 1e3:.2f}..{seconds['max'] * 1e3:.2f}")
        if rate:
            line.append(f"{units / seconds['median']:.2f}")
        for peer in peers:
            ratio = row["ratios"][peer]
            line.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})")
        cells.append(line)
    return format_table(headers, cells)
