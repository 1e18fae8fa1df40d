"""CocoDataset: the boxes that are trained on, and files that are missing or not the annotated ones."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco.annotations import read_coco
from data.images.decode import ImageError
from data.loading.dataset import CocoDataset, DatasetError


@pytest.fixture
def write_set(tmp_path: Path) -> Callable[..., Path]:
    """write_set(annotations, names): images of 64x48 named `names`, ids 1, 2, ...; returns the file."""

    def write(annotations: list[dict], names: tuple[str, ...] = ("a.png",)) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (64, 48)).save(tmp_path / name)
        images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names, start=1)]
        for i, annotation in enumerate(annotations):
            annotation.update({"id": i + 1})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 5, "name": "x"}, {"id": 9, "name": "y"}],
        }
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps(content))
        return file

    return write


def box(bbox: list[float], category: int = 5, image: int = 1, **more: object) -> dict:
    area = bbox[2] * bbox[3]
    return {"image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0} | more


def test_crowds_and_ignored_annotations_are_not_among_the_boxes(tmp_path: Path, write_set: Callable) -> None:
    annotations = [
        box([1, 2, 10, 20]),
        box([0, 0, 30, 30], iscrowd=1),
        box([5, 5, 6, 7], ignore=1),
        box([3.3, 4.4, 5.5, 6.6], category=9),
        box([-4, 30, 100, 40]),
    ]
    for training in (True, False):
        dataset = CocoDataset(tmp_path, read_coco(write_set(annotations)), training=training)
        boxes, labels = dataset.boxes(0)
        expected = np.array([[1, 2, 11, 22], [3.3, 4.4, 3.3 + 5.5, 4.4 + 6.6], [-4, 30, 96, 70]], np.float32)
        assert boxes.dtype == np.float32
        assert np.array_equal(boxes, expected)
        assert labels.tolist() == [0, 1, 0]
        assert dataset.box_counts.tolist() == [3]


def test_training_leaves_out_images_without_annotation_and_evaluation_keeps_them(
    tmp_path: Path, write_set: Callable
) -> None:
    file = write_set([box([1, 2, 10, 20], image=2)], ("a.png", "b.png", "c.png"))
    training = CocoDataset(tmp_path, read_coco(file), training=True)
    assert training.image_ids.tolist() == [2]
    assert training.path(0) == tmp_path / "b.png"
    assert len(training.boxes(0)[0]) == 1
    evaluation = CocoDataset(tmp_path, read_coco(file), training=False)
    assert evaluation.image_ids.tolist() == [1, 2, 3]
    assert [len(evaluation.boxes(i)[0]) for i in range(3)] == [0, 1, 0]


def test_images_in_subfolders_are_found(tmp_path: Path, write_set: Callable) -> None:
    file = write_set([box([1, 2, 10, 20])], ("2014/a.png",))
    dataset = CocoDataset(tmp_path, read_coco(file), training=True)
    assert dataset.image(0).shape == (48, 64, 3)


def test_missing_images_are_counted_and_the_first_named(tmp_path: Path, write_set: Callable) -> None:
    names = tuple(f"{i}.png" for i in range(9))
    file = write_set([box([1, 2, 10, 20], image=i + 1) for i in range(9)], names)
    for name in names[1:]:
        (tmp_path / name).unlink()
    with pytest.raises(DatasetError, match=r"8 of the 9 images.*1\.png, 2\.png.*5\.png, \.\.\."):
        CocoDataset(tmp_path, read_coco(file), training=True)


def test_a_missing_folder_is_named(tmp_path: Path, write_set: Callable) -> None:
    annotations = read_coco(write_set([box([1, 2, 10, 20])]))
    with pytest.raises(DatasetError, match="elsewhere: there is no such folder"):
        CocoDataset(tmp_path / "elsewhere", annotations, training=False)
    absent_subfolder = read_coco(write_set([box([1, 2, 10, 20])], ("sub/a.png",)))
    (tmp_path / "sub" / "a.png").unlink()
    (tmp_path / "sub").rmdir()
    with pytest.raises(DatasetError, match="sub/a.png"):
        CocoDataset(tmp_path, absent_subfolder, training=False)


def test_a_set_without_anything_to_train_on_is_refused(tmp_path: Path, write_set: Callable) -> None:
    annotations = read_coco(write_set([]))
    with pytest.raises(DatasetError, match="none of its 1 images can be trained on"):
        CocoDataset(tmp_path, annotations, training=True)
    assert len(CocoDataset(tmp_path, annotations, training=False)) == 1


def test_an_image_of_another_size_than_annotated_is_refused_with_both_sizes(
    tmp_path: Path, write_set: Callable
) -> None:
    dataset = CocoDataset(tmp_path, read_coco(write_set([box([1, 2, 10, 20])])), training=True)
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: is 640x480 pixels.*says 64x48 for image id 1"):
        dataset.image(0)
    Image.new("RGB", (48, 64)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="EXIF.*exif_transpose"):
        dataset.image(0)
