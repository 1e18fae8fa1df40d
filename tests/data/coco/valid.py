"""A sound annotation file, to be changed: two images, ids with gaps and in no order, a crowd region."""

from typing import Any

VALID: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 3, "file_name": "sub/b ü.png", "width": 48, "height": 64.0},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 30, 40], "area": 1100.5, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0.5, 0.25, 10, 12], "area": 120, "iscrowd": 0},
        {
            "id": 5, "image_id": 3, "category_id": 4, "bbox": [5, 5, 20, 20], "area": 300, "iscrowd": 1,
            "segmentation": {"size": [64, 48], "counts": [10, 300, 2762]},
        },
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
}  # fmt: skip
