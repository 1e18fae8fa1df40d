"""A small COCO-format folder for the tests of the data path."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco.annotations import read_coco
from data.loading.dataset import CocoDataset

MakeDataset = Callable[..., CocoDataset]


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """make_dataset(sizes, training=True, masks=False): images of (width, height) sizes with noise, each with 0 to 3
    boxes (1 to 3 when training) with a polygon in each, image ids 100, 101, ..."""

    def make(sizes: Sequence[tuple[int, int]], *, training: bool = True, masks: bool = False) -> CocoDataset:
        rng, corners = np.random.default_rng(len(sizes)), np.random.default_rng(0)
        images, annotations = [], []
        for index, (width, height) in enumerate(sizes):
            name = f"{index:03d}.jpg"
            images.append({"id": 100 + index, "width": width, "height": height, "file_name": name})
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
            for _ in range(rng.integers(1 if training else 0, 4)):
                x, y = float(rng.uniform(0, width - 10)), float(rng.uniform(0, height - 10))
                w, h = float(rng.uniform(2, width - x)), float(rng.uniform(2, height - y))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 100 + index,
                        "category_id": int(rng.choice([3, 7])),
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [(corners.uniform(0, 1, (7, 2)) * [w, h] + [x, y]).reshape(-1).tolist()],
                    }
                )
        file = tmp_path / "annotations.json"
        categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return CocoDataset(tmp_path, read_coco(file, masks=masks), training=training, masks=masks)

    return make
