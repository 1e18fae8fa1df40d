"""The TensorBoard log of a run: curves, images, texts and pages that show them together.

A resumed run continues its curves without a seam: before anything new is written, what lies past the
checkpoint is taken out of the event files themselves, so that each point is there once for every reader,
not only for those that understand TensorBoard's restart marks.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary as summaries

from detection.reporting.event_files import EventWriter, cut_event_files
from detection.reporting.metrics_log import points_of

IMAGES_TAG = "val/detections"
JPEG_QUALITY = 92

# Page -> chart -> tags (regular expressions). A page draws all curves of a run in one color: parts that do not lie
# apart have a chart each.
_PAGES = {
    "Overview": {
        "learning rate": ["^train/lr$"],
        "mAP": ["^val/mAP$"],
        "mAP of masks": ["^val/segm_mAP$"],
        "loss": ["^(train|val)/loss$"],
        "images per second": ["^train/images_per_second$"],
    },
    "Losses": {
        "RPN: object or not": ["^(train|val)/loss_rpn_cls$"],
        "RPN: boxes": ["^(train|val)/loss_rpn_bbox$"],
        "box head: classes": ["^(train|val)/loss_cls(_s[0-9])?$"],
        "box head: boxes": ["^(train|val)/loss_bbox(_s[0-9])?$"],
        "mask head": ["^(train|val)/loss_mask(_s[0-9])?$"],
        "gradient norm": ["^train/grad_norm$"],
    },
    "Validation": {
        "mAP at IoU 0.50 and 0.75": ["^val/mAP_50$", "^val/mAP_75$"],
        "mAP by object size": ["^val/mAP_[sml]$"],
        "mAP of masks at IoU 0.50 and 0.75": ["^val/segm_mAP_50$", "^val/segm_mAP_75$"],
        "mAP of masks by object size": ["^val/segm_mAP_[sml]$"],
        "mAP by frequency of classes": ["^val/mAP_[rcf]$"],
        "average recall": ["^val/AR_[13]00$"],
        "AP by class": ["^val/AP/"],
    },
    "Speed": {
        "seconds waiting for data": ["^train/data_seconds$"],
        "device idle for want of data (share)": ["^train/idle_share$"],
        "GPU memory (GB)": ["^train/memory_gb$"],
        "seconds of a validation": ["^val/seconds$"],
    },
}
_LAYOUT = {page: {chart: ["Multiline", tags] for chart, tags in charts.items()} for page, charts in _PAGES.items()}
_LAYOUT_TAG = "custom_scalars__config__"
_HPARAMS_METRICS = ("val/mAP", "val/mAP_50", "val/mAP_75", "train/loss")


class TensorBoardLog:
    """Writes one run's event files. Steps are iterations, counted from 0 over the whole run.

    A validation's step is the index of the last finished iteration. Points are visible at once; call flush() before a
    checkpoint is written: after a power loss a resume can only continue the curve up to what was flushed. OSError, of
    any call: the disk is full or gone, and the file may end in a torn record; a log opened anew takes that out.
    """

    def __init__(self, directory: str | Path, *, first_iteration: int = 0, val_from: int = 0) -> None:
        """Opens the log of a run that goes on at first_iteration and validates next at val_from or later.

        What earlier processes wrote at or past these steps is removed from the event files in the
        directory, and a torn last record with it. A file begun now continues them.
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.first_iteration, self.val_from = first_iteration, val_from
        self.history = cut_event_files(self.directory, first_iteration=first_iteration, val_from=val_from)
        # The start marks are for a TensorBoard that is open now and holds the removed points in its
        # memory; it takes the first one that it meets for the run's beginning and heeds the later ones.
        self._writer = EventWriter(self.directory, first_iteration)
        if not self.has(_LAYOUT_TAG):
            self._write(summaries.custom_scalars(_LAYOUT), first_iteration)

    def has(self, tag: str) -> bool:
        """Whether the log already holds something under this tag (of this process or an earlier one)."""
        return tag in self.history.last_steps

    def train(self, record: Mapping[str, Any]) -> None:
        """Draws a training record of metrics.jsonl at record["iteration"]: its points_of."""
        self._draw(record)

    def validation(self, record: Mapping[str, Any]) -> None:
        """Draws a validation record of metrics.jsonl in the same way."""
        self._draw(record)

    def images(self, iteration: int, images: Sequence[np.ndarray], tag: str = IMAGES_TAG) -> None:
        """Shows uint8 RGB [H, W, 3] arrays as <tag>/0, <tag>/1, ...; an image that the log already has is skipped."""
        for number, pixels in enumerate(images):
            name = f"{tag}/{number}"
            if self._is_new(name, iteration):
                self._write(_image(name, pixels), iteration)

    def text(self, tag: str, text: str, *, verbatim: bool = False) -> None:
        """Shows a text (Markdown, or as it stands with verbatim) unless the log already shows this very text."""
        if verbatim:
            text = "\n".join("    " + line for line in text.splitlines())
        name = f"{tag}/text_summary"
        if self.history.texts.get(name) != text:
            self.history.texts[name] = text
            self._write(summaries.text(tag, text), self.first_iteration)

    def hparams(self, settings: Mapping[str, Any]) -> None:
        """Lists the run on the HPARAMS page: its settings (numbers, strings, booleans) as this start has them, beside
        the last values of mAP and loss, which the page takes from the run's own curves. To be called once a log."""
        plain = {
            name: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for name, value in settings.items()
        }
        # Of the three messages the last says "finished with success": see finish.
        for summary in summaries.hparams(plain, dict.fromkeys(_HPARAMS_METRICS))[:2]:
            self._write(summary, self.first_iteration)

    def finish(self, iteration: int) -> None:
        """Marks the run as finished on the HPARAMS page, once; `iteration` is the last one."""
        summary = summaries.hparams({}, {})[2]
        if not any(self.has(value.tag) for value in summary.value):
            self._write(summary, iteration)

    def precision_recall(self, iteration: int, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Draws name -> (precision, recall), float arrays of one length (at most 127 points), the recall
        falling, as val/PR/<name>."""
        for name, (precision, recall) in curves.items():
            tag, length = f"val/PR/{name}", len(precision)
            if self._is_new(tag, iteration):
                # The page cuts a curve off where no positives are counted; COCO's curves come without counts.
                some = np.ones(length)
                curve = summaries.pr_curve_raw(tag, some, some, some, some, precision, recall, num_thresholds=length)
                self._write(curve, iteration)

    def flush(self) -> None:
        """Puts everything written so far on the disk (fsync): a kill or a power loss from here on cannot take it."""
        self._writer.sync()

    def close(self) -> None:
        self._writer.close()

    def _is_new(self, tag: str, step: int) -> bool:
        return self.history.last_steps.get(tag, -1) < step

    def _draw(self, record: Mapping[str, Any]) -> None:
        # One message with all points of a step: a twelfth of the records that one message a point would take.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points_of(record).items()]
        if values:
            self._write(Summary(value=values), int(record["iteration"]))

    def _write(self, summary: Summary, step: int) -> None:
        self._writer.write(summary, step)
        for value in summary.value:
            self.history.last_steps[value.tag] = step


def _image(tag: str, pixels: np.ndarray) -> Summary:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    height, width = pixels.shape[:2]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    return Summary(value=[Summary.Value(tag=tag, image=image)])
