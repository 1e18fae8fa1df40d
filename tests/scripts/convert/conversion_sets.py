"""A COCO-format set for the tests of the converters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("dog", "cat", "unused")  # not by alphabet
CATEGORY_IDS = (3, 17, 40)


def make_set(root: Path, num_train: int = 6, num_val: int = 3, *, crowds: bool = True) -> dict[str, list[Any]]:
    """Images in root/train and root/val, boxes in hundredths of a pixel; options that name them."""
    rng = np.random.default_rng(0)
    options = []
    for split, count in (("train", num_train), ("val", num_val)):
        images, annotations = [], []
        for number in range(count):
            width, height = int(rng.integers(40, 90)), int(rng.integers(40, 90))
            name = f"{'sub/' if number == 1 else ''}{split}_{number}.png"
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
            images.append({"id": 10 * number + 5, "width": width, "height": height, "file_name": name})
            for place in range(number % 4):  # none for some
                x, y = (float(round(v, 2)) for v in rng.uniform(0, 20, 2))
                w, h = (float(round(v, 2)) for v in rng.uniform(2, 20, 2))
                ids = {"id": len(annotations) + 1, "image_id": 10 * number + 5, "category_id": CATEGORY_IDS[place % 2]}
                crowd = int(crowds and place == 2)
                annotations.append({**ids, "bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd})
        categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, NAMES, strict=True)]
        file = root / f"{split}.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        options += [f"--{split}-images", str(root / split), f"--{split}-annotations", str(file)]
    return options


def names_in(file: Path) -> list[str]:
    return [image["file_name"] for image in json.loads(file.read_text())["images"]]


def content_of(file: Path) -> tuple[list[str], dict[str, tuple[int, int, list[tuple]]]]:
    """Class names by id, and for each file name its size and boxes: what has to survive a conversion."""
    content = json.loads(file.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {i["id"]: (i["file_name"], (i["width"], i["height"], [])) for i in content["images"]}
    for a in content["annotations"]:
        images[a["image_id"]][1][2].append((names[a["category_id"]], a["iscrowd"], a["bbox"]))
    return [names[number] for number in sorted(names)], dict(images.values())
