"""--val-only and --test-only."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from detection.config import parse_arguments
from detection.engine import RunError, run
from detection.models import load_detector
from detection.models.weights.stored import stripped_file


@pytest.fixture(scope="module")
def weights(finished: Path, tmp_path_factory: pytest.TempPathFactory, load) -> Path:
    """A stripped file of the finished training's weights."""
    file = tmp_path_factory.mktemp("weights") / "detector.pt"
    state = load(finished / "checkpoints" / "last.pt")
    described = {name: state[name] for name in ("model_config", "class_names", "category_ids", "preprocessing")}
    torch.save(stripped_file(state["model"], **described), file)
    return file


def test_a_validation_alone_gives_the_figures_of_the_trainings_last(start, finished, tmp_path, records_of, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert start(tmp_path / "run", "--val-only", "--resume") == 0
    metrics = json.loads((tmp_path / "run" / "metrics_val.json").read_text())
    trained = records_of(finished, "val")[-1]
    for name in ("mAP", "mAP_50", "AR_100", "per_class", "num_images", "loss", "loss_rpn_cls", "loss_bbox"):
        assert metrics[name] == trained[name]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    first, second = ((folder / "detections_val.json").read_text() for folder in (finished, tmp_path / "run"))
    assert first == second
    assert "iteration 6" in capsys.readouterr().out


def test_weights_that_are_not_finite_detect_nothing_and_are_told_once(start, finished, tmp_path, load, capsys):
    state = load(finished / "checkpoints" / "last.pt")
    state["model"]["rpn.conv.weight"].fill_(torch.nan)
    torch.save(state, tmp_path / "nan.pt")
    words = ["--val-only", "--resume", tmp_path / "nan.pt", "--limit-val-batches", "3"]
    assert start(tmp_path / "out", *words) == 0
    assert json.loads((tmp_path / "out" / "detections_val.json").read_text()) == []
    assert json.loads((tmp_path / "out" / "metrics_val.json").read_text())["nonfinite_images"] == 6
    assert capsys.readouterr().err.count("the network gave NaN or infinity for 6 images") == 1


@pytest.mark.parametrize("kind", ["stripped", "checkpoint"])
def test_a_file_of_ours_brings_its_own_model_classes_and_scale(kind, start, finished, weights, tmp_path, capsys):
    file = weights if kind == "stripped" else finished / "checkpoints" / "last.pt"
    words = ["--val-only", "--weights", file, "--model", "faster_rcnn_r50_fpn"]
    assert start(tmp_path / "out", *words) == 0
    assert json.loads((tmp_path / "out" / "detections_val.json").read_text()) == json.loads(
        (finished / "detections_val.json").read_text()
    )
    assert start(tmp_path / "out", *words, "--min-size", "80", "--dry-run") == 0
    assert "trained at --min-size 64 --max-size 96, evaluated at 80 and 96" in capsys.readouterr().out


def test_the_average_is_what_is_evaluated_where_there_is_one(start, tmp_path, capsys, load):
    assert start(tmp_path / "run", "--ema", "0.5", "--max-epochs", "1") == 0
    trained = json.loads((tmp_path / "run" / "detections_val.json").read_text())
    assert start(tmp_path / "run", "--val-only", "--resume") == 0
    assert "averaged weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "detections_val.json").read_text()) == trained
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert not torch.equal(state["ema"]["fpn.output.0.weight"], state["model"]["fpn.output.0.weight"])


def test_a_test_set_with_boxes_gets_results_and_metrics(start, shapes_set, weights, tmp_path):
    annotations = shapes_set / "annotations" / "instances_val2017.json"
    words = ["--test-only", "--weights", weights, "--test-images", shapes_set / "val2017"]
    assert start(tmp_path / "out", *words, "--test-annotations", annotations, "--limit-val-batches", "9") == 0
    results = json.loads((tmp_path / "out" / "detections_test.json").read_text())
    assert {entry["image_id"] for entry in results} == {1, 2, 3, 4, 5, 6}
    assert {"image_id", "category_id", "bbox", "score"} <= set(results[0])
    assert {entry["category_id"] for entry in results} <= set(load_detector(weights).category_ids)
    assert 0 <= json.loads((tmp_path / "out" / "metrics_test.json").read_text())["mAP"] <= 1
    assert not (tmp_path / "out" / "detections_val.json").exists()


@pytest.mark.parametrize("how", ["no key", "empty list"])
def test_a_test_set_without_boxes_gets_results_for_an_upload(how, start, shapes_set, weights, tmp_path, capsys):
    content = json.loads((shapes_set / "annotations" / "instances_val2017.json").read_text())
    content["annotations"] = []
    if how == "no key":
        del content["annotations"]
    file = tmp_path / "image_info_test.json"
    file.write_text(json.dumps(content))
    words = ["--test-only", "--weights", weights, "--test-images", shapes_set / "val2017", "--test-annotations", file]
    assert start(tmp_path / "out", *words) == 0
    assert "ready for an upload" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "detections_test.json").read_text())
    assert not (tmp_path / "out" / "metrics_test.json").exists()


