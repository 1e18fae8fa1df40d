"""A data set to look at: a gallery of it, or images of what the model is fed (resized, augmented and padded).

    python3 scripts/browse_dataset.py --data-path my_set --html gallery.html
    python3 scripts/browse_dataset.py --images DIR --annotations FILE.json --html gallery.html
    python3 scripts/browse_dataset.py --dataset shapes --data-path datasets/shapes --output-dir browse
    python3 scripts/browse_dataset.py --dataset shapes --lsj 512 --photometric-distortion --mosaic

--html writes one page that needs nothing beside it: images as stored with the boxes of the file, filters by class and
text, counts and sizes. Without it PNG files are written of what the model is fed, by train.py's options for training
images (docs/augmentation.md). There, boxes are drawn after augmentation, from the very tensors that the training step
gets, so a box that is off there is off in training.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from checkout import exit_status
from data import (
    CocoDataset,
    DatasetError,
    DeviceBatch,
    EvalLoader,
    TrainLoader,
    read_coco,
)
from data.errors import DataError
from data.tools.gallery import write_gallery
from data_path import add_data_path, chosen, found_set
from detection.config.arg_types import positive_int
from detection.config.augmentation import AugmentationConfig, add_augmentation_options, check_effect
from detection.config.settings import ConfigError, filled
from detection.engine.inputs.augmentation import augmentation_of, sampling_of
from detection.reporting.images import class_color, draw_boxes, mosaic, save_png

GALLERY_COUNT, PNG_COUNT = 200, 32


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return exit_status(lambda: show(arguments), DataError, ConfigError, OSError, status=1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", choices=("coco", "shapes"), default="coco", help="shapes: made if not there [coco]")
    add_data_path(parser)
    add("--images", type=Path, help="folder of images of any COCO-format set")
    add("--annotations", type=Path, help="annotation file of that set")
    add("--split", choices=("train", "val", "test"), default="train", help="val, test: no flips, every image [train]")
    add("--output-dir", type=Path, default=Path("browse"), help="where the PNG files go [browse]")
    add("--html", type=Path, metavar="FILE", help="a gallery in one file instead; replaces nothing but a gallery")
    add("--thumbnail-size", type=positive_int, default=480, help="gallery: longest side, pixels [480]")
    add("--count", type=positive_int, help=f"number of images at most [{PNG_COUNT}; gallery {GALLERY_COUNT}]")
    add("--masks", action="store_true", help="with the masks that a model with masks learns; no gallery has them")
    add("--mosaic", action="store_true", help="one file, mosaic.png, with all of them")
    add("--min-size", type=int, default=800, help="shorter side after the resize [800]")
    add("--max-size", type=int, default=1333, help="limit of the longer side [1333]")
    add("--batch-size", type=int, default=16, help="global batch size: decides order and padding [16]")
    add("--epoch", type=int, default=0, help="0-based: which epoch's order and augmentation [0]")
    add("--seed", type=int, default=0, help="that of the training; gallery: which images [0]")
    add_augmentation_options(parser)
    return parser


def show(arguments: argparse.Namespace) -> int:
    """Writes the gallery or the images; the exit status."""
    images, annotations = locate(arguments)
    if arguments.html is not None:
        return write_html(images, annotations, arguments)
    read = chosen(read_coco(annotations, masks=arguments.masks), arguments)
    dataset = CocoDataset(images, read, training=arguments.split == "train", masks=arguments.masks)
    count = browse(dataset, arguments)
    print(f"{count} images in {arguments.output_dir / 'mosaic.png' if arguments.mosaic else arguments.output_dir}")
    return 0


def locate(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Image folder and annotation file. Raises what its readers raise: one of the errors that main prints."""
    images, annotations = arguments.images, arguments.annotations
    if (images is None) != (annotations is None):
        raise DatasetError("--images and --annotations go together: give both or none.")
    if images is not None:
        return images, annotations
    found = found_set(arguments, needed=True)
    if arguments.split not in found.splits:
        raise DatasetError(f"{found.title}: there is no {arguments.split} split, only {', '.join(found.splits)}")
    files = found.splits[arguments.split]
    return files.images, files.annotations


def write_html(images: Path, file: Path, arguments: argparse.Namespace) -> int:
    """Writes the gallery; 1 where images cannot be read or have another size than the file says, else 0."""
    annotations = chosen(read_coco(file), arguments)
    count = arguments.count or GALLERY_COUNT
    with tqdm(total=min(count, len(annotations)), desc="images", unit="img", disable=None) as bar:
        summary = write_gallery(
            arguments.html,
            images,
            annotations,
            colors=[f"rgb{class_color(label)}" for label in range(len(annotations.class_names))],
            count=count,
            seed=arguments.seed,
            longest_side=arguments.thumbnail_size,
            progress=bar.update,
        )
    shown = f"{summary.num_shown:,} images"
    if summary.num_shown < summary.num_images:
        shown = f"{summary.num_shown:,} of {summary.num_images:,} images (--count N shows more, --seed N others)"
    print(f"{arguments.html}: {shown}, {summary.num_bytes / 1e6:.1f} MB. Open it in a browser.")
    if summary.num_problems:
        print(f'{summary.num_problems:,} images have a problem: choose "with a problem" in the page', file=sys.stderr)
    return int(summary.num_problems > 0)


def browse(dataset: CocoDataset, arguments: argparse.Namespace) -> int:
    """Writes the images; returns how many."""
    scale = {"min_size": arguments.min_size, "max_size": arguments.max_size}
    if arguments.split == "train":
        config = filled(AugmentationConfig, vars(arguments))
        check_effect(config, vars(arguments), arguments.max_size)
        if config.copy_paste and not dataset.has_masks:
            raise ConfigError("--copy-paste needs masks: give --masks as well")
        loader = TrainLoader(
            dataset,
            **scale,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            augmentation=augmentation_of(config, arguments.max_size),
            sampling=sampling_of(config),
        )
        first = arguments.epoch * loader.iterations_per_epoch
        batches = loader.batches(first, first + loader.iterations_per_epoch)
    else:
        batches = EvalLoader(dataset, **scale, batch_size=arguments.batch_size).batches()
    images = ((batch, place) for batch in (raw.to("cpu") for raw in batches) for place in range(len(batch)))
    cells, count = [], 0
    for batch, place in itertools.islice(images, arguments.count or PNG_COUNT):
        image = drawn(batch, place, dataset.class_names)
        count += 1
        if arguments.mosaic:
            cells.append(image)
        else:
            name = f"{batch.iteration:06d}_{place:02d}_id{int(batch.image_ids[place])}.png"
            save_png(arguments.output_dir / name, image)
    if arguments.mosaic:
        save_png(arguments.output_dir / "mosaic.png", mosaic(cells))
    return count


def drawn(batch: DeviceBatch, place: int, class_names: tuple[str, ...]) -> np.ndarray:
    """Image `place` of the batch with its padding and boxes: uint8 [H, W, 3]."""
    valid = batch.valid[place]
    return draw_boxes(
        np.ascontiguousarray(batch.pixels[place].permute(1, 2, 0).numpy()),
        batch.boxes_xyxy[place][valid].numpy(),
        batch.labels[place][valid].numpy(),
        class_names,
        masks=batch.whole_masks(place),
    )


if __name__ == "__main__":
    sys.exit(main())
