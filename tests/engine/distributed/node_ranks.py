"""Processes on two pretended machines: run by test_nodes.py in each, results left in <folder>/<rank>.pt."""

import errno
import fcntl
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import data.coco.fields
from data import CocoAnnotations
from detection.config import parse_arguments
from detection.engine import RunError, run
from detection.engine.distributed.agreement import run_on_each_node
from detection.engine.distributed.comm import Processes, start_processes, stop_processes
from detection.engine.inputs import datasets
from detection.process_exit import leave
from tests.data.layouts.exports import yolo_class_list
from tests.engine.tiny_model import make_known

calls: Counter[str] = Counter()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose calls with the name of a file or folder are counted."""

    def call(path: Any, *more: Any) -> Any:
        calls[f"{name} {Path(path).name}"] += 1
        return function(path, *more)

    return call


def message(action: Callable[[], Any]) -> str:
    try:
        return f"result {action()}"
    except RunError as error:
        return str(error)


def on_each_node(processes: Processes) -> dict[str, str]:
    rank = processes.rank

    def fails() -> None:
        if rank > 0:
            raise RunError(f"rank {rank} does not like it")

    return {
        "by": message(lambda: run_on_each_node(processes, lambda: f"of rank {rank}")),
        "failing": message(lambda: run_on_each_node(processes, fails)),
    }


def readings(processes: Processes, folder: Path, own: Path, words: list[str]) -> dict[str, Any]:
    """What reading the annotations costs each process, in different surroundings; `own`: the disk of its machine."""
    plain_flock, plain_shared = fcntl.flock, datasets.shared_coco
    found: dict[str, Any] = {}

    def read(case: str, cache: Path) -> dict[Path, CocoAnnotations]:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        calls.clear()
        _, sets = datasets.read_annotations(parse_arguments(words).data, processes, mode="train")
        digests = [annotations.digest() for annotations in sets.values()]
        sources = [annotations.source for annotations in sets.values()]
        found[case] = {"parses": calls.total(), "digests": digests, "sources": sources}
        return sets

    def refuse(_file: Any, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    read("one cache for all", folder / "home")
    read("once more", folder / "home")
    read("a cache a machine", own / "home")
    (own / "occupied").touch()  # which is as good as read-only, for root too
    kept = read("no cache", own / "occupied")
    fcntl.flock = refuse
    read("no locks", folder / "lockless")
    fcntl.flock = plain_flock
    if processes.rank == 1:
        datasets.shared_coco = lambda file, words, masks: None
    read("out of reach", folder / "home")
    datasets.shared_coco = plain_shared
    found["kept"] = [annotations.digest() for annotations in kept.values()]
    train = Path(words[words.index("--train-annotations") + 1])
    content = train.read_bytes()
    processes.barrier()
    if processes.rank == processes.world_size - 1:
        train.write_bytes(b"{")
    found["faulty"] = message(lambda: read("faulty", folder / "home"))
    train.write_bytes(content)
    return found


def conversions(processes: Processes, own: Path) -> dict[str, Any]:
    """What a YOLO folder on the disk of each machine costs each process, twice; and what a fault in it says."""
    os.environ["XDG_CACHE_HOME"] = str(own / "cache")
    if processes.rank == processes.node_main:
        yolo_class_list(own / "things")
    processes.barrier()
    plain_find = datasets.find_set
    config = parse_arguments(["--data-path", str(own / "things")]).data
    found: dict[str, Any] = {}
    for case in ("first", "again"):
        calls.clear()
        datasets.find_set = lambda *words: calls.update(["find"]) or plain_find(*words)  # type: ignore[func-returns-value]
        files, sets = datasets.read_annotations(config, processes, mode="train")
        digests = [sets[path].digest() for path in files.annotations]
        found[case] = {"finds": calls["find"], "digests": digests, "folder": str(files.annotations[0].parents[4])}
    datasets.find_set = plain_find
    processes.barrier()
    if processes.rank == processes.world_size - 1:
        (own / "things" / "000.txt").write_text("7 0.5 0.5 0.1 0.1")
    processes.barrier()
    found["faulty"] = message(lambda: datasets.read_annotations(config, processes, mode="train"))
    return found


def main() -> None:
    folder, ports, nodes, words = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    make_known()
    node = nodes[int(os.environ["RANK"])]
    platform.node = lambda: node
    # Each machine has the data on a disk of its own, with other times, here under another path too.
    own = folder / node
    shared = Path(words[words.index("--data-path") + 1])
    for split in ("train", "val"):
        words += [
            f"--{split}-images",
            str(shared / f"{split}2017"),
            f"--{split}-annotations",
            str(own / f"{split}.json"),
        ]
    data.coco.fields.parse_coco = counted("parse", data.coco.fields.parse_coco)
    processes = start_processes("cpu")
    if processes.rank == processes.node_main:
        own.mkdir()
        for split in ("train", "val"):
            shutil.copyfile(shared / "annotations" / f"instances_{split}2017.json", own / f"{split}.json")
            os.utime(own / f"{split}.json", ns=(processes.rank, processes.rank))
    processes.barrier()
    found = {"node_main": processes.node_main, "on_each_node": on_each_node(processes)}
    found["readings"] = readings(processes, folder, own, words)
    found["conversions"] = conversions(processes, own)
    stop_processes()
    os.environ["MASTER_PORT"] = ports.pop()
    os.scandir = counted("list", os.scandir)  # type: ignore[assignment]
    calls.clear()
    run(parse_arguments([*words, "--output-dir", str(folder / "run"), "--dry-run"]))
    found["listed"] = [calls["list train2017"], calls["list val2017"]]
    torch.save(found, folder / f"{processes.rank}.pt")
    leave(0)


if __name__ == "__main__":
    main()
