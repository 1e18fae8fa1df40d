"""What is kept about files counts until one of them changes, in whatever way."""

import os
import time

import pytest

from data.cache.known_files import KnownFiles


@pytest.fixture
def known(tmp_path):
    (tmp_path / "cache").mkdir()
    return KnownFiles(tmp_path / "cache")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").write_text("first")
    time.sleep(0.1)  # as old as a file must be
    return tmp_path / "a.json", tmp_path / "images"


def keep(known, file, others=(), fact="digest"):
    with known.keeping(file, "what", others) as kept:
        kept.append(fact)


def rewrite(file):
    """The same size and time of modification."""
    times = file.stat()
    file.write_text("other")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, os.remove, lambda file: file.write_text("longer than before")])
def test_a_fact_counts_until_the_file_changes(known, files, change):
    file, _ = files
    assert known.recall(file, "what") is None
    keep(known, file)
    assert known.recall(file, "what") == "digest"
    assert known.recall(file, "something else") is None
    change(file)
    assert known.recall(file, "what") is None


def test_a_fact_counts_until_a_file_is_added_to_a_folder_that_it_depends_on(known, files):
    file, folder = files
    keep(known, file, [folder])
    assert known.recall(file, "what") == "digest"
    (folder / "1.jpg").write_text("")
    assert known.recall(file, "what") is None


def test_nothing_is_kept_of_a_file_that_has_just_changed_or_changes_meanwhile(known, files):
    file, _ = files
    rewrite(file)
    keep(known, file)
    assert known.recall(file, "what") is None
    time.sleep(0.1)
    with known.keeping(file, "what") as kept:
        rewrite(file)
        kept.append("digest of the old content")
    assert known.recall(file, "what") is None


def test_a_fact_ages_and_a_record_that_cannot_be_read_or_written_is_none(known, files, tmp_path):
    file, _ = files
    keep(known, file)
    assert known.recall(file, "what", seconds=60) == "digest"
    assert known.recall(file, "what", seconds=0) is None
    for record in (tmp_path / "cache").iterdir():
        record.write_text("{")
    assert known.recall(file, "what") is None
    keep(KnownFiles(file / "nowhere"), file)
    assert KnownFiles(file / "nowhere").recall(file, "what") is None
    keep(KnownFiles(tmp_path / "made" / "here"), file)
    assert KnownFiles(tmp_path / "made" / "here").recall(file, "what") == "digest"
