"""A run of train.py -> one HTML page that needs nothing beside it: configuration, curves, validations, speed, errors by
kind, confusions, worst and best images, and the command that repeats the run.

    python scripts/report.py runs/NAME

The errors are those of detections_val.json, which the last validation has written, and of the masks beside it.
"""

import sys
from pathlib import Path

from analyze_results import number_run
from checkout import exit_status, program_parser
from data import AnnotationError, read_image
from detection.engine.metrics.run_page import run_page
from detection.evaluation.analysis import analyze_results
from detection.evaluation.html_report import analysis_sections
from detection.evaluation.results import EvaluationError, ResultsError
from detection.reporting import MetricsError, RunsError, read_runs


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="output directory of a run (its --output-dir)")
    add("--output", metavar="FILE", type=Path, help="the page (default: RUN/report.html)")
    add("--annotations", metavar="FILE", type=Path, help="validation set, where it is not where the run found it")
    add("--images", metavar="DIR", type=Path, help="images of the validation set, likewise")
    add("--worst", metavar="N", type=int, default=12, help="how many of the worst images to show (default 12)")
    arguments = parser.parse_args(argv)

    def write() -> int:
        (run,) = read_runs([arguments.run])
        validated = run.config.get("validated") or {}
        annotations = arguments.annotations or _path(validated.get("annotations"))
        images = arguments.images or _path(validated.get("images"))
        analysis, missing = _analysis(arguments.run / "detections_val.json", annotations, images, arguments.worst)
        if (masks := arguments.run / "detections_val_segm.json").is_file():
            of_masks, missing_too = _analysis(masks, annotations, images, arguments.worst)
            analysis, missing = analysis + of_masks, list(dict.fromkeys(missing + missing_too))
        file = arguments.output or arguments.run / "report.html"
        file.write_text(run_page(run, analysis=analysis, missing=missing), encoding="utf-8")
        for line in missing:
            print(f"not shown: {line}")
        print(f"wrote {file}")
        return 0

    return exit_status(write, RunsError, MetricsError, OSError)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _analysis(results: Path, annotations: Path | None, images: Path | None, worst: int) -> tuple[str, list[str]]:
    """Sections on the errors of a results file, and what cannot be shown of them."""
    if not results.is_file():
        return "", [f"errors and images: the run has no {results.name}"]
    if annotations is None:
        return "", ["errors and images: config.json does not name the validation set; give --annotations and --images"]
    if not annotations.is_file():
        return "", [f"errors and images: {annotations} is not there; give --annotations FILE"]
    try:
        analysis = analyze_results(annotations, results, num_run=number_run(results), num_worst_images=worst)
    except (AnnotationError, EvaluationError, ResultsError) as error:
        return "", [f"errors and images: {error}"]
    title = f"<h2>Errors in {results.name}</h2>"
    if images is None or not images.is_dir():
        missing = f"the images: {images or 'their folder'} is not there; give --images DIR"
        return title + analysis_sections(analysis), [missing]
    return title + analysis_sections(analysis, image_of=lambda name: read_image(images / name)), []


if __name__ == "__main__":
    sys.exit(main())
