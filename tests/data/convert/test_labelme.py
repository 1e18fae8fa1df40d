"""LabelMe's files: which shapes are objects, and what is refused."""

import json

import pytest
from PIL import Image

from data.convert.conversion import ConversionError, Remarks
from data.convert.labelme import LABELME_TEXTS, labelme_set

SQUARE = [[4, 6], [14, 6], [14, 16], [4, 16]]


@pytest.fixture
def read(tmp_path):
    """read(*shapes): what labelme_set makes of an image of 64x48 with these, and the codes of its remarks."""

    def run(*shapes, size=(64, 48), path="a.jpg", orientation=1, text=None):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
        record = {"shapes": list(shapes), "imagePath": path, "imageWidth": size[0], "imageHeight": size[1]}
        (tmp_path / "a.json").write_text(text or json.dumps(record))
        remarks = Remarks(LABELME_TEXTS)
        found = labelme_set(tmp_path, remarks).found
        return [image for split in found.values() for image in split], {f.code: f.count for f in remarks.findings}

    return run


def shape(points=SQUARE, kind="polygon", label="cat", group=None):
    return {"label": label, "points": points, "shape_type": kind, "group_id": group}


def test_polygons_rectangles_and_circles_are_objects_and_other_shapes_are_left_out(read):
    kinds = [
        *(shape(), shape([[30, 10], [20, 20]], "rectangle", "dog"), shape([[40, 24], [50, 24]], "circle", "dog")),
        *(shape([[1, 1]], "point"), shape([[1, 1], [9, 9]], "line")),
    ]
    (image,), codes = read(*kinds)
    square, rectangle, circle = image.boxes
    assert [list(map(float, ring)) for ring in square.rings] == [[4, 6, 14, 6, 14, 16, 4, 16]]
    assert (square.box_xywh, square.area) == ([4, 6, 10, 10], 100)
    assert (rectangle.name, rectangle.box_xywh, rectangle.area) == ("dog", [20, 10, 10, 10], 100)
    assert circle.box_xywh == [30, 14, 20, 20] and circle.area == pytest.approx(314, abs=1)
    assert codes == {"no-outline": 2}


def test_shapes_of_one_label_and_group_are_one_object_with_several_rings(read):
    apart = [[30, 30], [40, 30], [40, 40]]
    (image,), _ = read(shape(group=1), shape(apart, group=1), shape(apart, label="dog", group=1), shape(apart))
    assert [(box.name, len(box.rings), box.area) for box in image.boxes] == [
        *(("cat", 2, 150), ("dog", 1, 50), ("cat", 1, 50)),
    ]
    assert image.boxes[0].box_xywh == [4, 6, 36, 34]


def test_what_is_drawn_on_a_turned_image_is_turned_to_the_pixels_as_stored(read):
    (image,), codes = read(shape([[0, 0], [10, 0], [10, 20]]), size=(48, 64), orientation=6)  # by a quarter, clockwise
    (box,) = image.boxes
    assert list(map(float, box.rings[0])) == [0, 48, 0, 38, 20, 38]
    assert box.box_xywh == [0, 38, 20, 10] and codes == {"exif-mapped": 1}


def test_boxes_are_cut_at_the_edge_and_outlines_stay_as_drawn(read):
    (image,), codes = read(shape([[-8, 6], [14, 6], [14, 16]]))
    assert image.boxes[0].box_xywh == [0, 6, 14, 10] and float(image.boxes[0].rings[0][0]) == -8
    assert codes == {"box-clipped": 1}


def test_an_image_without_a_file_is_background(read, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    images, codes = read(shape())
    assert [len(image.boxes) for image in images] == [1, 0] and codes == {"no-label-file": 1}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"size": (60, 48)}, "size-differs"),
        ({"text": '{"shapes": [{"label": "a", "points": [[1]]}], "imagePath": "a.jpg"}'}, "faulty-file"),
        ({"text": '{"shapes": [{"label": "a", "points": [[1, NaN]]}], "imagePath": "a.jpg"}'}, "faulty-file"),
        ({"text": '{"shapes": [{"label": 1, "points": [[1, 1]]}], "imagePath": "a.jpg"}'}, "faulty-file"),
        *(
            ({"text": json.dumps({"shapes": [shape(label=label)], "imagePath": "a.jpg"})}, "faulty-file")
            for label in (" ", "a\0b", "\ud800")
        ),
        *(
            (
                {"text": json.dumps({"shapes": [shape(kind=kind)], "imagePath": "a.jpg"}).replace("14", far)},
                "faulty-file",
            )
            for kind in ("polygon", "circle")
            for far in ("1e30", "1e999999", "-1e99999999", "1" + "0" * 400)
        ),
        ({"text": '{"shapes": 1, "imagePath": "a.jpg"'}, "faulty-file"),
    ],
)
def test_faulty_files_are_errors_and_left_out(read, change, code):
    images, codes = read(shape(), **change)
    assert not images and codes == {code: 1}


def test_a_missing_image_is_an_error_with_the_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [shape()], "imagePath": "gone.png"}))
    remarks = Remarks(LABELME_TEXTS)
    assert not labelme_set(tmp_path, remarks).found
    assert [(f.code, "gone.png" in f.places[0]) for f in remarks.findings] == [("missing-image", True)]


def test_a_folder_without_such_files_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="no annotation file of LabelMe"):
        labelme_set(tmp_path, Remarks(LABELME_TEXTS))
