"""Pascal VOC's XML: what is read, what is put right, what is refused."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image

from data.convert.conversion import ConversionError, LabeledBox, LabeledImage, Remarks, derived_classes
from data.convert.files import read_class_file
from data.convert.voc import VOC_TEXTS, VocReader, VocSet, find_voc
from data.convert.voc_xml import XmlError, parse_xml, voc_xml

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>"
    "<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


def an_object(*corners: object, name: str = "cat", difficult: int = 0) -> str:
    return OBJECT.format(*corners, name=name, difficult=difficult)


def an_xml(*objects: str, filename: str = "a.png", size: tuple[int, int] = (64, 48), database: str = "Unknown") -> str:
    head = f"<filename>{filename}</filename><source><database>{database}</database></source>"
    head += f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation>{head}{''.join(objects)}</annotation>"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[VocSet, Remarks]]:
    """read({"a.xml": text}, images=["a.png"], **options): what VocReader makes of such a folder."""

    def run(files: dict[str, str | bytes], images: tuple[str, ...] = ("a.png",), **options: object):
        for name, content in files.items():
            path = tmp_path / "Annotations" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        for name in images:
            path = tmp_path / "JPEGImages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48)).save(path)
        (tmp_path / "JPEGImages").mkdir(exist_ok=True)
        remarks = Remarks(VOC_TEXTS)
        return VocReader(find_voc(tmp_path), remarks, **options).read(), remarks

    return run


def boxes(found: VocSet) -> list[list[float]]:
    return [box.box_xywh for image in found.images for box in image.boxes]


def codes(remarks: Remarks) -> dict[str, int]:
    return {finding.code: finding.count for finding in remarks.findings}


@pytest.mark.parametrize(
    ("database", "coordinates", "expected"),
    [
        ("The VOC2007 Database", "auto", [[0.0, 9.0, 64.0, 39.0], [4.0, 4.0, 1.0, 1.0]]),
        ("Unknown", "auto", [[1.0, 10.0, 63.0, 38.0], [5.0, 5.0, 1.0, 1.0]]),
        ("Unknown", "one-based", [[0.0, 9.0, 64.0, 39.0], [4.0, 4.0, 2.0, 2.0]]),
        ("The VOC2007 Database", "zero-based", [[1.0, 10.0, 63.0, 38.0], [5.0, 5.0, 1.0, 1.0]]),
    ],
)
def test_vocs_own_files_count_pixels_from_one_and_those_of_programs_from_zero(read, database, coordinates, expected):
    last = 5 if database != "Unknown" and coordinates == "auto" else 6  # one-based, 5 to 5 is one pixel
    objects = an_object(1, 10, 64, 48), an_object(5, 5, last, last)
    found, remarks = read({"a.xml": an_xml(*objects, database=database)}, coordinates=coordinates)
    assert boxes(found) == expected
    assert not codes(remarks)


@pytest.mark.parametrize(("choice", "kept"), [("ignore", [False, True]), ("keep", [False, False]), ("drop", [False])])
def test_difficult_objects_are_crowds_or_like_others_or_left_out(read, choice, kept):
    objects = an_object(1, 1, 20, 20), an_object(5, 5, 30, 30, difficult=1)
    found, remarks = read({"a.xml": an_xml(*objects)}, difficult=choice)
    assert [box.crowd for box in found.images[0].boxes] == kept
    assert codes(remarks) == {"difficult": 1}


@pytest.mark.parametrize(
    ("element", "code", "expected"),
    [
        (an_object(30, 20, 10, 5), "corners-swapped", [[10.0, 5.0, 20.0, 15.0]]),
        (an_object(-9, 5, 30, 60), "box-clipped", [[0.0, 5.0, 30.0, 43.0]]),
        (an_object(10, 5, 64.5, 48), "box-trimmed", [[10.0, 5.0, 54.0, 43.0]]),
        (an_object(70, 5, 90, 20), "box-dropped", []),
        (an_object(10, 5, 10, 20), "box-dropped", []),
        (an_object(1, 2, 3, 4) * 2, "duplicate-box", [[1.0, 2.0, 2.0, 2.0]]),
    ],
)
def test_boxes_that_can_be_put_right_are_and_are_counted(read, element, code, expected):
    found, remarks = read({"a.xml": an_xml(element)})
    assert boxes(found) == expected
    assert codes(remarks) == {code: 1} | ({} if expected else {"empty": 1})
    assert "a.xml, line 1, object" in remarks.findings[0].places[0]
    assert not remarks.num_errors


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("<annotation><object></annotation>", "malformed-xml", "line 1, column 23: not XML: mismatched tag"),
        ("", "malformed-xml", "no element found"),
        (an_xml("\n<object><bndbox/></object>"), "faulty-object", "line 2, object 1: no <name>"),
        (an_xml("<object><name>cat</name></object>"), "faulty-object", "(cat): no <bndbox>"),
        (an_xml(an_object(1, "x", 3, 4)), "faulty-object", "<ymin> is 'x'"),
        (an_xml(an_object(1, "nan", 3, 4)), "faulty-object", "<ymin> is 'nan'"),
        (an_xml(an_object(1, 2, "1e99", 4)), "faulty-object", "<xmax> is '1e99'"),
        (an_xml(an_object(1, 2, 3, 4, name="cta")), "unknown-class", "'cta'; did you mean 'cat'?"),
        (an_xml(size=(640, 480)), "size-differs", "says 640x480, the image has 64x48"),
        (an_xml(size=(48, 64)), "size-differs", "sides exchanged"),
        (an_xml(filename="b.png").replace("annotation", "html"), "not-annotation", "<html>"),
    ],
)
def test_what_cannot_be_put_right_is_named_with_file_and_place_and_leaves_the_image_out(read, content, code, said):
    found, remarks = read({"a.xml": content}, classes=["cat"])
    assert not found.images
    finding = next(finding for finding in remarks.findings if finding.code == code)
    assert finding.severity == ("warning" if code == "not-annotation" else "error")
    assert "a.xml" in finding.places[0] and said in finding.places[0]


def test_document_types_and_entities_are_refused_before_they_do_anything(read, tmp_path):
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>'
    (tmp_path / "secret").write_text("secret")
    reading = f'<!DOCTYPE x [<!ENTITY a SYSTEM "file://{tmp_path}/secret">]><annotation>&a;</annotation>'
    for text in (bomb, reading, "<!DOCTYPE annotation><annotation/>"):
        path = tmp_path / "bad.xml"
        path.write_text(text)
        with pytest.raises(XmlError, match="refused for safety"):
            parse_xml(path)
    _, remarks = read({"a.xml": bomb})
    assert codes(remarks)["malformed-xml"] == 1


def test_deep_nesting_is_no_crash(tmp_path):
    path = tmp_path / "deep.xml"
    path.write_text("<a>" * 100_000 + "</a>" * 100_000)
    assert parse_xml(path).tag == "a"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_class_names_come_through_in_any_encoding_that_the_file_declares(read, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + an_xml(an_object(1, 2, 30, 40, name="Bär"))
    found, _ = read({"a.xml": text.encode(encoding)})
    assert found.images[0].boxes[0].name == "Bär"


@pytest.mark.parametrize(
    ("filename", "images", "expected", "code"),
    [
        ("a.png", ("a.png",), "a.png", None),
        ("C:\\somewhere\\a.png", ("a.png",), "a.png", None),
        ("a", ("a.png",), "a.png", None),
        ("", ("a.png",), "a.png", None),
        ("old.jpg", ("a.png",), "a.png", "image-renamed"),
        ("b.png", ("b.png",), "b.png", None),
        ("a.png", ("a.png", "a.bmp"), "a.png", "image-without-xml"),
        ("a.png", ("sub/a.png",), "sub/a.png", None),
        ("a.png", ("a.png", "sub/a.png"), "a.png", "image-without-xml"),
        ("b.png", ("a.png", "b.png"), None, "ambiguous-image"),
        ("", ("a.png", "a.bmp"), None, "ambiguous-image"),
        ("a.png", (), None, "missing-image"),
    ],
)
def test_the_image_is_the_one_of_the_filename_or_of_the_xmls_own_name(read, tmp_path, filename, images, expected, code):
    found, remarks = read({"a.xml": an_xml(an_object(1, 2, 30, 40), filename=filename)}, images)
    paths = [image.path.relative_to(tmp_path / "JPEGImages").as_posix() for image in found.images]
    assert paths == ([expected] if expected else [])
    assert (code in codes(remarks)) if code else not codes(remarks)


def test_one_image_in_two_files_is_an_error(read):
    xml = an_xml(an_object(1, 2, 30, 40))
    found, remarks = read({"a.xml": xml, "sub/a.xml": xml})
    assert len(found.images) == 1 and found.left_out == {"sub/a"}
    assert codes(remarks)["image-twice"] == 1


def test_a_missing_size_is_taken_from_the_image(read):
    found, remarks = read({"a.xml": an_xml(an_object(1, 2, 30, 40), size=(0, 0))})
    assert (found.images[0].width, found.images[0].height) == (64, 48)
    assert codes(remarks) == {"no-size": 1}


def test_a_file_that_is_no_image_is_an_error(read, tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "a.png").write_bytes(b"nothing")
    _, remarks = read({"a.xml": an_xml(an_object(1, 2, 30, 40))}, ())
    assert codes(remarks)["unreadable-image"] == 1


def _turned_image(path: Path, orientation: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(path, exif=exif)


def test_boxes_drawn_on_an_image_as_displayed_are_turned_to_the_stored_pixels(read, tmp_path):
    _turned_image(tmp_path / "JPEGImages" / "a.jpg", 6)
    xml = an_xml(an_object(10, 20, 30, 60), filename="a.jpg", size=(48, 64))
    found, remarks = read({"a.xml": xml}, ())
    assert (found.images[0].width, found.images[0].height) == (64, 48)
    assert boxes(found) == [[20.0, 18.0, 40.0, 20.0]]
    assert codes(remarks) == {"exif-mapped": 1}


def test_where_the_size_does_not_tell_which_way_up_boxes_are_taken_as_stored_with_a_warning(read, tmp_path):
    _turned_image(tmp_path / "JPEGImages" / "a.jpg", 3)
    xml = {"a.xml": an_xml(an_object(10, 20, 30, 40), filename="a.jpg")}
    found, remarks = read(xml, ())
    assert boxes(found) == [[10.0, 20.0, 20.0, 20.0]] and codes(remarks) == {"exif-turned": 1}
    found, remarks = read(xml, (), exif="displayed")
    assert boxes(found) == [[34.0, 8.0, 20.0, 20.0]] and codes(remarks) == {"exif-mapped": 1}


def test_what_is_written_is_read_again_digit_for_digit(read, tmp_path):
    corners = tuple(map(Decimal, ("0.1", "7.123456789", "33.33", "47.999")))
    image = LabeledImage("a", tmp_path / "a.png", 64, 48, [LabeledBox("R&B <cell>", corners, True)])
    for coordinates, database in (("one-based", b"VOC"), ("zero-based", b"Unknown")):
        xml = voc_xml(image, "a.png", coordinates=coordinates)
        assert database in xml
        found, _ = read({"a.xml": xml})
        assert found.images[0].boxes == image.boxes


def test_whole_pixels_never_lose_a_box():
    corners = tuple(map(Decimal, ("63.6", "0.2", "63.9", "0.4")))
    image = LabeledImage("a", Path("a.png"), 64, 48, [LabeledBox("cat", corners)])
    xml = voc_xml(image, "a.png", whole_pixels=True).decode()
    assert [f"<{side}>{value}</{side}>" in xml for side, value in (("xmin", 64), ("xmax", 64), ("ymin", 1))] == [
        True
    ] * 3


def test_a_name_that_xml_cannot_hold_is_an_error():
    box = LabeledBox("a\x01", (Decimal(1), Decimal(1), Decimal(2), Decimal(2)))
    with pytest.raises(ConversionError, match="Rename"):
        voc_xml(LabeledImage("a", Path("a.png"), 64, 48, [box]), "a.png")


def test_class_files_are_lists_or_cvats_label_map(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("\ufeffdog\r\nred cat\r\n\r\n", encoding="utf-8")
    assert read_class_file(file) == ["dog", "red cat"]
    file.write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ndog:1,2,3::\n")
    assert read_class_file(file) == ["dog"]
    for content, said in (("dog\ndog\n", "line 2.*twice"), ("", "names no class"), ("a\n\nb\n", "line 2: has no name")):
        file.write_text(content)
        with pytest.raises(ConversionError, match=said):
            read_class_file(file)


def test_folders_without_what_is_wanted_say_what_to_give(tmp_path):
    with pytest.raises(ConversionError, match="no such folder"):
        find_voc(tmp_path / "absent")
    (tmp_path / "VOCdevkit" / "VOC2012").mkdir(parents=True)
    with pytest.raises(ConversionError, match="VOC2012. Give one of these"):
        find_voc(tmp_path)
    with pytest.raises(ConversionError, match="no XML files there"):
        VocReader(find_voc(tmp_path / "VOCdevkit" / "VOC2012"), Remarks(VOC_TEXTS)).read()


def test_names_that_may_be_slips_are_pointed_out(read):
    objects = [an_object(i % 60, 1, i % 60 + 2, 3 + i // 60, name="WBC") for i in range(100)]
    slips = [an_object(1, 10, 20, 20, name="WBCs"), an_object(1, 20, 20, 30, name="wbc")]
    found, remarks = read({"a.xml": an_xml(*objects, *slips, an_object(2, 9, 40, 40, name="tree"))})
    assert derived_classes(found.images, remarks) == ["WBC", "WBCs", "tree", "wbc"]
    found_places = {finding.code: finding.places for finding in remarks.findings}
    alike = ("'WBCs' (1 boxes), 'WBC' (100 boxes)",)
    assert found_places == {"class-names-equal": ("'WBC', 'wbc'",), "class-names-alike": alike}
    assert remarks.num_errors == 1


def test_names_that_differ_in_case_alone_are_told_apart_where_all_of_them_are_meant(read):
    found, remarks = read({"a.xml": an_xml(an_object(1, 1, 9, 9, name="Coin"), an_object(9, 9, 19, 19, name="coin"))})
    assert derived_classes(found.images, remarks, ["Coin", "coin"]) == ["Coin", "coin"]
    assert not remarks.findings


def test_an_image_whose_xml_cannot_be_read_is_not_called_unlabeled(read):
    _, remarks = read({"a.xml": "<annotation>"})
    assert codes(remarks) == {"malformed-xml": 1}
