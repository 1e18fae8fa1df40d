"""A packed set is the set that it was packed of, wherever it is moved; what is wrong with one is said in one line."""

import json
import multiprocessing

import pytest

from data.cache.packed_file import MAGIC
from data.coco.annotations import AnnotationError, find_fatal, read_coco, share_coco, shared_coco, write_annotations
from data.coco.checks import check_files
from data.convert.conversion import ConversionError
from data.layouts.found_set import Wanted, find_set
from data.layouts.packed_set import RECORD, PackedSetError, damaged, write_set
from tests.data.layouts import exports


@pytest.fixture
def file(tmp_path):
    """A JSON file with polygons, some of them faulty, and annotations without an area."""
    content = json.loads(exports.coco_text(["a.jpg", "b.jpg", "c.jpg"]))
    content["annotations"][1]["segmentation"] = [[1, 2]]
    del content["annotations"][2]["area"]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def packed(file, tmp_path):
    write_annotations(read_coco(file, masks=True), tmp_path / "train.packed")
    return tmp_path / "train.packed"


def said(annotations):
    return [(finding.code, finding.count, finding.places) for finding in annotations.findings]


def _report(file, words, masks, queue):
    annotations = shared_coco(file, words, masks=masks)
    view = annotations.training_view()
    queue.put((annotations.digest(), view.digest(), view.boxes_xywh.flags.owndata))


@pytest.mark.parametrize("masks", [False, True])
def test_packed_annotations_stand_in_for_their_json_file(file, packed, tmp_path, masks):
    plain = read_coco(file, masks=masks)
    file.unlink()
    queue = multiprocessing.get_context("fork").SimpleQueue()
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        read = read_coco(packed, masks=masks, cache_dir=cache)
        assert (read.digest(), said(read), read.source) == (plain.digest(), said(plain), str(packed))
        assert (read.segmentations is not None) == masks
        assert read.training_view().digest() == plain.training_view().digest()
    assert "polygon-points" in [code for code, *_ in said(plain)] or not masks
    with share_coco(packed, tmp_path / "cache", masks=masks) as (_, words):
        process = multiprocessing.get_context("fork").Process(target=_report, args=(packed, words, masks, queue))
        process.start()
        assert queue.get() == (plain.digest(), plain.training_view().digest(), False)
        process.join(30)


def test_equal_annotations_are_packed_into_equal_bytes(file, packed, tmp_path):
    write_annotations(read_coco(packed, masks=True), tmp_path / "again.packed")
    assert (tmp_path / "again.packed").read_bytes() == packed.read_bytes()
    read_coco(file, masks=True, cache_dir=tmp_path / "cache")
    write_annotations(read_coco(file, masks=True, cache_dir=tmp_path / "cache"), tmp_path / "again.packed")
    assert (tmp_path / "again.packed").read_bytes() == packed.read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is cut off or damaged"),
        (lambda content: content[: len(MAGIC)], "is cut off or damaged"),
        (lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:], "its SHA-256 is not the one"),
        (lambda content: content.replace(MAGIC, MAGIC[:-2] + b"5\n"), "packed by another version"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(packed, tmp_path, damage, message):
    read_coco(packed, cache_dir=tmp_path / "cache")  # which keeps that it is sound, until it changes
    packed.write_bytes(damage(packed.read_bytes()))
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(AnnotationError, match=rf"train\.packed: .*{message}.*pack_dataset"):
            read_coco(packed, cache_dir=cache)
    assert message in find_fatal(packed)[0].text


def test_a_file_of_the_cache_is_not_taken_for_a_set(file, tmp_path):
    read_coco(file, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*.packed")
    with pytest.raises(AnnotationError, match="is of the cache"):
        read_coco(cached)


@pytest.fixture
def packed_set(tmp_path):
    exports.coco_own(tmp_path / "set")
    found = find_set(tmp_path / "set", tmp_path / "cache").splits
    splits = {name: (read_coco(files.annotations, masks=True), files.images) for name, files in found.items()}
    write_set(tmp_path / "packed", splits, shard_bytes=1)
    write_set(tmp_path / "annotations_only", splits, with_images=False)
    return tmp_path / "packed"


def test_images_that_were_not_packed_stay_where_they_are(packed_set, tmp_path):
    found = find_set(tmp_path / "annotations_only", tmp_path / "cache").splits
    assert found["val"].images == (tmp_path / "set" / "val2017").absolute()
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    with pytest.raises(PackedSetError, match="val2017: is missing|train2017: is missing"):
        find_set(tmp_path / "annotations_only", tmp_path / "cache")


def test_an_image_that_is_named_in_two_ways_is_packed_once(tmp_path):
    exports.coco_own(tmp_path / "set")
    found = find_set(tmp_path / "set", tmp_path / "cache").splits["train"]
    content = json.loads(found.annotations.read_text())
    first = content["images"][0]
    content["images"].append(first | {"id": 1000, "file_name": f"./{first['file_name']}"})
    found.annotations.write_text(json.dumps(content))
    read = read_coco(found.annotations, masks=True)
    write_set(tmp_path / "packed", {"train": (read, found.images)})
    (packed,) = find_set(tmp_path / "packed", tmp_path / "cache").splits.values()
    assert [finding.code for finding in check_files(read_coco(packed.annotations), packed.images)] == ["repeated-file"]
    assert not damaged(tmp_path / "packed")


def test_a_set_that_cannot_be_opened_is_named(packed_set, tmp_path):
    with pytest.raises(ConversionError, match="packed with its splits"):
        find_set(packed_set, tmp_path / "cache", Wanted(val_fraction=0.5))
    record = packed_set / RECORD
    content = record.read_text()
    for other, message in [
        (content.replace('"version": 1', '"version": 2'), "is of version 2, this program reads 1"),
        (content[:-5], "cannot be read"),
        ("[]", "cannot be read"),
    ]:
        record.write_text(other)
        with pytest.raises(PackedSetError, match=rf"{RECORD}: {message}.*Copy the whole folder again"):
            find_set(packed_set, tmp_path / "cache")
    record.write_text(content)
    (packed_set / "val.packed").unlink()
    with pytest.raises(PackedSetError, match=r"val\.packed: is missing"):
        find_set(packed_set, tmp_path / "cache")


def test_a_packed_set_has_one_layout_and_its_own_splits(packed_set, tmp_path):
    for wanted, option in ((Wanted("yolo"), "--data-format"), (Wanted(val_fraction=0.5), "--val-fraction")):
        with pytest.raises(ConversionError, match=option):
            find_set(packed_set, tmp_path / "cache", wanted)
