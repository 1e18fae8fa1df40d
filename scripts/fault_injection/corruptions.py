"""Checkpoints damaged on the disk: each damage must be named, and the newest intact file used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fault_injection.comparison import differences
from fault_injection.training import FaultTestError, Life, Training, finish, newest_on_disk

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

    def record(self) -> dict[str, Any]:
        return asdict(self)


def corrupt_and_resume(
    training: Training,
    reference: Path,
    stopped: Path,
    work: Path,
    *,
    count: int,
    random_state: random.Random,
    say: Callable[[str], None],
) -> list[Corruption]:
    """Damage the newest checkpoint of the folder `stopped` in `count` ways; one of each kind is trained to the end."""
    found = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        output, log = work / f"{number:03d}" / "run", work / f"{number:03d}" / "log.txt"
        _copy_run(stopped, output)
        corruption = _damage(output, kind, random_state)
        corruption.expected = newest_on_disk_among(output, corruption.names)
        # The plan says where a run would go on; one of each kind really does.
        corruption.resumed_to_the_end = number < len(KINDS)
        try:
            finish(training, output, log, more=() if corruption.resumed_to_the_end else ("--dry-run",))
        except FaultTestError as error:
            corruption.fault = str(error)
        said = log.read_text()
        corruption.named = all(f"skipped: {output / 'checkpoints' / name}" in said for name in corruption.names)
        corruption.went_on_at = _resumed_at(said)
        if not corruption.fault:
            corruption.fault = _fault(corruption)
        if not corruption.fault and corruption.resumed_to_the_end:
            corruption.fault = "; ".join(differences(reference, output)[:3])
        say(f"corruption {number + 1}: {kind} ({corruption.how}) {corruption.fault or 'named, skipped'}")
        if not corruption.fault:
            shutil.rmtree(output.parent)
        found.append(corruption)
    return found


def all_broken(training: Training, stopped: Path, work: Path) -> str:
    """Every checkpoint empty: the run must refuse and touch nothing. What went wrong; empty if nothing did."""
    output = work / "all_broken" / "run"
    _copy_run(stopped, output)
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


def newest_on_disk_among(output: Path, damaged: list[str]) -> int:
    """Iterations of the newest checkpoint that is not damaged."""
    aside = output.parent / "aside"
    aside.mkdir()
    for name in damaged:
        (output / "checkpoints" / name).rename(aside / name)
    newest = newest_on_disk(output)[0]
    for name in damaged:
        (aside / name).rename(output / "checkpoints" / name)
    aside.rmdir()
    return newest


def _copy_run(stopped: Path, output: Path) -> None:
    """A copy in which the names of one file stay names of one file."""
    shutil.copytree(stopped, output, ignore=shutil.ignore_patterns("*.pt", ".*"))
    copied: dict[int, Path] = {}
    for path in sorted((stopped / "checkpoints").glob("*.pt")):
        target = output / "checkpoints" / path.name
        if (first := copied.get(path.stat().st_ino)) is not None:
            target.hardlink_to(first)
        else:
            shutil.copyfile(path, target)
            copied[path.stat().st_ino] = target


def _damage(output: Path, kind: str, random_state: random.Random) -> Corruption:
    """Damage last.pt in place, and so every name that its content has."""
    path = output / "checkpoints" / "last.pt"
    names = [other.name for other in sorted(path.parent.glob("*.pt")) if other.samefile(path)]
    size = path.stat().st_size
    with path.open("r+b") as stream:
        if kind == "truncated":
            length = random_state.randrange(1, size)
            stream.truncate(length)
            how = f"{length} of {size} bytes"
        elif kind == "bit flipped":
            place, bit = _covered_place(path, random_state), random_state.randrange(8)
            stream.seek(place)
            value = stream.read(1)[0] ^ (1 << bit)
            stream.seek(place)
            stream.write(bytes([value]))
            how = f"bit {bit} of byte {place}"
        elif kind == "empty":
            stream.truncate(0)
            how = "0 bytes"
        elif kind == "foreign file":
            stream.truncate(0)
            how = random_state.choice(["text", "random bytes", "a tensor of torch.save", "a dict of torch.save"])
            if how == "text":
                stream.write(b"not a checkpoint\n" * random_state.randrange(1, 1000))
            elif how == "random bytes":
                stream.write(random_state.randbytes(random_state.randrange(1, 100_000)))
            else:
                torch.save(torch.zeros(9) if "tensor" in how else {"iteration": 10**9, "model": {}}, stream)
        elif kind == "half-written":
            # As a power loss leaves a file whose length was written and whose data was not.
            length = random_state.randrange(1, size)
            stream.truncate(length)
            stream.truncate(size)
            how = f"zeros from byte {length} on"
        else:
            start = random_state.randrange(0, size - 4096)
            stream.seek(start)
            stream.write(random_state.randbytes(4096))
            how = f"4096 random bytes at byte {start}"
    return Corruption(kind, how, names)


def _covered_place(path: Path, random_state: random.Random) -> int:
    """A byte of the file's content: padding between the entries of the archive says nothing that could be damaged."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
        entry = random_state.choices(entries, [entry.file_size for entry in entries])[0]
        with path.open("rb") as stream:
            stream.seek(entry.header_offset + 26)
            lengths = stream.read(4)
    data = entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return data + random_state.randrange(entry.file_size)


def _resumed_at(said: str) -> int | None:
    for line in said.splitlines():
        if line.startswith("resumed") and "at iteration" in line:
            return int(line.split("at iteration")[1].split()[0].replace(",", ""))
    return None


def _fault(corruption: Corruption) -> str:
    if corruption.went_on_at != corruption.expected:
        return f"went on at {corruption.went_on_at}, the newest intact checkpoint has {corruption.expected}"
    return "" if corruption.named else "the damaged file is not named"
