"""A set in another format than COCO's, read: what a converter writes, and what a training takes from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.convert.conversion import ConversionError, LabeledImage, Remarks, nearest
from data.convert.splits import whole_splits


@dataclass
class LabeledSet:
    """Images with their boxes, and what was remarked on the way.

    An image with an error is left out, and the error counted in `remarks`: whoever reads decides whether to go on.
    """

    found: dict[str, list[LabeledImage]]
    """Images by split as the source has them: train, val and test; "all" for those it says nothing of."""
    origin: str
    """What the splits are taken from, for a message."""
    class_names: list[str]
    remarks: Remarks
    description: str
    """For the "info" of a COCO file."""
    images_root: Path | None = None
    """The folder that file names are relative to, where all images are below it."""
    facts: dict[str, str] = field(default_factory=dict)
    """Lines about what was read, by name."""

    def keep_classes(self, wanted: Sequence[str]) -> None:
        """Leaves out the boxes of all other classes; those kept stay in the order of the source.

        Raises ConversionError for a name that no class has.
        """
        for name in wanted:
            if name not in self.class_names:
                raise ConversionError(f"--classes {name}: no such class here{nearest(name, self.class_names)}")
        for images in self.found.values():
            for image in images:
                for box in image.boxes:
                    if box.name not in wanted:
                        self.remarks.add("class-left-out", box.name)
                image.boxes = [box for box in image.boxes if box.name in wanted]
        self.class_names = [name for name in self.class_names if name in wanted]

    def splits(self, val_fraction: float | None, seed: int) -> dict[str, list[LabeledImage]]:
        """Images to train and to validate on, and those of the test split where there are any; see `whole_splits`."""
        splits, self.facts["splits"] = whole_splits(self.found, self.origin, val_fraction, seed)
        return splits
