"""Detections as arrays and as COCO results files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.evaluation import Detections, ResultsError, read_results, write_results
from tests.evaluation.coco_cases import detections_of


def random_detections(n, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Detections(
        rng.integers(0, 2**40, n),
        rng.integers(0, 90, n),
        rng.uniform(0, 1500, (n, 4)).astype(dtype),
        rng.random(n).astype(dtype),
    )


def assert_same(a, b):
    for name in ("image_ids", "category_ids", "boxes_xywh", "scores"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


def test_a_written_file_is_a_coco_results_list_that_json_reads(tmp_path):
    path = tmp_path / "new_folder" / "detections.json"
    write_results(detections_of([(7, 3, [1, 2.5, 30, 40], 0.25)]), path)
    assert json.loads(path.read_text()) == [{"image_id": 7, "category_id": 3, "bbox": [1, 2.5, 30, 40], "score": 0.25}]


@pytest.mark.parametrize("n", [0, 1, 4096, 9001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_bit_survives_writing_and_reading(tmp_path, n, dtype):
    detections = random_detections(n, dtype=dtype)
    write_results(detections, tmp_path / "r.json")
    assert len(json.loads((tmp_path / "r.json").read_text())) == n
    back = read_results(tmp_path / "r.json")
    assert_same(replace(back, boxes_xywh=back.boxes_xywh.astype(dtype), scores=back.scores.astype(dtype)), detections)


def test_writing_replaces_the_old_file_whole_and_leaves_no_temporary_one(tmp_path):
    path = tmp_path / "r.json"
    write_results(random_detections(50), path)
    write_results(random_detections(3), path)
    assert len(read_results(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    write_results(random_detections(5), path)

    def no_space_left(self, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", no_space_left)
    with pytest.raises(OSError, match="No space left"):
        write_results(random_detections(9), path)
    assert len(read_results(path)) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_detections_that_are_not_finite_are_refused_by_image(tmp_path):
    detections = random_detections(4)
    detections.scores[2] = np.nan
    with pytest.raises(ResultsError, match=rf"1 of 4 .* image {detections.image_ids[2]}"):
        write_results(detections, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_lists_per_image_become_flat_rows_with_category_ids_and_sizes():
    detections = Detections.from_lists(
        [10, 20, 30],
        [np.array([[0, 0, 4, 6], [1, 1, 2, 2]]), np.zeros((0, 4)), torch.tensor([[5.0, 5, 10, 20]])],
        [[0.9, 0.8], [], torch.tensor([0.7])],
        [[1, 0], [], [2]],
        category_ids=[3, 17, 90],
    )
    rows = [(10, 17, [0, 0, 4, 6], 0.9), (10, 3, [1, 1, 1, 1], 0.8), (30, 90, [5, 5, 5, 15], 0.7)]
    assert_same(detections, detections_of(rows))


def test_no_images_and_only_empty_images_give_no_rows():
    assert len(Detections.from_lists([], [], [], [], category_ids=[1])) == 0
    empty = Detections.from_lists([1], [np.zeros((0, 4))], [[]], [[]], category_ids=[1])
    assert_same(empty, Detections.empty())


def test_concatenating_keeps_the_order_and_nothing_gives_nothing():
    whole = random_detections(10)
    rows = np.arange(10)
    assert_same(Detections.concatenate([whole.take(rows < 4), whole.take(rows >= 4)]), whole)
    assert_same(Detections.concatenate([]), Detections.empty())


@pytest.mark.parametrize("n", [0, 17])
def test_transport_arrays_are_two_plain_arrays_and_give_the_same_detections_back(n):
    detections = random_detections(n)
    ids, values = detections.as_arrays()
    assert (ids.shape, ids.dtype, values.shape, values.dtype) == ((n, 2), np.int64, (n, 5), np.float32)
    assert ids.flags.c_contiguous and values.flags.c_contiguous
    assert_same(Detections.from_arrays(ids, values), detections)


GOOD = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**GOOD, "bbox": [1, 2, 3]}, "four finite numbers"),
        ({**GOOD, "bbox": [1, 2, 3, "4"]}, "four finite numbers"),
        ({**GOOD, "bbox": [1, 2, 3, 10**30]}, "four finite numbers"),
        ({**GOOD, "bbox": [50, 50, -10, 4]}, "negative size.*not two corners"),
        ({**GOOD, "bbox": [1, 2, 3, float("nan")]}, "four finite numbers"),
        ({**GOOD, "score": "0.9"}, "score is '0.9'"),
        ({**GOOD, "score": None}, "score is None"),
        ({**GOOD, "image_id": "000042"}, "image_id is '000042'"),
        ({**GOOD, "image_id": 1.5}, "image_id is 1.5"),
        ({**GOOD, "category_id": 2**70}, "category_id is"),
        ({"image_id": 1, "category_id": 2, "score": 0.5, "segmentation": {}}, "no bbox; every entry needs"),
        ({"image_id": 1, "bbox": [0, 0, 5, 5]}, "no category_id, score"),
        ("text", "expected an object"),
    ],
)
def test_a_bad_entry_is_named_with_file_and_index(tmp_path, entry, message):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([GOOD, GOOD, entry, GOOD]))
    with pytest.raises(ResultsError, match=rf"theirs\.json: entry 2 .*{message}"):
        read_results(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image_id": 1, "categ', "not JSON .*write it again"),
        ('{"images": [], "annotations": []}', "holds a dict with the keys .*annotations"),
        ("3", "holds a int"),
        (None, "no such results file"),
    ],
)
def test_a_file_that_is_no_results_list_says_what_it_is(tmp_path, text, message):
    path = tmp_path / "theirs.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_results(path)


def test_other_programs_extra_keys_and_whole_floats_are_taken(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps([{**GOOD, "image_id": 42.0, "id": 5, "segmentation": []}]))
    assert read_results(path).image_ids.tolist() == [42]
