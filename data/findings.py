"""A fault, or a remark, about a data set: what is wrong, where, and how to mend it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    """One kind of fault of one file, with the number of times it occurs.

    severity: "error" (would break or bias training or its figures), "warning" (handled, but worth a look) or
    "info". code: stable identifier such as "box-outside-image". text: one line that names file, ids and
    remedy.
    """

    severity: Severity
    code: str
    text: str
    count: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity}: {self.text} [{self.code}]"


def examples(values: Iterable[Any], total: int | None = None) -> str:
    """The first few of `values` as text: "3, 7, 12 and 40 more"."""
    shown: list[str] = []
    seen = 0
    for value in values:
        seen += 1
        if len(shown) < NUM_EXAMPLES:
            shown.append(str(value))
        elif total is not None:
            break
    rest = (seen if total is None else total) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")


def by_severity(findings: Sequence[Finding]) -> list[Finding]:
    """The findings, errors first; the order within a severity stays."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
