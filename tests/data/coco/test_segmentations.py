"""Polygons and run lengths packed into flat arrays, and their bitmaps: pycocotools', pixel for pixel."""

import json

import numpy as np
import pytest
from pycocotools import mask

from data.coco.annotations import read_coco, share_coco, shared_coco
from data.coco.run_lengths import RunLengths, compressed
from data.coco.segmentations import light, pack


def random_rings(rng, height, width):
    """One to three rings: with two decimals or more, whole numbers, inside the image or beyond its borders."""
    rings = []
    for _ in range(int(rng.integers(1, 4))):
        center = rng.uniform(-0.2, 1.2, 2) * [width, height]
        points = center + rng.normal(size=(int(rng.integers(3, 12)), 2)) * rng.choice([0.2, 3, 20, 60])
        if rng.random() < 0.7:
            points = np.clip(points, 0, [width, height])
        rings.append(np.round(points, int(rng.choice([0, 2, 12]))).reshape(-1).tolist())
    return rings


def whole(bitmap, height, width):
    """A cut bitmap at the image's size."""
    out = np.zeros((height, width), np.uint8)
    out[bitmap.top : bitmap.top + bitmap.bits.shape[0], bitmap.left : bitmap.left + bitmap.bits.shape[1]] = bitmap.bits
    return out


def packed(given, height, width):
    sides = np.full(len(given), width), np.full(len(given), height)
    return pack([light(each) for each in given], *sides)


def test_bitmaps_cut_to_their_outline_equal_pycocotools_at_full_size_on_a_thousand_random_polygons():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(side) for side in rng.integers(1, 120, 2))
        rings = random_rings(rng, height, width)
        segmentations, _ = packed([rings], height, width)
        assert [ring.tolist() for ring in segmentations.rings(0)] == rings
        entry = mask.merge(mask.frPyObjects(rings, height, width))
        assert segmentations.compressed(0, height, width) == entry["counts"]
        bitmap = segmentations.bitmap(0, height, width)
        assert np.array_equal(whole(bitmap, height, width), mask.decode(entry))


def test_run_lengths_as_list_and_as_text_give_the_mask_and_survive_packing():
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        bits = (rng.random((height, width)) < rng.choice([0, 0.05, 0.5, 0.95, 1])).astype(np.uint8)
        text = mask.encode(np.asfortranarray(bits))["counts"]
        flat = bits.T.reshape(-1)
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([*([0] if flat[0] else []), 0, *ends.tolist(), flat.size]).tolist()
        for counts in (text.decode(), runs):
            segmentations, faults = packed([{"size": [height, width], "counts": counts}], height, width)
            assert not any(which.any() for which in faults.values())
            assert segmentations.compressed(0, height, width) == text
            assert np.array_equal(whole(segmentations.bitmap(0, height, width), height, width), bits)


@pytest.mark.parametrize(
    "bad",
    [
        {"size": [8, 9], "counts": [72]},  # of another size
        {"size": [9, 8], "counts": [71]},
        {"size": [9, 8], "counts": [-1, 73]},
        {"size": [9, 8], "counts": [72.0]},
        {"size": [9, 8], "counts": "é"},
        {"size": [9, 8], "counts": "X"},  # a digit that says another one follows
        {"size": [9, 8], "counts": "o" * 40},
        {"size": [9, 8], "counts": ""},
        {"size": [9, 8]},
        {"counts": [72]},
    ],
)
def test_run_lengths_that_do_not_fill_their_image_are_refused(bad):
    assert compressed(bad, 9, 8) is None
    assert packed([bad], 9, 8)[1]["rle-unusable"].tolist() == [True]


def test_numbers_of_two_decimals_take_four_bytes_and_come_back_exactly():
    two, more = [[0.1, 0.7, 5.29, 1.15, 3.33, 8.01]], [[0.1, 0.7, 5.291, 1.15, 3.33, 8.01]]
    assert packed([two], 9, 9)[0].coordinates.dtype == np.int32
    assert packed([two, more], 9, 9)[0].coordinates.dtype == np.float64


SQUARE = [10, 10, 20, 10, 20, 20, 10, 20]
FAULTS = {
    "polygon-points": [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]],
    "polygon-numbers": [
        [1, 2, 3, "4", 5, 6], [1, 2, float("nan"), 4, 5, 6], [1, 2, 3, 4, 5, 1e6], [1, 2, 3, 4, 5, None], "ab", 7,
    ],
    "polygon-outside": [[70, 10, 80, 10, 80, 20], [10, -5, 20, -5, 20, 0]],
    "polygon-without-area": [[10, 10, 20, 20, 30, 30], [5, 5, 5, 5, 5, 5]],
}  # fmt: skip


