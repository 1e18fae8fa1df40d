"""A folder as each tool leaves it: recognized, split, and read as the set that it is."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.coco.annotations import read_coco
from data.coco.layout import MissingDataset
from data.convert.conversion import ConversionError
from data.layouts.found_set import FoundSet, Wanted, find_set
from data.layouts.recognition import LayoutError
from tests.data.layouts import exports
from tests.data.layouts.exports import BOXES, EXPORTS, NAMES, coco_text, image, voc_text, write, yolo_text


@pytest.fixture
def find(tmp_path):
    """find(folder, **wanted): what is found there, with a cache beside it."""
    return lambda folder, **wanted: find_set(folder, tmp_path / "cache", Wanted(**wanted))


def contents(found: FoundSet) -> dict[str, dict]:
    return {split: json.loads(files.annotations.read_text()) for split, files in found.splits.items()}


def image_names(found: FoundSet, split: str) -> set[str]:
    return {Path(one["file_name"]).name for one in contents(found)[split]["images"]}


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.__name__)
def test_every_export_is_recognized_and_read_as_the_same_set(export, find, tmp_path):
    title, counts, said = EXPORTS[export]
    export(tmp_path / "set")
    found = find(tmp_path / "set")
    assert found.title.startswith(f"{title} in {tmp_path / 'set'}")
    assert said in "; ".join(found.remarks)
    names = set()
    for split, count in counts.items():
        annotations = read_coco(found.splits[split].annotations)
        assert (len(annotations), annotations.class_names) == (count, NAMES)
        for index in range(count):
            with Image.open(found.splits[split].images / annotations.file_name(index)) as opened:
                assert opened.size == (32, 32)
            names.add(Path(annotations.file_name(index)).name)
            rows = annotations.rows(index)
            assert annotations.labels[rows].tolist() == [0, 1]
            np.testing.assert_allclose(annotations.boxes_xywh[rows], BOXES, atol=0.01)
    assert found.splits.keys() == counts.keys() and len(names) == sum(counts.values())
    # Once more out of the cache: the same files.
    assert find(tmp_path / "set") == found


@pytest.mark.parametrize("export", [exports.yolo_segmentation, exports.labelme])
def test_polygons_are_kept_to_the_hundredth_and_their_area_is_that_of_the_mask(export, find, tmp_path):
    export(tmp_path / "set")
    annotations = read_coco(find(tmp_path / "set").splits["train"].annotations, masks=True)
    segmentations = annotations.segmentations
    assert segmentations is not None and segmentations.present.all()
    for row, ring in zip(range(2), exports.RINGS, strict=True):
        assert [each.tolist() for each in segmentations.rings(row)] == [list(ring)]
    assert annotations.areas[:2].tolist() == [90.0, 100.0]


@pytest.mark.parametrize("wanted", [{}, {"classes": ("key",)}])
def test_polygons_of_roboflows_coco_export_are_kept(find, tmp_path, wanted):
    exports.roboflow_coco(tmp_path / "set")
    files = find(tmp_path / "set", **wanted).splits["val"]
    segmentations = read_coco(files.annotations, masks=True).segmentations
    assert segmentations is not None and len(segmentations) == (2 if wanted else 4)
    assert all(segmentations.rings(row)[0].tolist() == [1, 2, 3, 4, 5, 6] for row in range(len(segmentations)))


@pytest.mark.parametrize(
    "export", [exports.yolo_roboflow, exports.yolo_darknet, exports.voc_labelimg, exports.voc_cvat]
)
def test_the_converters_write_just_what_the_cache_holds(export, find, tmp_path, monkeypatch):
    export(tmp_path / "set")
    found = find(tmp_path / "set")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    program = __import__(f"convert_{'voc' if 'voc' in export.__name__ else 'yolo'}")
    assert program.main(["to-coco", str(tmp_path / "set"), str(tmp_path / "out")]) == 0
    for split, files in found.splits.items():
        assert (
            tmp_path / "out" / "annotations" / f"instances_{split}.json"
        ).read_bytes() == files.annotations.read_bytes()


def test_files_that_need_no_change_are_used_as_they_are(find, tmp_path):
    exports.coco_plain(tmp_path / "set")
    splits = find(tmp_path / "set").splits
    assert all(files.annotations.is_relative_to(tmp_path / "set") for files in splits.values())
    assert not list((tmp_path / "cache").rglob("instances_*"))


def test_masks_and_other_keys_of_a_coco_file_survive_what_is_changed(find, tmp_path):
    exports.roboflow_coco(tmp_path / "set")
    (first, *_) = contents(find(tmp_path / "set"))["train"]["annotations"]
    assert first["segmentation"] == [[1, 2, 3, 4, 5, 6]]


def test_a_root_category_of_the_same_name_as_a_class_is_no_class_either(find, tmp_path):
    root = tmp_path / "set"
    for split in ("train", "valid"):
        image(root / split / "a.png", 0)
        categories = [{"id": 0, "name": "key", "supercategory": "none"}]
        categories += [{"id": n, "name": name, "supercategory": "key"} for n, name in enumerate(NAMES, 1)]
        write(root / split / "_annotations.coco.json", coco_text(["a.png"], categories))
    assert read_coco(find(root).splits["val"].annotations).class_names == NAMES


def test_a_category_that_training_does_not_have_is_named(find, tmp_path):
    root = tmp_path / "set"
    for split, names in (("train", NAMES), ("valid", (*NAMES, "wheel"))):
        image(root / split / "a.png", 0)
        text = coco_text(["a.png"], [{"id": n, "name": name} for n, name in enumerate(names)])
        write(root / split / "_annotations.coco.json", text)
    assert read_coco(find(root).splits["val"].annotations).class_names == NAMES  # unused, it is left out
    file = root / "valid" / "_annotations.coco.json"
    file.write_text(file.read_text().replace('"category_id": 1', '"category_id": 2'))
    with pytest.raises(ConversionError, match=r"valid/_annotations.coco.json: has annotations of 'wheel'"):
        find(root)


def test_two_readings_are_both_named_with_the_option_for_each(find, tmp_path):
    exports.voc_cvat(tmp_path / "set")
    exports.one_coco_file(tmp_path / "set")
    with pytest.raises(LayoutError) as refused:
        find(tmp_path / "set")
    lines = str(refused.value).splitlines()
    assert "--data-format coco" in lines[1] and "labels.json" in lines[1]
    assert "--data-format voc" in lines[2] and ".xml" in lines[2]
    assert find(tmp_path / "set", data_format="voc").title.startswith("Pascal VOC")


def test_several_files_of_one_split_and_several_years_are_named_with_options(find, tmp_path):
    for name in ("train_a.json", "train_b.json"):
        write(tmp_path / "two" / name, coco_text([image(tmp_path / "two" / "1.png", 1).name]))
    with pytest.raises(LayoutError, match=r"--train-annotations .*train_a.json.*\n.*train_b.json"):
        find(tmp_path / "two")
    exports.voc_devkit(tmp_path / "years")
    shutil.copytree(tmp_path / "years" / "VOCdevkit" / "VOC2012", tmp_path / "years" / "VOCdevkit" / "VOC2007")
    with pytest.raises(LayoutError, match=r"--data-path .*VOC2007\n.*--data-path .*VOC2012"):
        find(tmp_path / "years")


def test_a_folder_inside_a_folder_is_looked_into(find, tmp_path):
    exports.yolo_roboflow(tmp_path / "unpacked" / "things.v1")
    assert find(tmp_path / "unpacked").splits["val"].images == tmp_path / "unpacked" / "things.v1" / "valid" / "images"


def test_what_cannot_be_read_says_what_is_there(find, tmp_path):
    with pytest.raises(LayoutError, match="no such folder"):
        find(tmp_path / "absent")
    image(tmp_path / "bare" / "a.png", 0)
    with pytest.raises(LayoutError, match=r"holds 1 \.png\.\n  There are images and no labels"):
        find(tmp_path / "bare")
    write(tmp_path / "bare" / "train" / "_annotations.createml.json", "[]")
    with pytest.raises(LayoutError, match="is CreateML"):
        find(tmp_path / "bare")
    exports.coco_own(tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "val2017")
    with pytest.raises(MissingDataset, match="val2017/ +MISSING"):
        find(tmp_path / "half")


def test_faults_of_labels_are_listed_with_the_converter_that_leaves_them_out(find, tmp_path):
    exports.voc_cvat(tmp_path / "set")
    write(tmp_path / "set" / "Annotations" / "003.xml", "<annotation>")
    with pytest.raises(ConversionError, match=r"003\.xml[\s\S]*convert_voc.py to-coco .* --skip-errors") as refused:
        find(tmp_path / "set")
    assert "[malformed-xml]" in str(refused.value)


def test_classes_that_differ_only_in_case_are_refused_until_all_are_named(find, tmp_path):
    for number in range(4):
        path = image(tmp_path / "set" / f"{number}.png", number)
        write(path.with_suffix(".xml"), voc_text(path.name, ("Coin", "coin")))
    with pytest.raises(ConversionError, match="'Coin', 'coin'"):
        find(tmp_path / "set")
    found = find(tmp_path / "set", classes=("Coin", "coin"))
    assert read_coco(found.splits["train"].annotations).class_names == ("Coin", "coin")


@pytest.mark.parametrize("export", [exports.roboflow_coco, exports.yolo_roboflow, exports.voc_cvat])
def test_classes_keeps_these_alone_and_all_images(export, find, tmp_path):
    export(tmp_path / "set")
    found = find(tmp_path / "set", classes=("key",))
    annotations = read_coco(found.splits["train"].annotations)
    assert annotations.class_names == ("key",)
    assert len(annotations) == EXPORTS[export][1]["train"] == annotations.num_boxes
    np.testing.assert_allclose(annotations.boxes_xywh, [BOXES[1]] * len(annotations), atol=0.01)
    with pytest.raises(ConversionError, match="did you mean 'key'"):
        find(tmp_path / "set", classes=("keys",))


@pytest.mark.parametrize("export", [exports.yolo_class_list, exports.one_coco_file])
def test_the_split_keeps_copies_and_near_equal_images_together_and_is_stable(export, find, tmp_path):
    root = tmp_path / "set"
    export(root)
    before = image_names(find(root, val_fraction=0.4), "val")
    assert image_names(find(root, val_fraction=0.4, split_seed=1), "val") != before
    shutil.rmtree(tmp_path / "cache")
    assert image_names(find(root, val_fraction=0.4), "val") == before
    # Every image twice: as another JPEG, and as an augmented copy of Roboflow's, which looks different.
    names = sorted(path.name for path in root.glob("*.jpg"))
    for name in names:
        stem = name.removesuffix(".jpg")
        Image.open(root / name).save(root / f"{stem}_again.jpg", quality=80)
    for name in names[:3]:
        image(root / f"{name[:3]}_jpg.rf.abc{name[:3]}.jpg", 50 + int(name[:3]))
        image(root / f"{name[:3]}_jpg.rf.def{name[:3]}.jpg", 80 + int(name[:3]))
    everything = sorted(path.name for path in root.glob("*.jpg"))
    if (root / "labels.json").is_file():
        write(root / "labels.json", coco_text(everything))
    for name in everything:
        write((root / name).with_suffix(".txt"), yolo_text()) if (root / "classes.txt").is_file() else None
    found = find(root, val_fraction=0.4)
    val = image_names(found, "val")
    assert 8 <= len(val) <= 10 and len(image_names(found, "train")) + len(val) == len(everything)
    for name in names:
        again = f"{name.removesuffix('.jpg')}_again.jpg"
        assert (name in val) == (again in val)
    for name in names[:3]:
        assert (f"{name[:3]}_jpg.rf.abc{name[:3]}.jpg" in val) == (f"{name[:3]}_jpg.rf.def{name[:3]}.jpg" in val)
    assert "nearly equal to others and stay with them" in "; ".join(found.remarks)


def test_a_share_to_validate_on_is_refused_where_the_set_has_its_own(find, tmp_path):
    for number, export in enumerate((exports.yolo_roboflow, exports.roboflow_coco)):
        export(tmp_path / str(number))
        with pytest.raises(ConversionError, match="--val-fraction"):
            find(tmp_path / str(number), val_fraction=0.2)


def test_a_changed_label_or_image_is_converted_anew_and_a_torn_cache_too(find, tmp_path):
    root = tmp_path / "set"
    exports.yolo_class_list(root)
    first = find(root)
    label = root / "000.txt"
    times = label.stat().st_mtime_ns
    label.write_text(label.read_text().replace("0 ", "1 ", 1))  # of equal size
    os.utime(label, ns=(times, times))
    changed = find(root)
    assert contents(changed) != contents(first)
    label.write_text(label.read_text().replace("1 ", "0 ", 1))
    assert find(root) == first
    first.splits["train"].annotations.unlink()
    again = find(root)
    assert again == first and again.splits["train"].annotations.is_file()
    image(root / "000.jpg", 99)
    assert find(root).splits["train"].annotations != first.splits["train"].annotations


def test_a_cache_that_cannot_be_written_says_which_variable_helps(tmp_path):
    exports.yolo_class_list(tmp_path / "set")
    (tmp_path / "occupied").touch()
    with pytest.raises(LayoutError, match="XDG_CACHE_HOME"):
        find_set(tmp_path / "set", tmp_path / "occupied")


def test_a_link_to_the_folder_of_the_images_is_followed(find, tmp_path):
    exports.yolo_ultralytics(tmp_path / "set")
    (tmp_path / "set" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "train" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = find(tmp_path / "set")
    assert len(image_names(found, "train")) == 4 and len(image_names(found, "val")) == 2


@pytest.mark.parametrize(
    ("program", "export", "said"),
    [
        ("convert_voc", exports.yolo_roboflow, "YOLO .*give it to scripts/convert_yolo.py, or .*train.py --data-path"),
        ("convert_yolo", exports.voc_cvat, "Pascal VOC .*give it to scripts/convert_voc.py"),
        ("convert_voc", exports.roboflow_coco, "COCO JSON .*it needs no conversion"),
    ],
)
def test_a_converter_names_the_right_one_for_another_tools_folder(program, export, said, tmp_path, monkeypatch, capsys):
    export(tmp_path / "set")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts"))
    assert __import__(program).main(["to-coco", str(tmp_path / "set"), str(tmp_path / "out")]) == 1
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "000.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [0]}}', "image-twice"),
        ('{"file_name": "gone.png", "objects": {"bbox": [], "categories": []}}', "missing-image"),
        ('{"file_name": "000.png", "objects": {"bbox": [[1, 2, 3]], "categories": [0]}}', "faulty-record"),
        ('{"file_name": "000.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [0, 1]}}', "faulty-record"),
        ('{"file_name": "000.png", "objects": {"bbox": [[1, 2, 3, "x"]], "categories": [0]}}', "faulty-record"),
        ('{"file_name": "000.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [7]}}', "unknown-class"),
        ("no JSON", "faulty-record"),
    ],
)
def test_records_of_an_imagefolder_that_cannot_be_used_are_named_with_their_line(line, said, find, tmp_path):
    exports.imagefolder(tmp_path / "set")
    file = tmp_path / "set" / "train" / "metadata.jsonl"
    write(file, file.read_text() + line + "\n")
    with pytest.raises(ConversionError, match=rf"\[{said}\]\n.*train/metadata.jsonl, line 5"):
        find(tmp_path / "set")


def test_images_of_an_imagefolder_may_differ_in_their_suffix_alone(find, tmp_path):
    names = [
        image(tmp_path / "set" / f"{number // 2}.{'png' if number % 2 else 'jpg'}", number).name for number in range(6)
    ]
    records = [{"file_name": name, "objects": [{"bbox": BOXES[0], "label": "coin"}]} for name in names]
    write(tmp_path / "set" / "metadata.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    found = find(tmp_path / "set")
    assert image_names(found, "train") | image_names(found, "val") == set(names)
