import errno
import fcntl
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import data.cache.packed_file
import data.coco.fields
from data.cache.packed_file import MAGIC, Packed, read_packed, write_packed
from data.coco.annotations import AnnotationError, read_coco, share_coco, shared_coco
from data.errors import DataError
from data.loading.dataset import kept_boxes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "instances.json"
    store(path, width=100)
    return path


def store(path, width):
    images = [{"id": 5 + i, "file_name": f"ä{i}.jpg", "width": width, "height": 90} for i in range(7)]
    annotations = [
        {"id": i, "image_id": 5 + i % 6, "category_id": 3 + i % 2, "bbox": [i, 2, 30, 40.25], "iscrowd": i % 5 == 0}
        for i in range(20)
    ]
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dög"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.fixture
def parses(monkeypatch):
    """The calls of the JSON parser."""
    calls = []
    real = data.coco.fields.parse_coco
    monkeypatch.setattr(data.coco.fields, "parse_coco", lambda path, masks: (calls.append(path), real(path, masks))[1])
    return calls


def packed_file(cache):
    (path,) = cache.glob("*.packed")
    return path


def test_the_second_reading_maps_what_the_first_packed(file, tmp_path, parses):
    plain = read_coco(file)
    first = read_coco(file, cache_dir=tmp_path / "cache")
    second = read_coco(file, cache_dir=tmp_path / "cache")
    assert len(parses) == 2
    for annotations in (first, second):
        assert annotations.digest() == plain.digest()
        assert annotations.findings == plain.findings
        assert annotations.source == plain.source
        assert annotations.file_name(3) == "ä3.jpg"
        assert annotations.training_view().digest() == plain.training_view().digest()
    assert len(plain.findings) == 3
    with pytest.raises(ValueError, match="read-only"):
        second.boxes_xywh[0, 0] = 1


def test_class_lists_are_applied_after_the_cache(file, tmp_path, parses):
    read_coco(file, cache_dir=tmp_path / "cache")
    annotations = read_coco(file, ["dög", "cat"], cache_dir=tmp_path / "cache")
    assert len(parses) == 1
    assert annotations.digest() == read_coco(file, ["dög", "cat"]).digest()
    with pytest.raises(AnnotationError, match="lacks 'horse'"):
        read_coco(file, ["cat", "dög", "horse"], cache_dir=tmp_path / "cache")


def test_a_changed_file_is_packed_anew(file, tmp_path, parses):
    read_coco(file, cache_dir=tmp_path / "cache")
    times = file.stat()
    store(file, width=101)  # of equal length
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # and made to look as old
    assert read_coco(file, cache_dir=tmp_path / "cache").widths.tolist() == [101] * 7
    assert len(parses) == 2


