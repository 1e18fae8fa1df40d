"""What the end of a training says."""

from __future__ import annotations

from shlex import quote

from detection.engine.inputs.bad_images import BadImages
from detection.engine.inputs.datasets import SplitFiles
from detection.engine.metrics.logger import MetricLogger
from detection.engine.run_dir import RunDir
from detection.engine.trainer import Progress


def closing_summary(
    output: RunDir,
    metric_logger: MetricLogger,
    progress: Progress,
    bad_images: BadImages,
    validated: SplitFiles | None,
    can_be_analyzed: bool,
) -> str:
    """The table of the run's validations, where everything is, and commands to go on with, ready to paste."""
    best, remarks = "", []
    if progress.skipped_steps:
        remarks.append(f"{progress.skipped_steps} of {progress.iteration} iterations were not finite and made no step")
    if bad_images:
        remarks.append(bad_images.summary())
    if progress.best_map is not None:
        best = f"   best.pt has mAP {progress.best_map:.3f} (epoch {progress.best_epoch})"
    weights = output.checkpoints / "best.pt"
    if not weights.is_file():
        weights = output.checkpoints / "last.pt"
    results, images = output.detections("val"), "IMAGE_OR_FOLDER"
    found, analysis = [], []
    if validated is not None and progress.best_map is not None:
        images = quote(str(validated.images))
        found.append(f"detections   {results} (of the last validation)")
        if can_be_analyzed:
            analysis.append(
                f"why so       python3 scripts/analyze_results.py --annotations {quote(str(validated.annotations))} "
                f"--results {quote(str(results))} --images {images}"
            )
    return "\n".join(
        [
            "",
            metric_logger.summary(progress.best_epoch),
            "",
            *remarks,
            f"checkpoints  {output.checkpoints}{best}",
            *found,
            f"figures      {output.metrics}, {output.log}",
            f"curves       tensorboard --logdir {quote(str(output.path))}",
            *analysis,
            f"try it       python3 scripts/predict.py --weights {quote(str(weights))} {images}",
        ]
    )
