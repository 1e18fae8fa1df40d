"""Where a run's figures go: metrics.jsonl, TensorBoard, trackers, and the console with train.log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from detection.reporting import (
    Console,
    Forecast,
    MetricsLog,
    ProgressBar,
    TensorBoardLog,
    TrackerFeed,
    duration,
    points_of,
    summary_table,
    validation_table,
)
from detection.reporting.metrics_log import metric_of

_MAX_FAILED_WRITES = 3


class MetricLogger:
    """One process's records. On other processes than the main one it only passes errors on to the console."""

    def __init__(
        self,
        console: Console,
        log: MetricsLog | None = None,
        board: TensorBoardLog | None = None,
        *,
        describe: Callable[[TensorBoardLog], None] = lambda board: None,
        best_epoch: int | None = None,
        best_metric: str = "mAP",
        trackers: Sequence[TrackerFeed] = (),
    ) -> None:
        """
        Args:
            log, board: on the main process of a run that trains; None elsewhere.
            describe: writes what describes the run into a log that does not have it yet.
            best_epoch: of the run so far, counted from 1. None: what `log` holds is not compared with what comes.
            best_metric: of a validation, which says whether it is the best.
            trackers: get every figure and image besides.
        """
        self.console = console
        self.log = log
        self.board = board
        self._trackers = trackers
        self._is_done = False
        self._bar: ProgressBar | None = None
        self._forecast: Forecast | None = None
        self._failed_writes = 0
        self._unwritten: list[dict[str, Any]] = []
        self._board_is_broken = False
        self._describe = describe
        # The next iterations of training and validation.
        self._next = (board.first_iteration, board.val_from) if board is not None else (0, 0)
        self._on_board(self._complete)
        self._last_validation: dict[str, Any] | None = None
        self._best_validation: dict[str, Any] | None = None
        self._best_metric = best_metric
        if log is not None and best_epoch is not None:
            for record in log.validations():
                self._remember(record)

    def say(self, text: str = "") -> None:
        self.console.say(text)

    def warn(self, text: str) -> None:
        self.console.warn(text)

    @contextmanager
    def training_bar(self, total: int, initial: int) -> Iterator[None]:
        """Show the iterations' progress while inside."""
        with self.console.progress(total, initial=initial, description="training", unit="it") as bar:
            self._bar = bar
            self._forecast = Forecast(initial, total)
            try:
                yield
            finally:
                self._bar = self._forecast = None

    @contextmanager
    def evaluation_bar(self, verb: str, total: int) -> Iterator[ProgressBar]:
        """A bar over the batches of an evaluation."""
        with self.console.progress(total, description=verb, unit="batch") as bar:
            yield bar

    def train(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of iterations just done."""
        for record in records:
            self._log(record)
            self._on_board(partial(TensorBoardLog.train, record=record))
            self._track(record)
            self._next = record["iteration"] + 1, self._next[1]
        if records and self._bar is not None:
            last = records[-1]
            figures = {name: last[name] for name in ("loss", "images_per_second", "lr", "memory_gb") if name in last}
            self._bar.update(len(records), epoch=last["epoch"] + 1, **figures)
            if self._forecast is not None and (line := self._forecast.report(last["iteration"] + 1)):
                self.say(line)

    def validation(self, epoch: int, iteration: int, metrics: dict[str, Any], model_tested: str) -> None:
        """Write a validation's metrics, and show them beside the previous and the best ones."""
        record = {"kind": "val", "epoch": epoch, "iteration": iteration, "weights": model_tested, **metrics}
        self._log(record)
        self._on_board(partial(TensorBoardLog.validation, record=record))
        self._track(record)
        self._next = self._next[0], iteration + 1
        if self._forecast is not None:
            self._forecast.leave_out(metrics["seconds"])
        self.say(
            f"validation after epoch {epoch + 1} "
            f"({model_tested}, {metrics['num_images']:,} images, {duration(metrics['seconds'])})"
            + (f", loss {metrics['loss']:.4f}" if "loss" in metrics else "")
        )
        self.say(validation_table(metrics, self._last_validation, self._best_validation))
        self._remember(record)

    def images(self, iteration: int, images: Sequence[np.ndarray], tag: str) -> None:
        """Show images, uint8 RGB [H, W, 3] each, in TensorBoard and trackers."""
        self._on_board(lambda board: board.images(iteration, images, tag))
        for tracker in self._trackers:
            tracker.images(iteration, tag, images)

    def precision_recall(self, iteration: int, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Show curves, name -> (precision, recall), in TensorBoard."""
        self._on_board(lambda board: board.precision_recall(iteration, curves))

    def flush(self) -> None:
        """Put on the disk what was written so far; before a checkpoint, which a resume continues from."""
        if self.log is not None:
            self._write(lambda record: self.log.flush(), None)  # type: ignore[union-attr]
        self._mend_board()
        self._on_board(TensorBoardLog.flush)

    def finish(self, num_iterations: int) -> None:
        """Mark the run as done to its last iteration."""
        self._is_done = True
        self._mend_board()
        self._on_board(lambda board: board.finish(num_iterations))

    def summary(self, best_epoch: int | None) -> str:
        """All validations of the run as a table, that of `best_epoch` (counted from 1) marked."""
        if self.log is None:
            return ""
        # Records count epochs from 0, people from 1.
        records = self.log.validations()
        return summary_table([{**record, "epoch": record["epoch"] + 1} for record in records], best_epoch)

    @property
    def num_validated(self) -> int | None:
        """Images of the run's last validation; None where there was none."""
        return None if self._last_validation is None else self._last_validation.get("num_images")

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        self._mend_board()
        self._on_board(TensorBoardLog.close)
        for tracker in self._trackers:
            tracker.close(self._is_done)

    def _remember(self, record: dict[str, Any]) -> None:
        self._last_validation = record
        best = None if self._best_validation is None else metric_of(self._best_validation, self._best_metric)
        value = metric_of(record, self._best_metric)
        if self._best_validation is None or (value is not None and (best is None or value > best)):
            self._best_validation = record

    def _track(self, record: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.scalars(record["iteration"], points_of(record))

    def _log(self, record: dict[str, Any]) -> None:
        """Write into metrics.jsonl, after what an earlier failure left unwritten."""
        if self.log is None:
            return
        self._unwritten.append(record)
        while self._unwritten and self._write(self.log.write, self._unwritten[0]):
            del self._unwritten[0]

    def _on_board(self, write: Callable[[TensorBoardLog], None]) -> None:
        if self.board is None or self._board_is_broken:
            return
        try:
            write(self.board)
        except OSError as error:
            # Its file may end in the middle of a record, behind which a reader would see nothing.
            self._board_is_broken = True
            self.warn(
                f"TensorBoard's files cannot be written: {error}; the run continues, and tries again at each checkpoint"
            )

    def _mend_board(self) -> None:
        """Complete TensorBoard's files after a failure, if they can be written again. Images and
        precision-recall curves of the time in between are lost."""
        if self.board is None or not self._board_is_broken or self._unwritten:
            return
        try:
            with contextlib.suppress(OSError):
                self.board.close()
            board = TensorBoardLog(self.board.directory, first_iteration=self._next[0], val_from=self._next[1])
            self._complete(board)
            board.flush()
        except OSError:
            return
        self.board, self._board_is_broken = board, False
        self.say("TensorBoard's files are complete again")

    def _complete(self, board: TensorBoardLog) -> None:
        """Write what metrics.jsonl has and the board lacks: of a time when it could not be written, here or before a
        kill."""
        self._describe(board)
        if self.log is None:
            return
        last = board.history.last_steps
        trained, validated = last.get("train/loss", -1), last.get("val/seconds", -1)
        for record in self.log.since(trained, validated):
            if record["kind"] == "train":
                board.train(record)
            else:
                board.validation(record)

    def _write(self, write: Callable[[Any], None], record: Any) -> bool:
        # A full disk must not end a run. The warning comes a few times, not every iteration.
        try:
            write(record)
        except OSError as error:
            self._failed_writes += 1
            if self._failed_writes <= _MAX_FAILED_WRITES:
                self.warn(f"figures could not be written: {error}; the run continues")
            return False
        return True
