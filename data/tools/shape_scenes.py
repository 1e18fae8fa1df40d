"""Draws one image of the procedural set, with its boxes.

An image is a function of its key alone, the same on every machine: random bits come straight from PCG64
(numpy keeps that stream fixed, unlike the methods built on it), pixels from elementwise arithmetic (sums of
floats would depend on the order a machine adds in), and sines are rounded before use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

CLASS_NAMES = ("circle", "ring", "triangle", "square", "star", "cross")

# Radii of the circumscribed circle in pixels, with the share of objects drawn from each range. COCO's
# small, medium and large (by area, from 32 x 32 and 96 x 96 pixels on) all occur.
RADII = ((0.25, 11.0, 16.0), (0.47, 18.0, 44.0), (0.28, 48.0, 88.0))
MIN_VISIBLE = 0.4  # an object is placed only where this share of each one below it stays in sight
MIN_LABELLED = 0.25  # less than this share in sight (bars may cross it too): not annotated
MIN_SIDE = 4  # pixels; a visible part smaller than this is not annotated
EMPTY_SHARE, CROWD_SHARE = 0.05, 0.08  # of the images

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class SceneObject:
    """An annotated object: the visible part's tight box and area, in pixels."""

    label: int
    box_xywh: tuple[int, int, int, int]
    area: int
    rle_counts: tuple[int, ...] | None
    """Run lengths of the mask, column by column, beginning with zeros; None but for a crowd region."""
    polygons: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    """Rings x, y, x, y, ... along the edges of the mask's pixels, which are filled to that very mask; empty for a crowd
    region"""


@dataclass(frozen=True)
class Scene:
    pixels: np.ndarray
    """uint8 [H, W, 3] RGB"""
    objects: tuple[SceneObject, ...]


class Dice:
    """Random numbers as a function of a key."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def pick(self, items: Sequence[_Item]) -> _Item:
        return items[self.below(len(items))]

    def grid(self, height: int, width: int) -> np.ndarray:
        """float32 [height, width] in [0, 1), multiples of 1/256."""
        count = height * width
        raw = np.asarray(self._bits.random_raw((count + 7) // 8), dtype="<u8").view(np.uint8)[:count]
        return raw.reshape(height, width).astype(np.float32) / 256

    def angle(self) -> tuple[float, float]:
        """Cosine and sine of a random angle, rounded so that no library's last digit matters."""
        turn = self.uniform(0, 2 * math.pi)
        return round(math.cos(turn) * 4096) / 4096, round(math.sin(turn) * 4096) / 4096


class _Canvas:
    """The image under construction: float32 RGB, and which object each pixel shows (0: none)."""

    def __init__(self, background: np.ndarray) -> None:
        self.colors = background
        self.height, self.width = background.shape[:2]
        self.owner = np.zeros((self.height, self.width), dtype=np.int32)
        self.labels: list[int] = []
        self.crowd: list[bool] = []
        self.full_areas: list[int] = []
        """Pixels of each object before anything hid it."""

    def window(self, cx: float, cy: float, reach: float) -> tuple[slice, slice]:
        top, left = max(0, math.floor(cy - reach)), max(0, math.floor(cx - reach))
        bottom, right = (
            min(self.height, math.ceil(cy + reach) + 1),
            min(self.width, math.ceil(cx + reach) + 1),
        )
        return slice(top, max(top, bottom)), slice(left, max(left, right))

    def hides_too_much(self, window: tuple[slice, slice], covered: np.ndarray) -> bool:
        hit = np.bincount(self.owner[window][covered], minlength=len(self.labels) + 1)[1:]
        if not hit.any():
            return False
        in_sight = np.bincount(self.owner.ravel(), minlength=len(self.labels) + 1)[1:]
        return any(
            taken and seen - taken < MIN_VISIBLE * full
            for taken, seen, full in zip(hit.tolist(), in_sight.tolist(), self.full_areas, strict=True)
        )

    def paint(self, window: tuple[slice, slice], alpha: np.ndarray, colors: np.ndarray, owner: int) -> None:
        below = self.colors[window]
        below += (colors - below) * alpha[..., None]
        self.owner[window][alpha >= 0.5] = owner


