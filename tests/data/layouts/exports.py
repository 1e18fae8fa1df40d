"""One small set, as each tool writes it: images of 32x32 pixels, a coin at the left and a key at the right of each."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
NAMES = ("coin", "key")
BOXES = ((2, 4, 10, 12), (18, 6, 12, 20))
"""x, y, width and height in pixels, of a coin and a key."""
RINGS = ((2, 4, 12, 4, 12, 16, 2, 10), (18, 6, 30, 26, 20, 26))
"""Outlines of the two."""


def image(path: Path, number: int) -> Path:
    """An image like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((SIDE // 4, SIDE // 4, 1), dtype=np.uint8))).save(path)
    return path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def coco_text(file_names: list[str], categories: list[dict] | None = None) -> str:
    """A COCO file with both boxes in each image; ids of coin and key are those of the categories with these names."""
    categories = categories or [{"id": 1, "name": "coin"}, {"id": 2, "name": "key"}]
    ids = {category["name"]: category["id"] for category in categories}
    images = [{"id": n, "file_name": name, "width": SIDE, "height": SIDE} for n, name in enumerate(file_names)]
    annotations = [
        {"image_id": n, "category_id": ids[name], "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
        for n in range(len(images))
        for name, box in zip(NAMES, BOXES, strict=True)
    ]
    annotations = [{"id": n, **one, "segmentation": [[1, 2, 3, 4, 5, 6]]} for n, one in enumerate(annotations)]
    return json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories})


def yolo_text() -> str:
    return "".join(
        f"{label} {(x + w / 2) / SIDE} {(y + h / 2) / SIDE} {w / SIDE} {h / SIDE}\n"
        for label, (x, y, w, h) in enumerate(BOXES)
    )


def voc_text(file_name: str, names: tuple[str, ...] = NAMES) -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
        "</bndbox></object>"
        for name, (x, y, w, h) in zip(names, BOXES, strict=True)
    )
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
    return f"<annotation><filename>{file_name}</filename>{size}{objects}</annotation>"


def _numbered(root: Path, folders: dict[str, int], suffix: str = "jpg") -> dict[str, list[Path]]:
    """As many images in each folder as asked for, by folder."""
    number, made = 0, {}
    for folder, count in folders.items():
        made[folder] = [image(root / folder / f"{number + n:03d}.{suffix}", number + n) for n in range(count)]
        number += count
    return made


def coco_own(root: Path) -> None:
    for folder, images in _numbered(root, {"train2017": 4, "val2017": 2}).items():
        write(root / "annotations" / f"instances_{folder}.json", coco_text([path.name for path in images]))


def coco_plain(root: Path) -> None:
    """As scripts/convert_*.py, CVAT and MMDetection's guides have it: all images in one folder."""
    images = [path.name for path in _numbered(root, {"images": 6})["images"]]
    write(root / "annotations" / "instances_train.json", coco_text(images[:4]))
    write(root / "annotations" / "instances_val.json", coco_text(images[4:]))


def roboflow_coco(root: Path) -> None:
    categories = [{"id": 0, "name": "things", "supercategory": "none"}]
    categories += [{"id": n, "name": name, "supercategory": "things"} for n, name in enumerate(NAMES, 1)]
    for folder, images in _numbered(root, {"train": 4, "valid": 2, "test": 2}).items():
        write(root / folder / "_annotations.coco.json", coco_text([path.name for path in images], categories))
    write(root / "README.roboflow.txt", "exported\n")


def roboflow_coco_mmdetection(root: Path) -> None:
    """Its categories count from 0, without a root; here the splits list them in different orders."""
    for folder, images in _numbered(root, {"train": 4, "valid": 2}).items():
        names = NAMES if folder == "train" else NAMES[::-1]
        categories = [{"id": n, "name": name, "supercategory": "none"} for n, name in enumerate(names)]
        write(root / folder / "_annotations.coco.json", coco_text([path.name for path in images], categories))


def one_coco_file(root: Path) -> None:
    write(root / "labels.json", coco_text([path.name for path in _numbered(root, {".": 10})["."]]))


def label_studio(root: Path) -> None:
    """Its COCO export names files as the machine that it ran on would."""
    images = _numbered(root, {"images": 10})["images"]
    write(root / "result.json", coco_text([f"..\\..\\label-studio\\media\\{path.name}" for path in images]))


def yolo_ultralytics(root: Path) -> None:
    for images in _numbered(root, {"images/train": 4, "images/val": 2}).values():
        for path in images:
            write(root / "labels" / path.parent.name / f"{path.stem}.txt", yolo_text())
    write(root / "data.yaml", "path: ../datasets/things\ntrain: images/train\nval: images/val\ntest:\n"
          "names:\n  0: coin\n  1: key\n")  # fmt: skip


def yolo_roboflow(root: Path) -> None:
    """Its paths point one level off."""
    for images in _numbered(root, {"train/images": 4, "valid/images": 2, "test/images": 2}).values():
        for path in images:
            write(path.parents[1] / "labels" / f"{path.stem}.txt", yolo_text())
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
          "names: ['coin', 'key']\n")  # fmt: skip


