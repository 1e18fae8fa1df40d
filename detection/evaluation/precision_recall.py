"""Precision over recall, as COCO's evaluation samples it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from detection.evaluation.backends import Accumulated

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

# Places of IoU 0.50 and 0.75 on COCOeval's axis 0.50:0.05:0.95.
_THRESHOLDS = {"0.50": 0, "0.75": 5}


def precision_recall_curves(accumulated: Accumulated, class_names: Sequence[str]) -> dict[str, Curve]:
    """Name -> (precision, recall), float64 [101] each, the recall falling from 1 to 0.

    "all/IoU 0.50" and "all/IoU 0.75" are means over the classes that have boxes, "class/<name>" is one class at IoU
    0.50; all sizes, 100 detections an image. Precision is COCO's: at each recall the highest that is reached at this
    recall or beyond, 0 where no detection reaches it. A class without boxes has no curve.
    """
    precision = accumulated.precision[:, ::-1, :, 0, 2]
    recall = np.linspace(1, 0, precision.shape[1])
    has_boxes = precision[0, 0] > -1
    if not has_boxes.any():
        return {}
    curves = {
        f"all/IoU {name}": (precision[place][:, has_boxes].mean(axis=1), recall) for name, place in _THRESHOLDS.items()
    }
    for column in np.flatnonzero(has_boxes).tolist():
        curves[f"class/{class_names[column]}"] = (precision[0][:, column], recall)
    return curves
