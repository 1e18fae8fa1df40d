"""What a run has from its first line to its last."""

from __future__ import annotations

from dataclasses import dataclass

from detection.config.run_config import RunConfig
from detection.engine.distributed.comm import Processes
from detection.engine.distributed.signals import StopRequest
from detection.engine.state.run_dir import RunDir
from detection.reporting import Console, Tracker


@dataclass(frozen=True)
class RunContext:
    """The command line, the processes, and where the run writes. The same objects for training and evaluation."""

    config: RunConfig
    processes: Processes
    output: RunDir
    stop: StopRequest
    console: Console
    trackers: tuple[Tracker, ...] = ()
    """The caller's own, besides that of --tracker."""

    @property
    def num_workers(self) -> int:
        """Loader processes of this process."""
        return self.config.data.workers_on(self.processes.device.type)
