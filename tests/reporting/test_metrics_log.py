import io
import json
import math
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.reporting import MetricsError, MetricsLog, points_of, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def train_record(iteration, **more):
    record = {"kind": "train", "epoch": iteration // 10, "iteration": iteration, "loss": 1.0 / (iteration + 3)}
    return record | more


def write(path, *records):
    with closing(MetricsLog(path)) as log:
        for record in records:
            log.write(record)
            assert path.read_bytes().endswith(b"}\n")  # at once


def write_run(path, first, stop):
    for iteration in range(first, stop):
        val_record = {"kind": "val", "epoch": iteration // 10, "iteration": iteration, "mAP": 0.1 + iteration / 1e7}
        write(path, train_record(iteration), *([val_record] if iteration % 10 == 9 else []))


def cut(path, train_from, val_from):
    with closing(MetricsLog(path)) as log:
        log.cut(train_from, val_from)


def iterations(path, kind=None):
    return [record["iteration"] for record in read_metrics(path, kind)]


def test_floats_come_back_bit_equal(path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 0.02 * 0.001, 123456789.123456789]
    write(path, *(train_record(number, lr=value) for number, value in enumerate(values)))
    assert [record["lr"].hex() for record in read_metrics(path)] == [value.hex() for value in values]


def test_nan_and_infinity_are_written_for_strict_json_readers_and_read_back(path):
    written = train_record(0, loss=math.nan, grad_norm=math.inf, lr=-math.inf)
    write(path, written, {"kind": "val", "iteration": 0, "per_class": {"a/b": math.nan, "c": 0.5}})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    strict = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert strict[0]["loss"] is None
    assert strict[0]["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "lr": "-inf"}

    first, second = read_metrics(path)
    assert math.isnan(first.pop("loss"))
    assert first == {key: value for key, value in written.items() if key != "loss"}
    assert math.isnan(second["per_class"]["a/b"])
    assert second["per_class"]["c"] == 0.5


def test_nan_and_infinity_of_several_sets_are_read_back(path):
    write(path, {"kind": "val", "iteration": 0, "sets": {"a": {"mAP": math.inf, "per_class": {"x/y": -math.inf}}}})
    (record,) = read_metrics(path)
    assert record == {
        "kind": "val",
        "iteration": 0,
        "sets": {"a": {"mAP": math.inf, "per_class": {"x/y": -math.inf}}},
    }
    assert points_of(record) == {"val/a/mAP": math.inf, "val/a/AP/x/y": -math.inf}


def test_numbers_of_numpy_and_torch_are_written_as_plain_numbers(path):
    write(path, train_record(0, a=np.float32(0.5), b=np.int64(3), c=torch.tensor(2.0), d=np.float64("nan")))
    (record,) = read_metrics(path)
    assert (record["a"], record["b"], record["c"]) == (0.5, 3, 2.0)
    assert math.isnan(record["d"])


@pytest.mark.parametrize("torn", [b'{"kind": "train", "iter', b"{", b'{"kind": "train", "iteration": 20, "loss": 1.0}'])
def test_a_torn_last_line_is_dropped_when_the_file_is_opened_again(path, torn):
    write_run(path, 0, 20)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_metrics(path)) == 22
    write_run(path, 20, 21)
    assert path.read_bytes()[: len(whole)] == whole
    assert iterations(path, "train") == list(range(21))


def test_a_file_that_is_one_torn_line_becomes_empty(path):
    path.write_bytes(b"x" * 10_000)
    write(path)
    assert path.read_bytes() == b""


def test_several_kills_and_resumes_give_the_file_of_the_uninterrupted_run(path, tmp_path):
    write_run(tmp_path / "whole.jsonl", 0, 60)
    write_run(path, 0, 25)
    for resumed_at, killed_at in [(20, 47), (40, 44), (13, 60), (60, 60)]:
        with path.open("ab") as file:
            file.write(b'{"kind": "tr')
        cut(path, train_from=resumed_at, val_from=resumed_at)
        write_run(path, resumed_at, killed_at)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_cut_has_its_own_limit_for_validations_and_writing_goes_on_after_it(path):
    write_run(path, 0, 30)
    with closing(MetricsLog(path)) as log:
        log.cut(train_from=20, val_from=19)
        log.write(train_record(20))
        log.flush()
    assert iterations(path, "val") == [9]
    assert iterations(path, "train") == list(range(21))


def test_a_cut_removes_doubled_records_and_lines_that_are_no_records(path):
    write_run(path, 0, 10)
    whole = path.read_bytes()
    first_line = whole.splitlines(keepends=True)[0]
    path.write_bytes(whole + first_line + b"\0\0\0\n" + b"[1]\n" + b'{"kind": "train"}\n' + b"[" * 100_000 + b"\n")
    cut(path, 100, 100)
    assert path.read_bytes() == whole


def test_a_cut_that_cannot_be_finished_leaves_the_old_file(path, monkeypatch):
    write_run(path, 0, 10)
    whole = path.read_bytes()

    def fail(descriptor):
        raise OSError("no space left on device")

    path.write_bytes(whole + b"no record\n" + whole.splitlines(keepends=True)[0].replace(b": 0", b": 10"))
    whole = path.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        cut(path, 100, 100)
    assert path.read_bytes() == whole


def test_a_record_that_fits_only_in_part_is_taken_back(path, monkeypatch):
    class Full(io.FileIO):
        def write(self, content):
            return super().write(content[:7])

    write(path, train_record(0))
    whole = path.read_bytes()
    monkeypatch.setattr(Path, "open", lambda self, mode, **_: Full(self, mode.replace("b", "")))
    with pytest.raises(OSError, match="7 of"):
        write(path, train_record(1))
    monkeypatch.undo()
    assert path.read_bytes() == whole
    write(path, train_record(1))
    assert iterations(path) == [0, 1]


def test_read_metrics_names_file_and_line_of_what_is_no_record(path):
    path.write_text('{"kind": "train", "iteration": 0}\nhello\n{"kind": "train", "iteration": 1}\n')
    with pytest.raises(MetricsError, match="metrics.jsonl, line 2"):
        read_metrics(path)


def counted(monkeypatch):
    """A list that gets the number of bytes of each read of any file."""
    read = []

    class Counting(io.BufferedReader):
        def read(self, *size):
            read.append(len(content := super().read(*size)))
            return content

        def readline(self, *size):
            read.append(len(content := super().readline(*size)))
            return content

    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **k: Counting(io.FileIO(self)) if mode == "rb" else plain(self, mode, **k)
    )
    return read


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_resume_of_a_long_run_reads_the_end_and_the_validations_and_finds_the_same(path, monkeypatch, block):
    """Whatever lies across the borders of the blocks that are read."""
    with path.open("wb") as file:
        for iteration in range(20_000):
            file.write((json.dumps(train_record(iteration, note="x" * block)) + "\n").encode())
            if iteration % 5_000 == 4_999:
                file.write(
                    (json.dumps({"kind": "val", "iteration": iteration, "mAP": iteration / 1e5}) + "\n").encode()
                )
    whole = read_metrics(path)
    with closing(MetricsLog(path)) as log:
        assert log.validations() == [record for record in whole if record["kind"] == "val"]
    read = counted(monkeypatch)
    with closing(MetricsLog(path)) as log:
        log.cut(19_990, 19_990)
        assert log.validations() == [record for record in whole if record["kind"] == "val"][:3]
        assert list(log.since(19_980, 4_999)) == [
            record
            for record in whole[:-1]
            if record["iteration"] > {"train": 19_980, "val": 4_999}[record["kind"]] and record["iteration"] < 19_990
        ]
    assert sum(read) < path.stat().st_size / 5
    monkeypatch.undo()
    assert read_metrics(path) == [record for record in whole if record["iteration"] < 19_990]


def test_an_index_that_does_not_fit_is_made_again(path):
    write_run(path, 0, 30)
    index = path.with_name("metrics.jsonl.index")
    for damaged in (
        b"",
        b"x" * 7,
        np.array([10**9, 3]).tobytes(),
        np.array([0, 5]).tobytes(),
        np.array([-4]).tobytes(),
    ):
        index.write_bytes(damaged)
        with closing(MetricsLog(path)) as log:
            assert [record["iteration"] for record in log.validations()] == [9, 19, 29]
    cut(path, 15, 15)
    write_run(path, 15, 40)
    with closing(MetricsLog(path)) as log:
        assert [record["iteration"] for record in log.validations()] == [9, 19, 29, 39]
