import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2

from detection.reporting import TensorBoardLog
from detection.reporting.event_files import event_files, parse_record, read_records

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")
NO_LIMITS = {"scalars": 0, "images": 0, "tensors": 0}
RECALL = np.linspace(1, 0, 101)
IMAGE = np.full((8, 12, 3), 200, dtype=np.uint8)


def train_record(iteration):
    record = {"kind": "train", "epoch": iteration // 10, "iteration": iteration, "lr": 0.5 / (iteration + 1)}
    return record | {"loss": 2.0 + iteration, "grad_norm": 3.0} | dict.fromkeys(LOSSES, 0.25 * iteration)


def val_record(iteration):
    return {
        "kind": "val",
        "epoch": iteration // 10,
        "iteration": iteration,
        "mAP": iteration / 100,
        "mAP_s": -1.0,
        "AR_100": 0.5,
        "per_class": {"cat": 0.25, "dog": -1.0},
        "notes": ["no small objects"],
    }


def write_segment(directory, first, stop, *, val_from=None, configuration="lr: 0.5"):
    log = TensorBoardLog(directory, first_iteration=first, val_from=first if val_from is None else val_from)
    log.text("configuration", configuration)
    log.hparams({"lr": 0.5, "model": "r50", "amp": None})
    if first == 0:
        log.images(0, [IMAGE], tag="train/augmented")
    if val_from is not None and val_from < first:
        log.validation(val_record(val_from))
        log.images(val_from, [IMAGE, IMAGE])
        log.precision_recall(val_from, {"class/cat": (RECALL, RECALL)})
    for iteration in range(first, stop):
        log.train(train_record(iteration))
        if iteration % 10 == 9:
            log.validation(val_record(iteration))
            log.images(iteration, [IMAGE, IMAGE])
            log.precision_recall(iteration, {"class/cat": (RECALL, RECALL)})
    log.finish(stop)
    log.flush()
    return log


def steps_on_disk(directory):
    """tag -> steps, as a reader sees them that knows nothing of restarts."""
    steps = defaultdict(list)
    for path in event_files(directory):
        for record in read_records(path):
            event = parse_record(record)
            for value in event.summary.value:
                steps[value.tag].append(event.step)
    return steps


def read_back(directory, *, purge):
    accumulator = EventAccumulator(str(directory), size_guidance=NO_LIMITS, purge_orphaned_data=purge)
    accumulator.Reload()
    return accumulator


def assert_one_whole_run(directory, num_iterations):
    everything = list(range(num_iterations))
    validations = [iteration for iteration in everything if iteration % 10 == 9]
    on_disk = steps_on_disk(directory)
    for tag in ("train/lr", "train/loss", *(f"train/{name}" for name in LOSSES)):
        assert on_disk[tag] == everything, tag
    for tag in ("val/mAP", "val/AP/cat", "val/detections/0", "val/detections/1", "val/PR/class/cat"):
        assert on_disk[tag] == validations, tag
    once = ("configuration/text_summary", "custom_scalars__config__", "_hparams_/experiment", "train/augmented/0")
    for tag in once:
        assert on_disk[tag] == [0], tag
    assert on_disk["_hparams_/session_end_info"] == [num_iterations]
    for purge in (False, True):
        accumulator = read_back(directory, purge=purge)
        curve = accumulator.Scalars("train/lr")
        assert [point.step for point in curve] == everything
        assert [point.value for point in curve] == [np.float32(0.5 / (step + 1)) for step in everything]
        assert [point.step for point in accumulator.Scalars("val/mAP")] == validations
        assert [image.step for image in accumulator.Images("val/detections/1")] == validations


def test_a_run_shows_every_figure_under_its_tag(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    accumulator = read_back(tmp_path, purge=True)
    assert set(accumulator.Tags()["scalars"]) == {
        "train/lr",
        "train/loss",
        *(f"train/{name}" for name in LOSSES),
        "train/grad_norm",
        "val/mAP",
        "val/AR_100",
        "val/AP/cat",
    }
    assert accumulator.Scalars("val/mAP")[0].step == 9
    assert accumulator.Scalars("val/AP/cat")[0].value == 0.25
    assert_one_whole_run(tmp_path, 10)


def test_a_figure_of_minus_one_gets_no_point(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    steps = steps_on_disk(tmp_path)
    assert "val/mAP_s" not in steps
    assert "val/AP/dog" not in steps


def test_points_past_the_checkpoint_are_on_disk_once_after_several_resumes(tmp_path):
    write_segment(tmp_path, 0, 25)
    write_segment(tmp_path, 20, 47)
    write_segment(tmp_path, 40, 44)
    write_segment(tmp_path, 13, 52)
    write_segment(tmp_path, 52, 60).close()
    assert_one_whole_run(tmp_path, 60)


def test_a_validation_that_the_checkpoint_does_not_hold_is_drawn_again_and_once(tmp_path):
    write_segment(tmp_path, 0, 30)
    write_segment(tmp_path, 30, 40, val_from=29).close()
    assert_one_whole_run(tmp_path, 40)


def test_a_validation_before_the_checkpoint_stays(tmp_path):
    write_segment(tmp_path, 0, 30)
    write_segment(tmp_path, 30, 40, val_from=30).close()
    assert_one_whole_run(tmp_path, 40)


def test_a_resume_from_the_very_start_leaves_nothing_of_before(tmp_path):
    write_segment(tmp_path, 0, 25)
    write_segment(tmp_path, 0, 30).close()
    assert_one_whole_run(tmp_path, 30)


def test_twelve_resumes_in_a_row_keep_the_order_of_the_files(tmp_path):
    for resumed_at in range(0, 120, 10):
        write_segment(tmp_path, resumed_at, resumed_at + 10).close()
    assert_one_whole_run(tmp_path, 120)


@pytest.mark.parametrize("num_bytes_lost", [1, 4, 9, 40])
def test_a_torn_last_record_does_not_hide_what_follows(tmp_path, num_bytes_lost):
    write_segment(tmp_path, 0, 25).close()
    (path,) = event_files(tmp_path)
    os.truncate(path, path.stat().st_size - num_bytes_lost)
    write_segment(tmp_path, 20, 30).close()
    assert_one_whole_run(tmp_path, 30)


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\x18" + b"\0" * 30, b"rubbish" * 20])
def test_rubbish_after_the_last_record_is_removed(tmp_path, tail):
    write_segment(tmp_path, 0, 20).close()
    (path,) = event_files(tmp_path)
    with path.open("ab") as file:
        file.write(tail)
    write_segment(tmp_path, 20, 30).close()
    assert_one_whole_run(tmp_path, 30)


def test_a_last_record_with_a_wrong_checksum_is_not_read(tmp_path):
    write_segment(tmp_path, 0, 25).close()
    (path,) = event_files(tmp_path)
    num_records = len(list(read_records(path)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # in a value: the message can still be parsed
    path.write_bytes(content)
    assert len(list(read_records(path))) == num_records - 1
    write_segment(tmp_path, 20, 30).close()
    assert_one_whole_run(tmp_path, 30)


def test_a_kill_while_the_files_were_cut_leaves_nothing_behind(tmp_path, monkeypatch):
    write_segment(tmp_path, 0, 25).close()
    write_segment(tmp_path, 20, 37).close()
    before = steps_on_disk(tmp_path)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        TensorBoardLog(tmp_path, first_iteration=13, val_from=13)
    monkeypatch.undo()
    assert steps_on_disk(tmp_path) == before
    write_segment(tmp_path, 13, 40).close()
    assert_one_whole_run(tmp_path, 40)
    assert [path for path in tmp_path.iterdir() if "tfevents" not in path.name] == []


def test_points_that_are_there_twice_are_dropped(tmp_path):
    write_segment(tmp_path, 0, 20).close()
    (path,) = event_files(tmp_path)
    copy = path.with_name(path.name + ".copy")
    copy.write_bytes(path.read_bytes())
    write_segment(tmp_path, 20, 30).close()
    assert_one_whole_run(tmp_path, 30)


def test_a_clock_that_went_back_does_not_put_the_resumed_part_first(tmp_path):
    for resumed_at in (0, 20, 40):
        write_segment(tmp_path, resumed_at, resumed_at + 20).close()
        for path in reversed(event_files(tmp_path)):
            fields = path.name.split(".")
            fields[3] = f"{int(fields[3]) + 3600:010d}"
            path.rename(tmp_path / ".".join(fields))
    write_segment(tmp_path, 60, 80).close()
    assert_one_whole_run(tmp_path, 80)


def test_files_from_machines_with_clocks_ahead_keep_their_order(tmp_path):
    now = int(time.time())
    hosts = {now - 50: "c", now + 100: "b", now + 200: "a"}
    for seconds, host in hosts.items():
        write_segment(tmp_path / host, 0, 1).close()
        (path,) = event_files(tmp_path / host)
        path.rename(tmp_path / f"events.out.tfevents.{seconds:010d}.{host}.1.0")
    TensorBoardLog(tmp_path, first_iteration=5, val_from=5).close()
    assert [path.name.split(".")[4] for path in event_files(tmp_path)[:3]] == ["c", "b", "a"]


def test_a_tensorboard_that_is_open_forgets_what_a_resume_took_back(tmp_path, monkeypatch):
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 5 * len(event_files(tmp_path)))  # resumes come seconds apart
    open_reader = PluginEventAccumulator(str(tmp_path), tensor_size_guidance={"scalars": 0})

    def shown_steps():
        open_reader.Reload()
        return [tensor.step for tensor in open_reader.Tensors("train/lr")]

    write_segment(tmp_path, 0, 25)
    assert shown_steps() == list(range(25))
    write_segment(tmp_path, 20, 30)
    assert shown_steps() == list(range(30))
    write_segment(tmp_path, 13, 27)
    assert shown_steps() == list(range(27))
    write_segment(tmp_path, 25, 40)
    assert shown_steps() == list(range(40))


def test_a_text_that_changed_on_resume_is_shown_beside_the_old_one(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    write_segment(tmp_path, 10, 20, configuration="lr: 0.1").close()
    write_segment(tmp_path, 20, 30, configuration="lr: 0.1").close()
    texts = read_back(tmp_path, purge=True).Tensors("configuration/text_summary")
    assert [(text.step, text.tensor_proto.string_val[0]) for text in texts] == [
        (0, b"lr: 0.5"),
        (10, b"lr: 0.1"),
    ]


def test_learning_rate_and_map_stand_on_one_page_of_the_custom_layout(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    (tensor,) = read_back(tmp_path, purge=True).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    overview = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert overview["learning rate"] == ["^train/lr$"]
    assert overview["mAP"] == ["^val/mAP$"]


def test_a_image_comes_back_as_it_was_given(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    image = read_back(tmp_path, purge=True).Images("val/detections/0")[0]
    assert (image.height, image.width) == (8, 12)
    assert image.encoded_image_string[:3] == b"\xff\xd8\xff"


def test_precision_recall_curves_are_kept_with_their_values(tmp_path):
    precision, recall = np.linspace(0.5, 1, 101), RECALL
    with TensorBoardLog(tmp_path) as log:
        log.precision_recall(9, {"cat": (precision, recall)})
    (tensor,) = read_back(tmp_path, purge=True).Tensors("val/PR/cat")
    values = np.array(tensor.tensor_proto.float_val).reshape(6, 101)
    np.testing.assert_allclose(values[4:], [precision, recall], rtol=1e-6)


def test_what_was_flushed_outlives_a_kill(tmp_path):
    program = textwrap.dedent("""
        import sys, time
        from detection.reporting import TensorBoardLog
        log = TensorBoardLog(sys.argv[1])
        for iteration in range(500):
            log.train({"kind": "train", "iteration": iteration, "lr": 0.5, "loss": 1.0})
        log.flush()
        print("flushed", flush=True)
        for iteration in range(500, 10**9):
            log.train({"kind": "train", "iteration": iteration, "lr": 0.5, "loss": 1.0})
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "flushed\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    log = TensorBoardLog(tmp_path, first_iteration=500, val_from=500)
    log.train({"kind": "train", "iteration": 500, "lr": 0.5, "loss": 1.0})
    log.close()
    assert steps_on_disk(tmp_path)["train/lr"] == list(range(501))
