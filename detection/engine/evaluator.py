"""Validation and test: every image of a set once, over all processes, without a GPU collective."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import DeviceBatch, DevicePrefetcher, EvalLoader, UnreadableImage
from detection.engine.distributed.agreement import run_on_main_rank
from detection.engine.distributed.comm import Processes
from detection.engine.inputs.bad_images import BadImages
from detection.engine.metrics.logger import MetricLogger
from detection.engine.optim.amp import Precision
from detection.engine.run_dir import RunDirError
from detection.engine.signals import StopRequest
from detection.engine.trainer import Stopped
from detection.evaluation import CocoEvaluator, Detections, write_results
from detection.models import ImageBatch
from detection.reporting import counted

_OVER = 2
"""Told to the other processes in place of a wish to stop: more images than allowed cannot be read."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What both loops need: images, how to run the model, where to write."""

    loader: EvalLoader
    category_ids: tuple[int, ...]
    """COCO category id of each label."""
    precision: Precision
    processes: Processes
    metric_logger: MetricLogger
    bad_images: BadImages
    split: str
    """val or test, for messages."""
    stop: StopRequest
    results_file: Path
    limited: bool
    """Only a part of the set is run (--limit-val-batches): the figures are over that part."""


class ValLoop:
    """Detections of the validation set, written as a COCO results file, and their metrics."""

    def __init__(self, inputs: EvaluationInputs, evaluator: CocoEvaluator | None) -> None:
        """
        Args:
            evaluator: on rank 0, which computes the metrics; None elsewhere.
        """
        self.inputs = inputs
        self.evaluator = evaluator

    def run(self, model: nn.Module) -> tuple[dict[str, Any], Detections | None]:
        """Run `model` (not wrapped) over the set; collective.

        Returns:
            metrics on every process, and on rank 0 all detections (None elsewhere).

        Raises:
            Stopped: on every process, when a signal came to one of them.
            RunError: on every process, when the metrics cannot be computed.
        """
        processes = self.inputs.processes
        started = time.perf_counter()
        detections, image_ids, num_unreadable = detect(self.inputs, model, "validating")
        forward_seconds = time.perf_counter() - started
        # The others wait here, on gloo, for as long as rank 0 needs.
        processes.at("computing the metrics" if processes.is_main else "validating, all batches done")
        metrics = run_on_main_rank(processes, partial(self._metrics, detections, image_ids, num_unreadable))
        metrics["seconds"] = time.perf_counter() - started
        metrics["images_per_second"] = metrics["num_images"] / forward_seconds
        return metrics, detections

    def _metrics(self, detections: Detections | None, image_ids: np.ndarray, num_unreadable: int) -> dict[str, Any]:
        assert detections is not None and self.evaluator is not None
        try:
            write_results(detections, self.inputs.results_file)
        except OSError as error:  # a full disk does not end a training; the metrics need no file
            self.inputs.metric_logger.warn(f"{self.inputs.results_file} could not be written: {error}; the run goes on")
        return _evaluated(self.evaluator, self.inputs, detections, image_ids, num_unreadable)


class TestLoop:
    """Detections of the test set as a COCO results file ready for an upload; metrics too where there are boxes."""

    def __init__(self, inputs: EvaluationInputs, evaluator: CocoEvaluator | None) -> None:
        """
        Args:
            evaluator: on rank 0, where the annotation file has boxes; else None.
        """
        self.inputs = inputs
        self.evaluator = evaluator

    def run(self, model: nn.Module) -> tuple[dict[str, Any] | None, int]:
        """Run `model` over the set; collective.

        Returns:
            on every process the metrics (None without boxes), and the number of detections written.

        Raises:
            Stopped: on every process, when a signal came to one of them.
            RunError: on every process, when the results cannot be written or judged.
        """
        detections, image_ids, num_unreadable = detect(self.inputs, model, "testing")
        return run_on_main_rank(self.inputs.processes, partial(self._results, detections, image_ids, num_unreadable))

    def _results(
        self, detections: Detections | None, image_ids: np.ndarray, num_unreadable: int
    ) -> tuple[dict[str, Any] | None, int]:
        assert detections is not None
        try:
            write_results(detections, self.inputs.results_file)
        except OSError as error:
            raise RunDirError(f"{self.inputs.results_file} could not be written: {error}") from error
        if self.evaluator is None:
            return None, len(detections)
        return _evaluated(self.evaluator, self.inputs, detections, image_ids, num_unreadable), len(detections)


