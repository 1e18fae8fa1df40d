"""What a run leaves behind for people: TensorBoard, metrics.jsonl, the console and train.log, images."""

from detection.reporting.console import Console, ProgressBar
from detection.reporting.disk import check_writable, sync_folder, write_whole
from detection.reporting.forecast import Forecast
from detection.reporting.images import class_color, draw_boxes, mosaic, save_png, side_by_side
from detection.reporting.metrics_log import MetricsError, MetricsLog, points_of, read_metrics
from detection.reporting.run_comparison import (
    Run,
    RunsError,
    comparison_table,
    configuration_differences,
    plot_runs,
    read_runs,
)
from detection.reporting.tables import sparkline, summary_table, validation_table
from detection.reporting.tensorboard import TensorBoardLog
from detection.reporting.tracker_clients import TRACKERS, tracker_named
from detection.reporting.trackers import TrackedRun, Tracker, TrackerFeed
from detection.reporting.words import counted, duration

__all__ = [
    "Console",
    "Forecast",
    "MetricsError",
    "MetricsLog",
    "ProgressBar",
    "Run",
    "RunsError",
    "TRACKERS",
    "TensorBoardLog",
    "TrackedRun",
    "Tracker",
    "TrackerFeed",
    "check_writable",
    "class_color",
    "comparison_table",
    "configuration_differences",
    "counted",
    "draw_boxes",
    "duration",
    "mosaic",
    "plot_runs",
    "points_of",
    "read_metrics",
    "read_runs",
    "save_png",
    "side_by_side",
    "sparkline",
    "summary_table",
    "sync_folder",
    "tracker_named",
    "validation_table",
    "write_whole",
]
