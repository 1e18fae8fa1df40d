"""Rows of choices in which every pair of choices occurs."""

import itertools
import random
from collections.abc import Sequence

Choice = tuple[int, int]
"""Number of an option, and of one of its values."""


def covering_rows(num_values: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Few rows, each with one value for every option, so that every two values of two options are in a row together.

    num_values: of each option. Greedy: a row begins with a pair that no row has yet; then each option takes the value
    that makes most such pairs with what the row has already. The same rows for the same seed.
    """
    draw = random.Random(seed)
    options = range(len(num_values))
    missing: set[tuple[Choice, Choice]] = {
        ((one, a), (other, b))
        for one, other in itertools.combinations(options, 2)
        for a in range(num_values[one])
        for b in range(num_values[other])
    }
    rows = []
    while missing:
        row = dict(min(missing))
        rest = [option for option in options if option not in row]
        draw.shuffle(rest)
        for option in rest:
            values = draw.sample(range(num_values[option]), num_values[option])
            row[option] = max(
                values, key=lambda value: sum(_pair(option, value, *made) in missing for made in row.items())
            )
        rows.append(tuple(row[option] for option in options))
        missing -= set(itertools.combinations(sorted(row.items()), 2))
    return rows


def _pair(option: int, value: int, other_option: int, other_value: int) -> tuple[Choice, Choice]:
    one, other = sorted([(option, value), (other_option, other_value)])
    return one, other
