"""scripts/predict.py with a small detector of random weights: what is written, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from data import make_shapes, read_coco
from detection.models import load_detector, paste_masks

CLASS_NAMES = ["person", "race car", "cat"]
CATEGORY_IDS = [1, 3, 17]
SMALL = {"fpn_channels": 32, "roi_hidden_channels": 64, "rpn_nms_pre_test": 100, "rpn_proposals_test": 50}
SMALL |= {"has_masks": True, "mask_channels": 8}


@pytest.fixture(scope="module")
def weights(tmp_path_factory, detector_content):
    path = tmp_path_factory.mktemp("weights") / "detector.pt"
    content = detector_content("faster_rcnn_r18_fpn", 0, CLASS_NAMES, CATEGORY_IDS, detections_per_image=20, **SMALL)
    torch.save(content, path)
    return path


@pytest.fixture
def predict(weights, program):
    return lambda *arguments: program("predict", "--weights", weights, *arguments)


@pytest.fixture
def photos(tmp_path):
    """Four images, two of them with one name."""
    folder = tmp_path / "in"
    for number, (name, size) in enumerate(
        [("a.jpg", (80, 60)), ("b.png", (60, 80)), ("sub/a.jpg", (64, 64)), ("sub/c.JPEG", (90, 50))]
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_image_comes_out_with_boxes_and_the_inputs_stay(predict, photos, tmp_path, capsys):
    before = content_of(photos)
    assert predict("--output-dir", tmp_path / "out", "--min-score", 0.1, photos) == 0
    assert content_of(photos) == before
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    # Small images are enlarged, so that names can be read beside what they name.
    assert sizes == {"in_a.jpg": (640, 480), "b.png": (480, 640), "sub_a.jpg": (640, 640), "c.jpg": (640, 356)}
    drawn = np.asarray(Image.open(tmp_path / "out" / "b.png"))
    assert (drawn != np.asarray(Image.open(photos / "b.png").resize((480, 640), Image.Resampling.LANCZOS))).any()
    assert "4 images, " in capsys.readouterr().out


def test_the_results_are_the_detectors_with_numbers_of_a_list_written_beside(predict, weights, photos, tmp_path):
    target = tmp_path / "results.json"
    assert predict("--json", target, "--batch-size", 1, photos) == 0
    listing = read_coco(tmp_path / "results_images.json")
    files = [photos / listing.file_name(i) for i in range(len(listing))]
    assert files == [photos / name for name in ("a.jpg", "b.png", "sub/a.jpg", "sub/c.JPEG")]
    assert list(zip(listing.widths, listing.heights, strict=True)) == [(80, 60), (60, 80), (64, 64), (90, 50)]
    assert (listing.class_names, listing.category_ids) == (tuple(CLASS_NAMES), tuple(CATEGORY_IDS))
    rows = json.loads(target.read_text())
    detector = load_detector(weights)
    assert len(rows) > 20
    for image_id, file in zip(listing.image_ids, files, strict=True):
        found = detector.predict(file)
        mine = [row for row in rows if row["image_id"] == image_id]
        assert [row["category_id"] for row in mine] == [CATEGORY_IDS[label] for label in found["labels"]]
        np.testing.assert_allclose([row["score"] for row in mine], found["scores"], rtol=1e-6)
        boxes = np.array([row["bbox"] for row in mine])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, found["boxes_xyxy"], atol=1e-3)


def test_batches_find_what_single_images_find(predict, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    for number in range(5):
        Image.fromarray(pixels[number]).save(tmp_path / f"{number}.png")
    results = []
    for size in (1, 3):
        assert predict("--json", tmp_path / f"{size}.json", "--batch-size", size, f"{tmp_path}/?.png") == 0
        rows = json.loads((tmp_path / f"{size}.json").read_text())
        results.append([sorted(row["score"] for row in rows if row["image_id"] == i) for i in range(1, 6)])
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)


def test_ids_come_from_the_annotations_by_file_name_and_class_name(predict, photos, tmp_path, capsys):
    names = ["sub/a.jpg", "b.png", "a.jpg", "elsewhere.jpg"]
    images = [{"id": 40 + i, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names)]
    categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "person"}]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps({"images": images, "categories": categories, "annotations": []}))
    inputs = [photos / "a.jpg", photos / "sub/a.jpg"]
    assert predict("--json", tmp_path / "out.json", "--annotations", annotations, *inputs) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["image_id"] for row in rows} == {42, 40}
    assert {row["category_id"] for row in rows} <= {7, 9}
    assert "1 classes of the detector are not in" in capsys.readouterr().err
    assert not (tmp_path / "out_images.json").exists()

    assert predict("--json", tmp_path / "other.json", "--annotations", annotations, photos) == 2
    assert "1 of 4 images are not in" in capsys.readouterr().err


def test_score_class_number_and_limit_choose_the_boxes(predict, photos, tmp_path):
    options = ["--min-score", 0.2, "--classes", "race car, cat", "--max-boxes", 2, "--limit", 3]
    assert predict("--json", tmp_path / "some.json", *options, photos) == 0
    assert predict("--json", tmp_path / "all.json", photos) == 0
    some, everything = (json.loads((tmp_path / name).read_text()) for name in ("some.json", "all.json"))
    wanted = []
    for image_id in (1, 2, 3):
        fitting = [r for r in everything if r["image_id"] == image_id and r["category_id"] != 1 and r["score"] >= 0.2]
        wanted += fitting[:2]
    assert len(some) > 0 and [r["score"] for r in some] == pytest.approx([r["score"] for r in wanted])


def test_crops_are_the_pixels_of_the_boxes_in_folders_of_their_classes(predict, photos, tmp_path):
    options = ["--json", tmp_path / "r.json", "--save-crops", tmp_path / "crops", "--min-score", 0.1]
    assert predict(*options, photos / "b.png") == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    crops = sorted((tmp_path / "crops").rglob("*.png"), key=lambda path: path.name)
    assert len(crops) == len(rows) > 0
    pixels = np.asarray(Image.open(photos / "b.png"))
    folders = dict(zip(CATEGORY_IDS, ["person", "race_car", "cat"], strict=True))
    for crop, row in zip(crops, rows, strict=True):
        x, y, width, height = row["bbox"]
        x1, y1 = int(np.ceil(np.float32(x) + np.float32(width))), int(np.ceil(np.float32(y) + np.float32(height)))
        assert crop.parent.name == folders[row["category_id"]]
        np.testing.assert_array_equal(np.asarray(Image.open(crop)), pixels[int(y) : y1, int(x) : x1])


def test_each_mask_is_an_image_of_the_photos_size(predict, weights, photos, tmp_path):
    options = ["--save-masks", tmp_path / "masks", "--json", tmp_path / "r.json", "--min-score", 0.1]
    assert predict(*options, photos / "b.png") == 0
    found = load_detector(weights).predict(photos / "b.png")
    expected = paste_masks(found["mask_probabilities"], found["boxes_xyxy"], (80, 60))[found["scores"] >= 0.1]
    files = sorted((tmp_path / "masks").rglob("*.png"), key=lambda path: path.name)
    assert len(files) == len(expected) > 0 and expected.any()
    for file, mask in zip(files, expected.numpy(), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), mask * np.uint8(255))
    boxes, rows = (json.loads((tmp_path / name).read_text()) for name in ("r.json", "r_segm.json"))
    for box, row, mask in zip(boxes, rows, expected.numpy(), strict=True):
        assert [row[key] for key in ("image_id", "category_id", "score")] == [
            box[key] for key in ("image_id", "category_id", "score")
        ]
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]), mask)


def test_a_broken_image_is_named_and_the_others_are_done(predict, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:200])
    assert predict("--output-dir", tmp_path / "out", "--json", tmp_path / "r.json", photos) == 1
    error = capsys.readouterr().err
    assert "broken.jpg" in error and "1 of 5 images could not be read" in error and "Traceback" not in error
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert len(read_coco(tmp_path / "r_images.json")) == 4


def test_no_input_is_ever_overwritten(predict, weights, photos, tmp_path, capsys):
    before, weights_before = content_of(photos), weights.read_bytes()
    (tmp_path / "link.json").symlink_to(weights)
    for arguments in (
        ["--output-dir", photos, photos / "a.jpg"],
        ["--output-dir", photos, photos],
        ["--output-dir", photos, f"{photos}/*.png"],
        ["--json", photos / "b.png", photos / "b.png"],
        ["--json", tmp_path / "link.json", photos],
    ):
        assert predict(*arguments) == 2
        assert "would overwrite the input" in capsys.readouterr().err
    assert content_of(photos) == before and weights.read_bytes() == weights_before


def test_a_folder_is_no_file_for_results_also_to_overwrite(predict, photos, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    assert predict("--json", tmp_path / "results", "--overwrite", photos) == 2
    assert "results: is a folder; name a file" in capsys.readouterr().err


def test_what_an_earlier_call_wrote_is_not_taken_as_input(predict, photos):
    for _ in range(2):
        assert predict("--output-dir", photos / "out", "--overwrite", photos, f"{photos}/**") == 0
    assert len(list((photos / "out").iterdir())) == 4


def test_what_an_earlier_call_wrote_is_replaced_only_when_asked(predict, photos, tmp_path, capsys):
    (tmp_path / "crops" / "cat").mkdir(parents=True)
    (tmp_path / "crops" / "cat" / "mine.png").write_bytes(b"mine")
    (tmp_path / "masks").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("masks/mine.png", "out/b.png", "r.json", "s_images.json"):
        (tmp_path / name).write_text("mine")
    before = content_of(tmp_path)
    wishes = (["--output-dir", tmp_path / "out"], ["--json", tmp_path / "r.json"], ["--json", tmp_path / "s.json"])
    for wish in (*wishes, ["--save-crops", tmp_path / "crops"], ["--save-masks", tmp_path / "masks"]):
        assert predict(*wish, photos) == 2
        error = capsys.readouterr().err
        assert "--overwrite" in error and error.count("\n") == 1
    assert content_of(tmp_path) == before
    assert predict("--overwrite", "--json", tmp_path / "r.json", photos) == 0
    assert json.loads((tmp_path / "r.json").read_text())


def test_a_file_of_masks_stands_in_the_way_of_a_detector_with_masks_alone(
    predict, program, detector_content, photos, tmp_path
):
    settings = SMALL | {"has_masks": False}
    torch.save(detector_content("faster_rcnn_r18_fpn", 0, CLASS_NAMES, CATEGORY_IDS, **settings), tmp_path / "boxes.pt")
    (tmp_path / "r_segm.json").write_text("mine")
    assert predict("--json", tmp_path / "r.json", photos) == 2
    assert program("predict", "--weights", tmp_path / "boxes.pt", "--json", tmp_path / "r.json", photos) == 0
    assert (tmp_path / "r_segm.json").read_text() == "mine"


def test_images_go_to_a_folder_of_their_own_where_nothing_is_said(predict, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert predict(photos / "b.png") == 0
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["b.png"]


def stored_sideways(path, target):
    """The image as a camera held on its side stores it: other pixels, and a tag that says how to turn them."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(target, exif=exif)


