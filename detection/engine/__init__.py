"""Loops, optimizer, precision, processes and checkpoints: everything that happens around a training step."""

from detection.engine.distributed.agreement import USER_ERRORS, RunError
from detection.engine.distributed.signals import STOPPED_EXIT_CODE
from detection.engine.run import run

__all__ = ["STOPPED_EXIT_CODE", "USER_ERRORS", "RunError", "run"]
