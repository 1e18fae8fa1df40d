"""What the tests with hostile files share: how many files they try, damage to bytes, and odd entries.

The tests try a few hundred files each; FUZZ_EXAMPLES=10000 in the environment makes it that many.
"""

import copy
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**64 - 1)
"""Of a generator that makes one file."""


def examples(usual: int) -> Callable[[Any], Any]:
    """Settings of a test with `usual` examples, or FUZZ_EXAMPLES of them: always the same ones."""
    return settings(
        max_examples=int(os.environ.get("FUZZ_EXAMPLES", usual)),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


Damage = list[tuple[str, float, int, int]]
PLACE = st.floats(0, 1, exclude_max=True)
"""As a share of the file; the second half of a zip file is its directory, the first the pickle and the tensors."""
CUT = st.tuples(st.just("cut"), PLACE, st.just(0), st.just(0))
FLIP = st.tuples(st.just("flip"), PLACE, st.integers(0, 7), st.just(0))
WRITE = st.tuples(st.sampled_from(["zero", "fill", "drop", "repeat"]), PLACE, st.just(0), st.integers(1, 600))
DAMAGE = st.one_of(
    st.lists(CUT, min_size=1, max_size=1),
    st.lists(FLIP, min_size=1, max_size=1),
    st.lists(FLIP | WRITE, min_size=1, max_size=8),
    st.lists(FLIP | WRITE | CUT, min_size=1, max_size=3),
)


def damaged(content: bytes, damage: Damage) -> bytes:
    altered = bytearray(content)
    for how, share, bit, length in damage:
        place = int(share * len(altered))
        end = min(place + length, len(altered))
        if how == "cut" or not altered:
            del altered[place:]
        elif how == "flip":
            altered[place] ^= 1 << bit
        elif how == "zero":
            altered[place:end] = bytes(end - place)
        elif how == "fill":
            altered[place:end] = b"\xff" * (end - place)
        elif how == "drop":
            del altered[place:end]
        else:
            altered[place:place] = altered[place:end]
    return bytes(altered)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def with_odd_entries(content: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """A copy in which one to three entries, at any depth, are left out or something else than they should be."""
    content = copy.deepcopy(content)
    for _ in range(dice.randint(1, 3)):
        there = [place for place in places(content) if place]
        if not there:
            break
        *path, last = dice.choice(there)
        holder: Any = content
        for key in path:
            holder = holder[key]
        if dice.random() < 0.2:
            del holder[last]
        else:
            holder[last] = _odd_value(holder[last], dice)
    return content


def _odd_value(value: Any, dice: random.Random) -> Any:
    if isinstance(value, torch.Tensor) and dice.random() < 0.8:
        changes: list[Callable[[], Any]] = [
            *(
                lambda: value[:0],
                lambda: value.flatten(),
                lambda: value[None],
                lambda: value.sum(),
                lambda: value.long(),
            ),
            *(lambda: value.bool(), lambda: value.half(), lambda: value.double() * float("nan")),
            *(lambda: torch.ones(1).expand(value.shape), lambda: value.repeat(3, *(value.dim() - 1) * [1])),
            *(lambda: value.to(torch.complex64), lambda: value.to(torch.float8_e5m2), lambda: value.to_sparse()),
        ]
        return dice.choice(changes)() if value.dim() else value[None]
    numbers = [True, -1, 0, 1, 3, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf")]
    texts = ["", "7", "bn", "\0", "\ud800", "x" * 2000, b"bytes"]
    others = [None, [], {}, (), [[]], {"a": 1}, {1: 2}, [1, "a", None], {(): ()}, range(3), {1, 2}, 1j]
    return dice.choice([*numbers, *texts, *others, torch.ones(2), torch.tensor(3), [value], {"x": value}, [1.5] * 3])