def test_files_of_one_name_in_two_folders_do_not_share_a_cache_file(file, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / file.name
    store(other, width=222)
    assert read_coco(file, cache_dir=tmp_path / "cache").widths[0] == 100
    assert read_coco(other, cache_dir=tmp_path / "cache").widths[0] == 222
    assert read_coco(file, cache_dir=tmp_path / "cache").widths[0] == 100


def test_copies_of_a_file_share_a_cache_file_and_findings_name_the_copy_that_is_read(file, tmp_path, parses):
    read_coco(file, cache_dir=tmp_path / "cache")
    (tmp_path / "other_disk").mkdir()
    copy = shutil.copyfile(file, tmp_path / "other_disk" / "copy.json")
    os.utime(copy, ns=(1, 1))
    annotations = read_coco(copy, cache_dir=tmp_path / "cache")
    assert len(parses) == 1
    assert packed_file(tmp_path / "cache").is_file()
    assert annotations.source == str(copy)
    assert annotations.findings == read_coco(copy).findings
    assert len(annotations.findings) == 3 and all(str(copy) in finding.text for finding in annotations.findings)


def test_a_file_that_changes_while_it_is_read_is_an_error_and_not_kept(file, tmp_path, monkeypatch):
    real = data.coco.fields.parse_coco
    monkeypatch.setattr(data.coco.fields, "parse_coco", lambda path, masks: (real(path), store(path, width=101))[0])
    with pytest.raises(DataError, match=r"instances.json: was changed while it was read"):
        read_coco(file, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.packed")) == []


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:]


def flip_header(content):
    return content[: len(MAGIC) + 3] + b"\xff" + content[len(MAGIC) + 4 :]


@pytest.mark.parametrize(
    "damage", [cut, flip, flip_header, lambda _: b"", lambda _: b"x", lambda _: b"\0" * 9000, lambda c: c + b"\0"]
)
def test_a_torn_or_foreign_cache_file_is_made_anew(file, tmp_path, parses, damage):
    expected = read_coco(file, cache_dir=tmp_path / "cache").digest()
    cached = packed_file(tmp_path / "cache")
    damaged = damage(cached.read_bytes())
    cached.write_bytes(damaged)
    assert read_coco(file, cache_dir=tmp_path / "cache").digest() == expected
    assert len(parses) == 2
    assert packed_file(tmp_path / "cache").read_bytes() != damaged
    read_coco(file, cache_dir=tmp_path / "cache")
    assert len(parses) == 2


def test_any_writing_to_a_file_known_to_be_sound_is_noticed(file, tmp_path, parses):
    expected = read_coco(file, cache_dir=tmp_path / "cache").digest()
    time.sleep(0.1)
    read_coco(file, cache_dir=tmp_path / "cache")  # keeps the digest of the annotation file
    annotations = read_coco(file, cache_dir=tmp_path / "cache")
    assert annotations.digest() == expected and len(parses) == 1
    cached = packed_file(tmp_path / "cache")
    content, times = bytearray(cached.read_bytes()), cached.stat()
    content[70] ^= 1  # in an array
    cached.write_bytes(content)
    os.utime(cached, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read_coco(file, cache_dir=tmp_path / "cache").digest() == expected
    assert len(parses) == 2


def test_every_truncation_of_a_small_file_is_recognized(tmp_path):
    path = tmp_path / "a.packed"
    write_packed(path, Packed({"a": np.arange(5), "b": np.zeros((0, 4), dtype=np.float32)}, {"n": 1}), "key")
    whole = path.read_bytes()

    def read(key):
        with path.open("rb") as file:
            return read_packed(file, key)

    packed = read("key")
    assert packed.arrays["a"].tolist() == [0, 1, 2, 3, 4]
    assert packed.arrays["b"].shape == (0, 4)
    assert packed.facts == {"n": 1}
    assert read("other") is None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert read("key") is None


def test_a_folder_that_cannot_be_written_to_is_a_finding_and_no_error(file, tmp_path):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    annotations = read_coco(file, cache_dir=tmp_path / "occupied")
    assert annotations.digest() == read_coco(file).digest()
    assert annotations.findings[-1].code == "no-cache"


def test_faults_of_the_annotation_file_are_reported_as_without_a_cache(file, tmp_path):
    file.write_text("{")
    with pytest.raises(AnnotationError, match="not JSON"):
        read_coco(file, cache_dir=tmp_path / "cache")
    with pytest.raises(AnnotationError, match="no such file"):
        read_coco(tmp_path / "none.json", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.packed")) == []


def test_a_failed_write_leaves_no_part_behind(file, tmp_path, monkeypatch, parses):
    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    annotations = read_coco(file, cache_dir=tmp_path / "cache")
    assert len(annotations) == 7
    assert len(parses) == 1
    assert "No space left" in annotations.findings[-1].text
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock", ".known"}


def refusing(error):
    def flock(_file, _operation):
        raise OSError(error, os.strerror(error))

    return flock


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_a_cache_all_the_same(file, tmp_path, monkeypatch, parses, error):
    monkeypatch.setattr(fcntl, "flock", refusing(error))
    first = read_coco(file, cache_dir=tmp_path / "cache")
    assert "no-cache" not in {finding.code for finding in first.findings}
    assert read_coco(file, cache_dir=tmp_path / "cache").digest() == first.digest()
    assert len(parses) == 1


def _in_another_process(action, *arguments):
    process = multiprocessing.get_context("fork").Process(target=action, args=arguments)
    process.start()
    return process


def _pack_for_ever(file, cache, begun):
    def parse(_path, _masks):
        begun.set()
        time.sleep(600)

    data.coco.fields.parse_coco = parse
    read_coco(file, cache_dir=cache)


@pytest.fixture
def builder(file, tmp_path):
    """A process that packs the file and does not come to an end."""
    begun = multiprocessing.get_context("fork").Event()
    process = _in_another_process(_pack_for_ever, file, tmp_path / "cache", begun)
    assert begun.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_killed_builder_keeps_nobody_waiting(file, tmp_path, builder, parses, capfd):
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    assert len(read_coco(file, cache_dir=tmp_path / "cache")) == 7
    assert len(parses) == 1
    assert capfd.readouterr().err == ""


def test_a_builder_that_does_not_end_is_named_and_waited_for_no_longer_than_the_limit(
    file, tmp_path, builder, parses, capfd, monkeypatch
):
    monkeypatch.setattr(data.cache.packed_file, "PATIENCE_SECONDS", 0.3)
    assert len(read_coco(file, cache_dir=tmp_path / "cache")) == 7
    assert len(parses) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"{file}: process {builder.pid} on {platform.node()} packs it (lock: {tmp_path / 'cache'}" in said
    assert packed_file(tmp_path / "cache").is_file()


def _report_shared(file, words, queue):
    calls = []
    real = data.coco.fields.parse_coco
    data.coco.fields.parse_coco = lambda path, masks: (calls.append(path), real(path, masks))[1]
    annotations = shared_coco(file, words)
    queue.put((annotations.digest(), annotations.source, annotations.findings, len(calls)))


@pytest.mark.skipif(sys.platform != "linux", reason="another process's files have no names")
@pytest.mark.parametrize("folder", ["cache", "occupied"])
def test_another_process_maps_what_this_one_has_with_and_without_a_cache(file, tmp_path, folder):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    plain = read_coco(file)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    with share_coco(file, tmp_path / folder) as (annotations, words):
        assert annotations.digest() == plain.digest()
        process = _in_another_process(_report_shared, file, words, queue)
        assert queue.get() == (plain.digest(), str(file), plain.findings, 0)
        process.join(30)
    assert annotations.digest() == plain.digest()  # the mapping outlives the file
    assert shared_coco(file, words) is None


def test_words_of_another_container_lead_to_nothing(file, tmp_path):
    with share_coco(file, tmp_path / "cache") as (_, (path, key, folder)):
        assert shared_coco(file, (path, "another key", folder)) is None
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, file, os.devnull):
        assert shared_coco(file, (str(other), key, folder)) is None


def _count_parses(file, cache, barrier, queue):
    calls = []
    real = data.coco.fields.parse_coco
    data.coco.fields.parse_coco = lambda path, masks: (calls.append(path), real(path, masks))[1]
    barrier.wait()
    queue.put((len(calls), read_coco(file, cache_dir=cache).digest(), len(calls)))


def test_processes_that_start_at_once_pack_once(file, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.SimpleQueue()
    arguments = (file, tmp_path / "cache", barrier, queue)
    processes = [context.Process(target=_count_parses, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join(30)
    assert sum(after - before for before, _, after in results) == 1
    assert len({digest for _, digest, _ in results}) == 1


def _report_view(file, words, masks, queue):
    annotations = shared_coco(file, words)
    view = annotations.training_view()
    boxes = kept_boxes(view, masks)
    arrays = [view.boxes_xywh, view.image_ids, view.file_name_bytes, *boxes.values()]
    queue.put((view.digest(), boxes["boxes_xyxy"].tolist(), [array.flags.owndata for array in arrays]))


@pytest.mark.parametrize("classes", [None, ["dög"]])
def test_another_process_maps_the_training_view_and_its_boxes(file, tmp_path, classes):
    def chosen(annotations):
        return annotations if classes is None else annotations.of_classes(classes)

    plain = chosen(read_coco(file)).training_view()
    plain_boxes = kept_boxes(plain, masks=False)
    with share_coco(file, tmp_path / "cache") as (annotations, words):
        for _ in range(2):  # made, then found
            view = chosen(annotations).training_view()
            boxes = kept_boxes(view, masks=False)
            assert view.digest() == plain.digest()
            assert view.file_name(2) == plain.file_name(2) and view.findings == plain.findings
            for name, array in boxes.items():
                assert np.array_equal(array, plain_boxes[name]) and not array.flags.writeable
        assert not view.labels.flags.writeable
        again = replace(view, findings=())
        assert again.stored is None
        if classes is None:
            queue = multiprocessing.get_context("fork").SimpleQueue()
            process = _in_another_process(_report_view, file, words, False, queue)
            digest, there, owned = queue.get()
            process.join(30)
            assert (digest, there) == (plain.digest(), plain_boxes["boxes_xyxy"].tolist()) and not any(owned)
