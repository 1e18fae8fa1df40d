"""What one process of each machine does for the others there, and which GPU is whose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.engine.distributed.comm import DeviceError, own_gpu, require_own_gpus
from tests.engine.distributed.test_two_ranks import free_ports

MACHINES = {2: ["a", "b"], 3: ["a", "a", "b"]}


@pytest.fixture(scope="module", params=MACHINES)
def ranks(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    program: Callable[..., Any],
    arguments: Callable[..., list[str]],
) -> list[dict[str, Any]]:
    """What node_ranks.py found on each rank."""
    folder = tmp_path_factory.mktemp("nodes")
    words = arguments(folder, "--max-epochs", "1")
    place = words.index("--output-dir")
    del words[place : place + 2]
    nodes = MACHINES[request.param]
    script = ("distributed/node_ranks.py", folder, json.dumps(free_ports(1)), json.dumps(nodes), *words)
    with program(*script, ranks=len(nodes)) as processes:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, out[-3000:] + err[-6000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(nodes))]


def test_the_first_process_of_each_machine_acts_for_those_there(ranks):
    last = len(ranks) - 1
    mains = [*[0] * last, last]
    assert [found["node_main"] for found in ranks] == mains
    assert [found["on_each_node"]["by"] for found in ranks] == [f"result of rank {main}" for main in mains]
    assert {found["on_each_node"]["failing"] for found in ranks} == {f"rank {last} does not like it"}


@pytest.mark.parametrize(
    ("case", "of_first", "of_second"),
    [
        ("one cache for all", None, None),
        ("once more", 0, 0),
        ("a cache a machine", 2, 2),
        ("no cache", 2, 2),
        ("no locks", None, None),
        ("out of reach", 0, 0),
    ],
)
def test_annotations_are_parsed_once_a_cache_and_once_a_machine_without_one(ranks, case, of_first, of_second):
    found = [one["readings"][case] for one in ranks]
    parses = [one["parses"] for one in found]
    if of_first is None:
        # Two machines that begin at once share the two files out, or both do a file where there are no locks.
        assert parses[0] + parses[-1] == 2 if case != "no locks" else 2 <= parses[0] + parses[-1] <= 4
    else:
        assert (parses[0], parses[-1]) == (of_first, of_second)
    assert not any(parses[1:-1])
    assert len({tuple(one["digests"]) for one in found}) == 1
    machines = [Path(one["sources"][0]).parent.name for one in found]
    assert machines == MACHINES[len(ranks)]


def test_annotations_of_no_cache_outlive_the_file_that_they_came_by(ranks):
    assert all(found["readings"]["kept"] == found["readings"]["once more"]["digests"] for found in ranks)


def test_a_faulty_file_on_one_machine_ends_the_start_on_all_and_is_named(ranks):
    (said,) = {found["readings"]["faulty"] for found in ranks}
    assert said.startswith("/") and "/b/train.json: not JSON" in said


def test_one_process_of_each_machine_finds_and_converts_a_folder_for_those_there(ranks):
    found = [one["conversions"] for one in ranks]
    for case in ("first", "again"):
        assert [one[case]["finds"] for one in found] == [1, *[0] * (len(ranks) - 2), 1]
        assert [Path(one[case]["folder"]).name for one in found] == ["cache"] * len(ranks)
        assert [Path(one[case]["folder"]).parent.name for one in found] == MACHINES[len(ranks)]
    # Equal folders on two machines are equal sets.
    assert len({tuple(one[case]["digests"]) for one in found for case in ("first", "again")}) == 1
    (said,) = {one["faulty"] for one in found}
    assert "/b/things/000.txt, line 1: class 7" in said


def test_one_process_of_each_machine_lists_the_images(ranks):
    assert [any(found["listed"]) for found in ranks] == [True, *[False] * (len(ranks) - 2), True]
    assert ranks[-1]["listed"] == [1, 1]


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees():
    assert [own_gpu(rank, 8, 8) for rank in range(8)] == list(range(8))
    assert own_gpu(1, 2, 8) == 1
    assert [own_gpu(rank, 8, 1) for rank in range(8)] == [0] * 8  # srun --gpus-per-task=1


@pytest.mark.parametrize(("local_rank", "local_world_size"), [(0, 4), (3, 4), (2, 1)])
def test_fewer_gpus_than_processes_are_refused_with_both_numbers(local_rank, local_world_size):
    with pytest.raises(DeviceError, match=f"{local_world_size} processes on this machine and 2 GPUs: .*per_node=2"):
        own_gpu(local_rank, local_world_size, 2)


def test_processes_that_would_share_a_gpu_are_named():
    nodes = ["a, started as 1", "a, started as 1", "b, started as 2", "b, started as 2"]
    require_own_gpus(nodes, ["1", "2", "3", "4"])
    require_own_gpus(nodes, [None] * 4)  # on CPUs
    with pytest.raises(DeviceError, match=r"processes 2, 3 would share a GPU of b \(UUID 3\).*LOCAL_RANK"):
        require_own_gpus(nodes, ["1", "2", "3", "3"])
