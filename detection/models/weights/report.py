"""The account of what a weight file gave a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_NAMES_IN_FULL = 4


@dataclass(frozen=True)
class WeightReport:
    """What `load_weights` did, by names of the model's state dict (`unexpected`: the file's own names).

    matched: filled from the file. missing: not in the file. unexpected: in the file, not in the model.
    reshaped: (name, shape in the file, shape in the model); these kept the model's initialization, as the
    missing ones did. source: what was read. notes: what was converted, re-initialized or cannot be the same.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    source: str
    notes: tuple[str, ...]

    def table(self) -> str:
        """A few lines for a person: counts, names where they are few, modules where they are many."""
        reshaped = [f"{name} {list(theirs)} -> {list(ours)}" for name, theirs, ours in self.reshaped]
        total = len(self.matched) + len(self.missing) + len(self.reshaped)
        lines = [
            f"weights from {self.source}",
            f"  matched    {len(self.matched):4d} of {total} tensors of the model",
            f"  missing    {len(self.missing):4d}  {_names(self.missing)}",
            f"  unexpected {len(self.unexpected):4d}  {_names(self.unexpected)}",
            f"  reshaped   {len(reshaped):4d}  {', '.join(reshaped[:_NAMES_IN_FULL])}",
        ]
        if len(reshaped) > _NAMES_IN_FULL:
            lines[-1] += f" and {len(reshaped) - _NAMES_IN_FULL} more"
        if self.missing or self.reshaped:
            lines.append("  missing and reshaped tensors keep the model's own initialization")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)


def _names(names: Sequence[str]) -> str:
    if len(names) <= _NAMES_IN_FULL:
        return ", ".join(names)
    modules = Counter(".".join(name.split(".")[:-1][:2]) or name for name in names)
    if len(modules) > 2 * _NAMES_IN_FULL:
        modules = Counter(name.split(".")[0] for name in names)
    groups = [f"{module}.* ({count})" if count > 1 else f"{module}.*" for module, count in modules.items()]
    more = len(groups) - 2 * _NAMES_IN_FULL
    return ", ".join(groups[: 2 * _NAMES_IN_FULL]) + (f" and {more} more modules" if more > 0 else "")
