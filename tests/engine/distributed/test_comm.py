"""What a process does alone before it joins the others."""

import resource

import pytest

from detection.engine.distributed.comm import allow_connections


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
