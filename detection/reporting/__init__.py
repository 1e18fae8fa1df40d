"""What a run leaves behind for people: TensorBoard, metrics.jsonl, the console and train.log, pictures."""

from detection.reporting.console import Console, Progress
from detection.reporting.durations import duration, remaining
from detection.reporting.metrics_log import CutReport, MetricsError, MetricsLog, read_metrics
from detection.reporting.pictures import class_colour, draw_boxes, mosaic, save_png, side_by_side
from detection.reporting.sparkline import sparkline
from detection.reporting.tables import summary_table, validation_table
from detection.reporting.tensorboard import TensorBoardLog

__all__ = [
    "Console",
    "CutReport",
    "MetricsError",
    "MetricsLog",
    "Progress",
    "TensorBoardLog",
    "class_colour",
    "draw_boxes",
    "duration",
    "mosaic",
    "read_metrics",
    "remaining",
    "save_png",
    "side_by_side",
    "sparkline",
    "summary_table",
    "validation_table",
]
