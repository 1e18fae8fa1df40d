import importlib
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco.annotations import read_coco
from data.coco.checks import check_annotations, check_files, check_pair, check_split, looks_like_xyxy
from data.coco.image_checks import check_images, check_leaks, inspect_images
from data.tools.shapes import make_shapes


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    return importlib.import_module("check_dataset")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("pristine") / "shapes", num_train=24, num_val=12, size=(128, 96))


@pytest.fixture
def shapes(pristine, tmp_path):
    """A copy of a sound set, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "shapes"))


def edit(shapes, split="train"):
    """The content of an annotation file and a function that stores it back."""
    file = shapes / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    return content, lambda: file.write_text(json.dumps(content))


def run(script, shapes, capsys, *options):
    """Exit status, printed text and the findings of the JSON by code."""
    report = shapes / "report.json"
    status = script.main(["--data-path", str(shapes), "--json", str(report), *options])
    found = {f["code"]: f for group in json.loads(report.read_text()).values() for f in group}
    return status, capsys.readouterr().out, found


def written(tmp_path, images, annotations, categories=(("a", 1), ("b", 2))):
    file = tmp_path / "instances.json"
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, w, h in images],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1 + n % 2, "iscrowd": 0, "area": 100, "bbox": list(box)}
            for n, box in enumerate(annotations, start=1)
        ],
        "categories": [{"id": i, "name": name} for name, i in categories],
    }
    file.write_text(json.dumps(content))
    return read_coco(file)


def codes(findings):
    return {finding.code: finding.count for finding in findings}


def test_a_sound_set_passes_with_exit_status_0(script, shapes, capsys):
    status, text, found = run(script, shapes, capsys)
    assert status == 0
    assert "Nothing stands in the way" in text or "No faults" in text
    assert "24 images" in text and "12 images" in text and "images decoded" in text
    assert {f["severity"] for f in found.values()} <= {"info"}


def put(path, value, *splits):
    """Spoils a set: the value at a path such as "images/5/width" of the annotation files of the splits."""

    def spoil(shapes):
        for split in splits or ("train",):
            content, store = edit(shapes, split)
            holder = content
            *way, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
            for key in way:
                holder = holder[key]
            holder[last] = value(holder[last]) if callable(value) else value
            store()

    return spoil


def rewrite(name, change):
    """Spoils a set: what `change` does to one of its image files."""
    return lambda shapes: change(shapes / name)


def link_out(file):
    file.rename(file.parents[1] / "elsewhere.png")
    file.symlink_to(file.parents[1] / "elsewhere.png")


def copy_of_image_9(file):
    shutil.copy(file.parents[1] / "train2017" / "000000000009.png", file)
    for split in ("train", "val"):  # of one size, so that this is the only fault
        content, store = edit(file.parents[1], split)
        sizes = [Image.open(file.parents[1] / f"{split}2017" / image["file_name"]).size for image in content["images"]]
        for image, (width, height) in zip(content["images"], sizes, strict=True):
            image.update(width=width, height=height)
        store()


def turn(file):
    Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)


def add_exif(file):
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


def as_corners(annotations):
    return [
        a | {"bbox": [*a["bbox"][:2], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]} for a in annotations
    ]


def other_ids(shapes):
    put("categories/0/id", 500, "val")(shapes)
    for number, annotation in enumerate(edit(shapes, "val")[0]["annotations"]):
        if annotation["category_id"] == 1:
            put(f"annotations/{number}/category_id", 500, "val")(shapes)


# Each case spoils one thing of a sound set and names the finding, its severity, and a part that leads to the place.
SPOILS = [
    ("missing-image", "error", "000000000002.png (image id 2)", rewrite("train2017/000000000002.png", Path.unlink)),
    ("empty-image", "error", "000000000003.png (image id 3)",
     rewrite("val2017/000000000003.png", lambda file: file.write_bytes(b""))),
    ("link-out", "warning", "000000000004.png (image id 4)", rewrite("train2017/000000000004.png", link_out)),
    ("no-image-folder", "error", "val2017", rewrite("val2017", shutil.rmtree)),
    ("repeated-file", "warning", "image id 5", put("images/5/file_name", "./000000000005.png")),
    ("degenerate-box", "warning", "annotation id 4 ", put("annotations/3/bbox/2", 0)),
    ("degenerate-box", "warning", "annotation id 4 ", put("annotations/3/bbox/3", -7)),
    ("no-area-of-object", "warning", "annotation id 5 ", put("annotations/4/area", 0)),
    ("box-outside-image", "warning", "annotation id 6 ", put("annotations/5/bbox/0", 5000)),
    ("box-sticks-out", "warning", "annotation id 7 ", put("annotations/6/bbox", [-5, 3, 50, 50])),
    ("duplicate-box", "warning", "annotation id 999 ",
     put("annotations", lambda all_of: [*all_of, all_of[7] | {"id": 999}])),
    ("xyxy-boxes", "warning", "instances_train2017.json", put("annotations", as_corners)),
    ("no-annotations", "error", "instances_train2017.json", put("annotations", [])),
    ("only-crowds", "error", "crowd regions and other categories: nothing to train on",
     put("annotations", lambda all_of: [a | {"iscrowd": 1} for a in all_of])),
    ("only-crowds", "error", "nothing to score detections against",
     put("annotations", lambda all_of: [a | {"iscrowd": 1} for a in all_of], "val")),
    ("no-trained-image", "error", "instances_train2017.json: no image can be trained on",
     put("images", lambda all_of: [image | {"width": 8, "height": 8} for image in all_of])),
    ("unused-category", "warning", "'heart' (category id 77)",
     put("categories", lambda all_of: [*all_of, {"id": 77, "name": "heart"}], "train", "val")),
    ("crowd-without-rle", "warning", "annotation id 1",
     put("annotations/0", lambda a: a | {"iscrowd": 1, "segmentation": []})),
    ("no-iscrowd", "info", "annotation id 2", put("annotations/1", lambda a: {k: a[k] for k in a if k != "iscrowd"})),
    ("annotation-id-0", "info", "annotation id 0", put("annotations/0/id", 0)),
    ("classes-differ", "error", "'disc'", put("categories/0/name", "disc", "val")),
    ("category-ids-differ", "info", "matched by name", other_ids),
    ("train-image-in-val", "error", "000000000001.png (image id 1) is 000000000009.png (image id 9)",
     rewrite("val2017/000000000001.png", copy_of_image_9)),
    ("duplicate-image", "warning", "000000000010.png (image id 10) is 000000000009.png (image id 9)",
     rewrite("train2017/000000000010.png", copy_of_image_9)),
    ("unreadable-image", "error", "000000000006.png (image id 6)",
     rewrite("train2017/000000000006.png", lambda file: file.write_bytes(file.read_bytes()[:3000]))),
    ("unreadable-image", "error", "000000000006.png (image id 6)",
     rewrite("train2017/000000000006.png", lambda file: file.write_text("<html>404 not found</html>"))),
    ("size-differs", "error", "000000000007.png (image id 7): 100x90, annotated as 128x96",
     rewrite("train2017/000000000007.png", Image.new("RGB", (100, 90)).save)),
    ("size-differs", "error", "sides exchanged", rewrite("train2017/000000000007.png", turn)),
    ("exif-rotated", "info", "000000000007.png (image id 7)", rewrite("train2017/000000000007.png", add_exif)),
]  # fmt: skip
NEED_DECODING = {"unreadable-image", "size-differs", "exif-rotated", "train-image-in-val", "duplicate-image"}


@pytest.mark.parametrize(("code", "severity", "part", "spoil"), SPOILS, ids=[case[0] for case in SPOILS])
def test_each_fault_is_found_with_place_severity_and_exit_status(script, shapes, capsys, code, severity, part, spoil):
    spoil(shapes)
    status, text, found = run(script, shapes, capsys)
    assert found[code]["severity"] == severity
    assert part in text
    assert f": {code}]" in text
    assert status == int(severity == "error")
    if code in NEED_DECODING:
        status, _, found = run(script, shapes, capsys, "--fast")
        assert status == 0 and code not in found


def test_without_decoding_the_rest_is_found(script, shapes, capsys):
    rewrite("train2017/000000000002.png", Path.unlink)(shapes)
    put("annotations/5/bbox/0", 5000)(shapes)
    status, _, found = run(script, shapes, capsys, "--fast")
    assert status == 1 and {"missing-image", "box-outside-image"} <= set(found)


def test_every_fatal_column_is_listed_at_once(script, shapes, capsys):
    content, store = edit(shapes)
    content["images"][0]["id"] = "1"
    content["images"][1]["width"] = -5
    content["annotations"][0]["bbox"] = [1, 2, 3]
    content["annotations"][1]["category_id"] = 4321
    content["annotations"][2]["id"] = content["annotations"][3]["id"]
    store()
    status, text, found = run(script, shapes, capsys)
    assert status == 1
    assert found["unusable-annotations"]["severity"] == "error"
    for part in ("images[0]", "images[1]", "annotations[0]", "annotations[1]", "annotations[3]", "train2017.json"):
        assert part in text
    assert text.count("ERROR [train: unusable-annotations]") == 5
    assert "unusable as it is; boxes and images were not checked" in text  # in the table


def test_a_missing_file_is_an_error_and_no_traceback(script, tmp_path, capsys):
    assert script.main(["--data-path", str(tmp_path)]) == 1
    assert "nothing there is a data set that can be read" in capsys.readouterr().err


def test_one_split_alone_is_checked_by_its_own_paths(script, shapes, capsys):
    options = ["--val-images", str(shapes / "val2017")]
    options += ["--val-annotations", str(shapes / "annotations" / "instances_val2017.json")]
    assert script.main(options) == 0
    text = capsys.readouterr().out
    assert "12 images" in text and "24 images" not in text


@pytest.mark.parametrize(
    "options",
    [
        ["--val-images", "x"],
        ["--train-annotations", "x"],
        ["--data-path", "x", "--val-images", "x", "--val-annotations", "y"],
    ],
)
def test_half_a_split_or_two_ways_at_once_is_a_wrong_command(script, options, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(options)
    assert caught.value.code == 2


def test_places_shown_are_limited_and_the_rest_is_counted(script, shapes, capsys):
    for index in range(1, 9):
        (shapes / "train2017" / f"{index:012d}.png").unlink()
    _, text, found = run(script, shapes, capsys, "--places", "3")
    assert "and 5 more" in text
    assert found["missing-image"]["count"] == 8
    assert len(found["missing-image"]["places"]) == 8


def test_the_same_file_in_both_splits_is_found_without_decoding(shapes):
    train = read_coco(shapes / "annotations" / "instances_train2017.json")
    val = read_coco(shapes / "annotations" / "instances_val2017.json")
    found = codes(check_pair(train, val, shapes / "train2017", shapes / "val2017/../train2017"))
    assert found == {"shared-image": 12}
    assert check_pair(train, val, shapes / "train2017", shapes / "val2017") == []


def test_a_test_split_may_do_without_boxes(tmp_path):
    annotations = written(tmp_path, [(1, 64, 64)], [])
    assert check_annotations(annotations, needs_boxes=False)[0].severity == "info"
    assert check_annotations(annotations)[0].severity == "error"


def test_training_split_names_the_images_that_training_leaves_out(tmp_path):
    annotations = written(tmp_path, [(1, 64, 64), (2, 64, 64), (3, 31, 64)], [(1, 1, 20, 20), (5, 5, 20, 20)])
    found = codes(check_split(annotations, tmp_path, training=True))
    assert found["small-image"] == 1
    assert found["image-without-annotation"] == 1
    assert not {"small-image", "image-without-annotation"} & set(
        codes(check_split(annotations, tmp_path, training=False))
    )


def test_boxes_that_overhang_by_rounding_are_not_mentioned(tmp_path):
    annotations = written(tmp_path, [(1, 64, 64)], [(-1.5, 0, 20, 20), (50, 50, 15.5, 14)])
    assert codes(check_annotations(annotations)) == {}


def test_corners_by_mistake_are_told_from_boxes_at_the_top_left(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.uniform(10, 200, (60, 2))
    corners = rng.uniform(0, 1, (60, 2)) * ([640, 480] - sizes)

    def judged(boxes):
        return looks_like_xyxy(written(tmp_path, [(1, 640, 480)], boxes.tolist()))

    assert not judged(np.hstack([corners, sizes]))
    assert judged(np.hstack([corners, corners + sizes]))
    assert not judged(np.hstack([corners * 0.02, sizes]))  # width > x and height > y, but inside the image
    assert not judged(np.hstack([corners, corners + sizes])[:5])  # too few to tell


def test_files_in_subfolders_are_found_and_a_linked_subfolder_is_mentioned(tmp_path):
    root, outside = tmp_path / "images", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "b").symlink_to(outside)
    for file in (root / "a" / "1.jpg", outside / "2.jpg"):
        file.write_bytes(b"x")
    content = {
        "images": [
            {"id": 1, "file_name": "a/1.jpg", "width": 9, "height": 9},
            {"id": 2, "file_name": "b/2.jpg", "width": 9, "height": 9},
            {"id": 3, "file_name": "c/3.jpg", "width": 9, "height": 9},
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    findings = check_files(read_coco(tmp_path / "a.json"), root)
    assert {finding.code: finding.places for finding in findings} == {
        "missing-image": ("c/3.jpg (image id 3)",),
        "link-out": ("b/2.jpg (image id 2)",),
    }


def test_facts_come_in_the_order_of_the_annotations_on_any_number_of_threads(shapes):
    annotations = read_coco(shapes / "annotations" / "instances_train2017.json")
    done = []
    one = inspect_images(annotations, shapes / "train2017", workers=1, progress=done.append)
    four = inspect_images(annotations, shapes / "train2017", workers=4)
    assert one == four
    assert sum(done) == len(annotations)
    assert [fact.width for fact in one] == annotations.widths.tolist()
    assert check_images(annotations, shapes / "train2017", one) == []
    assert len(check_leaks(annotations, annotations, one, four)[0].places) == len(annotations)


def test_the_same_pixels_in_another_file_format_count_as_the_same_image(shapes):
    annotations = read_coco(shapes / "annotations" / "instances_train2017.json")
    before = inspect_images(annotations, shapes / "train2017")
    for file in (shapes / "train2017").iterdir():
        buffer = io.BytesIO()
        Image.open(file).save(buffer, format="BMP")
        file.write_bytes(buffer.getvalue())
    after = inspect_images(annotations, shapes / "train2017")
    assert [fact.digest for fact in before] == [fact.digest for fact in after]


def test_checks_leave_the_set_as_it_is(script, shapes, capsys):
    before = sorted(p.relative_to(shapes) for p in shapes.rglob("*"))
    assert script.main(["--data-path", str(shapes)]) == 0
    assert sorted(p.relative_to(shapes) for p in shapes.rglob("*")) == before


def test_findings_of_cached_annotations_are_kept_until_a_folder_of_images_changes(shapes, tmp_path, monkeypatch):
    images = shapes / "train2017"
    time.sleep(0.1)
    annotations = read_coco(shapes / "annotations" / "instances_train2017.json", cache_dir=tmp_path / "cache")
    first = check_split(annotations, images, training=True)
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), real(path))[1])
    assert check_split(annotations, images, training=True) == first
    assert listed == []
    check_split(annotations, images, training=False)  # another question
    assert len(listed) == 1
    next(images.iterdir()).unlink()
    listed.clear()
    for _ in range(2):  # errors are not kept: what mends one may be no change of a folder
        found = codes(check_split(annotations, images, training=True))
        assert found["missing-image"] == 1
    assert len(listed) == 2
