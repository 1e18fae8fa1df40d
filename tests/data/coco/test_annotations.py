import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.coco.annotations import AnnotationError, CocoAnnotations, find_fatal, read_coco
from tests.data.coco.valid import VALID

REFERENCE = Path(__file__).parents[2] / "reference" / "pipeline"
REFERENCE_CLASSES = ["person", "bicycle", "car"]


def read(tmp_path, content, **options):
    file = tmp_path / "instances.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(file, **options)


def changed(section, index, **values):
    content = copy.deepcopy(VALID)
    content[section][index].update(values)
    return content


def without(section, index, key):
    content = copy.deepcopy(VALID)
    del content[section][index][key]
    return content


def failure(tmp_path, content, **options):
    """The message of the error, checked to name the file and to be one sentence with a remedy behind it."""
    with pytest.raises(AnnotationError) as caught:
        read(tmp_path, content, **options)
    message = str(caught.value)
    assert str(tmp_path / "instances.json") in message
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message


def as_dicts(annotations: CocoAnnotations):
    """The form of the recorded results: corner boxes, labels and crowd flags by image."""
    result = []
    for index in range(len(annotations)):
        rows = annotations.rows(index)
        instances = [
            {"bbox": [x, y, x + w, y + h], "label": label, "ignore_flag": crowd}
            for (x, y, w, h), label, crowd in zip(
                annotations.boxes_xywh[rows].tolist(),
                annotations.labels[rows].tolist(),
                annotations.crowd[rows].astype(int).tolist(),
                strict=True,
            )
        ]
        result.append({"img_id": int(annotations.image_ids[index]), "instances": instances})
    return result


@pytest.fixture
def reference(tmp_path):
    """The annotations that were given to MMDetection, with the classes that were told there: not all of the file's."""
    content = (REFERENCE / "filter_annotations.json").read_text()
    return read(tmp_path, content).of_classes(REFERENCE_CLASSES).with_classes(REFERENCE_CLASSES)


def test_training_view_keeps_what_mmdetection_keeps(reference):
    expected = json.loads((REFERENCE / "filter_result.json").read_text())["train"]
    assert as_dicts(reference.training_view()) == expected


def test_what_training_leaves_out_is_told_by_reason(reference):
    assert {reason: int(which.sum()) for reason, which in reference.not_trained().items()} == {
        "ignored-annotation": 1,
        "box-outside-image": 4,
        "degenerate-box": 3,
        "no-area-of-object": 2,
    }
    images = {reason: int(which.sum()) for reason, which in reference.images_not_trained().items()}
    assert images == {"small-image": 1, "image-without-annotation": 2}


def test_training_view_keeps_names_and_sizes_with_their_images(reference):
    view = reference.training_view()
    assert [view.file_name(i) for i in range(len(view))] == [f"{i}.jpg" for i in view.image_ids]
    assert view.widths[view.image_ids == 9] == 32
    assert view.heights[view.image_ids == 14] == 640


def test_arrays_follow_the_file_with_labels_by_category_id(tmp_path):
    annotations = read(tmp_path, VALID)
    assert annotations.class_names == ("cat", "dog")
    assert annotations.category_ids == (4, 9)
    assert annotations.image_ids.tolist() == [7, 3]
    assert annotations.widths.tolist() == [64, 48]
    assert annotations.heights.tolist() == [48, 64]
    assert [annotations.file_name(i) for i in range(2)] == ["a.jpg", "sub/b ü.png"]
    assert annotations.offsets.tolist() == [0, 1, 3]
    assert annotations.annotation_ids.tolist() == [2, 1, 5]
    assert annotations.labels.tolist() == [0, 1, 0]
    assert annotations.boxes_xywh.tolist() == [[0.5, 0.25, 10, 12], [1, 2, 30, 40], [5, 5, 20, 20]]
    assert annotations.areas.tolist() == [120, 1100.5, 300]
    assert annotations.crowd.tolist() == [False, False, True]
    assert annotations.image_indices.tolist() == [0, 1, 1]
    assert annotations.has_boxes
    assert annotations.findings == ()
    assert annotations.boxes_xywh.dtype == np.float64
    assert annotations.labels.dtype == np.int64


def test_given_classes_are_matched_by_name_and_set_the_labels(tmp_path):
    annotations = read(tmp_path, VALID, class_names=["dog", "cat"])
    assert annotations.class_names == ("dog", "cat")
    assert annotations.category_ids == (9, 4)
    assert annotations.labels.tolist() == [1, 0, 1]


