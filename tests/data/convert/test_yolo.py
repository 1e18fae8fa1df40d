"""YOLO's label files and settings: what is read, what is put right, what is refused."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.convert.conversion import (
    ConversionError,
    ImageFacts,
    LabeledBox,
    LabeledImage,
    Remarks,
    image_facts,
    to_displayed,
    to_stored,
)
from data.convert.yolo import YOLO_TEXTS, check_orphans, find_yolo, label_path, read_yolo, yolo_lines
from data.convert.yolo_config import parse_simple_yaml, read_settings, yaml_text

NAMES = ["cat", "dog"]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[LabeledImage], Remarks]]:
    """read("0 .5 .5 .1 .1"): what read_yolo makes of an image of 64x48 with this label file (None: without)."""

    def run(text: str | None, **options: object):
        path = tmp_path / "images" / "a.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(path)
        (tmp_path / "labels").mkdir(exist_ok=True)
        if text is not None:
            (tmp_path / "labels" / "a.txt").write_text(text)
        remarks = Remarks(YOLO_TEXTS)
        return read_yolo([path], NAMES, remarks, root=tmp_path, **options), remarks

    return run


def codes(remarks: Remarks) -> dict[str, int]:
    return {finding.code: finding.count for finding in remarks.findings}


def test_a_line_is_class_centre_and_size_as_fractions(read):
    images, remarks = read("1 0.5 0.5 0.25 0.5\n\n0 0.125 0.25 0.25 0.5\n")
    assert [(box.name, box.box_xywh) for box in images[0].boxes] == [
        ("dog", [24.0, 12.0, 16.0, 24.0]),
        ("cat", [0.0, 0.0, 16.0, 24.0]),
    ]
    assert not codes(remarks)
    assert images[0].key == "images/a"


@pytest.mark.parametrize(
    ("text", "code", "num_boxes"),
    [
        ("0 0.5 0.5 1.2 0.5", "box-clipped", 1),
        ("0 0.51 0.5 1 1", "box-trimmed", 1),
        ("0 1.5 1.5 0.2 0.2", "box-dropped", 0),
        ("0 0.5 0.5 0 0.2", "box-dropped", 0),
        ("0 0.5 0.5 -0.1 0.2", "box-dropped", 0),
        ("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2", "duplicate-box", 1),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5", "polygon", 1),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5", "polygon", 1),
        ("", "empty", 0),
        (None, "no-label-file", 0),
    ],
)
def test_what_can_be_put_right_is_and_is_counted(read, text, code, num_boxes):
    images, remarks = read(text)
    assert len(images[0].boxes) == num_boxes
    assert codes(remarks)[code] == 1
    assert not remarks.num_errors
    if text:
        assert "a.txt, line " in remarks.findings[0].places[0]


def test_rounding_at_the_edge_is_not_worth_a_remark(read):
    _, remarks = read("0 0.500001 0.5 1 1")
    assert not codes(remarks)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("0 0.5 0.5 0.1", "faulty-line", "'0 0.5 0.5 0.1'"),
        ("0 0.5 0.5 0.1 0.1 0.9", "faulty-line", "a prediction with its score?"),
        ("cat 0.5 0.5 0.1 0.1", "faulty-line", "'cat 0.5"),
        ("0 0.5 nan 0.1 0.1", "faulty-line", "nan"),
        ("2 0.5 0.5 0.1 0.1", "unknown-class", "class 2, and the class list goes from 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "unknown-class", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "unknown-class", "class 0.5"),
        ("1e999999999 0.5 0.5 0.1 0.1", "unknown-class", "class 1e999999999"),
        ("0 320 240 20 20", "not-fractions", "'0 320 240 20 20'"),
        ("0 0.5 0.5 1e99999999 0.1", "not-fractions", "1e99999999"),
    ],
)
def test_what_cannot_be_put_right_is_named_with_file_and_line_and_leaves_the_image_out(read, line, code, said):
    images, remarks = read("0 0.5 0.5 0.1 0.1\n" + line)
    assert not images
    assert codes(remarks) == {code: 1}
    (finding,) = remarks.findings
    assert finding.severity == "error"
    assert "a.txt, line 2" in finding.places[0] and said in finding.places[0]


def test_two_images_of_one_label_file_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    paths = [tmp_path / "a.jpg", tmp_path / "a.png"]
    for path in paths:
        Image.new("RGB", (64, 48)).save(path)
    remarks = Remarks(YOLO_TEXTS)
    read_yolo(paths, NAMES, remarks, root=tmp_path)
    assert codes(remarks) == {"duplicate-stem": 1}


def test_label_files_without_an_image_are_errors_and_other_texts_are_not(tmp_path):
    for name, text in (("b.txt", "0 0.5 0.5 0.1 0.1"), ("classes.txt", "cat\ndog"), ("c.txt", ""), ("a.txt", "")):
        (tmp_path / name).write_text(text)
    remarks = Remarks(YOLO_TEXTS)
    check_orphans([tmp_path / "a.png"], remarks)
    assert [finding.places for finding in remarks.findings] == [(str(tmp_path / "b.txt"),)]


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("set/images/train/a.jpg", "set/labels/train/a.txt"),
        ("set/train/images/a.jpg", "set/train/labels/a.txt"),
        ("images/set/images/a.b.jpg", "images/set/labels/a.b.txt"),
        ("set/a.jpg", "set/a.txt"),
        ("set/images.jpg", "set/images.txt"),
    ],
)
def test_labels_lie_in_labels_instead_of_the_last_images(image, labels):
    assert label_path(Path(image)) == Path(labels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_as_exif_turns_images(orientation, tmp_path):
    stored = np.zeros((48, 64, 3), dtype=np.uint8)
    stored[10:20, 5:35] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(stored).save(path.with_suffix(".jpg"), exif=exif, quality=95)
    with Image.open(path.with_suffix(".jpg")) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("L")) > 127
    facts = image_facts(path.with_suffix(".jpg"))
    assert facts == ImageFacts(64, 48, orientation)
    assert facts.displayed_size == shown.shape[::-1]
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    displayed = tuple(map(Decimal, map(int, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))))
    corners = tuple(map(Decimal, (5, 10, 35, 20)))
    assert to_displayed(corners, facts) == displayed
    assert to_stored(displayed, facts) == corners


def test_labels_of_a_turned_image_refer_to_it_as_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.new("RGB", (64, 48)).save(path, exif=exif)
    box = LabeledBox("dog", tuple(map(Decimal, (20, 18, 60, 38))))
    image = LabeledImage("a", path, 64, 48, [box])
    for choice, line in (("auto", "1 0.41666667 0.625 0.41666667 0.625\n"), ("stored", "1 0.625 0.58333333 0.625")):
        remarks = Remarks(YOLO_TEXTS)
        text = yolo_lines(image, NAMES, image_facts(path), choice, remarks)
        assert text.startswith(line)
        path.with_suffix(".txt").write_text(text)
        assert read_yolo([path], NAMES, remarks, root=tmp_path, exif=choice)[0].boxes == [box]


@pytest.mark.parametrize("size", [(640, 480), (333, 1999), (299_993, 7919)])
def test_boxes_in_hundredths_of_a_pixel_come_back_exactly(size, read, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    width, height = size
    monkeypatch.setattr("data.convert.yolo.image_facts", lambda path: ImageFacts(width, height, 1))
    boxes = []
    for _ in range(300):
        xs, ys = sorted(rng.integers(0, 100 * width + 1, 2)), sorted(rng.integers(0, 100 * height + 1, 2))
        if xs[0] < xs[1] and ys[0] < ys[1]:
            boxes.append(LabeledBox("cat", tuple(Decimal(int(v)) / 100 for v in (xs[0], ys[0], xs[1], ys[1]))))
    image = LabeledImage("a", tmp_path / "a.png", width, height, boxes)
    text = yolo_lines(image, NAMES, ImageFacts(width, height, 1), "auto", Remarks(YOLO_TEXTS))
    images, remarks = read(text)
    assert images[0].boxes == boxes
    assert not codes(remarks)


@pytest.mark.parametrize(
    "text",
    [
        "names: [cat, 'dog # 1']\nnc: 2  # two\n",
        'names: ["cat",\n  "dog # 1",\n]\n',
        "# comment\nnc: 2\nnames:\n- cat\n- 'dog # 1'\n",
        "names:\n  0: cat\n  1: 'dog # 1'\n",
        "names: {0: cat, 1: 'dog # 1'}\n",
        '---\nroboflow:\n  workspace: me\n  version: 3\nnames:\n  - cat\n  - "dog # 1"\n',
    ],
)
def test_class_names_are_read_from_every_usual_spelling_of_data_yaml(tmp_path, text):
    file = tmp_path / "data.yaml"
    file.write_text(text)
    assert read_settings(file).class_names == ["cat", "dog # 1"]


def test_names_survive_what_we_write(tmp_path):
    names = ["O'Hara", 'say "hi"', "a: b", "- x", "Bär 🐻", "1", "true", "#7", "back\\slash"]
    file = tmp_path / "data.yaml"
    file.write_text(yaml_text(names, {"train": "images/train"}))
    settings = read_settings(file)
    assert settings.class_names == names
    assert settings.splits == {"train": ["images/train"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names: !!python/object/apply:os.system [ls]", "line 1"),
        ("names: &a [x]", "line 1"),
        ("nc: 2\nnames: |\n  cat", "line 2"),
        ("names: [cat", "line 1"),
        ("nc: 3\nnames: [cat, dog]", "nc is 3, and there are 2 names"),
        ("names: {1: cat, 2: dog}", "not 0, 1, 2"),
        ("train: x", 'has no "names"'),
        ("names: [cat, cat]", "named twice"),
        ("names: [cat, '']", "class 1 has no name"),
        ("just text", "line 1"),
    ],
)
def test_settings_that_are_not_understood_are_refused_with_the_line(tmp_path, text, said):
    file = tmp_path / "data.yaml"
    file.write_text(text)
    with pytest.raises(ConversionError, match=said):
        read_settings(file)


def test_numbers_and_texts_are_told_apart():
    assert parse_simple_yaml("a: 1\nb: '1'\nc: x y\nd: ~\ne: [1, a b]", "f") == {
        "a": 1, "b": "1", "c": "x y", "d": "", "e": [1, "a b"],
    }  # fmt: skip


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


@pytest.mark.parametrize(
    ("yaml", "files"),
    [
        ("train: images/train\nval: images/val", ("images/train/a.png", "images/val/b.png")),
        ("path: .\ntrain: train\nval: valid", ("train/a.png", "valid/b.png")),
        ("train: ../train/images\nval: ../valid/images", ("train/images/a.png", "valid/images/b.png")),
        ("train: train.txt\nval: val.txt", ("x/a.png", "y/b.png")),
        ("train: [x]\nval:\n  - y", ("x/a.png", "y/b.png")),
        ("", ("images/train/a.png", "images/val/b.png")),
        ("", ("train/a.png", "valid/b.png")),
        ("train: images\nval: images", ("images/a.png", "images/b.png")),
    ],
)
def test_splits_are_those_of_the_settings_or_of_the_folders(tmp_path, yaml, files):
    _touch(tmp_path, *files)
    (tmp_path / "train.txt").write_text("./x/a.png\n")
    (tmp_path / "val.txt").write_text(f"{tmp_path}/y/b.png\n")
    (tmp_path / "data.yaml").write_text(f"names: [cat]\n{yaml}\n")
    splits = find_yolo(tmp_path).splits
    train, val = (tmp_path / file for file in files)
    # One folder for both counts as no split.
    assert splits == ({"all": [train, val]} if yaml.startswith("train: images\n") else {"train": [train], "val": [val]})


def test_darknets_settings_and_cvats_folders_are_understood(tmp_path):
    _touch(tmp_path, "obj_train_data/a.png")
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/a.png\n")
    (tmp_path / "obj.data").write_text("classes = 2\nnames = data/obj.names\ntrain = data/train.txt\n")
    found = find_yolo(tmp_path)
    assert found.settings.class_names == NAMES
    assert found.splits == {"all": [tmp_path / "obj_train_data" / "a.png"]}


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        (None, "--classes FILE"),
        ("names: [cat]\ntrain: nowhere\nval: x", "train is 'nowhere', and there is no such folder"),
        ("names: [cat]", "no images there"),
        ("names: [cat]\ntrain: x\nval: x/y", "in train and in val.*--val-fraction"),
    ],
)
def test_folders_without_what_is_wanted_say_what_to_give(tmp_path, yaml, said):
    if yaml and "x/y" in yaml:
        _touch(tmp_path, "x/a.png", "x/y/b.png")
    if yaml is not None:
        (tmp_path / "data.yaml").write_text(yaml)
    with pytest.raises(ConversionError, match=said):
        find_yolo(tmp_path)
