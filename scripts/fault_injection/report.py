"""What the fault test found, as a page and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def faults(record: Record) -> list[str]:
    """Everything that went otherwise than promised, a line each."""
    lines = [f"{kill}" for entry in record["trainings"] for kill in entry["kills"] if kill["lost"]]
    lines += [f"{entry['training']}: {entry['failure']}" for entry in record["trainings"] if entry["failure"]]
    compared = [*record["trainings"], *record["signals"], *({"training": "disk", **case} for case in record["disk"])]
    lines += [f"{e['training']}: differs: {'; '.join(e['differences'][:5])}" for e in compared if e["differences"]]
    cases = [*record["corruptions"], *(case for entry in record["signals"] for case in entry["cases"]), *record["disk"]]
    lines += [f"{case}" for case in cases if case["fault"]]
    return lines + ([f"all checkpoints broken: {record['all_broken']}"] if record["all_broken"] else [])


def page(record: Record, headline: str) -> str:
    """Markdown."""
    found = [f"- {line}" for line in faults(record)]
    sections = [f"    {record['command']}", headline]
    sections += _kills(record["trainings"]) if any(entry["kills"] for entry in record["trainings"]) else []
    sections += _corruptions(record["corruptions"], record["all_broken"]) if record["corruptions"] else []
    sections += _signals(record["signals"]) if record["signals"] else []
    sections += ["## Full disk", _disk(record["disk"])] if record["disk"] else []
    sections += ["## Faults", "\n".join(found)] if found else []
    return "\n\n".join(sections) + "\n"


def _kills(trainings: Sequence[Record]) -> list[str]:
    kills = [kill for entry in trainings for kill in entry["kills"]]
    rows = []
    for name in dict.fromkeys(entry["training"] for entry in trainings):
        of_this = [entry for entry in trainings if entry["training"] == name]
        mine = [kill for entry in of_this for kill in entry["kills"]]
        hit = Counter(kill["hit"] for kill in mine)
        moments = [hit[moment] for moment in ("start-up", "training", "validation", "save")]
        one_rank = sum(kill["scope"] != "all" for kill in mine)
        different = _count(entry["differences"] or entry["failure"] for entry in of_this)
        lost = _count(kill["lost"] for kill in mine)
        rows.append([name, len(of_this), len(mine), *moments, one_rank, lost, different])
    header = ["training", "trainings", "kills", "in start-up", "in an iteration", "in a validation", "in a save",
              "one rank only", "lost", "different"]  # fmt: skip
    lost, ended = _count(kill["lost"] for kill in kills), _count(not entry["failure"] for entry in trainings)
    repeated = [kill["iterations"] - kill["newest"] for kill in kills]
    return [
        f"## {len(kills)} kills: {lost} lost, {_count(entry['differences'] for entry in trainings)} different",
        f"SIGKILL to all processes, or to one rank, in {len(trainings)} trainings, of which {ended} went on to their "
        "end and were compared.",
        _table(header, rows),
        f"A kill cost {sum(repeated) / len(repeated):.1f} iterations on average, {max(repeated)} at most. "
        f"{_count(kill['half_written'] for kill in kills)} left an unfinished file behind.",
    ]


def _corruptions(corruptions: Sequence[Record], all_broken: str) -> list[str]:
    rows = []
    for kind in dict.fromkeys(entry["kind"] for entry in corruptions):
        mine = [entry for entry in corruptions if entry["kind"] == kind]
        right = _count(entry["went_on_at"] == entry["expected"] for entry in mine)
        ended = _count(entry["resumed_to_the_end"] and not entry["fault"] for entry in mine)
        rows.append([kind, len(mine), _count(entry["named"] for entry in mine), right, ended])
    header = ["damage to the newest checkpoint", "cases", "named", "the one before used", "trained on to the same bits"]
    refusal = all_broken or "the run refuses, names each of them and changes no file."
    return [
        f"## {len(corruptions)} corruptions: {_count(entry['fault'] for entry in corruptions)} faults",
        _table(header, rows),
        f"Every checkpoint of a run emptied: {refusal}",
    ]


def _signals(trainings: Sequence[Record]) -> list[str]:
    cases = [case for entry in trainings for case in entry["cases"]]
    keys = ("training", "signal", "moment", "to", "statuses", "iterations_after")
    rows = [[*(case[key] for key in keys), _yes(not case["fault"])] for case in cases]
    header = ["training", "signal", "in", "to", "exit status", "iterations still done", "as documented"]
    different = _count(entry["differences"] for entry in trainings)
    title = f"## {len(cases)} signals: {_count(case['fault'] for case in cases)} faults, {different} different"
    return [title, _table(header, rows)]


def _disk(cases: Sequence[Record]) -> str:
    header = ["disk", "by", "exit status", "said", "ended with the same bits"]
    keys = ("what", "way", "statuses")
    return _table(
        header,
        [
            [*(case[key] for key in keys), _yes(case["said"]), _yes(not (case["fault"] or case["differences"]))]
            for case in cases
        ],
    )


def _yes(value: Any) -> str:
    return "yes" if value else "no"


def _count(values: Iterable[Any]) -> int:
    return sum(map(bool, values))


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def text(cell: Any) -> str:  # exit statuses are a list
        return ", ".join(map(str, cell)) if isinstance(cell, list) else str(cell)

    return "\n".join("| " + " | ".join(map(text, row)) + " |" for row in [header, ["---"] * len(header), *rows])