def test_boxes_come_back_in_pixels_of_the_stored_image(start, shapes_set, weights, tmp_path):
    assert start(tmp_path / "out", "--val-only", "--weights", weights, "--limit-val-batches", "9") == 0
    results = json.loads((tmp_path / "out" / "detections_val.json").read_text())
    images = json.loads((shapes_set / "annotations" / "instances_val2017.json").read_text())["images"]
    predicted = load_detector(weights).predict([shapes_set / "val2017" / image["file_name"] for image in images])
    num_matched = 0
    for image, found in zip(images, predicted, strict=True):
        x1, y1, x2, y2 = found["boxes_xyxy"].T
        theirs = torch.stack((x1, y1, x2 - x1, y2 - y1, 500 * found["scores"]), dim=1)
        mine = [[*e["bbox"], 500 * e["score"]] for e in results if e["image_id"] == image["id"]]
        num_matched += int((torch.cdist(torch.tensor(mine), theirs, p=torch.inf).amin(dim=1) < 1.5).sum())
    # Of nearly equal scores, which a network has that has hardly learned, rounding decides which survive.
    assert num_matched > len(results) / 2 > 20


def test_weights_of_a_backbone_alone_are_not_evaluated(start, tmp_path, finished, load):
    state = load(finished / "checkpoints" / "last.pt")["model"]
    only = {name: value for name, value in state.items() if name.startswith("backbone.")}
    torch.save(only, tmp_path / "backbone.pt")
    with pytest.raises(RunError, match="whole detector"):
        start(tmp_path / "out", "--val-only", "--weights", tmp_path / "backbone.pt", "--norm", "bn")


def test_weights_for_other_classes_are_not_evaluated(start, shapes_set, tmp_path, weights):
    other = tmp_path / "set"
    shutil.copytree(shapes_set, other)
    for file in (other / "annotations").iterdir():
        file.write_text(file.read_text().replace('"circle"', '"disc"'))
    with pytest.raises(RunError, match="disc"):
        start(tmp_path / "out", "--val-only", "--weights", weights, "--data-path", other)


def test_there_must_be_a_checkpoint_to_evaluate(start, tmp_path):
    with pytest.raises(RunError, match="no checkpoint to evaluate"):
        start(tmp_path / "out", "--val-only", "--resume")


def test_a_part_of_a_test_set_is_told_as_such(start, shapes_set, weights, tmp_path, capsys):
    annotations = shapes_set / "annotations" / "instances_val2017.json"
    words = ["--test-only", "--weights", weights, "--test-images", shapes_set / "val2017"]
    assert start(tmp_path / "out", *words, "--test-annotations", annotations, "--limit-val-batches", "1") == 0
    metrics = json.loads((tmp_path / "out" / "metrics_test.json").read_text())
    assert metrics["num_images"] == 2
    assert "only 2 images were run (--limit-val-batches)" in capsys.readouterr().out


def test_settings_that_the_weights_do_not_fit_are_one_error(start, tmp_path, weights):
    with pytest.raises(RunError, match="^--model-set fpn_channels=99: the weights do not fit into such a model"):
        start(tmp_path / "out", "--val-only", "--weights", weights, "--model-set", "fpn_channels=99")


@pytest.mark.parametrize("mode", [[], ["--val-only"]])
def test_a_dry_run_looks_whether_the_output_directory_can_be(mode, start, tmp_path, weights):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(RunError, match=f"{place}: cannot be used as output directory"):
            start(place, *mode, "--weights", weights, "--dry-run")


