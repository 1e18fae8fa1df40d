"""What a whole run shows in TensorBoard beside its curves, and that a resume doubles none of it."""

from collections import defaultdict

from detection.reporting.event_files import event_files, parse_record, read_records


def steps_and_texts(output):
    steps, texts = defaultdict(list), {}
    for path in event_files(output / "tensorboard"):
        for record in read_records(path):
            event = parse_record(record)
            for value in event.summary.value:
                steps[value.tag].append(event.step)
                if value.tag.endswith("/text_summary"):
                    texts[value.tag.removesuffix("/text_summary")] = value.tensor.string_val[0].decode()
    return steps, texts


def test_configuration_and_schedule_are_there_as_text(finished):
    _, texts = steps_and_texts(finished)
    assert "| model.model | `tiny` |" in texts["configuration"]
    assert "| train.batch_size | `2` |" in texts["configuration"]
    assert "| processes | 1 |" in texts["configuration"]
    assert "SGD, lr 0.02" in texts["schedule"]


def test_each_validation_has_precision_recall_curves(finished):
    steps, _ = steps_and_texts(finished)
    assert steps["val/PR/all/IoU 0.50"] == steps["val/mAP"] == [2, 5]
    assert any(tag.startswith("val/PR/class/") for tag in steps)


def test_the_start_shows_eight_images_as_the_model_gets_them(start, tmp_path, monkeypatch):
    shown = []

    def count(images, **_):
        shown.append(len(images))
        return images[0]

    monkeypatch.setattr("detection.engine.metrics.images.mosaic", count)
    assert start(tmp_path / "run", "--limit-train-batches", "5", "--max-epochs", "1") == 0
    assert shown == [8]


def test_a_run_that_goes_on_after_its_end_shows_everything_once(start, tmp_path):
    output = tmp_path / "run"
    assert start(output, "--max-epochs", "1") == 0
    assert steps_and_texts(output)[0]["_hparams_/session_end_info"] == [3]
    assert start(output, "--resume") == 0
    assert start(output, "--resume") == 0  # everything is done already
    steps, _ = steps_and_texts(output)
    assert steps["_hparams_/session_end_info"] == [6]
    assert steps["val/PR/all/IoU 0.50"] == steps["val/detections/0"] == [2, 5]
    assert steps["train/lr"] == list(range(6))
    for tag in ("custom_scalars__config__", "train/batch/0"):
        assert steps[tag] == [0], tag
    assert len(steps["_hparams_/session_start_info"]) == 1  # as the last start had it
    # The number of epochs was another one: the new texts stand beside the old ones, and no third time.
    assert steps["configuration/text_summary"] == steps["schedule/text_summary"] == [0, 3]
