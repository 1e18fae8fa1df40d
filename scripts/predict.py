"""Finds objects in images: images with boxes and masks, a COCO results file, crops, or masks.

    python scripts/predict.py --weights runs/mine/checkpoints/best.pt --output-dir out photo.jpg holiday/ "more/*.png"
    python scripts/predict.py --weights runs/mine/checkpoints/best.pt --data-path my_set --output-dir out
    python scripts/predict.py --weights detector.pt --json results.json --annotations instances_val2017.json val2017/
    python scripts/predict.py --weights detector.pt --tta --min-score 0.5 --save-crops crops holiday/

Photos are turned upright by their EXIF orientation first; boxes, images and crops are those of the turned photo.
With --annotations pixels are taken as they are stored, as in training and evaluation. An image that cannot be read is
reported and passed over, and the exit status is then 1. What exists is not overwritten without --overwrite. Images
below 640 pixels are drawn enlarged.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from checkout import exit_status, program_parser
from data import ImageError, read_coco
from data.errors import DataError
from data.images.files import ProtectedFiles, find_images
from data_path import add_data_path, found_set
from detection.config.arg_types import fraction, positive_int
from detection.engine.accelerate.compile import compile_for_evaluation
from detection.engine.accelerate.cuda_graphs import CudaGraphBackend, record_detection, require_cuda_graphs
from detection.engine.optim.amp import Precision
from detection.errors import DetectionError
from detection.inference.outputs import (
    PredictionOutputs,
    mask_results_path,
    refuse_existing,
    write_coco_results,
    write_images_list,
)
from detection.inference.predict import (
    ImageDetections,
    PredictionError,
    find_labels,
    match_category_ids,
    match_image_ids,
    predict_files,
)
from detection.inference.tta import DEFAULT_SCALES, View, make_views
from detection.models import Detector, FasterRCNN, load_detector
from detection.reporting import Console, counted

DEFAULT_MIN_SCORE = 0.3
DEFAULT_FOLDER = Path("predictions")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return exit_status(lambda: _in_memory(arguments), DataError, DetectionError, OSError)


def _in_memory(arguments: argparse.Namespace) -> int:
    try:
        return _predict(arguments, Console())
    except torch.OutOfMemoryError as error:
        remedy = "use a smaller --batch-size, or --device cpu"
        raise PredictionError(f"the device's memory is full; {remedy}") from error


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="IMAGES", help="files, folders (with subfolders), glob patterns")
    add("--weights", required=True, metavar="FILE", type=Path, help="a checkpoint of training, or a stripped file")
    text = "package.module:function, where the weights are of {} of your own (docs/extend.md)"
    add("--model", metavar="NAME", help=text.format("a detector"))
    add("--backbone", metavar="NAME", help=text.format("a backbone"))
    of_set = parser.add_argument_group("a data set in place of IMAGES, read as train.py reads it")
    add_data_path(of_set, without=("classes",))
    of_set.add_argument("--split", choices=["train", "val", "test"], default="val", help="images of this split [val]")
    add = parser.add_argument_group(f"what to write (default: --output-dir {DEFAULT_FOLDER})").add_argument
    add("--output-dir", metavar="DIR", type=Path, help="images with boxes, JPEG or PNG as they came")
    add("--json", metavar="FILE", type=Path, help="boxes in COCO's results format; masks in FILE_segm.json")
    add("--save-crops", metavar="DIR", type=Path, help="each box as DIR/CLASS/IMAGE_NUMBER.png")
    text = (
        "for --json: COCO file with the image ids (by file name) and category ids (by name); without it images count "
        "from 1, and FILE_images.json beside the results says which is which"
    )
    add("--save-masks", metavar="DIR", type=Path, help="each mask as DIR/CLASS/IMAGE_NUMBER.png, 255 on 0")
    add("--annotations", metavar="FILE", type=Path, help=text)
    add("--overwrite", action="store_true", help="replace files of an earlier call (never an input)")
    add = parser.add_argument_group("which boxes").add_argument
    text = f"0..1, default {DEFAULT_MIN_SCORE}; 0 where only --json is written, as metrics want all boxes"
    add("--min-score", metavar="X", type=fraction, help=text)
    add("--classes", metavar="NAME,...", help="only these classes (default: all)")
    add("--max-boxes", metavar="N", type=positive_int, help="the best N of an image (default: all)")
    add = parser.add_argument_group("how to look at an image").add_argument
    text = "orientation tags: apply, ignore, or auto (default): ignore with --annotations, else apply"
    add("--exif", choices=["auto", "apply", "ignore"], default="auto", help=text)
    text = (
        "test-time augmentation: look at each image in several sizes and mirrored, and fuse the boxes (weighted box "
        "fusion); takes as many times longer as there are views"
    )
    add("--tta", action="store_true", help=text)
    scales = ",".join(f"{scale:g}" for scale in DEFAULT_SCALES)
    add("--tta-scales", metavar="X,...", type=_scales, help=f"factors on the input size ({scales})")
    add("--no-tta-flip", action="store_true", help="not mirrored: for text, road sides, left and right")
    add = parser.add_argument_group("running").add_argument
    add("--limit", metavar="N", type=positive_int, help="only the first N images")
    add("--batch-size", metavar="N", type=positive_int, default=4, help="images at a time (default 4)")
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ..., or auto (default): CUDA if any")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision (default off)")
    add("--compile", action="store_true", help="torch.compile the network; takes minutes at first")
    add("--cuda-graphs", action="store_true", help="on a GPU: replay it; fast for few images at a time, of few sizes")
    return parser


def _predict(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.output_dir is arguments.json is arguments.save_crops is arguments.save_masks is None:
        arguments.output_dir = DEFAULT_FOLDER
    folders = [path for path in (arguments.output_dir, arguments.save_crops, arguments.save_masks) if path is not None]
    outputs = folders if arguments.json is None else [*folders, arguments.json]
    of_set = _files_of_set(arguments, console)
    if arguments.annotations is not None and arguments.json is None:
        raise PredictionError("--annotations goes with --json")
    views = _views(arguments)
    turn_upright = arguments.exif == "apply" or (arguments.exif == "auto" and arguments.annotations is None)
    min_score = arguments.min_score
    if min_score is None:
        min_score = 0.0 if outputs == [arguments.json] else DEFAULT_MIN_SCORE

    files = (find_images(arguments.inputs, excluded=folders) if of_set is None else of_set)[: arguments.limit]
    others = [path for path in (arguments.weights, arguments.annotations) if path is not None and path.is_file()]
    protected = ProtectedFiles([*files, *others])
    images_list = None
    if arguments.json is not None:
        if arguments.json.is_dir():
            raise PredictionError(f"--json {arguments.json}: is a folder; name a file")
        protected.check(arguments.json)
        if arguments.annotations is None:
            images_list = arguments.json.with_name(f"{arguments.json.stem}_images.json")
            protected.check(images_list)
            outputs.append(images_list)
        mask_results = mask_results_path(arguments.json)
        protected.check(mask_results)
        if not arguments.overwrite:
            for path in filter(None, (arguments.json, images_list)):
                refuse_existing(path)

    detector = load_detector(
        arguments.weights, _device(arguments.device), own_code=(arguments.model, arguments.backbone)
    )
    if arguments.json is not None and detector.model.config.has_masks:
        if not arguments.overwrite:
            refuse_existing(mask_results)
        outputs.append(mask_results)
    labels = None if arguments.classes is None else find_labels(arguments.classes.split(","), detector.class_names)
    if arguments.save_masks is not None and not detector.model.config.has_masks:
        raise PredictionError("--save-masks: this detector has no masks; train a mask_rcnn or cascade_mask_rcnn model")
    image_ids: Sequence[int] = range(1, len(files) + 1)
    category_ids: Sequence[int | None] = detector.category_ids
    if arguments.annotations is not None:
        annotations = read_coco(arguments.annotations)
        image_ids = match_image_ids(files, annotations)
        category_ids = match_category_ids(detector, annotations)
        if unmatched := category_ids.count(None):
            console.warn(f"{unmatched} classes of the detector are not in {arguments.annotations} and are left out")

    kept: list[ImageDetections] = []
    sizes: dict[int, tuple[int, int]] = {}
    num_turned = 0
    _accelerate(detector, arguments, console)
    precision = Precision(arguments.amp, detector.model.pixel_mean.device)
    with (
        console.progress(len(files), description="detecting", unit="images") as bar,
        PredictionOutputs(
            files,
            detector.class_names,
            image_folder=arguments.output_dir,
            crop_folder=arguments.save_crops,
            mask_folder=arguments.save_masks,
            protected=protected,
            overwrite=arguments.overwrite,
        ) as writer,
    ):

        def report_broken(file: Path, error: ImageError) -> None:
            console.warn(str(error))
            bar.update(1)

        for everything in predict_files(
            detector,
            files,
            batch_size=arguments.batch_size,
            autocast=precision.autocast,
            on_broken=report_broken,
            turn_upright=turn_upright,
            views=views,
        ):
            found = everything.select(min_score, labels, arguments.max_boxes)
            writer.add(found)
            if arguments.json is not None:
                kept.append(found.without_pixels())
            sizes[found.index] = (found.pixels.shape[0], found.pixels.shape[1])
            num_turned += found.is_turned
            bar.update(1)

    if arguments.json is not None:
        write_coco_results(arguments.json, kept, image_ids, category_ids)
    if images_list is not None:
        write_images_list(images_list, detector, files, sizes, turned_upright=turn_upright)
    kinds = ", ".join(f"{name} {count}" for name, count in writer.counts.most_common(8))
    total = f"{counted(len(sizes), 'image')}, {counted(writer.counts.total(), 'box', 'boxes')}"
    console.say(total + (f": {kinds}" if kinds else ""))
    if num_turned:
        console.say(f"{counted(num_turned, 'image')} turned upright by EXIF orientation (--exif ignore: as stored)")
    for path in filter(Path.exists, outputs):
        console.say(f"written: {path}")
    num_broken = len(files) - len(sizes)
    if num_broken:
        console.warn(f"{num_broken} of {counted(len(files), 'image')} could not be read")
    if num_broken == len(files):
        return 2
    return 1 if num_broken else 0


def _accelerate(detector: Detector, arguments: argparse.Namespace, console: Console) -> None:
    model = detector.model
    if not (arguments.compile or arguments.cuda_graphs):
        return
    if not isinstance(model, FasterRCNN):
        raise PredictionError("--compile and --cuda-graphs are not for detectors of your own: leave them away")
    if arguments.compile:
        compile_for_evaluation(model)
    if arguments.cuda_graphs:
        require_cuda_graphs(model.pixel_mean.device)
        record_detection(model, CudaGraphBackend(), console.warn)


def _files_of_set(arguments: argparse.Namespace, console: Console) -> list[Path] | None:
    """The images of the split of --data-path, whose annotations give the ids for --json; None without --data-path."""
    found = found_set(arguments)
    if (found is None) == (not arguments.inputs):
        raise PredictionError("give IMAGES, or --data-path DIR for the images of a data set")
    if found is None:
        return None
    if arguments.split not in found.splits:
        raise PredictionError(f"{found.title}: there is no {arguments.split} split, only {', '.join(found.splits)}")
    split = found.splits[arguments.split]
    annotations = read_coco(split.annotations)
    console.say(f"{found.title}: {arguments.split}, {counted(len(annotations), 'image')}")
    if arguments.annotations is None and arguments.json is not None:
        arguments.annotations = split.annotations
    return [split.images / annotations.file_name(index) for index in range(len(annotations))]


def _views(arguments: argparse.Namespace) -> tuple[View, ...]:
    """Of test-time augmentation; none where it is off."""
    if not arguments.tta:
        if arguments.tta_scales is not None or arguments.no_tta_flip:
            raise PredictionError("--tta-scales and --no-tta-flip go with --tta")
        return ()
    return make_views(arguments.tta_scales or DEFAULT_SCALES, flip=not arguments.no_tta_flip)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise PredictionError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise PredictionError(
                f"--device {name}: PyTorch sees no CUDA device here; use --device cpu, or check the driver"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise PredictionError(f"--device {name}: there are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def _scales(text: str) -> tuple[float, ...]:
    scales = tuple(float(part) for part in text.split(","))
    if not all(0.1 <= scale <= 10 for scale in scales) or len(set(scales)) < len(scales):
        raise argparse.ArgumentTypeError(f"{text}: scales are different numbers from 0.1 to 10")
    return scales


if __name__ == "__main__":
    raise SystemExit(main())
