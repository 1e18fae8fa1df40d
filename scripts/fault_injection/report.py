"""What the fault test found, as a page and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


class MergeError(ValueError):
    """Parts that do not belong together."""


LISTS = ("trainings", "interrupted_twice", "corruptions", "disk")


def merged(parts: Sequence[Record]) -> dict[str, Any]:
    """One record of several, made by one commit on one kind of CPU with one PyTorch, each with a seed of its own.

    Raises:
        MergeError: they differ in what they must share, or share their seed.
    """
    first, last = parts[0], max(parts, key=lambda part: str(part["date"]))
    for name, fact in {
        "commit": lambda part: part["git"],
        "hardware": lambda part: [part["hardware"][key] for key in ("cpu", "cpu_cores")],
        "versions": lambda part: part["versions"],
        "device": lambda part: part["device"],
    }.items():
        if len(found := {str(fact(part)) for part in parts}) > 1:
            raise MergeError(f"the parts have different {name}: {' and '.join(sorted(found))}; merge equal ones")
    if len({part["settings"]["seed"] for part in parts}) < len(parts):
        raise MergeError("two parts have the same seed, and so the same moments: give each its own --seed")
    whole: dict[str, Any] = {name: [entry for part in parts for entry in part[name]] for name in LISTS}
    broken = [part["all_broken"] for part in parts]
    minutes = round(sum(part["minutes"] for part in parts), 1)
    commands = "\n    ".join(part["command"] for part in parts)
    more = {"command": commands, "date": last["date"], "minutes": minutes, "all_broken": "".join(broken)}
    return {**first, **whole, **more}


def faults(record: Record) -> list[str]:
    """Everything that went otherwise than promised, a line each."""
    lines = [f"{entry['training']}: {entry['failure']}" for entry in record["trainings"] if entry["failure"]]
    compared = [*record["trainings"], *({"training": "disk", **case} for case in record["disk"])]
    lines += [f"{e['training']}: differs: {'; '.join(e['differences'][:5])}" for e in compared if e["differences"]]
    cases = [*_interruptions(record), *record["corruptions"], *record["disk"]]
    lines += [f"{case}" for case in cases if case["fault"]]
    return lines + ([f"all checkpoints broken: {record['all_broken']}"] if record["all_broken"] else [])


def page(record: Record, headline: str) -> str:
    """Markdown."""
    found = [f"- {line}" for line in faults(record)]
    sections = [f"    {record['command']}", headline]
    kills = [case for case in _interruptions(record) if case["signal"] == "SIGKILL"]
    signals = [case for case in _interruptions(record) if case["signal"] != "SIGKILL"]
    sections += _kills(kills, record["trainings"]) if kills else []
    sections += _corruptions(record["corruptions"], record["all_broken"]) if record["corruptions"] else []
    sections += _signals(signals) if signals else []
    sections += ["## Full disk", _disk(record["disk"])] if record["disk"] else []
    sections += ["## Faults", "\n".join(found)] if found else []
    return "\n\n".join(sections) + "\n"


def _interruptions(record: Record) -> list[Record]:
    cases = [case for entry in record["trainings"] for case in entry["interruptions"]]
    return cases + record["interrupted_twice"]


def _kills(kills: Sequence[Record], trainings: Sequence[Record]) -> list[str]:
    rows = []
    for name in dict.fromkeys(entry["training"] for entry in trainings):
        mine = [kill for kill in kills if kill["training"] == name]
        of_this = [entry for entry in trainings if entry["training"] == name]
        hit = Counter(kill["moment"] for kill in mine)
        moments = [hit[moment] for moment in ("start-up", "training", "validation", "save")]
        one_only = sum(kill["to"] != "all" for kill in mine)
        different = _count(entry["differences"] or entry["failure"] for entry in of_this)
        rows.append([name, len(of_this), len(mine), *moments, one_only, _count(k["fault"] for k in mine), different])
    header = ["training", "trainings", "kills", "in start-up", "in an iteration", "in a validation", "in a save",
              "one process only", "lost", "different"]  # fmt: skip
    lost, ended = _count(kill["fault"] for kill in kills), _count(not entry["failure"] for entry in trainings)
    repeated = [kill["reached"] - kill["saved"] for kill in kills]
    return [
        f"## {len(kills)} kills: {lost} lost, {_count(entry['differences'] for entry in trainings)} different",
        f"SIGKILL to all processes, to one rank or to one loader process, in {len(trainings)} trainings. {ended} of "
        "them were finished and compared.",
        _table(header, rows),
        f"A kill cost {sum(repeated) / len(repeated):.1f} iterations on average and {max(repeated)} at most. "
        f"{_count(kill['half_written'] for kill in kills)} kills left an unfinished file behind.",
    ]


def _corruptions(corruptions: Sequence[Record], all_broken: str) -> list[str]:
    rows = []
    for kind in dict.fromkeys(entry["kind"] for entry in corruptions):
        mine = [entry for entry in corruptions if entry["kind"] == kind]
        right = _count(entry["went_on_at"] == entry["expected"] for entry in mine)
        ended = _count(entry["resumed_to_the_end"] and not entry["fault"] for entry in mine)
        rows.append([kind, len(mine), _count(entry["named"] for entry in mine), right, ended])
    header = ["damage to the newest checkpoint", "cases", "named", "the one before was used",
              "training ended with the same bits"]  # fmt: skip
    refusal = all_broken or "the run ends with an error that names each of them, and changes no file"
    return [
        f"## {len(corruptions)} corruptions: {_count(entry['fault'] for entry in corruptions)} faults",
        _table(header, rows),
        f"With every checkpoint of a run emptied: {refusal}.",
    ]


def _signals(cases: Sequence[Record]) -> list[str]:
    """One row for all that was alike."""
    keys = ("training", "signal", "moment", "to", "statuses")
    alike: dict[str, list[Record]] = {}
    for case in cases:
        alike.setdefault(str([case[key] for key in keys]), []).append(case)
    rows = [
        [
            *(same[0][key] for key in keys),
            max(case["reached"] - case["before"] for case in same),
            len(same),
            _yes(not any(case["fault"] for case in same)),
        ]
        for same in alike.values()
    ]
    header = [
        "training",
        "signal",
        "during",
        "sent to",
        "exit status",
        "iterations still done",
        "cases",
        "as documented",
    ]
    return [f"## {len(cases)} signals: {_count(case['fault'] for case in cases)} faults", _table(header, rows)]


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
