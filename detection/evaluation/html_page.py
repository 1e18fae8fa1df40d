"""What the HTML pages are made of: a page that needs nothing beside it, tables, and line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

import numpy as np
import numpy.typing as npt

# Okabe and Ito's palette, told apart by the color-blind as well.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MOST_POINTS = 300
"""Of a curve; a longer one is drawn as means, with the range from the least to the largest value behind them."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 338, 10, 210
_OUTLIERS = 0.005
"""Part of a long curve's values that may run out of its chart: the first losses would flatten all others."""


def html_page(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML; the title is text."""
    files = resources.files("detection.evaluation")
    page, style, script = (files.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    return Template(page).substitute(title=escape(title), style=style, script=script, body=body)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    sortable: bool = False,
    is_text: bool = False,
    meanings: Mapping[str, str] | None = None,
) -> str:
    """A table of texts. is_text: aligned to the left. meanings: what a heading means, by its text, as a tooltip."""
    heads = "".join(
        f'<th title="{escape(meanings[cell])}">{escape(cell)}</th>'
        if meanings and cell in meanings
        else f"<th>{escape(cell)}</th>"
        for cell in head
    )
    lines = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = " ".join([*(["sortable"] if sortable else []), *(["text"] if is_text else [])])
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>\n{lines}\n'
        "</tbody></table></div>"
    )


def meanings_list(summary: str, meanings: Mapping[str, str]) -> str:
    """Terms and what they mean, folded under `summary`."""
    pairs = "".join(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in meanings.items())
    return f"<details><summary>{escape(summary)}</summary><dl>{pairs}</dl></details>"


def color_key(names: Mapping[str, str], colors: Mapping[str, str], gap: str = "") -> str:
    """What each color means."""
    keys = (
        f'<span class="key"><i style="background:{colors[key]}"></i>{escape(name)}</span>'
        for key, name in names.items()
    )
    return "".join(key + gap for key in keys)


def fraction(value: float | None) -> str:
    """A figure between 0 and 1; a dash where it is undefined."""
    return "–" if value is None or value < 0 else f"{value:.3f}"


@dataclass(frozen=True)
class Curve:
    """Values over x, float [n] each, finite, x ascending. dots: each value is marked."""

    x: npt.NDArray[np.floating]
    y: npt.NDArray[np.floating]
    dots: bool = False


def line_chart(title: str, curves: Mapping[str, Curve], *, x_name: str, from_zero: bool = False) -> str:
    """A figure of curves by name; empty where no curve has a point.

    from_zero: the vertical axis begins at 0 at the latest.
    """
    curves = {name: curve for name, curve in curves.items() if len(curve.x)}
    if not curves:
        return ""
    drawn = {name: _binned(curve) for name, curve in curves.items()}
    values = np.concatenate([np.concatenate([least, largest]) for _, _, least, largest in drawn.values()])
    cut = _OUTLIERS if len(values) >= _MOST_POINTS else 0
    low, high = np.quantile(values, [cut, 1 - cut]).tolist()
    low = min(low, 0.0) if from_zero else low
    y_ticks = _ticks(low, high)
    x_ticks = _ticks(
        min(float(curve.x[0]) for curve in curves.values()), max(float(curve.x[-1]) for curve in curves.values())
    )
    (low, *_, high), (first, *_, last) = y_ticks, x_ticks

    def place(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> list[str]:
        across = _LEFT + (_RIGHT - _LEFT) * (x - first) / (last - first)
        down = _BOTTOM - (_BOTTOM - _TOP) * (np.clip(y, low, high) - low) / (high - low)
        return [f"{a:.1f},{d:.1f}" for a, d in zip(across.tolist(), down.tolist(), strict=True)]

    parts = []
    for tick in y_ticks:
        down = _BOTTOM - (_BOTTOM - _TOP) * (tick - low) / (high - low)
        parts.append(f'<path d="M{_LEFT} {down:.1f}H{_RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{down + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        across = _LEFT + (_RIGHT - _LEFT) * (tick - first) / (last - first)
        parts.append(f'<path d="M{across:.1f} {_TOP}V{_BOTTOM}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{across:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>')
    colors = dict(zip(drawn, COLORS * math.ceil(len(drawn) / len(COLORS)), strict=False))
    for name, (x, mean, least, largest) in drawn.items():
        if least is not mean:
            outline = " ".join([*place(x, largest), *reversed(place(x, least))])
            parts.append(f'<polygon points="{outline}" fill="{colors[name]}" fill-opacity="0.18"/>')
    for name, (x, mean, _, _) in drawn.items():
        points, color = place(x, mean), colors[name]
        parts.append(f'<polyline points="{" ".join(points)}" stroke="{color}" stroke-width="1.6" fill="none"/>')
        if curves[name].dots or len(points) == 1:
            for point, value in zip(points, mean.tolist(), strict=True):
                center = 'cx="{}" cy="{}"'.format(*point.split(","))
                words = f"<title>{escape(name)}: {value:.4g}</title>"
                parts.append(f'<circle {center} r="3" fill="{color}">{words}</circle>')
    parts.append(f'<text x="{(_LEFT + _RIGHT) / 2}" y="242" text-anchor="middle">{escape(x_name)}</text>')
    key = color_key({name: name for name in drawn}, colors) if len(drawn) > 1 else ""
    return (
        f'<figure class="chart"><svg viewBox="0 0 360 247" role="img">{"".join(parts)}</svg>'
        f"<figcaption>{escape(title)} {key}</figcaption></figure>"
    )


def _binned(curve: Curve) -> tuple[npt.NDArray[np.floating], ...]:
    """x, and mean, least and largest value of at most _MOST_POINTS bins; the three are one array where nothing had to
    be joined."""
    if len(curve.x) <= _MOST_POINTS:
        return curve.x, curve.y, curve.y, curve.y
    begins = np.linspace(0, len(curve.x), _MOST_POINTS, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(begins, len(curve.x)))
    x, y = (np.add.reduceat(values, begins) / sizes for values in (curve.x, curve.y))
    return x, y, np.minimum.reduceat(curve.y, begins), np.maximum.reduceat(curve.y, begins)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` or below to `high` or above, three to seven of them."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _short(number: float) -> str:
    return f"{number / 1000:g}k" if abs(number) >= 10_000 else f"{number:g}"
