"""A small procedural set in COCO's layout, so that everything runs where no data set is at hand.

Six classes of shapes in any rotation, color and texture, from small to large, cut off by borders and
hidden by each other, on textured backgrounds with bars that belong to no class; crowd regions, images
without objects, and portrait images among them. The set is a function of its settings: equal annotations
to the byte and equal pixels (stored as PNG) wherever it is made.
"""

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.coco.layout import standard_layout
from data.errors import DataError
from data.tools.shape_scenes import CLASS_NAMES, Dice, draw_scene

GENERATOR_VERSION = 2  # goes up whenever equal settings would give another image, box or mask
SETTINGS_FILE = "shapes.json"
PORTRAIT_SHARE = 0.15
MIN_SIDE, MAX_SIDE = 64, 4096
# Category ids with gaps, as COCO's: code that takes an id for a label fails here and not first on COCO.
CATEGORY_IDS = (1, 2, 3, 5, 8, 13)


class ShapesError(DataError):
    """The set cannot be made with these settings or in this place."""


def make_shapes(
    folder: str | Path,
    *,
    seed: int = 0,
    num_train: int = 600,
    num_val: int = 150,
    size: tuple[int, int] = (256, 192),
) -> Path:
    """Makes the set under `folder` in COCO 2017's layout, unless it is there already, and returns the folder.

    size: width and height in pixels; portrait images have them swapped. The set is written beside the
    folder and renamed into place whole: an interrupted run leaves nothing that looks like a set, and of
    several processes that start at once one wins and the others take its set.

    Raises ShapesError for impossible settings, or when `folder` holds anything else than this very set.
    """
    folder = Path(folder)
    if num_train < 1 or num_val < 1:
        raise ShapesError(f"a shapes set of {num_train} and {num_val} images: at least 1 of each is needed.")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ShapesError(f"shapes images of {size[0]} x {size[1]}: sides of {MIN_SIDE} to {MAX_SIDE} are possible.")
    settings = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_val": num_val,
        "size": list(size),
    }
    if _is_made(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".building", dir=folder.parent))
    try:
        building.chmod(0o755)  # mkdtemp's folder is for its owner alone
        _write_set(building, settings)
        try:
            building.rename(folder)
        except OSError:  # not empty: another process was first, or it holds something else
            if not _is_made(folder, settings):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _is_made(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` holds the set of these settings; False where nothing is in the way of making it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        raise ShapesError(
            f"{folder} holds something else than a shapes set. Choose another folder for it with --data-path."
        ) from None
    if found != settings:
        raise ShapesError(
            f"{folder} holds a shapes set with other settings ({_listed(found)}; asked for: "
            f"{_listed(settings)}). Delete it, or choose another folder with --data-path."
        )
    return True


def _listed(settings: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items()) if isinstance(settings, dict) else repr(settings)


def _write_set(folder: Path, settings: dict[str, Any]) -> None:
    layout = standard_layout(folder)
    splits = (
        (0, settings["num_train"], layout.train_images, layout.train_annotations),
        (1, settings["num_val"], layout.val_images, layout.val_annotations),
    )
    layout.train_annotations.parent.mkdir()
    # Threads, not processes: encoding and much of numpy release the lock, and nothing has to be imported
    # again.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for split, count, images_folder, annotation_file in splits:
            images_folder.mkdir()
            draw = partial(_draw_image, images_folder, (settings["seed"], split), tuple(settings["size"]))
            content = _coco_content(list(pool.map(draw, range(count))), settings)
            annotation_file.write_text(json.dumps(content, separators=(",", ":")))
    (folder / SETTINGS_FILE).write_text(json.dumps(settings))


def _draw_image(
    folder: Path, key: tuple[int, int], size: tuple[int, int], index: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draws and stores one image; its COCO record and those of its objects, still without annotation
    ids."""
    width, height = size[::-1] if Dice(*key, index, 0).chance(PORTRAIT_SHARE) else size
    scene = draw_scene((*key, index, 1), width, height)
    file_name = f"{index + 1:012d}.png"
    image = {"id": index + 1, "file_name": file_name, "width": width, "height": height}
    Image.fromarray(scene.pixels).save(folder / file_name, compress_level=1)
    annotations: list[dict[str, Any]] = []
    for item in scene.objects:
        record: dict[str, Any] = {
            "image_id": image["id"],
            "category_id": CATEGORY_IDS[item.label],
            "bbox": list(item.box_xywh),
            "area": item.area,
            "iscrowd": int(item.rle_counts is not None),
        }
        if item.rle_counts is not None:
            record["segmentation"] = {"size": [height, width], "counts": list(item.rle_counts)}
        else:
            record["segmentation"] = [list(ring) for ring in item.polygons]
        annotations.append(record)
    return image, annotations


def _coco_content(
    images: list[tuple[dict[str, Any], list[dict[str, Any]]]], settings: dict[str, Any]
) -> dict[str, Any]:
    annotations = [record for _, records in images for record in records]
    return {
        "info": {"description": "procedural shapes", **settings},
        "images": [image for image, _ in images],
        "annotations": [{"id": number, **record} for number, record in enumerate(annotations, start=1)],
        "categories": [
            {"id": category_id, "name": name, "supercategory": "shape"}
            for category_id, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
        ],
    }
