"""What the fault test found, as a page and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKER = "<!-- written by scripts/fault_test.py; do not edit below -->"


def num_faults(record: Mapping[str, Any]) -> int:
    """Everything that went otherwise than promised."""
    cases = [*record["corruptions"], *(case for entry in record["signals"] for case in entry["cases"]), *record["disk"]]
    entries = [*record["trainings"], *record["signals"], *record["disk"]]
    return (
        sum(bool(kill["lost"]) for entry in record["trainings"] for kill in entry["kills"])
        + sum(bool(entry["failure"]) for entry in record["trainings"])
        + sum(bool(entry["differences"]) for entry in entries)
        + sum(bool(case["fault"]) for case in cases)
        + bool(record["all_broken"])
    )


def page(record: Mapping[str, Any], headline: str) -> str:
    """Markdown."""
    sections = [
        f"    {record['command']}",
        headline,
        _kills(record["trainings"]),
        _corruptions(record["corruptions"], record["all_broken"]),
        _signals(record["signals"]),
        _disk(record["disk"]),
        _faults(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_page(path: Path, text: str) -> None:
    """Write the page; where the file has a marker, what stands above it stays."""
    above = path.read_text().partition(MARKER) if path.is_file() else ("", "", "")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{above[0]}{MARKER}\n\n{text}" if above[1] else text)


def _kills(trainings: list[Mapping[str, Any]]) -> str:
    kills = [kill for entry in trainings for kill in entry["kills"]]
    if not kills:
        return ""
    ended = [entry for entry in trainings if not entry["failure"]]
    different = sum(bool(entry["differences"]) for entry in trainings)
    lost = sum(bool(kill["lost"]) for kill in kills)
    rows = []
    for name in dict.fromkeys(entry["training"] for entry in trainings):
        mine = [kill for kill in kills if kill["training"] == name]
        hit, of_this = Counter(kill["hit"] for kill in mine), [e for e in trainings if e["training"] == name]
        one_rank = sum(kill["scope"] != "all" for kill in mine)
        rows.append(
            [
                name,
                str(len(of_this)),
                str(len(mine)),
                *(str(hit[moment]) for moment in ("start-up", "training", "validation", "save")),
                str(one_rank),
                str(sum(bool(kill["lost"]) for kill in mine)),
                str(sum(bool(entry["differences"]) or bool(entry["failure"]) for entry in of_this)),
            ]
        )
    repeated = [kill["iterations"] - kill["newest"] for kill in kills]
    return "\n".join(
        [
            f"## {len(kills)} kills: {lost} lost, {different} different",
            "",
            f"SIGKILL to all processes, or to one rank, in {len(trainings)} trainings, of which {len(ended)} went "
            "on to their end and were compared.",
            "",
            *_table(
                [
                    "training", "trainings", "kills", "in start-up", "in an iteration", "in a validation",
                    "in a save", "one rank only", "lost", "different",
                ],
                rows,
            ),
            "",
            f"A kill cost {sum(repeated) / len(repeated):.1f} iterations on average, {max(repeated)} at most. "
            f"{sum(kill['half_written'] for kill in kills)} left an unfinished file behind.",
        ]
    )  # fmt: skip


def _corruptions(corruptions: list[Mapping[str, Any]], all_broken: str) -> str:
    if not corruptions:
        return ""
    rows = []
    for kind in dict.fromkeys(entry["kind"] for entry in corruptions):
        mine = [entry for entry in corruptions if entry["kind"] == kind]
        right = sum(entry["went_on_at"] == entry["expected"] for entry in mine)
        ended = sum(entry["resumed_to_the_end"] and not entry["fault"] for entry in mine)
        rows.append([kind, str(len(mine)), str(sum(entry["named"] for entry in mine)), str(right), str(ended)])
    header = ["damage to the newest checkpoint", "cases", "named", "the one before used", "trained on to the same bits"]
    return "\n".join(
        [
            f"## {len(corruptions)} corruptions: {sum(bool(entry['fault']) for entry in corruptions)} faults",
            "",
            *_table(header, rows),
            "",
            "Every checkpoint of a run emptied: "
            + (all_broken or "the run refuses, names each of them and changes no file."),
        ]
    )


def _signals(trainings: list[Mapping[str, Any]]) -> str:
    cases = [case for entry in trainings for case in entry["cases"]]
    if not cases:
        return ""
    rows = [
        [
            case["training"],
            case["signal"],
            case["moment"],
            case["to"],
            ", ".join(map(str, case["statuses"] or ["none"])),
            str(case["iterations_after"]),
            "no" if case["fault"] else "yes",
        ]
        for case in cases
    ]
    header = ["training", "signal", "in", "to", "exit status", "iterations still done", "as documented"]
    different = sum(bool(entry["differences"]) for entry in trainings)
    return "\n".join(
        [
            f"## {len(cases)} signals: {sum(bool(case['fault']) for case in cases)} faults, {different} different",
            "",
            *_table(header, rows),
        ]
    )


def _disk(cases: list[Mapping[str, Any]]) -> str:
    if not cases:
        return ""
    rows = [
        [
            case["what"],
            case["way"],
            ", ".join(map(str, case["statuses"] or ["none"])),
            "yes" if case["said"] else "no",
            "no" if case["fault"] or case["differences"] else "yes",
        ]
        for case in cases
    ]
    header = ["disk", "by", "exit status", "said", "ended with the same bits"]
    return "\n".join(["## Full disk", "", *_table(header, rows)])


def _faults(record: Mapping[str, Any]) -> str:
    lines = []
    for entry in [*record["trainings"], *record["signals"]]:
        lines += [f"- {entry['training']}: differs: {line}" for line in entry["differences"][:5]]
        lines += [f"- {entry['training']}: {entry['failure']}"] if entry.get("failure") else []
        lines += [f"- {kill}" for kill in entry.get("kills", []) if kill["lost"]]
        lines += [f"- {case}" for case in entry.get("cases", []) if case["fault"]]
    lines += [f"- {case}" for case in [*record["corruptions"], *record["disk"]] if case["fault"]]
    lines += [f"- disk: differs: {line}" for case in record["disk"] for line in case["differences"][:5]]
    lines += [f"- all checkpoints broken: {record['all_broken']}"] if record["all_broken"] else []
    return "\n".join(["## Faults", "", *lines]) if lines else ""


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
