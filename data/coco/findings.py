"""A fault, or a remark, about a data set: what is wrong, where, and how to mend it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
NUM_EXAMPLES = 5
MAX_PLACES = 1000  # named per finding; the rest is counted


@dataclass(frozen=True)
class Finding:
    """One kind of fault of one file, with the number of times it occurs.

    severity: "error" (breaks or biases training or its figures), "warning" (handled, but worth a look) or
    "info". code: stable identifier such as "box-outside-image". text: one line that names the file and the
    remedy. places: where it occurs, with ids; not all of them where there are very many (count has them all).
    """

    severity: Severity
    code: str
    text: str
    count: int = 1
    places: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        times = f" ({self.count:,} times)" if self.count > 1 else ""
        where = f": {examples(self.places, self.count)}" if self.places else ""
        return f"{self.severity}: {self.text}{times}{where} [{self.code}]"


def examples(values: Iterable[Any], total: int | None = None, *, shown: int = NUM_EXAMPLES) -> str:
    """The first few of `values` as text: "3, 7, 12 and 40 more"; total counts those that `values` leaves out."""
    values = list(values)
    rest = (len(values) if total is None else total) - len(values[:shown])
    return ", ".join(map(str, values[:shown])) + (f" and {rest:,} more" if rest > 0 else "")


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, errors first; the order within a severity stays."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
