"""Where the processes of a run meet: a key-value store that holds nothing of an earlier start.

torchrun keeps one store over its restarts, and PyTorch finds in it the addresses of processes that are dead: a
restarted run then waits for them forever. The number of the restart does not tell the starts apart, for a machine that
joined later counts from 0. So process 0 names each start anew, and tells the name to those who ask now.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_POLL_SECONDS = 0.02


def rendezvous(timeout: timedelta) -> tuple[dist.Store, str]:
    """The store of this start of the run (torchrun's environment says where), and the start's name; collective.

    Raises:
        DistStoreError: a process does not come within `timeout`; the message says which.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name = _name_start(store, world_size, timeout) if rank == 0 else _ask_for_name(store, rank, timeout)
    return dist.PrefixStore(f"start/{name}", store), name


def _name_start(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    """Process 0's part: answer every question until all others have heard the name.

    A question of an earlier start is answered too, to nobody; its process's new question takes its place.
    """
    name = uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"heard/{name}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"question/{rank}"]):
                store.set(f"answer/{store.get(f'question/{rank}').decode()}", name)
        if time.monotonic() > until:
            listed = ", ".join(map(str, sorted(missing)))
            raise dist.DistStoreError(
                f"process {listed} of {world_size} did not come within {timeout.total_seconds() / 60:g} minutes"
            )
        if missing:
            time.sleep(_POLL_SECONDS)
    return name


def _ask_for_name(store: dist.Store, rank: int, timeout: timedelta) -> str:
    question = uuid.uuid4().hex
    store.set(f"question/{rank}", question)
    try:
        store.wait([f"answer/{question}"], timeout)
    except dist.DistStoreError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise dist.DistStoreError(
            f"process {rank} waited {timeout.total_seconds() / 60:g} minutes at {address} for process 0"
        ) from error
    name = store.get(f"answer/{question}").decode()
    store.set(f"heard/{name}/{rank}", "")
    return name