def test_a_dry_validation_writes_nothing(start, tmp_path, weights):
    assert start(tmp_path / "out", "--val-only", "--weights", weights, "--dry-run") == 0
    assert not (tmp_path / "out").exists()


def test_a_test_whose_results_cannot_be_written_fails(start, shapes_set, tmp_path, weights, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detection.engine.evaluator.write_results", refuse)
    annotations = shapes_set / "annotations" / "instances_val2017.json"
    words = ["--test-only", "--weights", weights, "--test-images", shapes_set / "val2017"]
    with pytest.raises(RunError, match="detections_test.json could not be written"):
        start(tmp_path / "out", *words, "--test-annotations", annotations)


def test_a_validation_in_training_outlives_results_that_cannot_be_written(start, tmp_path, monkeypatch, records_of):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detection.engine.evaluator.write_results", refuse)
    assert start(tmp_path / "run", "--max-epochs", "1") == 0
    assert len(records_of(tmp_path / "run", "val")) == 1


def test_a_training_tests_its_best_weights_at_the_end(finished, shapes_set, tmp_path, capsys, load):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    annotations = shapes_set / "annotations" / "instances_val2017.json"
    words = ["--test-images", shapes_set / "val2017", "--test-annotations", annotations, "--limit-val-batches", "9"]
    # The run is done: what is left is its test.
    assert run(parse_arguments(["--resume", str(folder), *map(str, words)])) == 0
    said = capsys.readouterr().out
    assert "test: 6 images" in said
    assert "evaluated once, at the end, with the best weights" in said
    tested = json.loads((folder / "metrics_test.json").read_text())
    assert start_alone(["--val-only", "--weights", folder, *words[-2:]], finished, tmp_path / "alone") == 0
    alone = json.loads((tmp_path / "alone" / "metrics_val.json").read_text())
    assert tested["mAP"] == alone["mAP"]
    assert f"{folder / 'checkpoints' / 'best.pt'}" in said
    assert tested["num_images"] == 6


def test_the_validation_loss_of_three_processes_is_that_of_one_to_the_bit(finished, arguments, program, tmp_path):
    words = ["--val-only", "--weights", finished / "checkpoints" / "last.pt", "--limit-val-batches", "9"]
    words += ["--batch-size", "1"]
    assert run(parse_arguments(arguments(tmp_path / "one", *words))) == 0
    with program("tiny_model.py", *arguments(tmp_path / "three", *words), ranks=3) as processes:
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, out[-2000:] + err[-2000:]
    one, three = (json.loads((tmp_path / name / "metrics_val.json").read_text()) for name in ("one", "three"))
    losses = [name for name in one if name.startswith("loss")]
    assert len(losses) == 5
    assert [three[name] for name in losses] == [one[name] for name in losses]


def start_alone(words: list, record: Path, output: Path) -> int:
    return run(parse_arguments(list(map(str, ["--config", record, "--output-dir", output, *words]))))


def test_an_lvis_file_is_judged_by_its_rules_and_the_start_says_so(start, weights, shapes_set, tmp_path, capsys):
    words = []
    for split in ("train", "val"):
        content = json.loads((shapes_set / "annotations" / f"instances_{split}2017.json").read_text())
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{image.pop('file_name')}"
            image |= {"neg_category_ids": [category["id"] for category in content["categories"]]}
            image |= {"not_exhaustive_category_ids": []}
        for category in content["categories"]:
            category["frequency"] = "r"
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        words += [f"--{split}-annotations", tmp_path / f"{split}.json", f"--{split}-images", shapes_set]
    assert start(tmp_path / "out", "--val-only", "--weights", weights, *words[4:]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics_val.json").read_text())
    assert {"mAP_r", "mAP_c", "mAP_f", "AR_300"} < set(metrics) and "AR_100" not in metrics
    said = capsys.readouterr().out
    assert "by LVIS's rules" in said and "--model-set detections_per_image=300" in said and "rare classes" in said
    assert start(tmp_path / "new", *words, "--dry-run", "--model-set", "detections_per_image=20") == 0
    assert "gives 20 detections" in capsys.readouterr().out
    assert start(tmp_path / "new", *words, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "by LVIS's rules" in said and "detections an image at most" not in said  # 300 of themselves
