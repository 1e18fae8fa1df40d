"""Interleaved timing: every variant once a round, medians with their spread, ratios from pairs of the same round."""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Say = Callable[[str], None]
"""Tells on stderr how far a benchmark is."""
Samples = dict[str, dict[str, list[float]]]
"""name -> quantity ("seconds", "cpu_seconds", ...) -> its value in each round."""
CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
"""--clock -> the quantity that ratios are taken of."""


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as asked for."""


def rotated(names: Sequence[str], repeats: int) -> Iterator[list[str]]:
    """The names once a round, in an order that rotates: what slows the machine for a while slows all of them."""
    for number in range(repeats):
        shift = number % len(names)
        yield [*names[shift:], *names[:shift]]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    wait: Callable[[], None] = lambda: None,
    say: Say = lambda text: None,
    settle: Callable[[str], object] = lambda name: None,
) -> Samples:
    """Time each of `runs` once a round, `repeats` rounds, after one untimed round.

    `wait` ends when the device has done all it was given. `settle(name)` goes before each timed run of that name.
    """
    samples: Samples = {name: {"seconds": [], "cpu_seconds": []} for name in runs}
    for name, run in runs.items():
        start = time.perf_counter()
        run()
        wait()
        say(f"warm: {name} ({time.perf_counter() - start:.1f} s)")
    for number, names in enumerate(rotated(list(runs), repeats), start=1):
        for name in names:
            gc.collect()
            settle(name)
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            wait()
            samples[name]["cpu_seconds"].append(time.process_time() - cpu)
            samples[name]["seconds"].append(time.perf_counter() - wall)
        say(f"round {number} of {repeats}")
    return samples


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a fresh process: its memory and imports are the call's alone."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """median, min, max and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def pairwise_ratio(values: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """How many times faster than the peer: the peer's seconds over ours, round by round."""
    return spread([theirs / ours for ours, theirs in zip(values, peer, strict=True)])


def figure_rows(samples: Samples, peers: Sequence[str], key: str, *, units: float = 1.0) -> list[dict[str, Any]]:
    """JSON rows: the spread of each quantity, and by `key` the ratio to each of `peers`.

    A round holds `units` (steps, images, ...): quantities in seconds are given for one of them.
    """
    rows: list[dict[str, Any]] = []
    for name, quantities in samples.items():
        row: dict[str, Any] = {"name": name}
        for quantity, values in quantities.items():
            per_unit = units if quantity.endswith("seconds") else 1.0
            row[quantity] = spread([value / per_unit for value in values])
        known = [peer for peer in peers if peer in samples]
        row["ratios"] = {peer: pairwise_ratio(quantities[key], samples[peer][key]) for peer in known}
        rows.append(row)
    return rows


def figure_table(
    rows: Sequence[Mapping[str, Any]],
    key: str,
    heading: str,
    scale: float = 1.0,
    **more: Callable[[Mapping[str, Any]], str],
) -> str:
    """The rows as a table: median and spread of `key` times `scale`, columns of `more`, ratios to the peers.

    more: heading, with _ for a space, and what makes the cell from the row.
    """
    peers = list(rows[0]["ratios"])
    headers = ["", heading, "min..max", *(name.replace("_", " ") for name in more), *(f"x {peer}" for peer in peers)]
    cells = []
    for row in rows:
        middle, low, high = (row[key][which] * scale for which in ("median", "min", "max"))
        line = [row["name"], f"{middle:.2f}", f"{low:.2f}..{high:.2f}", *(cell(row) for cell in more.values())]
        cells.append(line + [ratio_cell(row["ratios"][peer]) for peer in peers])
    return format_table(headers, cells)


def ratio_cell(ratio: Mapping[str, Any], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['min']:.{digits}f}..{ratio['max']:.{digits}f})"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = []
    for cells in (headers, ["-" * width for width in widths], *rows):
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append("  ".join([cells[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)