def yolo_class_list(root: Path) -> None:
    """LabelImg's: everything in one folder."""
    for path in _numbered(root, {".": 10})["."]:
        write(path.with_suffix(".txt"), yolo_text())
    write(root / "classes.txt", "coin\nkey\n")


def yolo_darknet(root: Path) -> None:
    """CVAT's, without the list that obj.data names."""
    for path in _numbered(root, {"obj_train_data": 10})["obj_train_data"]:
        write(path.with_suffix(".txt"), yolo_text())
    write(root / "obj.names", "coin\nkey\n")
    write(root / "obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")


def yolo_segmentation(root: Path) -> None:
    lines = [f"{label} {' '.join(str(value / SIDE) for value in ring)}\n" for label, ring in enumerate(RINGS)]
    for images in _numbered(root, {"train/images": 4, "valid/images": 2}).values():
        for path in images:
            write(path.parents[1] / "labels" / f"{path.stem}.txt", "".join(lines))
    write(root / "data.yaml", "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['coin', 'key']\n")


def labelme(root: Path) -> None:
    """JSON files beside their images; imagePath as written on another machine."""
    shapes = [
        {"label": name, "points": [ring[i : i + 2] for i in range(0, len(ring), 2)], "shape_type": "polygon"}
        for name, ring in zip(NAMES, RINGS, strict=True)
    ]
    for images in _numbered(root, {"train": 4, "val": 2}).values():
        for path in images:
            record = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"..\\photos\\{path.name}"}
            record |= {"imageData": None, "imageHeight": SIDE, "imageWidth": SIDE}
            write(path.with_suffix(".json"), json.dumps(record))


def voc_devkit(root: Path) -> None:
    year = root / "VOCdevkit" / "VOC2012"
    images = _numbered(year, {"JPEGImages": 6})["JPEGImages"]
    for path in images:
        write(year / "Annotations" / f"{path.stem}.xml", voc_text(path.name))
    lists = {"train": images[:4], "val": images[4:], "trainval": images}
    for name, listed in lists.items():
        write(year / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{path.stem}\n" for path in listed))


def voc_labelimg(root: Path) -> None:
    """XML files beside their images, in the author's folders; nothing to validate on but the test images."""
    for images in _numbered(root, {"images/train": 4, "images/test": 2}).values():
        for path in images:
            write(path.with_suffix(".xml"), voc_text(path.name))


def voc_cvat(root: Path) -> None:
    images = _numbered(root, {"JPEGImages": 10})["JPEGImages"]
    for path in images:
        write(root / "Annotations" / f"{path.stem}.xml", voc_text(path.name))
    write(root / "ImageSets" / "Main" / "default.txt", "".join(f"{path.stem}\n" for path in images))
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncoin:1,1,1::\nkey:2,2,2::\n")


def imagefolder(root: Path) -> None:
    for folder, images in _numbered(root, {"train": 4, "validation": 2}, "png").items():
        records = [
            {"file_name": path.name, "objects": {"bbox": list(map(list, BOXES)), "categories": [0, 1]}}
            for path in images
        ]
        write(root / folder / "metadata.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    names = "".join(f"            '{n}': {name}\n" for n, name in enumerate(NAMES))
    write(root / "README.md", "---\ndataset_info:\n  features:\n  - name: objects\n    sequence:\n"
          f"    - name: categories\n      dtype:\n        class_label:\n          names:\n{names}---\n")  # fmt: skip


EXPORTS: dict[Callable[[Path], None], tuple[str, dict[str, int], str]] = {
    coco_own: ("COCO's own layout", {"train": 4, "val": 2}, ""),
    coco_plain: ("COCO JSON", {"train": 4, "val": 2}, ""),
    roboflow_coco: ("Roboflow's COCO export", {"train": 4, "val": 2, "test": 2}, "category 0 'things', the root"),
    roboflow_coco_mmdetection: ("Roboflow's COCO export", {"train": 4, "val": 2}, ""),
    one_coco_file: ("COCO JSON", {"train": 9, "val": 1}, "by seed 0 and file name"),
    label_studio: ("COCO JSON", {"train": 9, "val": 1}, "by seed 0 and file name"),
    yolo_ultralytics: ("YOLO", {"train": 4, "val": 2}, "data.yaml"),
    yolo_roboflow: ("YOLO", {"train": 4, "val": 2, "test": 2}, "data.yaml"),
    yolo_class_list: ("YOLO", {"train": 9, "val": 1}, "by seed 0 and file name"),
    yolo_darknet: ("YOLO", {"train": 9, "val": 1}, "named and not there: train (data/train.txt)"),
    voc_devkit: ("Pascal VOC", {"train": 4, "val": 2}, "ImageSets/Main/val.txt"),
    voc_labelimg: ("Pascal VOC", {"train": 4, "val": 2}, "the test split is validated on"),
    voc_cvat: ("Pascal VOC", {"train": 9, "val": 1}, "by seed 0 and file name"),
    imagefolder: ("Hugging Face's imagefolder", {"train": 4, "val": 2}, "the folders of"),
    yolo_segmentation: ("YOLO", {"train": 4, "val": 2}, "each was kept, with the box round it"),
    labelme: ("LabelMe", {"train": 4, "val": 2}, "the folders of"),
}
"""What writes each export: what it is recognized as, its images by split, and what is said of it."""
