"""The images that a run could not use: counted, named once each, and too many of them end it."""

from __future__ import annotations

from collections.abc import Sequence

from data import UnreadableImage
from detection.engine.distributed.comm import Processes
from detection.errors import DetectionError
from detection.reporting import Console, counted

_MOST_NAMED = 30


class TooManyBadImages(DetectionError):
    """More images cannot be used than --max-bad-images allows. Every process has it; the message names them."""


class BadImages:
    """Distinct unreadable images since the start of this program, the same on every process.

    They are not carried over to a resumed run: what was mended in between counts no more.
    """

    def __init__(self, processes: Processes, console: Console, limit: int) -> None:
        self._processes = processes
        self._console = console
        self._limit = limit
        self._messages: dict[tuple[str, int], str] = {}
        """By split and image id."""
        self.num_replaced = 0
        """Times that an image was replaced in training."""

    def __len__(self) -> int:
        return len(self._messages)

    def exceeded_by(self, split: str, found: Sequence[UnreadableImage]) -> bool:
        """Whether `found`, of this process alone, is too much already."""
        return len(self._messages.keys() | {(split, fault.image_id) for fault in found}) > self._limit

    def agree(self, split: str, found: Sequence[UnreadableImage]) -> int:
        """Take in what each process found; collective.

        Returns:
            How many places in batches could not be filled with the image planned, over all processes.

        Raises:
            TooManyBadImages: on every process.
        """
        mine = [(fault.image_id, fault.message, fault.replacement_id, fault.place is not None) for fault in found]
        everyones = [fault for part in self._processes.gather_objects(mine) for fault in part]
        for image_id, message, replacement_id, _ in everyones:
            if (split, image_id) in self._messages:
                continue
            self._messages[split, image_id] = message
            if self._processes.is_main:
                what = "it gets no detections" if split != "train" else "a black image stands in for it"
                if replacement_id is not None:
                    what = f"image id {replacement_id} is trained on in its place"
                self._console.warn(f"{split} image id {image_id} cannot be used: {message} Until then {what}.")
        if len(self._messages) > self._limit:
            raise TooManyBadImages(
                f"{counted(len(self), 'image')} cannot be used, --max-bad-images is {self._limit}:\n{self._listed()}\n"
                "Mend these files, or take them out of the annotations (scripts/check_dataset.py finds every one), and "
                "go on with --resume; or allow more of them. No checkpoint was written since the last of them."
            )
        num_places = sum(in_place for *_, in_place in everyones)
        if split == "train":
            self.num_replaced += num_places
        return num_places

    def summary(self) -> str:
        """What the end of a run says of them; empty where there was none."""
        if not self._messages:
            return ""
        times = f", {counted(self.num_replaced, 'replacement')} in training" if self.num_replaced else ""
        return f"{counted(len(self), 'image')} could not be used{times}:\n{self._listed()}"

    def _listed(self) -> str:
        lines = [f"  {split} image id {key}: {message}" for (split, key), message in self._messages.items()]
        more = len(lines) - _MOST_NAMED
        return "\n".join([*lines[:_MOST_NAMED], *([f"  ... and {more} more"] if more > 0 else [])])
