"""A curve as characters, for a start screen."""

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:#"


def sparkline(values: Sequence[float], width: int = 60, height: int = 1, *, unicode: bool = True) -> str:
    """`values` (finite) as `height` lines of at most `width` characters.

    The lowest value fills the lowest step of a column, the highest the whole column. Each column shows the
    value at its left edge, so that a step in the curve stands where it begins. Without unicode: ASCII
    characters.
    """
    if not values:
        return ""
    num_columns = min(width, len(values))
    columns = [values[column * len(values) // num_columns] for column in range(num_columns)]
    characters = _BLOCKS if unicode else _ASCII
    num_steps = len(characters) - 1
    low, high = min(columns), max(columns)
    scale = (height * num_steps - 1) / (high - low) if high > low else 0.0
    filled = [1 + round((value - low) * scale) for value in columns]
    lines = []
    for row in reversed(range(height)):
        lines.append("".join(characters[min(max(steps - row * num_steps, 0), num_steps)] for steps in filled))
    return "\n".join(line.rstrip() for line in lines)
