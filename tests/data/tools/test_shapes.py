import hashlib
import json
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data.coco.annotations import read_coco
from data.coco.layout import coco_layout
from data.tools.shape_scenes import CLASS_NAMES, MIN_SIDE, Dice, draw_scene, outline
from data.tools.shapes import ShapesError, make_shapes


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene((0, 0, index), 256, 192) for index in range(150)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("sets") / "shapes", num_train=40, num_val=10)


def contents(folder):
    """The bytes of the text files and the pixels of the images, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".png":
            found[name] = np.asarray(Image.open(path)).tobytes()
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def test_the_set_is_read_back_whole_and_in_the_standard_layout(shapes):
    layout = coco_layout(shapes)
    for folder, file, count in (
        (layout.train_images, layout.train_annotations, 40),
        (layout.val_images, layout.val_annotations, 10),
    ):
        annotations = read_coco(file)
        assert len(annotations) == count
        assert annotations.class_names == CLASS_NAMES
        assert max(annotations.category_ids) > len(CLASS_NAMES)  # gaps, as COCO's have
        assert annotations.findings == ()
        assert len(list(folder.iterdir())) == count
        for index in range(count):
            with Image.open(folder / annotations.file_name(index)) as image:
                assert image.size == (annotations.widths[index], annotations.heights[index])
                assert image.mode == "RGB"
        x, y, w, h = annotations.boxes_xywh.T
        assert (x >= 0).all() and (y >= 0).all()
        assert (x + w <= annotations.widths[annotations.image_indices]).all()
        assert (y + h <= annotations.heights[annotations.image_indices]).all()
        assert (annotations.areas <= w * h).all()


def test_equal_settings_give_equal_bytes_and_pixels_and_another_seed_others(shapes, tmp_path):
    content = json.loads(coco_layout(shapes).val_annotations.read_text())
    assert set(content) == {"info", "images", "annotations", "categories"}
    assert {"id", "image_id", "category_id", "bbox", "area", "iscrowd"} <= set(content["annotations"][0])
    assert contents(make_shapes(tmp_path / "again", num_train=40, num_val=10)) == contents(shapes)
    other, before = contents(make_shapes(tmp_path / "other", num_train=4, num_val=1, seed=1)), contents(shapes)
    assert not [name for name, content in other.items() if before[name] == content]
    assert len({content for name, content in before.items() if name.endswith(".png")}) == 50  # no image twice


def test_pixels_are_those_of_every_machine():
    # Recorded once; another value means that the set depends on the machine or on a library's version, or
    # that the generator changed (then its version goes up).
    sha = hashlib.sha256()
    for index in range(20):
        scene = draw_scene((0, 0, index), 256, 192)
        sha.update(scene.pixels.tobytes())
        sha.update(repr(scene.objects).encode())
    assert sha.hexdigest() == "1889010c6d8878ed9a5c748003fd7704363decce6a10e33aef74e8ee34bc46ef"


def test_random_numbers_are_a_fixed_function_of_the_key():
    assert [Dice(1, 2).below(1000), Dice(1, 2).below(1000), Dice(2, 1).below(1000)] == [448, 448, 894]


def test_polygons_are_filled_to_the_very_masks_with_holes_and_touching_corners(scenes):
    rng = np.random.default_rng(0)
    for case in range(400):
        mask = rng.random(tuple(rng.integers(1, 12, 2))) < rng.choice([0.2, 0.5, 0.8])
        if case % 2:
            mask = np.kron(mask, np.ones((3, 2))) > 0
        rings = [list(map(float, ring)) for ring in outline(mask)]
        assert bool(rings) == mask.any()
        if rings:
            assert np.array_equal(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, *mask.shape))), mask)
    for scene in scenes[:40]:
        for item in scene.objects:
            assert (len(item.polygons) > 0) == (item.rle_counts is None)
            if item.polygons:
                entry = coco_mask.merge(
                    coco_mask.frPyObjects([list(r) for r in item.polygons], *scene.pixels.shape[:2])
                )
                assert coco_mask.area(entry) == item.area
                assert coco_mask.toBbox(entry).tolist() == list(item.box_xywh)


def test_a_set_that_is_there_is_left_alone(shapes):
    before = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    assert make_shapes(shapes, num_train=40, num_val=10) == shapes
    assert {path: path.stat().st_mtime_ns for path in shapes.rglob("*")} == before


def test_a_folder_with_other_settings_or_other_files_is_refused_untouched(shapes, tmp_path):
    with pytest.raises(ShapesError, match="other settings"):
        make_shapes(shapes, num_train=41, num_val=10)
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ShapesError, match="something else"):
        make_shapes(tmp_path, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    assert coco_layout(make_shapes(tmp_path / "empty", num_train=1, num_val=1)).train_annotations.is_file()


@pytest.mark.parametrize("options", [{"num_val": 0}, {"num_train": -1}, {"size": (32, 192)}, {"size": (256, 9999)}])
def test_impossible_settings_are_refused(tmp_path, options):
    with pytest.raises(ShapesError):
        make_shapes(tmp_path / "shapes", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_shapes(tmp_path / "shapes", num_train=3, num_val=1)
    assert list(tmp_path.iterdir()) == []


def _make(folder, barrier):
    barrier.wait()
    make_shapes(folder, num_train=12, num_val=3)
    os._exit(0 if len(list((folder / "train2017").iterdir())) == 12 else 1)


def test_processes_that_start_at_once_end_with_one_whole_set(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_make, args=(tmp_path / "shapes", barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(contents(tmp_path / "shapes")) == 12 + 3 + 3


def test_all_classes_sizes_and_kinds_of_images_occur(scenes, shapes):
    objects = [item for scene in scenes for item in scene.objects if item.rle_counts is None]
    areas = np.array([item.area for item in objects])
    labels = np.array([item.label for item in objects])
    for kind in (areas < 32**2, (areas >= 32**2) & (areas < 96**2), areas >= 96**2):
        assert kind.mean() > 0.03
    assert (np.bincount(labels, minlength=6) > 0.1 * len(labels)).all()
    assert 0.02 < np.mean([not scene.objects for scene in scenes]) < 0.12
    crowds = [any(item.rle_counts for item in scene.objects) for scene in scenes]
    assert 0.03 < np.mean(crowds) < 0.15
    assert min(min(item.box_xywh[2:]) for scene in scenes for item in scene.objects) >= MIN_SIDE
    annotations = read_coco(coco_layout(shapes).train_annotations)
    assert 0.02 < np.mean(annotations.widths < annotations.heights) < 0.4  # a seventh is portrait


def test_objects_hide_each_other(scenes):
    def overlap(a, b):
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        return w > 4 and h > 4

    pairs = [
        any(overlap(one.box_xywh, other.box_xywh) for i, one in enumerate(scene.objects) for other in scene.objects[:i])
        for scene in scenes
    ]
    assert 0.2 < np.mean(pairs) < 0.9


def test_crowd_masks_are_coco_run_lengths_of_the_box_and_area(scenes):
    crowds = [item for scene in scenes for item in scene.objects if item.rle_counts is not None]
    for item in crowds:
        encoded = coco_mask.frPyObjects({"size": [192, 256], "counts": list(item.rle_counts)}, 192, 256)
        assert coco_mask.area(encoded) == item.area
        assert tuple(coco_mask.toBbox(encoded)) == item.box_xywh


def test_a_lone_object_reaches_all_four_sides_of_its_box(scenes):
    smallest_steps = []
    for scene in scenes:
        if len(scene.objects) != 1 or scene.objects[0].rle_counts is not None:
            continue
        x, y, w, h = scene.objects[0].box_xywh
        if x >= 3 and y >= 3 and x + w <= 253 and y + h <= 189:
            pixels = scene.pixels.astype(int)
            columns, rows = pixels[y : y + h], pixels[:, x : x + w].swapaxes(0, 1)
            sides = [(columns, x + 1, x - 2), (columns, x + w - 2, x + w + 1), (rows, y + 1, y - 2)]
            sides.append((rows, y + h - 2, y + h + 1))
            steps = [np.abs(part[:, inside] - part[:, outside]).sum(axis=-1).max() for part, inside, outside in sides]
            smallest_steps.append(min(steps))
    assert len(smallest_steps) >= 5
    assert np.mean(np.array(smallest_steps) > 30) > 0.8  # a few are nearly of the background's color
