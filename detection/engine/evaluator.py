"""Validation and test: every image of a set once, over all processes, without a GPU collective."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data import CocoAnnotations, CocoDataset, DeviceBatch, DevicePrefetcher, EvalLoader, UnreadableImage
from data.coco.run_lengths import RunLengths
from data.loading.dataset import ConcatDataset, sets_of
from detection.engine.accelerate.choice import acceleration_of
from detection.engine.accelerate.compile import compile_for_evaluation
from detection.engine.accelerate.cuda_graphs import CudaGraphBackend, record_detection
from detection.engine.accelerate.device_memory import naming_out_of_memory
from detection.engine.build import Components
from detection.engine.context import RunContext
from detection.engine.distributed.agreement import RunError, run_on_all_ranks, run_on_main_rank
from detection.engine.distributed.signals import STOPPED_EXIT_CODE, Interrupted, Stopped
from detection.engine.inputs.bad_images import BadImages, TooManyBadImages
from detection.engine.metrics.images import validation_images
from detection.engine.metrics.logger import MetricLogger
from detection.engine.optim.amp import Precision
from detection.engine.state.run_dir import RunDirError, write_json
from detection.evaluation import CocoEvaluator, Detections, describe_judging, write_mask_results, write_results
from detection.models import AnyDetector, FasterRCNN, ImageBatch, MaskBatch, TargetBatch, paste_masks
from detection.reporting import counted, validation_table

MASKS_AT_ONCE = 20
"""Whole masks of an image in memory at a time."""
_OVER = 2
"""Told to the other processes in place of a wish to stop: more images than allowed cannot be read."""


class Evaluator:
    """Detections of a validation or test set, written as a COCO results file, and their metrics."""

    def __init__(
        self,
        context: RunContext,
        dataset: CocoDataset,
        coco: CocoEvaluator | None,
        precision: Precision,
        metric_logger: MetricLogger,
        bad_images: BadImages,
    ) -> None:
        """
        Args:
            coco: computes the metrics on rank 0; None elsewhere, and where the annotations have no boxes.
        """
        config, self.processes = context.config, context.processes
        self.dataset = dataset
        self.coco = coco
        self.split = "test" if config.mode == "test" else "val"
        self.results_file = context.output.detections(self.split)
        self._parts = (
            [
                _Part(name, dataset.parts[number].annotations, dataset.image_ids[rows], self.results_file)
                for number, (name, rows) in enumerate(sets_of(dataset).items())
            ]
            if isinstance(dataset, ConcatDataset)
            else []
        )
        self._has_masks = dataset.annotations.segmentations is not None
        """Then each process has masks of its detections to gather, also one that has run no image"""
        self.loader = EvalLoader(
            dataset,
            min_size=config.data.min_size,
            max_size=config.data.max_size,
            batch_size=config.train.batch_size,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            workers=context.num_workers,
            limit_batches=config.data.limit_val_batches,
            pin=self.processes.device.type == "cuda",
            max_bad_images=config.data.max_bad_images,
        )
        self._is_limited = config.data.limit_val_batches is not None
        self._wants_losses = config.output.val_loss and self.split == "val"
        self._losses: list[tuple[int, int, dict[str, float]]] = []
        self._precision = precision
        self._logger = metric_logger
        self._bad_images = bad_images
        self._stop = context.stop

    @property
    def results_files(self) -> list[Path]:
        """Where the detections are: in one file, or one for each set."""
        return [part.file for part in self._parts] or [self.results_file]

    def close(self) -> None:
        """End the loader's processes."""
        self.loader.close()

    def validate(self, iteration: int, model: nn.Module) -> dict[str, Any]:
        """The metrics of `model` (not wrapped), with images and curves in TensorBoard at `iteration`; collective.

        Raises: see run.
        """
        metrics, detections = self.run(model)
        assert metrics is not None
        if detections is not None:
            self._logger.images(iteration, validation_images(self.dataset, detections), "val/detections")
        if self.coco is not None:
            self._logger.precision_recall(iteration, self.coco.curves)
        return metrics

    def run(self, model: nn.Module) -> tuple[dict[str, Any] | None, Detections | None]:
        """Run `model` (not wrapped) over the set and write the detections; collective.

        Returns:
            On every process the metrics (None for a test set without boxes); on rank 0 all detections, else None.

        Raises:
            Stopped: on every process, when a signal came to one of them.
            RunError: on every process, when a test's results cannot be written, or metrics cannot be computed.
            TooManyBadImages: on every process, see BadImages.
        """
        verb = "validating" if self.split == "val" else "testing"
        started = time.perf_counter()
        detections, image_ids, *counts = self._detect(model, verb)
        forward_seconds = time.perf_counter() - started
        # The others wait here, on gloo, for as long as rank 0 needs.
        self.processes.at("computing the metrics" if self.processes.is_main else f"{verb}, all batches done")
        metrics = run_on_main_rank(self.processes, partial(self._judge, detections, image_ids, *counts))
        if metrics is not None and self.split == "val":
            metrics |= self._mean_losses()
            metrics["seconds"] = time.perf_counter() - started
            metrics["images_per_second"] = metrics["num_images"] / forward_seconds
        return metrics, detections

    def _mean_losses(self) -> dict[str, float]:
        """The losses' mean over the images run, and their sum as "loss"; collective. Empty without losses.

        The batches do not depend on the number of processes, and their order here does not either.
        """
        found = [each for part in self.processes.gather_objects(self._losses) for each in part]
        found.sort(key=lambda each: each[0])
        self._losses = []
        total = sum(count for _, count, _ in found)
        names = found[0][2] if found else {}
        means = {name: math.fsum(count * losses[name] for _, count, losses in found) / total for name in names}
        return {"loss": math.fsum(means.values()), **means} if means else {}

    def _judge(
        self, detections: Detections | None, image_ids: np.ndarray, num_unreadable: int, num_nonfinite: int
    ) -> dict[str, Any] | None:
        """Write the results file; the metrics, with the number of images and what a reader must know of them."""
        assert detections is not None
        try:
            joint_ids = self.dataset.annotations.category_ids
            everyones = [part.own(detections, joint_ids) for part in self._parts] or [detections]
            for file, written in zip(self.results_files, everyones, strict=True):
                write_results(written, file)
                if written.masks is not None:
                    write_mask_results(written, mask_results(file))
        except OSError as error:
            problem = f"{self.results_file} could not be written: {error}"
            if self.split == "test":
                raise RunDirError(problem) from error
            # A full disk does not end a training; the metrics need no file.
            self._logger.warn(f"{problem}; the run continues")
        if num_nonfinite:
            self._logger.warn(
                f"the network gave NaN or infinity for {counted(num_nonfinite, 'image')}: such values are no detections"
            )
        if self.coco is None:
            return None
        metrics = self._metrics(self.coco, detections, image_ids)
        metrics["num_images"] = len(image_ids)
        if num_unreadable:
            metrics["unreadable_images"] = num_unreadable
            metrics["notes"].append(f"{counted(num_unreadable, 'image')} could not be read: without a detection")
        if num_nonfinite:
            metrics["nonfinite_images"] = num_nonfinite
        if self._is_limited:
            metrics["notes"].append(
                f"only {len(image_ids)} images were run (--limit-val-batches): no figure of the whole set"
            )
        return metrics

    def _metrics(self, coco: CocoEvaluator, detections: Detections, image_ids: np.ndarray) -> dict[str, Any]:
        """The metrics of all images; of several sets each one's as well, under "sets".

        A detection of a class that an image's set knows nothing of counts nowhere: nobody has looked for such objects.
        """
        joint_ids = self.dataset.annotations.category_ids
        for part in self._parts:
            detections = detections.take(~part.unjudged(detections, joint_ids))
        sets = {}
        for part in self._parts:
            run = image_ids[np.isin(image_ids, part.image_ids)]
            if len(run):
                its = detections.take(np.isin(detections.image_ids, run))
                found = coco.evaluate(its, run.tolist())
                sets[part.name] = {name: value for name, value in found.items() if name != "notes"}
        # Last, as its curves are the ones to be shown.
        metrics = coco.evaluate(detections, image_ids.tolist())
        return metrics | {"sets": sets} if sets else metrics

    @torch.no_grad()
    def _detect(self, model: nn.Module, verb: str) -> tuple[Detections | None, np.ndarray, int, int]:
        """Detections of every image of the loader's set, in pixels of the stored images; collective.

        An image that cannot be read is reported, and has no detections.

        Returns:
            On rank 0 all detections, ordered by image id, and the ids int64 [n] of the images run, each of them once.
            On other processes (None, empty). On all of them, the number of images that could not be read, and of those
            for which the network gave values that are not finite.
        """
        was_training = model.training
        model.eval()
        parts: list[Detections] = []
        image_ids: list[int] = []
        unreadable: list[UnreadableImage] = []
        num_nonfinite = 0
        # Processes have unequal shards. All go through as many rounds, so that a signal to one is seen by all.
        rounds = max(self.processes.gather_objects(len(self.loader)))
        batches = DevicePrefetcher(self.loader.batches(), self.processes.device)
        try:
            with self._logger.evaluation_bar(verb, len(self.loader)) as bar:
                for round_index in range(rounds):
                    self.processes.at(f"{verb}, batch {round_index + 1} of {rounds}")
                    wish = _OVER if self._bad_images.exceeded_by(self.split, unreadable) else 0
                    batch = None
                    try:
                        with self._stop.interrupting():
                            batch = next(batches, None)
                            batches.prepare()
                    except Interrupted:
                        wish = wish or 1
                    stop_wanted = self.processes.all_reduce_max_async(wish)
                    if batch is not None:
                        with naming_out_of_memory(partial(self._place, verb, batch)):
                            found, num_bad = self._detect_batch(model, batch)
                        parts.append(found)
                        num_nonfinite += num_bad
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
        num_unreadable = self._bad_images.agree(self.split, unreadable)
        num_nonfinite = sum(self.processes.gather_objects(num_nonfinite))
        collected = self._collect(Detections.concatenate(parts), np.asarray(image_ids, np.int64))
        return *collected, num_unreadable, num_nonfinite

    def _place(self, verb: str, batch: DeviceBatch) -> str:
        height, width = batch.padded_size
        return f"while {verb}, process {self.processes.rank}, batch of {len(batch)} x {height} x {width} pixels"

    def _detect_batch(self, model: nn.Module, batch: DeviceBatch) -> tuple[Detections, int]:
        """Detections in a batch, and how many of its images have values that are not finite."""
        assert isinstance(model, AnyDetector)
        with self._precision.autocast():
            images = ImageBatch(batch.pixels, batch.sizes)
            if self._wants_losses and isinstance(model, FasterRCNN):
                # An image's own key: it draws the same samples in every validation.
                masks = None if batch.masks is None else MaskBatch(*batch.masks)
                keys = batch.image_ids.to(batch.labels)
                targets = TargetBatch(batch.boxes_xyxy, batch.labels, batch.valid, keys, masks)
                found, is_finite, losses = model.detect_with_losses(images, targets)
                values = zip(losses, torch.stack(list(losses.values())).tolist(), strict=True)
                self._losses.append((batch.iteration, len(batch), dict(values)))
            else:
                found, is_finite = model.detect(images)
        # The network saw the image enlarged by (x, y) factors: boxes go back the same way.
        scales = batch.scale_factors.cpu().numpy()
        black = {fault.image_id for fault in batch.unreadable}
        found = [
            {name: value[: 0 if image_id in black else None] for name, value in entry.items()}
            for image_id, entry in zip(batch.image_ids.tolist(), found, strict=True)
        ]
        detections = Detections.from_lists(
            batch.image_ids.tolist(),
            [entry["boxes_xyxy"].float().cpu().numpy() / np.tile(s, 2) for entry, s in zip(found, scales, strict=True)],
            [entry["scores"].float().cpu().numpy() for entry in found],
            [entry["labels"].cpu().numpy() for entry in found],
            category_ids=self.dataset.annotations.category_ids,
            masks=[_masks(*each) for each in zip(found, scales, batch.native_sizes, strict=True)]
            if self._has_masks
            else None,
        )
        return detections, int(is_finite.logical_not().sum())

    def _collect(self, mine: Detections, image_ids: np.ndarray) -> tuple[Detections | None, np.ndarray]:
        ids, values, images = map(self.processes.gather_arrays, (*mine.as_arrays(), image_ids))
        masks = self._gathered_masks(mine.masks) if self._has_masks else None
        if ids is None or values is None or images is None:
            return None, image_ids[:0]
        detections = Detections.from_arrays(ids, values)
        del ids, values
        if masks is not None:
            detections = replace(detections, masks=masks)
        run = np.sort(images)
        assert np.array_equal(run, np.sort(self.loader.image_ids)), "the evaluated images are not those of the set"
        # The order of the file does not depend on the number of processes.
        return detections.take(np.argsort(detections.image_ids, kind="stable")), run

    def _gathered_masks(self, mine: RunLengths | None) -> RunLengths | None:
        """Those of all processes by rank, as arrays all the way; None on other processes than the main one."""
        mine = mine or RunLengths.of([], [])
        arrays = mine.text, np.diff(mine.offsets), mine.sizes
        text, lengths, sizes = map(self.processes.gather_arrays, arrays)
        if text is None or lengths is None or sizes is None:
            return None
        return RunLengths(text, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]), sizes)


