"""Compares the output directories of two or more runs: a table of their figures (those of the best
validation), the settings that differ, and an image of loss, learning rate and mAP.

    python scripts/compare_runs.py runs/a runs/b [runs/c ...] --png comparison.png
"""

import sys

from checkout import program_parser
from detection.config.arg_types import png_file
from detection.reporting import (
    MetricsError,
    RunsError,
    comparison_table,
    configuration_differences,
    plot_runs,
    read_runs,
)


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="output directory of a run (its --output-dir)")
    text = "image of loss, learning rate and mAP (needs matplotlib)"
    parser.add_argument("--png", type=png_file, metavar="FILE", help=text)
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        parser.error("give two or more output directories")
    try:
        runs = read_runs(options.runs)
        print(comparison_table(runs))
        print("\nconfiguration")
        print(configuration_differences(runs))
        if options.png:
            plot_runs(runs, options.png)
            print(f"\nimage: {options.png}")
    except (RunsError, MetricsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
