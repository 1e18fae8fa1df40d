"""What LVIS says of images and classes: read, kept in the cache, refused where it is no list of ids."""

import copy
import json

import numpy as np
import pytest

from data import AnnotationError, read_coco
from data.coco.merge import joint_classes
from tests.data.coco.valid import VALID


def written(path, **of_first):
    content = copy.deepcopy(VALID)
    for image in content["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": [9]}
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['id']}.jpg"
        del image["file_name"]
    content["images"][0] |= {"neg_category_ids": [9, 4]} | of_first
    content["categories"][1]["frequency"] = "c"
    path.write_text(json.dumps(content))
    return path


def test_lists_of_images_and_frequencies_are_read_and_cached_by_id(tmp_path):
    file = written(tmp_path / "lvis.json")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        read = read_coco(file, cache_dir=cache)
        federated = read.training_view().federated
        assert federated is not None
        assert federated.negative.tolist() == [[7, 9], [7, 4]]
        assert federated.not_exhaustive.tolist() == [[7, 9], [3, 9]]
        assert federated.frequencies.tolist() == [[4, 1]]
        assert all(array.dtype == np.int64 for array in federated.arrays().values())
        assert [read.file_name(i) for i in range(2)] == ["val2017/7.jpg", "val2017/3.jpg"]


def test_a_file_without_negatives_has_none_of_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(VALID))
    assert read_coco(tmp_path / "a.json", cache_dir=tmp_path / "cache").federated is None


@pytest.mark.parametrize("value", [None, "9", [9, "4"], [9.5], [2**70]])
def test_what_is_no_list_of_ids_is_refused_by_name(tmp_path, value):
    file = written(tmp_path / "lvis.json", not_exhaustive_category_ids=value)
    with pytest.raises(AnnotationError, match=r"images\[0\] \(id 7\).*not_exhaustive_category_ids"):
        read_coco(file)


def test_classes_of_lvis_cannot_be_joined_but_renamed(tmp_path):
    read = read_coco(written(tmp_path / "lvis.json"))
    one, other = read.class_names[:2]
    assert joint_classes([read], {one: "another"})[0] == "another"
    with pytest.raises(AnnotationError, match=r"lvis\.json: .*searched for \(LVIS\).*leave --class-map away"):
        joint_classes([read], {one: other})
