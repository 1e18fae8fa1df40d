import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco.annotations import find_fatal, read_coco
from data.coco.checks import check_annotations, check_files, check_pair, check_split, looks_like_xyxy
from data.coco.image_checks import check_images, check_leaks, inspect_images
from data.tools.shapes import make_shapes


@pytest.fixture(scope="module")
def script():
    folder = Path(__file__).parents[3] / "scripts"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("check_dataset", folder / "check_dataset.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_dataset"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("pristine") / "shapes", num_train=24, num_val=12)


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


# Each case spoils one thing of a sound set and names the finding, its severity, and a part that leads to the place.


def spoil_missing(shapes):
    (shapes / "train2017" / "000000000002.png").unlink()
    return "missing-image", "error", "000000000002.png (image id 2)"


def spoil_empty(shapes):
    (shapes / "val2017" / "000000000003.png").write_bytes(b"")
    return "empty-image", "error", "000000000003.png (image id 3)"


def spoil_link(shapes):
    file = shapes / "train2017" / "000000000004.png"
    file.rename(shapes / "elsewhere.png")
    file.symlink_to(shapes / "elsewhere.png")
    return "link-out", "warning", "000000000004.png (image id 4)"


def spoil_folder(shapes):
    shutil.rmtree(shapes / "val2017")
    return "no-image-folder", "error", "val2017"


def spoil_repeated_file(shapes):
    content, store = edit(shapes)
    content["images"][5]["file_name"] = "./000000000005.png"
    store()
    return "repeated-file", "warning", "image id 5"


def spoil_thin_box(shapes):
    content, store = edit(shapes)
    content["annotations"][3]["bbox"][2] = 0
    store()
    return "degenerate-box", "warning", "annotation id 4 "


def spoil_negative_box(shapes):
    content, store = edit(shapes)
    content["annotations"][3]["bbox"][3] = -7
    store()
    return "degenerate-box", "warning", "annotation id 4 "


def spoil_area(shapes):
    content, store = edit(shapes)
    content["annotations"][4]["area"] = 0
    store()
    return "no-area-of-object", "warning", "annotation id 5 "


def spoil_outside(shapes):
    content, store = edit(shapes)
    content["annotations"][5]["bbox"][0] = 5000
    store()
    return "box-outside-image", "warning", "annotation id 6 "


def spoil_overhang(shapes):
    content, store = edit(shapes)
    content["annotations"][6]["bbox"] = [-5, 3, 50, 50]
    store()
    return "box-sticks-out", "warning", "annotation id 7 "


def spoil_twin_box(shapes):
    content, store = edit(shapes)
    content["annotations"].append(content["annotations"][7] | {"id": 999})
    store()
    return "duplicate-box", "warning", "annotation id 999 "


def spoil_xyxy(shapes):
    content, store = edit(shapes)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x, y, x + w, y + h]
    store()
    return "xyxy-boxes", "warning", "instances_train2017.json"


def spoil_no_annotations(shapes):
    content, store = edit(shapes)
    content["annotations"] = []
    store()
    return "no-annotations", "error", "instances_train2017.json"


def spoil_unused_category(shapes):
    for split in ("train", "val"):
        content, store = edit(shapes, split)
        content["categories"].append({"id": 77, "name": "heart"})
        store()
    return "unused-category", "warning", "'heart' (category id 77)"


def spoil_crowd(shapes):
    content, store = edit(shapes)
    content["annotations"][0].update(iscrowd=1)
    content["annotations"][0].pop("segmentation", None)
    store()
    return "crowd-without-rle", "warning", "annotation id 1"


def spoil_id_0(shapes):
    content, store = edit(shapes)
    content["annotations"][0]["id"] = 0
    store()
    return "annotation-id-0", "info", "annotation id 0"


def spoil_classes(shapes):
    content, store = edit(shapes, "val")
    content["categories"][0]["name"] = "disc"
    store()
    return "classes-differ", "error", "'disc'"


def spoil_category_ids(shapes):
    content, store = edit(shapes, "val")
    content["categories"][0]["id"] = 500
    for annotation in content["annotations"]:
        if annotation["category_id"] == 1:
            annotation["category_id"] = 500
    store()
    return "category-ids-differ", "info", "matched by name"


def spoil_leak(shapes):
    shutil.copy(shapes / "train2017" / "000000000009.png", shapes / "val2017" / "000000000001.png")
    for split in ("train", "val"):  # of one size, so that this is the only fault
        content, store = edit(shapes, split)
        size = Image.open(shapes / f"{split}2017" / content["images"][0]["file_name"]).size
        content["images"][0].update(width=size[0], height=size[1])
        store()
    return "train-image-in-val", "error", "000000000001.png (image id 1) is 000000000009.png (image id 9)"


def spoil_twin_image(shapes):
    shutil.copy(shapes / "train2017" / "000000000009.png", shapes / "train2017" / "000000000010.png")
    content, store = edit(shapes)
    content["images"][9].update({key: content["images"][8][key] for key in ("width", "height")})
    store()
    return "duplicate-image", "warning", "000000000010.png (image id 10) is 000000000009.png (image id 9)"


def spoil_truncated(shapes):
    file = shapes / "train2017" / "000000000006.png"
    file.write_bytes(file.read_bytes()[:3000])
    return "unreadable-image", "error", "000000000006.png (image id 6)"


def spoil_not_an_image(shapes):
    (shapes / "train2017" / "000000000006.png").write_text("<html>404 not found</html>")
    return "unreadable-image", "error", "000000000006.png (image id 6)"


def spoil_size(shapes):
    Image.new("RGB", (100, 90)).save(shapes / "train2017" / "000000000007.png")
    return "size-differs", "error", "000000000007.png (image id 7): 100x90, annotated as 256x192"


def spoil_turned(shapes):
    file = shapes / "train2017" / "000000000007.png"
    Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    return "size-differs", "error", "sides exchanged"


def spoil_exif(shapes):
    file = shapes / "train2017" / "000000000007.png"
    image = Image.open(file)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)
    return "exif-rotated", "info", "000000000007.png (image id 7)"


SPOILS = [value for name, value in list(globals().items()) if name.startswith("spoil_")]
NEED_DECODING = {
    "unreadable-image", "size-differs", "exif-rotated", "train-image-in-val", "duplicate-image",
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_each_fault_is_found_with_place_severity_and_exit_status(script, shapes, capsys, spoil):
    code, severity, part = spoil(shapes)
    status, text, found = run(script, shapes, capsys)
    assert code in found
    assert found[code]["severity"] == severity
    assert part in text
    assert f": {code}]" in text
    assert status == int(severity == "error")

    fast_status, _, fast_found = run(script, shapes, capsys, "--fast")
    assert (code in fast_found) == (code not in NEED_DECODING)
    if code in NEED_DECODING:
        assert fast_status == 0


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


def test_a_file_that_reads_has_nothing_fatal(pristine):
    assert find_fatal(pristine / "annotations" / "instances_train2017.json") == []


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"images": 3, "annotations": {}, "categories": [0]}', "[[" * 99999]
)
def test_whatever_the_file_holds_something_fatal_is_named_and_nothing_raised(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_text(content)
    findings = find_fatal(file)
    assert findings and all(str(file) in finding.text for finding in findings)


def test_a_missing_file_is_an_error_and_no_traceback(script, tmp_path, capsys):
    assert script.main(["--data-path", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().out


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


def test_crowds_alone_are_nothing_to_train_on(shapes):
    content, store = edit(shapes)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    store()
    annotations = read_coco(shapes / "annotations" / "instances_train2017.json")
    assert codes(check_annotations(annotations))["only-crowds"] == 1


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