@dataclass(frozen=True)
class _Part:
    """One of several sets that are evaluated together.

    annotations: its own. image_ids: of its images among all, int64. results: where the detections of a set alone would
    be, beside which its file is.
    """

    name: str
    annotations: CocoAnnotations
    image_ids: np.ndarray
    results: Path

    def unjudged(self, detections: Detections, joint_ids: Sequence[int]) -> np.ndarray:
        """bool [n]: detections on its images of classes that it knows nothing of."""
        names = self.annotations.class_names
        unknown = [joint_ids[names.index(name)] for name in self.annotations.unknown_classes]
        return np.isin(detections.image_ids, self.image_ids) & np.isin(detections.category_ids, unknown)

    @property
    def file(self) -> Path:
        """Its own results file."""
        return self.results.with_name(f"{self.results.stem}_{self.name}.json")

    def own(self, detections: Detections, joint_ids: Sequence[int]) -> Detections:
        """Its detections, with the ids of its own annotation file."""
        its = detections.take(np.isin(detections.image_ids, self.image_ids) & ~self.unjudged(detections, joint_ids))
        order = np.argsort(joint_ids)
        labels = order[np.searchsorted(np.asarray(joint_ids)[order], its.category_ids)]
        return replace(
            its,
            image_ids=self.annotations.image_ids[np.searchsorted(self.image_ids, its.image_ids)],
            category_ids=np.asarray(self.annotations.category_ids, dtype=np.int64)[labels],
        )


