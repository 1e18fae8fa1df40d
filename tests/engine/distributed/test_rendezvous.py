"""Every start of a run over one store has a name of its own, which all its processes know."""

import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from detection.engine.distributed.comm import allow_connections
from detection.engine.distributed.rendezvous import _ask_for_name, _name_start

PATIENCE = timedelta(seconds=60)


def start(store: dist.Store, world_size: int) -> set[str]:
    with ThreadPoolExecutor(world_size) as pool:
        names = [pool.submit(_ask_for_name, store, rank, PATIENCE) for rank in range(1, world_size)]
        names.append(pool.submit(_name_start, store, world_size, PATIENCE))
        return {name.result() for name in names}


def test_all_processes_hear_the_name_of_their_own_start_and_not_of_an_earlier_one():
    store = dist.HashStore()
    found = [start(store, world_size) for world_size in (3, 3, 2, 4)]
    assert all(len(names) == 1 for names in found)
    assert len(set.union(*found)) == 4


def test_a_question_that_was_never_answered_does_not_stand_in_for_its_process():
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match="process 1 waited"):
        _ask_for_name(store, 1, timedelta(milliseconds=50))  # died before process 0 came
    with pytest.raises(dist.DistStoreError, match="process 1 of 2 did not come"):
        _name_start(store, 2, timedelta(milliseconds=200))
    assert len(start(store, 2)) == 1


@pytest.mark.parametrize(("before", "world_size", "after"), [(200, 512, 2048), (200, 2, 1028), (2000, 64, 2000)])
def test_the_limit_of_open_files_is_raised_for_the_connections_and_never_lowered(before, world_size, after):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
        allow_connections(world_size)
        allowed = after if hard == resource.RLIM_INFINITY else min(after, hard)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
