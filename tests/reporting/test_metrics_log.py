import json
import math
import os

import numpy as np
import pytest
import torch

from detection.reporting import MetricsError, MetricsLog, read_metrics


def train_record(iteration, **more):
    return {
        "kind": "train",
        "epoch": iteration // 10,
        "iteration": iteration,
        "loss": 1.0 / (iteration + 3),
    } | more


def val_record(iteration):
    return {"kind": "val", "epoch": iteration // 10, "iteration": iteration, "mAP": 0.1 + iteration / 1e7}


def write_run(path, first, stop):
    with MetricsLog(path) as log:
        for iteration in range(first, stop):
            log.write(train_record(iteration))
            if iteration % 10 == 9:
                log.write(val_record(iteration))


def test_floats_come_back_bit_equal(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 0.02 * 0.001, 123456789.123456789]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for number, value in enumerate(values):
            log.write(train_record(number, lr=value))
    read = [record["lr"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_a_record_is_in_the_file_as_soon_as_write_returns(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(train_record(0))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    log.close()


def test_nan_and_infinity_are_written_for_strict_json_readers_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = train_record(0, loss=math.nan, grad_norm=math.inf, lr=-math.inf)
    with MetricsLog(path) as log:
        log.write(written)
        log.write({"kind": "val", "iteration": 0, "per_class": {"a/b": math.nan, "c": 0.5}})

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


def test_numbers_of_numpy_and_torch_are_written_as_plain_numbers(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(train_record(0, a=np.float32(0.5), b=np.int64(3), c=torch.tensor(2.0), d=np.float64("nan")))
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["a"], record["b"], record["c"]) == (0.5, 3, 2.0)
    assert math.isnan(record["d"])


@pytest.mark.parametrize("torn", [b'{"kind": "train", "iter', b"{", b'{"kind": "train", "iteration": 20, "loss": 1.0}'])
def test_a_torn_last_line_is_dropped_when_the_file_is_opened_again(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 20)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_metrics(path)) == 22
    write_run(path, 20, 21)
    assert path.read_bytes()[: len(whole)] == whole
    assert [record["iteration"] for record in read_metrics(path, "train")] == list(range(21))


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 10_000)
    MetricsLog(path).close()
    assert path.read_bytes() == b""


def test_several_kills_and_resumes_give_the_file_of_the_uninterrupted_run(tmp_path):
    write_run(tmp_path / "whole.jsonl", 0, 60)
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 25)
    for resumed_at, killed_at in [(20, 47), (40, 44), (13, 60), (60, 60)]:
        with path.open("ab") as file:
            file.write(b'{"kind": "tr')
        with MetricsLog(path) as log:
            log.cut(train_from=resumed_at, val_from=resumed_at)
        write_run(path, resumed_at, killed_at)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_cut_has_its_own_limit_for_validations(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 30)
    with MetricsLog(path) as log:
        report = log.cut(train_from=20, val_from=19)
    assert (report.kept, report.dropped, report.unreadable) == (21, 12, 0)
    assert [record["iteration"] for record in read_metrics(path, "val")] == [9]
    assert [record["iteration"] for record in read_metrics(path, "train")] == list(range(20))


def test_writing_goes_on_in_the_same_log_after_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 5)
    with MetricsLog(path) as log:
        log.cut(3, 3)
        log.write(train_record(3))
        log.flush()
    assert [record["iteration"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_cut_removes_doubled_records_and_lines_that_are_no_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 10)
    whole = path.read_bytes()
    first_line = whole.splitlines(keepends=True)[0]
    path.write_bytes(whole + first_line + b"\0\0\0\n" + b"[1]\n" + b'{"kind": "train"}\n' + b"[" * 100_000 + b"\n")
    with MetricsLog(path) as log:
        report = log.cut(100, 100)
    assert (report.kept, report.dropped, report.unreadable) == (11, 1, 4)
    assert path.read_bytes() == whole


def test_a_cut_that_cannot_be_finished_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_run(path, 0, 10)
    whole = path.read_bytes()
    log = MetricsLog(path)

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        log.cut(5, 5)
    assert path.read_bytes() == whole


def test_a_record_that_fits_only_in_part_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(train_record(0))
    whole = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:7]))
    with pytest.raises(OSError, match="7 of"):
        log.write(train_record(1))
    monkeypatch.undo()
    assert path.read_bytes() == whole
    log.write(train_record(1))
    log.close()
    assert [record["iteration"] for record in read_metrics(path)] == [0, 1]


def test_read_metrics_names_file_and_line_of_what_is_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "iteration": 0}\nhello\n{"kind": "train", "iteration": 1}\n')
    with pytest.raises(MetricsError, match="metrics.jsonl, line 2"):
        read_metrics(path)
