"""How far the detections of two implementations of one detector lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.models.ops.boxes import pairwise_iou

_SAME_OBJECT_IOU = 0.5


@dataclass(frozen=True)
class Difference:
    """num_matched: detections that both found. unmatched_scores: of those that only one found. largest_score,
    largest_box: largest difference of a matched score, and of a coordinate in pixels. largest_mask: of a mask's
    probabilities; 0 without masks."""

    num_matched: int
    unmatched_scores: tuple[float, ...]
    largest_score: float
    largest_box: float
    largest_mask: float = 0.0

    def within(self, score: float, box: float) -> bool:
        """Whether nothing differs by more, masks as scores, and nothing was found by one alone."""
        return (
            not self.unmatched_scores
            and max(self.largest_score, self.largest_mask) <= score
            and self.largest_box <= box
        )

    def __str__(self) -> str:
        text = f"{self.num_matched} detections; scores differ by {self.largest_score:.1e}"
        text += f" at most, boxes by {self.largest_box:.1e} pixels"
        text += f", masks by {self.largest_mask:.1e}" if self.largest_mask else ""
        if self.unmatched_scores:
            text += f"; {len(self.unmatched_scores)} found by one alone, the surest at {max(self.unmatched_scores):.3f}"
        return text


def compare_detections(
    ours: Sequence[Mapping[str, Tensor]],
    theirs: Sequence[Mapping[str, Tensor]],
    *,
    score_threshold: float,
    detections_per_image: int,
    score_tolerance: float,
) -> Difference:
    """Detections of the same images, {"boxes_xyxy", "scores", "labels"} each, matched by class and overlap. Masks are
    compared where both have "mask_probabilities".

    What only one found is not counted where its score is within score_tolerance of what it would have had to exceed
    in the other: the threshold, or the last of a full list.
    """
    matched, unmatched = 0, []
    largest_score = largest_box = largest_mask = 0.0
    for one, other in zip(ours, theirs, strict=True):
        rows, columns = _match(one, other)
        matched += len(rows)
        if len(rows):
            scores = one["scores"][rows] - other["scores"][columns]
            boxes = one["boxes_xyxy"][rows] - other["boxes_xyxy"][columns]
            largest_score = max(largest_score, float(scores.abs().max()))
            largest_box = max(largest_box, float(boxes.abs().max()))
            if "mask_probabilities" in one and "mask_probabilities" in other:
                masks = one["mask_probabilities"][rows] - other["mask_probabilities"][columns]
                largest_mask = max(largest_mask, float(masks.abs().max()))
        sides = ((one["scores"], rows, other["scores"]), (other["scores"], columns, one["scores"]))
        for scores, used, rivals in sides:
            is_full = len(rivals) == detections_per_image
            bar = max(score_threshold, float(rivals.min())) if is_full else score_threshold
            alone = torch.ones(len(scores), dtype=torch.bool).index_fill(0, used, False)
            unmatched += [score for score in scores[alone].tolist() if score > bar + score_tolerance]
    return Difference(matched, tuple(unmatched), largest_score, largest_box, largest_mask)


def _match(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pairs of one class, the best overlap first, each detection once: row and column numbers, int64 [M] each."""
    overlap = pairwise_iou(one["boxes_xyxy"].float(), other["boxes_xyxy"].float())
    overlap = torch.where(one["labels"][:, None] == other["labels"], overlap, 0.0)
    rows, columns = [], []
    for _ in range(min(overlap.shape)):
        best = int(overlap.argmax())
        row, column = divmod(best, overlap.shape[1])
        if overlap[row, column] < _SAME_OBJECT_IOU:
            break
        rows.append(row)
        columns.append(column)
        overlap[row] = 0
        overlap[:, column] = 0
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
