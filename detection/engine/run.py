"""One run from the command line to its exit status: check, build, then train, validate or test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from data import worker_error
from data.layouts.found_set import FoundSet
from detection.config import ConfigError, parse_arguments
from detection.config.arg_types import AUTO_BATCH_SIZE
from detection.config.cli import words_of
from detection.config.run_config import RunConfig
from detection.engine.accelerate.device_memory import device_memory
from detection.engine.build import build, has_masks, preflight
from detection.engine.context import RunContext
from detection.engine.distributed.agreement import USER_ERRORS, RunError, run_on_all_ranks, run_on_main_rank
from detection.engine.distributed.comm import Processes, start_processes, stop_processes
from detection.engine.distributed.heartbeat import LostProcess, is_network_error
from detection.engine.distributed.signals import STOPPED_EXIT_CODE, StopRequest
from detection.engine.evaluator import evaluate_model
from detection.engine.inputs.datasets import read_annotations
from detection.engine.state.checkpoint import LoadedCheckpoint
from detection.engine.state.resume import resumed_settings, with_batch_size_of
from detection.engine.state.run_dir import RunDir
from detection.engine.train import find_batch_size, run_training
from detection.reporting import Console, Tracker


def train(*, trackers: Sequence[Tracker] = (), **options: Any) -> Path:
    """Train as `train.py` does, with its options by name: train(data_path="my_set", max_epochs=3, ema=True).

    set={"lr": 0.01} and model_set={...} take dictionaries, options of several values lists. val_only=True and
    test_only=True evaluate.

    Args:
        trackers: as of `run`.
        options: those of the command line, `tracker` among them.

    Returns:
        The run's output directory.

    Raises:
        ConfigError: an option that is wrong, or options that contradict each other.
        RunError and the other errors in USER_ERRORS: what the command line would end with.
        KeyboardInterrupt: a signal ended the run, which saved itself first: resume="DIR" continues it.
    """
    config = parse_arguments(words_of(options), raises=True)
    if run(config, trackers) == STOPPED_EXIT_CODE:
        raise KeyboardInterrupt(f"continue with train(resume={str(config.output_dir)!r})")
    return config.output_dir


def run(config: RunConfig, trackers: Sequence[Tracker] = ()) -> int:
    """Do what the configuration says.

    Args:
        trackers: get a training's figures and images, besides that of --tracker; on the main process only. Their
            classes have different names.

    Returns:
        The exit status: 0, or STOPPED_EXIT_CODE where a signal ended the run (which saved itself first).

    Raises:
        RunError and the errors in USER_ERRORS: the user's to mend.
    """
    with ExitStack() as scratch:
        if config.dry_run and config.data.dataset == "shapes" and not config.data.folders[0].exists():
            # A dry run writes nothing: the set that it needs goes when it ends.
            folder = Path(scratch.enter_context(TemporaryDirectory(prefix="dry_run_"))) / "shapes"
            config = replace(config, data=replace(config.data, data_path=(folder,)))
        return _with_processes(config, trackers)


def _with_processes(config: RunConfig, trackers: Sequence[Tracker]) -> int:
    timeout = timedelta(minutes=config.collective_timeout)
    processes = start_processes(config.device, timeout, config.threads)
    output = RunDir(config.output_dir)
    last_words: str | None = None
    try:
        config = config.for_processes(processes.world_size)
        with StopRequest() as stop:
            if processes.heartbeat is not None:
                processes.heartbeat.share_stop(lambda: stop.requested, stop.request_from_elsewhere)
            return _run(config, processes, output, stop, tuple(trackers))
    except BaseException as error:
        # A process that fails alone leaves the others waiting: they are told why.
        last_words = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if processes.heartbeat is not None and is_network_error(error):
            last_words = "lost contact as well"
            raise LostProcess(processes.heartbeat.report(str(error).splitlines()[0])) from error
        raise
    finally:
        if processes.heartbeat is not None:
            processes.heartbeat.close(last_words)
        output.release()
        stop_processes(failed=last_words is not None)


def _run(
    config: RunConfig, processes: Processes, output: RunDir, stop: StopRequest, trackers: tuple[Tracker, ...]
) -> int:
    finds_batch_size = config.train.batch_size == AUTO_BATCH_SIZE
    if finds_batch_size and device_memory(processes.device) is None:
        raise ConfigError("--batch-size auto is for GPUs: a CPU shares its machine's memory; give a number")
    if config.train.deterministic:
        # cuBLAS repeats its results only with a fixed workspace; it reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    checkpoint, found, lines = _prepare(config, processes, output)
    if finds_batch_size and checkpoint is not None:
        config, finds_batch_size = with_batch_size_of(checkpoint, config, processes.world_size), False
    changes: list[str] = []
    if checkpoint is not None and config.mode == "train":
        config, changes = run_on_all_ranks(processes, partial(resumed_settings, checkpoint, config))
    masks = run_on_all_ranks(processes, partial(has_masks, config, checkpoint))
    files, annotations = read_annotations(config.data, processes, mode=config.mode, found=found, masks=masks)
    components = run_on_all_ranks(processes, partial(build, config, processes, checkpoint, files, annotations))
    console = Console(None if config.dry_run else output.log, is_main=processes.is_main, rank=processes.rank)
    context = RunContext(config, processes, output, stop, console, trackers)
    for line in lines:
        console.say(line)
    try:
        if finds_batch_size:
            context = find_batch_size(context, components)
        if config.mode == "train":
            return run_training(context, components, checkpoint, changes)
        return evaluate_model(context, components)
    except (RunError, *USER_ERRORS) as error:
        if processes.is_main or not isinstance(error, RunError):
            console.log(f"error: {error}")
        raise
    except RuntimeError as error:
        if (of_worker := worker_error(error)) is None:
            raise
        console.log(f"error: {of_worker}")
        raise of_worker from error


def _prepare(
    config: RunConfig, processes: Processes, output: RunDir
) -> tuple[LoadedCheckpoint | None, tuple[FoundSet, ...], list[str]]:
    """The checkpoint to resume from, what the main process has found (nothing on others), and what the start says.

    The main process reads the checkpoint; the others get what it has read, whatever lies at that path for them.
    """
    checkpoint: LoadedCheckpoint | None = None
    found: tuple[FoundSet, ...] = ()

    def check() -> tuple[Path | None, list[str]]:
        nonlocal checkpoint, found
        checkpoint, found, lines = preflight(config, output, processes)
        return None if checkpoint is None else checkpoint.path, lines

    path, lines = run_on_main_rank(processes, check)
    if path is None:
        return None, found, lines
    state = processes.broadcast_state(None if checkpoint is None else checkpoint.state)
    return LoadedCheckpoint(path, state), found, lines
