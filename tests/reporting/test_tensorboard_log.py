import resource
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

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


def write_segment(directory, first, stop, *, val_from=None, configuration="lr: 0.5", lr=0.5):
    log = TensorBoardLog(directory, first_iteration=first, val_from=first if val_from is None else val_from)
    log.text("configuration", configuration)
    log.hparams({"lr": lr, "model": "r50", "amp": None})
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
    for tag in ("configuration/text_summary", "custom_scalars__config__", "train/augmented/0"):
        assert on_disk[tag] == [0], tag
    for tag in ("_hparams_/experiment", "_hparams_/session_start_info"):
        assert len(on_disk[tag]) == 1, tag
    assert on_disk["_hparams_/session_end_info"] == [num_iterations]
    for purge in (False, True):
        accumulator = read_back(directory, purge=purge)
        curve = accumulator.Scalars("train/lr")
        assert [point.step for point in curve] == everything
        assert [point.value for point in curve] == [np.float32(0.5 / (step + 1)) for step in everything]
        assert [point.step for point in accumulator.Scalars("val/mAP")] == validations
        assert [image.step for image in accumulator.Images("val/detections/1")] == validations


def test_a_run_shows_every_figure_but_undefined_ones_under_its_tag(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    accumulator = read_back(tmp_path, purge=True)
    train_tags = {f"train/{name}" for name in ("lr", "loss", "grad_norm", *LOSSES)}
    assert set(accumulator.Tags()["scalars"]) == train_tags | {"val/mAP", "val/AR_100", "val/AP/cat"}
    assert accumulator.Scalars("val/mAP")[0].step == 9
    assert accumulator.Scalars("val/AP/cat")[0].value == 0.25
    image = accumulator.Images("val/detections/0")[0]
    assert (image.height, image.width, image.encoded_image_string[:3]) == (8, 12, b"\xff\xd8\xff")
    assert_one_whole_run(tmp_path, 10)


@pytest.mark.parametrize(
    "segments",
    [
        pytest.param([(0, 25), (20, 47), (40, 44), (13, 52), (52, 60)], id="several resumes"),
        pytest.param([(0, 30), (30, 40, 29)], id="a validation that the checkpoint does not hold"),
        pytest.param([(0, 30), (30, 40, 30)], id="a validation before the checkpoint"),
        pytest.param([(0, 25), (0, 30)], id="from the very start"),
        pytest.param([(first, first + 10) for first in range(0, 120, 10)], id="twelve in a row"),
    ],
)
def test_after_resumes_every_point_is_on_disk_once_and_in_order(tmp_path, segments):
    for first, stop, *val_from in segments:
        write_segment(tmp_path, first, stop, val_from=val_from[0] if val_from else None).close()
    assert_one_whole_run(tmp_path, segments[-1][1])


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(lambda content, lost=lost: content[:-lost], id=f"{lost} bytes lost") for lost in (1, 4, 9, 40)),
        # In a value: the message can still be parsed, and only its checksum is wrong.
        pytest.param(lambda content: content[:-8] + bytes([content[-8] ^ 1]) + content[-7:], id="a bit flipped"),
        pytest.param(lambda content: content + b"\0" * 100, id="zeros"),
        pytest.param(lambda content: content + b"\x18" + b"\0" * 30, id="a length and zeros"),
        pytest.param(lambda content: content + b"rubbish" * 20, id="rubbish"),
    ],
)
def test_a_damaged_end_does_not_hide_what_follows(tmp_path, damage):
    write_segment(tmp_path, 0, 25).close()
    (path,) = event_files(tmp_path)
    whole = list(read_records(path))
    path.write_bytes(damage(path.read_bytes()))
    read = list(read_records(path))
    assert read == (whole[:-1] if path.stat().st_size <= sum(map(len, whole)) else whole)
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


def test_a_full_disk_is_the_callers_error_and_a_log_opened_anew_continues(tmp_path):
    log = write_segment(tmp_path, 0, 10)
    (path,) = event_files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))  # less than the next record
    try:
        with pytest.raises(OSError, match="too large"):
            log.train(train_record(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert path.stat().st_size > sum(map(len, read_records(path)))  # torn
    write_segment(tmp_path, 10, 20).close()
    assert_one_whole_run(tmp_path, 20)


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


@pytest.mark.parametrize("purge", [False, True])
def test_the_hparams_page_has_the_settings_of_the_last_start(tmp_path, purge):
    for first, lr in ((0, 0.5), (10, 0.25), (15, 0.125)):
        write_segment(tmp_path, first, first + 10, lr=lr).close()
    # What the page reads; of several records TensorBoard keeps the first alone.
    metadata = read_back(tmp_path, purge=purge).SummaryMetadata("_hparams_/session_start_info")
    settings = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert settings["lr"].number_value == 0.125 and settings["model"].string_value == "r50"


def test_learning_rate_and_map_stand_on_one_page_of_the_custom_layout(tmp_path):
    write_segment(tmp_path, 0, 10).close()
    (tensor,) = read_back(tmp_path, purge=True).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    overview = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert overview["learning rate"] == ["^train/lr$"]
    assert overview["mAP"] == ["^val/mAP$"]


def test_precision_recall_curves_are_kept_with_their_values(tmp_path):
    precision, recall = np.linspace(0.5, 1, 101), RECALL
    with closing(TensorBoardLog(tmp_path)) as log:
        log.precision_recall(9, {"cat": (precision, recall)})
    (tensor,) = read_back(tmp_path, purge=True).Tensors("val/PR/cat")
    values = np.array(tensor.tensor_proto.float_val).reshape(6, 101)
    np.testing.assert_allclose(values[4:], [precision, recall], rtol=1e-6)


@pytest.mark.slow
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
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "flushed\n"
        process.kill()
    with closing(TensorBoardLog(tmp_path, first_iteration=500, val_from=500)) as log:
        log.train({"kind": "train", "iteration": 500, "lr": 0.5, "loss": 1.0})
    assert steps_on_disk(tmp_path)["train/lr"] == list(range(501))