def draw_scene(key: Sequence[int], width: int, height: int) -> Scene:
    """The image of `key` with its annotated objects, in the order they were painted."""
    dice = Dice(*key)
    canvas = _Canvas(_background(dice, width, height))
    for _ in range(dice.below(3)):
        _draw_bar(dice, canvas)
    if not dice.chance(EMPTY_SHARE):
        if dice.chance(CROWD_SHARE / (1 - EMPTY_SHARE)):
            _draw_crowd(dice, canvas)
        for _ in range(dice.pick((1, 2, 3, 3, 4, 4, 5, 6, 7))):
            _draw_object(dice, canvas)
    for _ in range(dice.pick((0, 0, 0, 1, 2))):
        _draw_bar(dice, canvas)
    pixels = np.clip(np.floor(canvas.colors + 0.5), 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(_annotate(canvas)))


def _background(dice: Dice, width: int, height: int) -> np.ndarray:
    """Two muted colors mixed by octaves of value noise, by a gradient, or by stripes, with fine grain on
    top."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cosine, sine = dice.angle()
    kind = dice.pick(("noise", "noise", "gradient", "stripes", "checks"))
    noise = np.zeros((height, width), dtype=np.float32)
    for cell, weight in ((64, 0.55), (24, 0.3), (8, 0.15)):
        noise += _value_noise(dice, width, height, cell) * weight
    along, across = (x * cosine + y * sine), (y * cosine - x * sine)
    if kind == "noise":
        mix = noise
    elif kind == "gradient":
        mix = 0.3 * noise + 0.7 * np.clip(along / (width + height) + 0.5, 0, 1)
    else:
        period = dice.uniform(10, 40)
        mix = _triangle_wave(along / period)
        if kind == "checks":
            mix = np.abs(mix - _triangle_wave(across / period))
        mix = 0.45 * mix + 0.55 * noise
    first, second = (_color(dice, (0.05, 0.45), values) for values in ((0.15, 0.5), (0.45, 0.95)))
    grain = (dice.grid(height, width) - 0.5) * dice.uniform(4, 14)
    bands = [a + (b - a) * mix + grain for a, b in zip(first, second, strict=True)]
    return np.stack(bands, axis=-1)


def _value_noise(dice: Dice, width: int, height: int, cell: int) -> np.ndarray:
    """float32 [height, width] in [0, 1): random values every `cell` pixels, linear in between."""
    knots = dice.grid(height // cell + 2, width // cell + 2)

    def places(n: int) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(n, dtype=np.float32) / cell
        return position.astype(np.int64), position - np.floor(position)

    (row, down), (column, right) = places(height), places(width)
    rows = knots[row] + (knots[row + 1] - knots[row]) * down[:, None]
    return rows[:, column] + (rows[:, column + 1] - rows[:, column]) * right


def _triangle_wave(t: np.ndarray) -> np.ndarray:
    return np.abs((t - np.floor(t)) * 2 - 1)


def _color(dice: Dice, saturation: tuple[float, float], value: tuple[float, float]) -> tuple[float, float, float]:
    """A random RGB color, 0 to 255, with saturation and value (as in HSV) from the ranges."""
    hue, s, v = dice.uniform(0, 6), dice.uniform(*saturation), dice.uniform(*value)
    ramp = [min(1.0, max(0.0, abs((hue + shift) % 6 - 3) - 1)) for shift in (0, 4, 2)]
    red, green, blue = (255 * v * (1 - s + s * channel) for channel in ramp)
    return red, green, blue


def _signed_distance(label: int, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """About the distance in pixels to the outline, negative inside; u and v are relative to the center."""
    name = CLASS_NAMES[label]
    if name == "circle":
        return np.sqrt(u * u + v * v) - radius
    if name == "ring":
        return np.abs(np.sqrt(u * u + v * v) - 0.78 * radius) - 0.22 * radius
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.707 * radius
    if name == "cross":
        long, short = 0.94 * radius, 0.34 * radius
        one = np.maximum(np.abs(u) - long, np.abs(v) - short)
        other = np.maximum(np.abs(u) - short, np.abs(v) - long)
        return np.minimum(one, other)
    corners = 3 if name == "triangle" else 5
    normals = [(round(math.cos(t) * 4096) / 4096, round(math.sin(t) * 4096) / 4096) for t in
               (2 * math.pi * k / corners for k in range(corners))]  # fmt: skip
    planes = np.stack([u * a + v * b for a, b in normals])
    if name == "triangle":
        return planes.max(axis=0) - 0.5 * radius
    # A five-pointed star is where at most one of its five lines has the point on the outer side.
    return np.sort(planes, axis=0)[-2] - 0.309 * radius


@dataclass(frozen=True)
class _Placed:
    window: tuple[slice, slice]
    distance: np.ndarray
    alpha: np.ndarray


def _place(canvas: _Canvas, dice: Dice, label: int, cx: float, cy: float, radius: float) -> _Placed:
    window = canvas.window(cx, cy, radius + 1)
    y, x = np.mgrid[window].astype(np.float32)
    x, y = x - cx, y - cy
    cosine, sine = dice.angle()
    stretch = dice.uniform(1.0, 1.3)
    distance = _signed_distance(label, x * cosine + y * sine, (y * cosine - x * sine) * stretch, radius)
    return _Placed(window, distance, np.clip(0.5 - distance, 0, 1))


def _draw_object(dice: Dice, canvas: _Canvas) -> None:
    label = dice.below(len(CLASS_NAMES))
    radius = _radius(dice)
    inset = radius * (0.35 if dice.chance(0.2) else 1.0)  # one in five may be cut off by the border
    for _ in range(8):
        cx, cy = (_coordinate(dice, side, inset) for side in (canvas.width, canvas.height))
        placed = _place(canvas, dice, label, cx, cy, radius)
        covered = placed.alpha >= 0.5
        if not canvas.hides_too_much(placed.window, covered):
            canvas.labels.append(label)
            canvas.crowd.append(False)
            canvas.full_areas.append(int(np.count_nonzero(covered)))
            colors = _skin(dice, placed, radius, _contrasting_color(dice, canvas, cx, cy))
            canvas.paint(placed.window, placed.alpha, colors, owner=len(canvas.labels))
            return


def _radius(dice: Dice) -> float:
    draw = dice.uniform()
    low, high = RADII[-1][1:]
    for share, *between in RADII:
        if draw < share:
            low, high = between
            break
        draw -= share
    return round(dice.uniform(low, high) * 16) / 16


def _coordinate(dice: Dice, side: int, inset: float) -> float:
    inset = min(inset, side / 2)
    return round(dice.uniform(inset, side - inset) * 16) / 16


def _contrasting_color(dice: Dice, canvas: _Canvas, cx: float, cy: float) -> tuple[float, float, float]:
    below = canvas.colors[min(int(cy), canvas.height - 1), min(int(cx), canvas.width - 1)].tolist()
    for _ in range(6):
        color = _color(dice, (0.45, 1.0), (0.35, 1.0))
        if sum(abs(a - b) for a, b in zip(color, below, strict=True)) > 150:
            break
    return color


def _skin(dice: Dice, placed: _Placed, radius: float, color: tuple[float, float, float]) -> np.ndarray:
    """float32 [h, w, 3]: the color with a gradient, stripes or blotches, and a darker or lighter rim."""
    height, width = placed.distance.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cosine, sine = dice.angle()
    along = (x * cosine + y * sine) / (2 * radius)
    kind = dice.pick(("plain", "gradient", "stripes", "blotches"))
    if kind == "plain":
        shade = np.zeros_like(along)
    elif kind == "gradient":
        shade = np.clip(along, -1, 1) * 0.35
    elif kind == "stripes":
        shade = (_triangle_wave(along * dice.uniform(2, 4)) - 0.5) * 0.5
    else:
        shade = (_value_noise(dice, width, height, 6) - 0.5) * 0.6
    rim = dice.pick((-0.5, -0.35, 0.0, 0.4))
    shade = np.where(placed.distance > -max(1.5, 0.07 * radius), rim, shade)
    return np.stack([np.clip(band * (1 + shade), 0, 255) for band in color], axis=-1)


def _draw_crowd(dice: Dice, canvas: _Canvas) -> None:
    """Many small shapes of one class, too dense to tell apart: one annotation."""
    label = dice.below(len(CLASS_NAMES))
    spread = dice.uniform(22, 40)
    cx, cy = (_coordinate(dice, side, spread + 8) for side in (canvas.width, canvas.height))
    canvas.labels.append(label)
    canvas.crowd.append(True)
    for _ in range(10 + dice.below(10)):
        (cosine, sine), away = dice.angle(), spread * dice.uniform()
        radius = round(dice.uniform(6, 10) * 16) / 16
        placed = _place(canvas, dice, label, cx + cosine * away, cy + sine * away * 0.6, radius)
        colors = _skin(dice, placed, radius, _contrasting_color(dice, canvas, cx, cy))
        canvas.paint(placed.window, placed.alpha, colors, owner=len(canvas.labels))
    canvas.full_areas.append(int(np.count_nonzero(canvas.owner == len(canvas.labels))))


def _draw_bar(dice: Dice, canvas: _Canvas) -> None:
    """A long thin bar: of no class, behind the objects or across them."""
    length, half_width = dice.uniform(30, 130), dice.uniform(1.5, 4.5)
    cx, cy = dice.uniform(0, canvas.width), dice.uniform(0, canvas.height)
    window = canvas.window(cx, cy, length / 2 + half_width + 1)
    y, x = np.mgrid[window].astype(np.float32)
    cosine, sine = dice.angle()
    along, across = (x - cx) * cosine + (y - cy) * sine, (y - cy) * cosine - (x - cx) * sine
    distance = np.maximum(np.abs(along) - length / 2, np.abs(across) - half_width)
    alpha = np.clip(0.5 - distance, 0, 1)
    if not canvas.hides_too_much(window, alpha >= 0.5):
        color = np.array(_color(dice, (0.1, 0.9), (0.2, 0.95)), dtype=np.float32)
        canvas.paint(window, alpha, np.broadcast_to(color, (*alpha.shape, 3)), owner=0)


def _annotate(canvas: _Canvas) -> list[SceneObject]:
    objects = []
    for index, (label, crowd, full) in enumerate(
        zip(canvas.labels, canvas.crowd, canvas.full_areas, strict=True), start=1
    ):
        mask = canvas.owner == index
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        area = int(np.count_nonzero(mask))
        if area == 0 or area < MIN_LABELLED * full:
            continue
        left, top = int(columns[0]), int(rows[0])
        w, h = int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top
        if min(w, h) >= MIN_SIDE:
            counts, rings = (_run_lengths(mask), ()) if crowd else (None, outline(mask))
            objects.append(SceneObject(label, (left, top, w, h), area, counts, rings))
    return objects


def _run_lengths(mask: np.ndarray) -> tuple[int, ...]:
    """COCO's uncompressed run lengths of a bool [H, W] mask: column by column, beginning with the zeros."""
    pixels = mask.T.ravel()
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(pixels)]])).tolist()
    return (0, *runs) if pixels[0] else tuple(runs)