def test_photos_are_turned_upright_but_not_for_annotations_of_stored_pixels(predict, photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    stored_sideways(photos / "b.png", folder / "b.png")
    straight = json_rows(predict, tmp_path / "straight.json", photos / "b.png")
    assert "turned upright" not in capsys.readouterr().out
    turned = json_rows(predict, tmp_path / "turned.json", folder)
    assert turned == straight
    assert "1 image turned upright" in capsys.readouterr().out
    listing = json.loads((tmp_path / "turned_images.json").read_text())
    assert listing["info"]["turned_upright"] is True
    assert (listing["images"][0]["width"], listing["images"][0]["height"]) == (60, 80)

    stored = json_rows(predict, tmp_path / "stored.json", "--exif", "ignore", folder)
    assert stored != straight
    image = {"id": 1, "file_name": "b.png", "width": 80, "height": 60}
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps({"images": [image], "categories": categories, "annotations": []}))
    options = ["--annotations", annotations]
    assert json_rows(predict, tmp_path / "annotated.json", *options, folder) == stored
    assert json_rows(predict, tmp_path / "wanted.json", *options, "--exif", "apply", folder) == straight


def json_rows(predict, target, *arguments):
    assert predict("--json", target, *arguments) == 0
    return json.loads(target.read_text())


