"""Checkpoints damaged on the disk: each damage must be named, and the newest intact file used."""

from __future__ import annotations

import random
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from fault_injection.comparison import differences
from fault_injection.training import FaultTestError, Life, Say, Training, newest_on_disk

KINDS = ("truncated", "bit flipped", "empty", "foreign file", "half-written", "overwritten block")


@dataclass
class Corruption:
    """One damaged file and what the program made of it."""

    kind: str
    how: str
    names: list[str]
    """The damaged file's names (hard links)."""
    went_on_at: int | None = None
    expected: int = 0
    named: bool = False
    resumed_to_the_end: bool = False
    fault: str = ""


def corrupt_and_resume(
    training: Training, reference: Path, stopped: Path, work: Path, count: int, random_state: random.Random, say: Say
) -> list[Corruption]:
    """Damage the newest checkpoint of the folder `stopped` in `count` ways; one of each kind is trained to the end."""
    found = []
    for number in range(count):
        output, log = work / f"{number:03d}" / "run", work / f"{number:03d}" / "log.txt"
        copy_run(stopped, output)
        corruption = damage(output, KINDS[number % len(KINDS)], random_state)
        corruption.expected = newest_on_disk(output, corruption.names)[0]
        # The plan says where a run would go on; one of each kind really does.
        corruption.resumed_to_the_end = number < len(KINDS)
        try:
            more = () if corruption.resumed_to_the_end else ("--dry-run",)
            Life(training, output, log, more=more).start().finish()
        except FaultTestError as error:
            corruption.fault = str(error)
        said = log.read_text()
        corruption.named = all(f"skipped: {output / 'checkpoints' / name}" in said for name in corruption.names)
        resumed = re.search(r"^resumed .*at iteration ([\d,]+)", said, re.MULTILINE)
        corruption.went_on_at = int(resumed[1].replace(",", "")) if resumed else None
        if not corruption.fault and corruption.went_on_at != corruption.expected:
            newest = f"the newest intact checkpoint has {corruption.expected}"
            corruption.fault = f"went on at {corruption.went_on_at}, {newest}"
        elif not corruption.fault and not corruption.named:
            corruption.fault = "the damaged file is not named"
        elif not corruption.fault and corruption.resumed_to_the_end:
            corruption.fault = "; ".join(differences(reference, output)[:3])
        outcome = corruption.fault or "named, skipped"
        say(f"corruption {number + 1}: {corruption.kind} ({corruption.how}) {outcome}")
        if not corruption.fault:
            shutil.rmtree(output.parent)
        found.append(corruption)
    return found


def all_broken(training: Training, stopped: Path, work: Path) -> str:
    """Every checkpoint empty: the run must refuse and touch nothing. What went wrong; empty if nothing did."""
    output = work / "all_broken" / "run"
    copy_run(stopped, output)
    files = sorted((output / "checkpoints").glob("*.pt"))
    for path in files:
        path.write_bytes(b"")
    records = (output / "metrics.jsonl").read_bytes()
    life = Life(training, output, work / "all_broken" / "log.txt").start()
    statuses = life.wait()
    said = life.log.read_text()
    if statuses is None or statuses[0] == 0 or "no checkpoint is intact" not in said or "Traceback" in said:
        return f"ended with {statuses}: {life.last_words()}"
    if any(path.name not in said for path in files):
        return "not every broken file is named"
    untouched = records == (output / "metrics.jsonl").read_bytes() and all(path.is_file() for path in files)
    return "" if untouched else "files were changed"


def copy_run(stopped: Path, output: Path) -> None:
    """A copy in which the names of one file stay names of one file."""
    shutil.copytree(stopped, output, ignore=shutil.ignore_patterns("*.pt", ".*"))
    copied: dict[int, Path] = {}
    for path in sorted((stopped / "checkpoints").glob("*.pt")):
        target = output / "checkpoints" / path.name
        if (first := copied.setdefault(path.stat().st_ino, target)) is target:
            shutil.copyfile(path, target)
        else:
            target.hardlink_to(first)


def damage(output: Path, kind: str, random_state: random.Random) -> Corruption:
    """Damage last.pt in place, and so every name that its content has."""
    path = output / "checkpoints" / "last.pt"
    names = [other.name for other in sorted(path.parent.glob("*.pt")) if other.samefile(path)]
    content = bytearray(path.read_bytes())
    size = len(content)
    if kind == "truncated":
        length = random_state.randrange(1, size)
        content, how = content[:length], f"{length} of {size} bytes"
    elif kind == "bit flipped":
        place, bit = _covered_place(path, random_state), random_state.randrange(8)
        content[place] ^= 1 << bit
        how = f"bit {bit} of byte {place}"
    elif kind == "empty":
        content, how = bytearray(), "0 bytes"
    elif kind == "foreign file":
        content = bytearray()
        how = random_state.choice(["text", "random bytes", "a tensor of torch.save", "a dict of torch.save"])
        if how == "text":
            content += b"not a checkpoint\n" * random_state.randrange(1, 1000)
        elif how == "random bytes":
            content += random_state.randbytes(random_state.randrange(1, 100_000))
    elif kind == "half-written":
        # As a power loss leaves a file whose length was written and whose data was not.
        length = random_state.randrange(1, size)
        content[length:] = bytes(size - length)
        how = f"zeros from byte {length} on"
    else:
        start = random_state.randrange(0, size - 4096)
        content[start : start + 4096] = random_state.randbytes(4096)
        how = f"4096 random bytes at byte {start}"
    with path.open("r+b") as stream:
        stream.truncate(0)
        stream.write(content)
        if "torch.save" in how:
            torch.save(torch.zeros(9) if "tensor" in how else {"iteration": 10**9, "model": {}}, stream)
    return Corruption(kind, how, names)


def _covered_place(path: Path, random_state: random.Random) -> int:
    """A byte of the file's content: padding between the entries of the archive says nothing that could be damaged."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
    entry = random_state.choices(entries, [entry.file_size for entry in entries])[0]
    lengths = path.read_bytes()[entry.header_offset + 26 : entry.header_offset + 30]
    data = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return data + random_state.randrange(entry.file_size)