def mask_results(results_file: Path) -> Path:
    """The results file of masks beside that of boxes: COCO's evaluation server takes one kind a file."""
    return results_file.with_name(f"{results_file.stem}_segm.json")


def _masks(found: dict[str, torch.Tensor], scale: np.ndarray, size: tuple[int, int]) -> RunLengths:
    """The masks of an image's detections at its stored size (height, width), as MMDetection makes them: boxes go back
    to it first, and each mask is interpolated there."""
    boxes = found["boxes_xyxy"].float() / torch.from_numpy(np.tile(scale, 2)).to(found["boxes_xyxy"].device)
    parts = []
    for start in range(0, len(boxes), MASKS_AT_ONCE):
        rows = slice(start, start + MASKS_AT_ONCE)
        bitmaps = paste_masks(found["mask_probabilities"][rows], boxes[rows], size)
        # COCO counts along columns.
        columns = bitmaps.transpose(1, 2).contiguous().cpu().numpy().view(np.uint8)
        parts.append(RunLengths.encode(columns.transpose(0, 2, 1)))
    return RunLengths.concatenate(parts)


def coco_evaluator(context: RunContext, dataset: CocoDataset) -> CocoEvaluator | None:
    """What judges detections of a set, on the main process; None elsewhere."""
    annotations, output = dataset.annotations, context.config.output
    return run_on_all_ranks(
        context.processes,
        lambda: (
            CocoEvaluator(annotations, backend=output.eval_backend, voc_metric=output.voc_metric)
            if context.processes.is_main
            else None
        ),
    )


