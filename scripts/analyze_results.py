"""Why is the mAP what it is? A COCO results file and its annotations -> JSON, images and an HTML report.

    python scripts/analyze_results.py --annotations instances_val2017.json --results detections_val.json \\
        --images datasets/coco/val2017 --output-dir analysis

Works on the results of any program that writes COCO's format. Shows AP, AR and the best score threshold of each
class, precision-recall curves, which kinds of error cost how much, confused classes, and the worst images.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

from checkout import exit_status, program_parser
from data import read_image
from detection.evaluation import BACKENDS, LVIS_METRIC_NAMES, METRIC_NAMES
from detection.evaluation.analysis import analyze_results
from detection.evaluation.html_report import html_report
from detection.reporting import MetricsError, read_metrics


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: _analyze(argv), ValueError, OSError)


def _analyze(argv: list[str] | None) -> int:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("--annotations", required=True, metavar="FILE", help="COCO annotations with boxes")
    add("--results", required=True, metavar="FILE", help="COCO results of a detector: of boxes, or of masks")
    add("--images", metavar="DIR", type=Path, help="folder of the images; shows the worst ones")
    text = "where analysis.json, report.html and the PNG files go (default: <results>_analysis)"
    add("--output-dir", metavar="DIR", type=Path, help=text)
    text = "confusions and worst images of detections from this score on (default: each class at its best F1)"
    add("--score-threshold", metavar="X", type=float, help=text)
    add("--worst", metavar="N", type=int, default=24, help="how many images to show (default 24)")
    add("--backend", choices=BACKENDS, default="auto", help="what computes AP (default auto)")
    arguments = parser.parse_args(argv)

    images: Path | None = arguments.images
    if images is not None and not images.is_dir():
        print(f"error: --images {images}: there is no such folder", file=sys.stderr)
        return 2
    analysis = analyze_results(
        arguments.annotations,
        arguments.results,
        backend=arguments.backend,
        score_threshold=arguments.score_threshold,
        num_worst_images=arguments.worst,
        num_run=number_run(Path(arguments.results)),
    )
    worst = [image["file_name"] for image in analysis["worst_images"]]
    if images is not None and worst and not any((images / name).is_file() for name in worst):
        print(f"error: --images {images} holds none of the images to show, for instance {worst[0]}", file=sys.stderr)
        return 2

    folder = arguments.output_dir or Path(arguments.results).with_name(f"{Path(arguments.results).stem}_analysis")
    folder.mkdir(parents=True, exist_ok=True)

    files = [folder / "analysis.json", folder / "report.html"]
    files[0].write_text(json.dumps(analysis, indent=1) + "\n", encoding="utf-8")
    title = f"{Path(arguments.results).name} on {Path(arguments.annotations).name}"
    page = html_report(
        analysis, title=title, image_of=None if images is None else lambda name: read_image(images / name)
    )
    files[1].write_text(page, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no PNG files: they need matplotlib (pip install matplotlib); report.html has the same charts")
    else:
        from detection.evaluation.plots import save_plots

        files += save_plots(analysis, folder)

    metrics, known = analysis["metrics"], {*METRIC_NAMES, *LVIS_METRIC_NAMES}
    names = [name for name in metrics if name.removeprefix("segm_") in known and metrics[name] >= 0]
    print("  ".join(f"{name} {metrics[name]:.3f}" for name in names))
    print("AP_50 gain if mended: ", end="")
    print(", ".join(f"{kind} +{gain:.3f}" for kind, gain in analysis["errors"]["AP_50_gain"].items()))
    for line in (*(f"note: {note}" for note in metrics["notes"]), *(f"wrote {file}" for file in files)):
        print(line)
    return 0


def number_run(results: Path) -> int | None:
    """On how many images a run of train.py made this results file, where its records lie beside it."""
    split = results.stem.removeprefix("detections_").removesuffix("_segm")
    with contextlib.suppress(OSError, ValueError, MetricsError):
        alone, record = results.with_name(f"metrics_{split}.json"), results.with_name("metrics.jsonl")
        if alone.is_file() and alone.stat().st_mtime >= results.stat().st_mtime:
            return json.loads(alone.read_text()).get("num_images")
        if split == "val" and record.is_file():
            return next((each.get("num_images") for each in reversed(read_metrics(record, kind="val"))), None)
    return None


if __name__ == "__main__":
    raise SystemExit(main())