def _evaluated(
    evaluator: CocoEvaluator,
    inputs: EvaluationInputs,
    detections: Detections,
    image_ids: np.ndarray,
    num_unreadable: int,
) -> dict[str, Any]:
    """The metrics, with the number of images that they are of and what a reader must know of them."""
    metrics = evaluator.evaluate(detections, image_ids.tolist())
    metrics["num_images"] = len(image_ids)
    if num_unreadable:
        metrics["unreadable_images"] = num_unreadable
        metrics["notes"].append(f"{counted(num_unreadable, 'image')} could not be read: without a detection")
    if inputs.limited:
        metrics["notes"].append(
            f"only {len(image_ids)} images were run (--limit-val-batches): no figure of the whole set"
        )
    return metrics


@torch.no_grad()
def detect(inputs: EvaluationInputs, model: nn.Module, verb: str) -> tuple[Detections | None, np.ndarray, int]:
    """Detections of every image of the loader's set, in pixels of the stored images; collective.

    An image that cannot be read is reported, and has no detections.

    Returns:
        On rank 0 all detections, ordered by image id, and the ids int64 [n] of the images run, each of them once.
        On other processes (None, empty). On all of them, the number of images that could not be read.

    Raises:
        Stopped: on every process, when a signal came to one of them.
        TooManyBadImages: on every process, see BadImages.
    """
    processes, loader = inputs.processes, inputs.loader
    was_training = model.training
    model.eval()
    parts: list[Detections] = []
    image_ids: list[int] = []
    unreadable: list[UnreadableImage] = []
    # Processes have unequal shards. All go through as many rounds, so that a signal to one is seen by all.
    rounds = max(processes.gather_objects(len(loader)))
    batches = DevicePrefetcher(loader.batches(), processes.device)
    try:
        with inputs.metric_logger.evaluation_bar(verb, len(loader)) as bar:
            for round_index in range(rounds):
                processes.at(f"{verb}, batch {round_index + 1} of {rounds}")
                over = inputs.bad_images.exceeded_by(inputs.split, unreadable)
                stop_wanted = processes.all_reduce_max_async(_OVER if over else int(inputs.stop.requested))
                if round_index < len(loader):
                    batch = next(batches)
                    batches.prepare()
                    parts.append(_detect_batch(inputs, model, batch))
                    image_ids += batch.image_ids.tolist()
                    unreadable += batch.unreadable
                    bar.update(1)
                answer = stop_wanted.result()
                if answer == _OVER:
                    break
                if answer:
                    raise Stopped(f"while {verb}")
    finally:
        model.train(was_training)
    num_unreadable = inputs.bad_images.agree(inputs.split, unreadable)
    return *_collect(inputs, Detections.concatenate(parts), np.asarray(image_ids, np.int64)), num_unreadable


def _detect_batch(inputs: EvaluationInputs, model: nn.Module, batch: DeviceBatch) -> Detections:
    with inputs.precision.autocast():
        found = model(ImageBatch(batch.pixels, batch.sizes))
    # The network saw the image enlarged by (x, y) factors: boxes go back the same way.
    scales = batch.scale_factors.cpu().numpy()
    black = {fault.image_id for fault in batch.unreadable}
    found = [
        {name: value[: 0 if image_id in black else None] for name, value in entry.items()}
        for image_id, entry in zip(batch.image_ids.tolist(), found, strict=True)
    ]
    return Detections.from_lists(
        batch.image_ids.tolist(),
        [entry["boxes_xyxy"].float().cpu().numpy() / np.tile(s, 2) for entry, s in zip(found, scales, strict=True)],
        [entry["scores"].float().cpu().numpy() for entry in found],
        [entry["labels"].cpu().numpy() for entry in found],
        category_ids=inputs.category_ids,
    )


def _collect(inputs: EvaluationInputs, mine: Detections, image_ids: np.ndarray) -> tuple[Detections | None, np.ndarray]:
    processes = inputs.processes
    ids, values = mine.as_arrays()
    all_ids, all_values = processes.gather_arrays(ids), processes.gather_arrays(values)
    all_images = processes.gather_arrays(image_ids)
    if all_ids is None or all_values is None or all_images is None:
        return None, image_ids[:0]
    detections = Detections.from_arrays(np.concatenate(all_ids), np.concatenate(all_values))
    run = np.sort(np.concatenate(all_images))
    assert np.array_equal(run, np.sort(inputs.loader.image_ids)), "the evaluated images are not those of the set"
    # The order of the file does not depend on the number of processes.
    return detections.take(np.argsort(detections.image_ids, kind="stable")), run