def evaluate_model(context: RunContext, components: Components) -> int:
    """--val-only and --test-only; the exit status."""
    config, console, processes = context.config, context.console, context.processes
    dataset = components.evaluation_set
    assert dataset is not None
    console.say(f"{config.mode}: {len(dataset)} images of {dataset.annotations.source}")
    console.say(f"weights: {components.weights_line}")
    most = components.model.config.detections_per_image
    for line in describe_judging(dataset.annotations, config.output.eval_backend, most):
        console.say(f"judging: {line}")
    if config.dry_run:
        console.say("dry run: everything above was checked; nothing was written.")
        return 0
    precision = Precision(components.schedule.amp or "off", processes.device)
    acceleration = acceleration_of(config.train, processes.device, processes.world_size, components.model)
    if acceleration.compile:
        assert isinstance(components.model, FasterRCNN)  # the command line refuses the option for others
        compile_for_evaluation(components.model)
    if acceleration.graphs:
        record_detection(components.model, CudaGraphBackend(), console.warn)
    return evaluate_set(context, dataset, components.model, precision)


def evaluate_set(context: RunContext, dataset: CocoDataset, model: nn.Module, precision: Precision) -> int:
    """Evaluate the model (not wrapped) on a set, as the context's mode asks for; the exit status. Collective."""
    config, console, processes = context.config, context.console, context.processes
    coco = coco_evaluator(context, dataset)
    if config.mode == "test" and coco is not None and not coco.has_boxes:
        coco = None
    bad_images = BadImages(processes, console, config.data.max_bad_images)
    evaluator = Evaluator(context, dataset, coco, precision, MetricLogger(console), bad_images)
    with contextlib.closing(evaluator):
        try:
            metrics, _ = evaluator.run(model)
        except Stopped as stopped:
            console.say(
                f"stopped by {context.stop.signal_name or 'a signal to another process'} {stopped} "
                f"(exit status {STOPPED_EXIT_CODE}); nothing was written"
            )
            return STOPPED_EXIT_CODE
        except TooManyBadImages as error:  # every process has it
            raise RunError(str(error)) from error
    for file in evaluator.results_files:
        console.say(f"detections: {file} (COCO results format)")
    if dataset.annotations.segmentations is not None:
        for file in evaluator.results_files:
            console.say(f"masks: {mask_results(file)} (COCO results format)")
    if metrics is None:
        console.say("the annotation file has no boxes: no metrics, the detections are ready for an upload")
        return 0
    console.say(validation_table(metrics))
    file = context.output.path / f"metrics_{config.mode}.json"
    run_on_main_rank(processes, partial(_write_metrics, file, metrics))
    console.say(f"metrics: {file}")
    return 0


def _write_metrics(file: Path, metrics: dict[str, Any]) -> None:
    try:
        write_json(file, metrics)
    except OSError as error:
        raise RunDirError(f"{file} could not be written: {error}") from error
