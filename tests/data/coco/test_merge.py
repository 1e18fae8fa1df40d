"""Several annotation files as one: classes by name, images and boxes behind each other."""

import json

import numpy as np
import pytest

from data.coco.annotations import AnnotationError, read_coco
from data.coco.merge import concatenate, into_classes, joint_classes

BOX = {"bbox": [1.0, 2.0, 20.0, 30.0], "area": 600.0, "iscrowd": 0}
POLYGON = {"segmentation": [[1.0, 2.0, 21.0, 2.0, 21.0, 32.0]]}
RLE = {"segmentation": {"size": [48, 64], "counts": [5, 10, 3057]}}


@pytest.fixture
def read(tmp_path):
    """read(name, {category id: name}, [(image id, category id, entries)], masks=False)"""

    def make(name, categories, boxes, *, masks=False):
        ids = dict.fromkeys(image for image, _, _ in boxes)
        content = {
            "images": [{"id": i, "width": 64, "height": 48, "file_name": f"{name}_{i}.jpg"} for i in ids],
            "annotations": [
                {"id": 10 + n, "image_id": image, "category_id": category, **BOX, **more}
                for n, (image, category, more) in enumerate(boxes)
            ],
            "categories": [{"id": number, "name": each} for number, each in categories.items()],
        }
        (tmp_path / name).write_text(json.dumps(content))
        return read_coco(tmp_path / name, masks=masks)

    return make


@pytest.fixture
def pets(read):
    return read("pets", {2: "dog", 5: "cat"}, [(1, 5, POLYGON), (1, 2, RLE), (2, 2, POLYGON)], masks=True)


@pytest.fixture
def birds(read):
    third = {"segmentation": [[0.333, 0.0, 7.0, 0.0, 7.0, 9.0]]}
    return read("birds", {1: "bird", 2: "cat"}, [(1, 1, RLE), (1, 2, third), (7, 1, RLE)], masks=True)


def test_files_are_joined_with_the_classes_of_both_and_every_outline(pets, birds):
    names = joint_classes([pets, birds])
    assert names == ("dog", "cat", "bird")
    parts = [into_classes(each, names) for each in (pets, birds)]
    assert [part.unknown_classes for part in parts] == [("bird",), ("dog",)]
    assert parts[0].category_ids[:2] == (2, 5) and parts[1].category_ids[1:] == (2, 1)
    both = concatenate(parts)
    assert both.image_ids.tolist() == [1, 2, 3, 9] and both.annotation_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert [both.file_name(i) for i in range(4)] == ["pets_1.jpg", "pets_2.jpg", "birds_1.jpg", "birds_7.jpg"]
    assert [both.class_names[label] for label in both.labels] == ["cat", "dog", "dog", "bird", "cat", "bird"]
    assert both.image_indices.tolist() == [0, 0, 1, 2, 2, 3]
    before = [(each, row) for each in (pets, birds) for row in range(3)]
    for row, (own, its_row) in enumerate(before):
        one, other = (each.segmentations.bitmap(r, 48, 64) for each, r in ((both, row), (own, its_row)))
        assert one[:2] == other[:2] and np.array_equal(one.bits, other.bits)


def test_a_file_with_itself_alone_is_itself(pets):
    same = concatenate([into_classes(pets, joint_classes([pets]))])
    assert same.digest() == pets.digest()


def test_spellings_of_one_class_are_refused_until_they_are_mapped(read):
    one = read("a", {1: "traffic light", 2: "Coin"}, [(1, 1, {}), (1, 2, {})])
    other = read("b", {1: "coin", 2: "Traffic_Light"}, [(1, 1, {}), (1, 2, {})])
    with pytest.raises(AnnotationError, match=r"'traffic light' \(.*a\), 'Traffic_Light' \(.*b\)") as refused:
        joint_classes([one, other])
    assert "--class-map 'Traffic_Light=traffic light' makes" in str(refused.value)
    assert "'traffic light=traffic light' Traffic_Light=Traffic_Light keeps" in str(refused.value)
    lights, coins = {"Traffic_Light": "traffic light"}, {"Coin": "coin"}
    with pytest.raises(AnnotationError, match="'Coin'"):
        joint_classes([one, other], lights)
    names = joint_classes([one, other], lights | coins)
    assert names == ("traffic light", "coin")
    assert into_classes(other, names, lights | coins).labels.tolist() == [1, 0]
    assert len(joint_classes([one, other], lights | {"Coin": "Coin", "coin": "coin"})) == 3
    assert len(joint_classes([one, other], lights, meant=("Coin", "coin"))) == 3


def test_two_classes_of_one_file_can_become_one_and_others_be_left_out(read):
    file = read("a", {4: "cat", 6: "kitten", 9: "dog"}, [(1, 4, {}), (1, 9, {}), (2, 6, {}), (3, 9, {})])
    joined = into_classes(file, ("cat",), {"kitten": "cat"})
    assert (joined.labels.tolist(), joined.category_ids, len(joined)) == ([0, 0], (4,), 3)
    assert joined.offsets.tolist() == [0, 1, 2, 2] and not joined.unknown_classes


def test_a_mapped_class_that_no_file_has_is_an_error_with_the_nearest(read):
    with pytest.raises(AnnotationError, match=r"no set has a class 'kat' \(did you mean 'cat'\?\)"):
        joint_classes([read("a", {1: "cat"}, [(1, 1, {})])], {"kat": "cat"})