def written(path, segmentations):
    annotations = [
        {"id": 7 + n, "image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20], "area": 9, "segmentation": each}
        for n, each in enumerate(segmentations)
    ]
    images = [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("code", "rings"), FAULTS.items())
def test_each_fault_of_a_polygon_is_a_finding_that_names_the_annotation_and_the_remedy(tmp_path, code, rings):
    file = written(tmp_path / "a.json", [[SQUARE], *([SQUARE, ring] for ring in rings)])
    findings = {finding.code: finding for finding in read_coco(file, masks=True).findings}
    assert set(findings) == {"no-iscrowd", code}
    assert findings[code].places == tuple(f"annotation id {8 + n}" for n in range(len(rings)))
    assert findings[code].severity == "warning" and "delete them" in findings[code].text
    assert not {finding.code for finding in read_coco(file).findings} & set(FAULTS)


def test_annotations_without_an_outline_are_a_finding_where_others_have_one(tmp_path):
    file = written(tmp_path / "a.json", [[SQUARE], None, [], [[1, 2, 3, 4]]])
    annotations = read_coco(file, masks=True)
    assert {f.code: f.count for f in annotations.findings} == {"no-iscrowd": 4, "polygon-points": 1, "no-outline": 3}
    assert annotations.segmentations.present.tolist() == [True, False, False, False]
    none = read_coco(written(tmp_path / "b.json", [None, []]), masks=True)
    assert {f.code for f in none.findings} == {"no-iscrowd"}


def test_the_caches_of_runs_with_and_without_masks_are_two_files_of_which_processes_share_the_arrays(tmp_path):
    file = written(tmp_path / "a.json", [[SQUARE], {"size": [48, 64], "counts": [100, 48 * 64 - 100]}, None])
    plain = read_coco(file, cache_dir=tmp_path / "cache")
    assert plain.segmentations is None
    direct = read_coco(file, masks=True)
    sizes = []
    for _ in range(2):  # made, then found
        with share_coco(file, tmp_path / "cache", masks=True) as (annotations, words):
            elsewhere = shared_coco(file, words, masks=True)
        for read in (annotations, elsewhere):
            assert read.digest() == direct.digest() != plain.digest()
            for name, array in read.segmentations.arrays().items():
                assert np.array_equal(array, getattr(direct.segmentations, name)), name
                assert not array.flags.writeable, f"{name} was copied"
        sizes.append(len(list((tmp_path / "cache").glob("*.packed"))))
    assert sizes == [2, 2]
    assert read_coco(file, cache_dir=tmp_path / "cache").segmentations is None


def test_views_share_the_rings(tmp_path):
    file = written(tmp_path / "a.json", [None, [SQUARE], [[10, 10, 20, 10, 20, 30]]])
    annotations = read_coco(file, masks=True)
    taken = annotations.segmentations.take(np.array([False, False, True]))
    assert taken.coordinates is annotations.segmentations.coordinates
    assert taken.rings(0)[0].tolist() == [10, 10, 20, 10, 20, 30]


def test_outlines_stay_with_their_annotations_when_classes_are_left_out(tmp_path):
    file = written(tmp_path / "a.json", [[SQUARE], [[10, 10, 20, 10, 20, 30]]])
    content = json.loads(file.read_text())
    content["categories"].append({"id": 2, "name": "b"})
    content["annotations"][1]["category_id"] = 2
    file.write_text(json.dumps(content))
    chosen = read_coco(file, masks=True).of_classes(["b"])
    assert [ring.tolist() for ring in chosen.segmentations.rings(0)] == [[10, 10, 20, 10, 20, 30]]


def test_run_lengths_are_taken_joined_and_decoded():
    rng = np.random.default_rng(2)
    bitmaps = [(rng.random((n, 9 + n, 7)) < 0.4).astype(np.uint8) for n in (3, 0, 2)]
    joined = RunLengths.concatenate([RunLengths.encode(each) for each in bitmaps])
    masks = [each for part in bitmaps for each in part]
    assert joined.sizes.tolist() == [list(each.shape) for each in masks]
    order = np.array([4, 0, 3])
    taken = joined.take(order)
    for row, source in enumerate(order):
        assert np.array_equal(taken.decode(row), masks[source])
    assert taken.areas().tolist() == [masks[source].sum() for source in order]
    assert len(RunLengths.concatenate([])) == 0 == len(joined.take(np.zeros(5, bool)))
