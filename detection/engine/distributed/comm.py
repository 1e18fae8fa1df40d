"""The processes of a run: who they are, and the few things they tell each other.

The process group is the only global state of the project, and only this file touches it. Gradients travel
through NCCL on GPUs and gloo on CPUs. Everything else, evaluation included, goes through a gloo
group of its own, so that no GPU collective ever waits for a process that is computing metrics.
"""

from __future__ import annotations

import io
import os
import platform
import resource
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.engine.distributed.cpu_threads import set_threads
from detection.engine.distributed.heartbeat import Heartbeat, start_heartbeat
from detection.engine.distributed.rendezvous import rendezvous
from detection.errors import DetectionError

CONTROL_TIMEOUT = timedelta(hours=3)
"""How long the others wait for what the main process does alone: as long as the longest evaluation may take."""
_GRACE = timedelta(minutes=1)
"""The backends' own timeouts come after the heartbeat's, which names the missing process."""
_OTHER_FILES = 1024
"""Open files of a process besides its connections: data, shards, libraries"""
_SHORTEST_LOOK, _LONGEST_LOOK = 1e-4, 2e-3
"""Seconds between looks whether an answer is there: the first, and at most."""


class DeviceError(DetectionError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class Processes:
    """This process among the others of the run."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    control_group: Any = None
    """gloo group of all processes; None where there is one process."""
    heartbeat: Heartbeat | None = None
    """Who is still there; None where there is one process."""
    nodes: tuple[str, ...] = ("",)
    """By rank: the machine, and the torchrun on it that started the process. Equal ones share memory and disks."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def node_main(self) -> int:
        """The first rank on this process's machine, which does there what one process can do for all."""
        return self.nodes.index(self.nodes[self.rank])

    def at(self, place: str) -> None:
        """Note what this process is doing ("in iteration 7"), for the message of the others should it be lost."""
        if self.heartbeat is not None:
            self.heartbeat.at(place)

    def waiting(self, what: str, limit: timedelta | None = None) -> AbstractContextManager[Any]:
        """Inside, this process waits for the others. If that takes longer than `limit` (default: the run's timeout), it
        ends with a message that names them."""
        return self.heartbeat.waiting(what, limit) if self.heartbeat is not None else nullcontext()

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            with self.waiting("every process"):
                dist.barrier(group=self.control_group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (plain types) on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        with self.waiting("what process 0 does alone", CONTROL_TIMEOUT):
            dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def broadcast_state(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Rank 0's `state` (tensors on the CPU and plain types; None elsewhere) on every process, bit for bit."""
        content = io.BytesIO()
        if self.world_size > 1:
            if self.is_main:
                torch.save(state, content)
            size = self.broadcast(content.tell())
            data = torch.empty(size, dtype=torch.uint8)
            if self.is_main:
                data = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
            with self.waiting("the checkpoint that process 0 has read", CONTROL_TIMEOUT):
                dist.broadcast(data, src=0, group=self.control_group)
            if not self.is_main:
                state = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        assert state is not None
        return state

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's value (small, plain types), by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.waiting("the word of every process"):
            dist.all_gather_object(values, value, group=self.control_group)
        return values

    def gather_arrays(self, array: NDArray[Any]) -> NDArray[Any] | None:
        """Each process's `array` [n_r, ...] (n_r may differ, 0 included), one after another by rank; on rank 0 only,
        else None.

        Each part is received where it shall lie: beyond the result no process needs memory.
        """
        if self.world_size == 1:
            return array
        lengths = self.gather_objects(len(array))
        whole = np.empty((sum(lengths), *array.shape[1:]), array.dtype) if self.is_main else None
        with self.waiting("the results of every process"):
            if whole is None:
                if len(array):
                    mine = torch.from_numpy(np.require(array, requirements=["C", "W"]))  # it warns of others
                    dist.send(mine, dst=0, group=self.control_group)
                return None
            whole[: lengths[0]] = array
            end = lengths[0]
            for rank, length in enumerate(lengths[1:], start=1):
                if length:
                    dist.recv(torch.from_numpy(whole[end : end + length]), src=rank, group=self.control_group)
                end += length
        return whole

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of `values` (float, any shape, on this process's device); a new tensor."""
        values = values.clone()
        if self.world_size > 1:
            with self.waiting("the losses of every process"):
                dist.all_reduce(values)
            values /= self.world_size
        return values

    def all_reduce_sum_async(self, values: Tensor, *, in_rank_order: bool = False) -> PendingSum:
        """Start replacing `values` (float [n], on this process's device) by their sum over the processes.

        Args:
            in_rank_order: add the values of process 0, 1, 2, ..., whatever order the network's library would choose;
                n is a multiple of the number of processes.
        """
        if not in_rank_order:
            return PendingSum(values, dist.all_reduce(values, async_op=True))
        # Every process adds up one part of the values, and passes its sum on.
        parts = torch.empty_like(values).view(self.world_size, -1)
        return PendingSum(values, dist.all_to_all_single(parts, values.view_as(parts), async_op=True), parts)

    def all_reduce_max_async(self, value: int) -> PendingMax:
        """Start finding the largest `value` over the processes; `.result()` waits for it.

        The process does not wait between the two calls: an iteration later the answer is already there.
        """
        box = torch.tensor([value], dtype=torch.int64)
        work = dist.all_reduce(box, dist.ReduceOp.MAX, self.control_group, True) if self.world_size > 1 else None
        return PendingMax(box, work, self)

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every process rank 0's buffers: batch-norm statistics, which each keeps for itself while it trains."""
        if self.world_size > 1:
            with self.waiting("the statistics of process 0"):
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)

    def broadcast_weights(self, module: nn.Module) -> None:
        """Give every process rank 0's parameters and buffers."""
        if self.world_size > 1:
            with self.waiting("the weights of process 0"):
                for parameter in module.parameters():
                    dist.broadcast(parameter.detach(), src=0)
        self.broadcast_buffers(module)


@dataclass
class PendingMax:
    """A maximum over the processes that is under way."""

    box: Tensor
    work: Any
    processes: Processes

    def result(self) -> int:
        if self.work is not None:
            with self.processes.waiting("every process to reach this iteration"):
                seconds = _SHORTEST_LOOK
                # In the library's own wait no signal would be heard.
                while not self.work.is_completed():
                    time.sleep(seconds)
                    seconds = min(2 * seconds, _LONGEST_LOOK)
                self.work.wait()
        return int(self.box)


@dataclass
class PendingSum:
    """A sum over the processes that is under way."""

    values: Tensor
    work: Any
    parts: Tensor | None = None
    """float [world size, n / world size]: this process's part of every process's values."""

    def wait(self) -> None:
        """From here on `values` has the sum. On a GPU the stream waits, not the host."""
        self.work.wait()
        if self.parts is not None:
            total, *others = self.parts
            for other in others:
                total += other
            dist.all_gather(list(self.values.view_as(self.parts)), total)


def start_processes(device: str, timeout: timedelta = timedelta(minutes=15), threads: int | None = None) -> Processes:
    """Join the run's processes as torchrun's environment says; one process without it.

    Args:
        device: auto (CUDA where there is one), cpu or cuda.
        timeout: how long a process waits for the others before it ends with an error that names them.
        threads: CPU threads of a process; None: on CPUs the machine's cores are divided.

    Raises:
        DeviceError: cuda is asked for and absent, or two processes would use one GPU.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and num_gpus == 0:
        raise DeviceError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or check the driver")
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    chosen, gpu = torch.device("cpu"), None
    if device == "cuda":
        chosen = torch.device("cuda", own_gpu(local_rank, local_world_size, num_gpus))
        torch.cuda.set_device(chosen)
        gpu = str(getattr(torch.cuda.get_device_properties(chosen), "uuid", f"of process {rank}"))
    set_threads(threads, chosen.type, local_world_size)
    group = heartbeat = None
    if world_size > 1:
        allow_connections(world_size)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store, start = rendezvous(timeout + _GRACE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout + _GRACE)
        group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT + _GRACE)
        heartbeat = start_heartbeat(start, rank, world_size, timeout)
    processes = Processes(rank, local_rank, world_size, local_world_size, chosen, group, heartbeat)
    nodes, gpus = zip(*processes.gather_objects((_node(), gpu)), strict=True)
    require_own_gpus(nodes, gpus)
    return replace(processes, nodes=nodes)


def allow_connections(world_size: int) -> None:
    """Raise this process's limit of open files, where the system lets it: two groups connect it with every other."""
    needed = 2 * world_size + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def own_gpu(local_rank: int, local_world_size: int, num_gpus: int) -> int:
    """Which of the `num_gpus` GPUs that this process sees is the one for it.

    Raises:
        DeviceError: there are too few for the processes of this machine.
    """
    if num_gpus == 1:  # srun --gpus-per-task=1 shows each process its own; whether it did, require_own_gpus finds out
        return 0
    if max(local_rank + 1, local_world_size) > num_gpus:
        raise DeviceError(
            f"{local_world_size} processes on this machine and {num_gpus} GPUs: "
            f"start torchrun with --nproc_per_node={num_gpus}, or show each process one GPU (srun --gpus-per-task=1)"
        )
    return local_rank


def require_own_gpus(nodes: Sequence[str], gpus: Sequence[str | None]) -> None:
    """Raises DeviceError where two processes have the same GPU (by its UUID; None: a CPU); both arguments by rank."""
    for rank, gpu in enumerate(gpus):
        sharing = [str(other) for other, its in enumerate(gpus) if its == gpu]
        if gpu is not None and len(sharing) > 1:
            raise DeviceError(
                f"processes {', '.join(sharing)} would share a GPU of {nodes[rank].split(',')[0]} (UUID {gpu}). Start "
                "no more processes than the machine has GPUs: torchrun --nproc_per_node=gpu. Without torchrun, "
                "LOCAL_RANK must be each process's number on its machine, or each must see its own GPU: "
                "srun --gpus-per-task=1"
            )


def _node() -> str:
    """This machine since its start, and the torchrun that started this process; it stays the same over restarts.

    A torchrun's number may come again: in a container it is process 1. The moment of its start does not.
    """
    try:
        node = f"{platform.node()}, started as {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            pid = os.getppid()
            # A script of the user's may stand between the two.
            while b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
                pid = int(_stat_of(pid)[1])
            node += f", torchrun is process {pid}, begun {_stat_of(pid)[19]} after that"
    except OSError:  # where the system does not tell, each process stands alone
        node = uuid.uuid4().hex
    return node


def _stat_of(pid: int) -> list[str]:
    # Without the name, which may have anything in it: the parent is the second of these, the start the twentieth.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def stop_processes(*, failed: bool = False) -> None:
    """Leave the run's processes; `failed`: alone, while the others may be in the middle of an exchange."""
    # NCCL may wait for the end of an exchange that never comes. The end of the process, which is near, needs none.
    if dist.is_initialized() and not (failed and dist.get_backend() != "gloo"):
        dist.destroy_process_group()