def test_test_time_augmentation_finds_the_same_in_a_image_and_its_mirror_image(predict, photos, tmp_path):
    mirrored = tmp_path / "mirrored.png"
    with Image.open(photos / "b.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    options = ["--tta", "--tta-scales", "1,1.5"]
    one = json_rows(predict, tmp_path / "one.json", *options, photos / "b.png")
    other = json_rows(predict, tmp_path / "other.json", *options, mirrored)
    assert len(one) > 5
    np.testing.assert_allclose([row["score"] for row in one], [row["score"] for row in other], atol=1e-5)
    boxes, back = (np.array([row["bbox"] for row in rows]) for rows in (one, other))
    back[:, 0] = 60 - back[:, 0] - back[:, 2]
    np.testing.assert_allclose(boxes, back, atol=1e-3)
    plain = json_rows(predict, tmp_path / "plain.json", "--tta", "--tta-scales", "1", "--no-tta-flip", photos / "b.png")
    assert plain == json_rows(predict, tmp_path / "none.json", photos / "b.png")
    assert plain != one


def test_an_image_of_one_column_is_looked_at_mirrored_too(predict, tmp_path):
    Image.new("RGB", (1, 40)).save(tmp_path / "thin.png")
    assert predict("--json", tmp_path / "found.json", "--tta", tmp_path / "thin.png") == 0


def test_images_of_a_packed_set_are_found_and_a_missing_one_is_passed_over(predict, program, tmp_path, capsys):
    make_shapes(tmp_path / "set", num_train=2, num_val=2)
    assert program("pack_dataset", "pack", tmp_path / "set", tmp_path / "packed") == 0
    options = ["--classes", "cat", "--min-score", 0, "--output-dir"]
    assert predict("--data-path", tmp_path / "packed", *options, tmp_path / "a") == 0
    assert len(list((tmp_path / "a").iterdir())) == 2
    next((tmp_path / "set" / "val2017").iterdir()).unlink()
    capsys.readouterr()
    assert predict("--data-path", tmp_path / "set", *options, tmp_path / "b") == 1
    assert "1 of 2 images could not be read" in capsys.readouterr().err


def test_patterns_take_the_images_that_fit_each_once(predict, photos, tmp_path):
    (photos / "notes.txt").write_text("no image")
    options = ["--output-dir", tmp_path / "out", f"{photos}/*", f"{photos}/**/*.jpg", photos / "a.jpg"]
    assert predict(*options) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.png", "c.jpg", "in_a.jpg", "sub_a.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output-dir", "out", "--classes", "race-car", "in"], "no class 'race-car'; did you mean 'race car'?"),
        (["--output-dir", "out", "--classes", "zebra", "in"], "there are person, race car, cat"),
        (["--output-dir", "out", "absent.jpg"], "absent.jpg: no such file or folder"),
        (["--output-dir", "out", "in/*.bmp"], "no images there"),
        (["--tta-scales", "1,2", "in"], "go with --tta"),
        (["--device", "tpu", "in"], "choose auto, cpu, cuda or cuda:N"),
        (["--output-dir", "out", "--annotations", "a.json", "in"], "--annotations goes with --json"),
        (["--output-dir", "out", "--weights", "absent.pt", "in"], "absent.pt"),
        (["--json", "r.json", "--annotations", "absent.json", "in"], "absent.json"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(predict, photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert predict(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "predictions").exists()


def test_cuda_that_is_not_there_is_one_line(predict, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert predict("--output-dir", tmp_path / "out", "--device", "cuda", photos) == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


def test_where_no_image_can_be_read_nothing_is_said_to_be_written(predict, tmp_path, capsys):
    (tmp_path / "notes.jpg").write_text("no image")
    assert predict("--output-dir", tmp_path / "out", tmp_path / "notes.jpg") == 2
    said = capsys.readouterr()
    assert "1 of 1 image could not be read" in said.err
    assert "written" not in said.out and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told_before_the_images(predict, photos, tmp_path, capsys):
    for option in ("--output-dir", "--save-crops"):
        assert predict(option, photos / "a.jpg" / "out", photos) == 2
        said = capsys.readouterr()
        assert f"error: {option} " in said.err and "nothing can be written there" in said.err and not said.out


def test_graphs_are_refused_on_a_cpu_before_an_image_is_looked_at(predict, photos, tmp_path, capsys):
    words = ("--cuda-graphs", "--device", "cpu", "--output-dir", tmp_path / "out")
    assert predict(*words, photos) == 2
    assert "--cuda-graphs is for GPUs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