def outline(mask: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Rings x, y, x, y, ... along the edges of a bool [H, W] mask's pixels, one for each connected piece.

    COCO's polygons have no holes: where the mask has some, one ring walks along all edges, from one to the next and
    back on the same way, which fills nothing.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    ends: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # The edges of the pixels, each as long as the border is straight, with the mask on its right.
    for steps, turned in ((np.diff(padded, axis=0)[:, 1:-1], False), (np.diff(padded, axis=1)[1:-1].T, True)):
        lines, places = np.nonzero(np.diff(steps, axis=1, prepend=0, append=0))
        runs = zip(lines[:-1].tolist(), lines[1:].tolist(), places[:-1].tolist(), places[1:].tolist(), strict=True)
        for line, next_line, first, last in runs:
            if line == next_line and steps[line, first]:
                forward = (steps[line, first] > 0) != turned
                start, end = (first, last) if forward else (last, first)
                corners = ((line, start), (line, end)) if turned else ((start, line), (end, line))
                ends.setdefault(corners[0], []).append(corners[1])
    loops = []
    while ends:
        start = min(ends)
        loop = [start]
        while loop[-1] in ends:
            onward = ends[loop[-1]]
            # Where two pixels touch at a corner, straight edges end and each side turns: never straight on.
            chosen = (
                onward[0]
                if len(loop) < 2 or (onward[0][0] == loop[-1][0]) != (loop[-2][0] == loop[-1][0])
                else onward[-1]
            )
            onward.remove(chosen)
            if not onward:
                del ends[loop[-1]]
            if chosen == start:
                break
            loop.append(chosen)
        loops.append(loop)
    areas = [sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(loop, [*loop[1:], loop[0]], strict=True)) for loop in loops]
    if min(areas, default=0) < 0:
        loops = [[corner for loop in loops for corner in (*loop, loop[0])] + [loop[0] for loop in loops[-2::-1]]]
    return tuple(tuple(side for corner in loop for side in corner) for loop in loops)
