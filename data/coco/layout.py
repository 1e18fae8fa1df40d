"""Where the files of a COCO data set lie."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError


class MissingDataset(DataError):
    """Files of the data set are not where they are expected. The message shows the layout and the ways
    out."""


@dataclass(frozen=True)
class SplitFiles:
    """Where the images and the annotations of one split are, and what its set is called where there are several."""

    images: Path
    annotations: Path
    set_name: str = ""


@dataclass(frozen=True)
class CocoLayout:
    """The two splits of a COCO-format set: a folder of images and an annotation file each."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path


def standard_layout(data_path: str | Path) -> CocoLayout:
    """The paths of COCO 2017's layout under data_path, whether they exist or not."""
    root = Path(data_path)
    return CocoLayout(
        train_images=root / "train2017",
        train_annotations=root / "annotations" / "instances_train2017.json",
        val_images=root / "val2017",
        val_annotations=root / "annotations" / "instances_val2017.json",
    )


def coco_layout(data_path: str | Path, *, train: bool = True, val: bool = True) -> CocoLayout:
    """The paths of COCO 2017's layout under data_path, checked to exist for the splits asked for.

    Raises MissingDataset with the expected layout, what of it is missing, and the ways to get it.
    """
    layout = standard_layout(data_path)
    wanted = [(layout.train_annotations, False), (layout.train_images, True)] if train else []
    wanted += [(layout.val_annotations, False), (layout.val_images, True)] if val else []
    missing = {path for path, is_folder in wanted if not (path.is_dir() if is_folder else path.is_file())}
    if not missing:
        return layout

    root = Path(data_path)
    lines = [f"COCO is not complete under {root}. Expected there:", "", f"  {root}/"]
    for path, is_folder in wanted:
        name = str(path.relative_to(root)) + ("/" if is_folder else "")
        lines.append(f"    {name:<40}{'MISSING' if path in missing else 'found'}")
    lines += [
        "",
        "One of these helps:",
        f"  python3 scripts/download_coco.py --data-path {root}    fetches COCO 2017 into this layout",
        "  --data-path DIR                             COCO lies elsewhere",
        "  --train-images DIR --train-annotations FILE --val-images DIR --val-annotations FILE",
        "                                              any COCO-format set",
        "  --dataset shapes                            a small procedural set, made on the spot",
    ]
    raise MissingDataset("\n".join(lines))
