"""Annotation files and detections for the tests of evaluation."""

import json

import numpy as np

from detection.evaluation import CocoEvaluator, Detections

CAT, DOG = 1, 5
BOX = [100, 100, 100, 100]
FAR = [400, 300, 50, 50]
SCORES = np.array([0.1, 0.3, 0.3, 0.5, 0.9])  # few values, so that many tie


def evaluate(annotations, detections, *, image_ids=None, backend="auto"):
    return CocoEvaluator(annotations, backend=backend).evaluate(detections, image_ids)


def annotation(number, image, category, box, **more):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        **more,
    }


def write_annotations(path, annotations, *, image_ids=(1, 2, 3), categories=None):
    categories = categories or {CAT: "cat", DOG: "dog"}
    content = {
        "images": [{"id": int(i), "width": 640, "height": 480, "file_name": f"{int(i)}.png"} for i in image_ids],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    return path


def detections_of(rows):
    """rows: (image id, category id, [x, y, w, h], score)."""
    if not rows:
        return Detections.empty()
    images, categories, boxes, scores = zip(*rows, strict=True)
    return Detections(
        np.array(images, np.int64),
        np.array(categories, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
    )


def random_case(rng, path, *, crowded_image=False, crowds=True):
    """Writes random annotations, returns random detections: crowds, areas unlike the box, ties, empty images,
    absent classes, annotation id 0, category ids with gaps, image ids in no order."""
    num_images = int(rng.integers(1, 7))
    image_ids = rng.permutation(1000)[:num_images] * int(rng.choice([1, 10**12]))
    category_ids = np.sort(rng.permutation(20)[: int(rng.integers(1, 5))]) + 1
    annotations, rows = [], []
    for image in image_ids.tolist():
        boxes = []
        for _ in range(int(rng.choice([0, 1, 3, 8]))):
            size = np.exp(rng.uniform(1.5, 5.5, 2))
            box = np.round(np.concatenate([rng.uniform(0, 300, 2), size]), int(rng.choice([0, 2])))
            boxes.append(box)
            area = float(box[2] * box[3] * rng.choice([1, 1, 0.6]))
            annotations.append(
                annotation(
                    len(annotations),
                    image,
                    int(rng.choice(category_ids)),
                    box.tolist(),
                    area=area,
                    iscrowd=int(crowds and rng.random() < 0.15),
                )
            )
        many = crowded_image and image == image_ids[0]
        for _ in range(int(rng.integers(101, 140)) if many else int(rng.choice([0, 1, 5, 15]))):
            if boxes and rng.random() < 0.8:
                box = boxes[int(rng.integers(len(boxes)))].copy()
                box += rng.choice([0, 0.05, 0.3]) * rng.normal(size=4) * box[[2, 3, 2, 3]]
                box[2:] = np.abs(box[2:])
            else:
                box = rng.uniform(0, 200, 4)
            category = category_ids[0] if many else rng.choice(category_ids)
            rows.append((image, int(category), box.tolist(), float(rng.choice(SCORES))))
    order = rng.permutation(len(annotations))
    write_annotations(
        path,
        [annotations[i] for i in order],
        image_ids=image_ids,
        categories={int(i): f"class {i}" for i in category_ids},
    )
    return detections_of([rows[i] for i in rng.permutation(len(rows))])