def test_classes_other_than_the_files_are_an_error_that_names_them(tmp_path):
    assert "lacks 'horse'" in failure(tmp_path, VALID, class_names=["cat", "dog", "horse"])
    assert "has besides 'dog'" in failure(tmp_path, VALID, class_names=["cat"])


def test_some_classes_keep_every_image_and_the_files_order(tmp_path):
    annotations = read(tmp_path, VALID).of_classes(["dog"])
    assert (annotations.class_names, annotations.category_ids, len(annotations)) == (("dog",), (9,), 2)
    assert annotations.annotation_ids.tolist() == [1] and annotations.labels.tolist() == [0]
    assert annotations.offsets.tolist() == [0, 0, 1]
    assert read(tmp_path, VALID).of_classes(["dog", "cat"]).class_names == ("cat", "dog")
    with pytest.raises(AnnotationError, match="has no category 'horse'; it has 'cat', 'dog'"):
        annotations = read(tmp_path, VALID).of_classes(["dog", "horse"])


def test_a_file_without_annotations_is_a_list_of_images(tmp_path):
    annotations = read(tmp_path, {key: VALID[key] for key in ("images", "categories")})
    assert not annotations.has_boxes
    assert annotations.offsets.tolist() == [0, 0, 0]
    assert annotations.boxes_xywh.shape == (0, 4)
    assert len(annotations.training_view()) == 0


def test_a_missing_area_is_the_area_of_the_box(tmp_path):
    annotations = read(tmp_path, without("annotations", 0, "area"))
    assert annotations.areas.tolist() == [120, 1200, 300]
    assert [(f.code, f.count) for f in annotations.findings] == [("no-area", 1)]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    assert len(read(tmp_path, "\ufeff" + json.dumps(VALID))) == 2


def test_arrays_survive_pickling_and_equal_data_has_equal_digests(tmp_path):
    annotations = read(tmp_path, VALID)
    again = pickle.loads(pickle.dumps(annotations))
    assert again.digest() == annotations.digest()
    assert read(tmp_path, changed("annotations", 0, bbox=[1, 2, 30, 41])).digest() != annotations.digest()
    assert read(tmp_path, changed("categories", 0, name="wolf")).digest() != annotations.digest()


HUGE = 10**400
FATAL = [
    ("an image id that is text",
     changed("images", 0, id="7"),
     ['images[0] (id \'7\'): "id" is \'7\'', "mixes"]),
    ("an image id with a fraction", changed("images", 0, id=7.0), ["expected an integer"]),
    ("an image id of true", changed("images", 0, id=True), ["true or false"]),
    ("an image id beyond 64 bits", changed("images", 0, id=2**63), ["beyond 64 bits"]),
    ("no image id", without("images", 1, "id"), ["images[1]", 'has no "id"']),
    ("two images of one id", changed("images", 1, id=7), ["images[1] (id 7)", "taken by images[0]"]),
    ("two annotations of one id", changed("annotations", 2, id=1), ["annotations[2] (id 1)", "taken by"]),
    ("two categories of one id", changed("categories", 1, id=9), ["categories[1] (id 9)"]),
    ("two categories of one name", changed("categories", 1, name="dog"), ["'dog'", "category id 9"]),
    ("an unknown image",
     changed("annotations", 1, image_id=8),
     ["annotations[1] (id 2)", "none of the images"]),
    ("an unknown category", changed("annotations", 1, category_id=5), ["none of the categories"]),
    ("an image reference that is text", changed("annotations", 1, image_id="7"), ['"image_id"', "mixes"]),
    ("no width", without("images", 0, "width"), ["images[0] (id 7)", 'has no "width"']),
    ("a width of 0", changed("images", 0, width=0), ['"width" is 0']),
    ("a height of -1", changed("images", 1, height=-1), ["images[1] (id 3)", '"height" is -1']),
    ("a height of 1e308", changed("images", 1, height=1e308), ['"height" is 1e+308']),
    ("a height of 400 digits", changed("images", 1, height=HUGE), ["401 digits"]),
    ("an image that nobody can decode",
     changed("images", 1, width=900_000, height=900_000),
     ["images[1] (id 3)", '"width" is 900000', "178,956,970 pixels"]),
    ("a height of NaN", changed("images", 1, height=float("nan")), ['"height" is nan']),
    ("a width that is text", changed("images", 0, width="64"), ['"width" is \'64\'']),
    ("a width with a fraction", changed("images", 0, width=64.5), ["whole number"]),
    ("a box of 3 numbers", changed("annotations", 0, bbox=[1, 2, 3]), ["3 values where 4"]),
    ("a box of text", changed("annotations", 0, bbox=["1", 2, 3, 4]), ["annotations[0] (id 1)", "'1'"]),
    ("a box of null", changed("annotations", 0, bbox=None), ['"bbox" is None, null']),
    ("a box in an object", changed("annotations", 0, bbox={"x": 1}), ["a list of 4 numbers"]),
    ("a box with NaN", changed("annotations", 1, bbox=[0, 0, float("nan"), 1]), ["annotations[1] (id 2)"]),
    ("a box with infinity", changed("annotations", 1, bbox=[0, 0, float("inf"), 1]), ["not finite"]),
    ("a box of 1e308", changed("annotations", 1, bbox=[1e308, 0, 1e308, 1]), ["beyond any image"]),
    ("a box of 400 digits",
     changed("annotations", 1, bbox=[0, HUGE, 1, 1]),
     ["annotations[1]", "401 digits"]),
    ("no box", without("annotations", 2, "bbox"), ["annotations[2] (id 5)", 'has no "bbox"']),
    ("an area of text", changed("annotations", 0, area="big"), ["'big'"]),
    ("an area of infinity", changed("annotations", 0, area=float("-inf")), ['"area" is -inf']),
    ("a crowd flag of text", changed("annotations", 0, iscrowd="no"), ['"iscrowd" is \'no\'']),
    ("an absolute file name", changed("images", 0, file_name="/etc/passwd"), ["leaves the image folder"]),
    ("a file name with ..", changed("images", 0, file_name="a/../../b.jpg"), ["leaves the image folder"]),
    ("a Windows path", changed("images", 0, file_name="C:\\a.jpg"), ["leaves the image folder"]),
    ("backslashes to leave by", changed("images", 0, file_name="..\\a.jpg"), ["leaves the image folder"]),
    ("an empty file name", changed("images", 0, file_name=""), ['"file_name"']),
    ("a NUL in a file name", changed("images", 0, file_name="a\0.jpg"), ["NUL"]),
    ("half a surrogate pair", changed("images", 1, file_name="\ud800.jpg"), ["images[1] (id 3)", "Unicode"]),
    ("a file name of null", changed("images", 0, file_name=None), ["expected a text"]),
    ("an empty category name", changed("categories", 0, name=" "), ["categories[0] (id 9)"]),
    ("images in an object", VALID | {"images": {"7": {}}}, ['"images" is an object']),
    ("an image that is a number", VALID | {"images": [1]}, ["images[0] is an integer"]),
    ("annotations of null", VALID | {"annotations": None}, ['"annotations" is null']),
    ("no images", VALID | {"images": []}, ['has no "images"']),
    ("no categories", VALID | {"categories": []}, ['has no "categories"']),
    ("a results file", VALID["annotations"], ["results format"]),
    ("an empty file", "", ["not JSON"]),
    ("half a file", json.dumps(VALID)[:-40], ["not JSON", "line 1"]),
    ("deep nesting", '{"images": ' + "[" * 200_000, ["nested too deeply"]),
    ("a number of 10,000 digits", '{"images": 1' + "0" * 10_000 + "}", ["number that cannot be read"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "parts"), [case[1:] for case in FATAL], ids=[case[0] for case in FATAL])
def test_what_cannot_be_used_is_one_message_with_file_record_and_remedy(tmp_path, content, parts):
    message = failure(tmp_path, content)
    for part in parts:
        assert part in message
    assert len(message) < 500 + len(str(tmp_path))
    assert message.rstrip(".") in [finding.text for finding in find_fatal(tmp_path / "instances.json")]


def test_names_with_dots_or_colons_that_stay_inside_are_fine(tmp_path):
    annotations = read(tmp_path, changed("images", 0, file_name="..a/b..jpg 12:30.png"))
    assert annotations.file_name(0) == "..a/b..jpg 12:30.png"


def test_a_missing_file_and_a_folder_and_an_image_are_told_apart(tmp_path):
    with pytest.raises(AnnotationError, match="no such file"):
        read_coco(tmp_path / "none.json")
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_coco(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(AnnotationError, match="not UTF-8"):
        read_coco(tmp_path / "a.jpg")
