"""scripts/report.py on output directories."""

import json
import shutil
from contextlib import closing

import pytest
from pycocotools import mask

from data import make_shapes
from data.coco.run_lengths import compressed
from detection.reporting import MetricsLog


@pytest.fixture
def run(tmp_path):
    """The output directory of a run that found every box of its validation set; the set is in val/."""
    shapes = make_shapes(tmp_path / "shapes", num_train=1, num_val=4, size=(128, 96))
    images = (shapes / "val2017").rename(tmp_path / "val")
    annotations = shapes / "annotations" / "instances_val2017.json"
    directory = tmp_path / "run"
    with closing(MetricsLog(directory / "metrics.jsonl")) as log:
        log.write({"kind": "train", "epoch": 0, "iteration": 0, "loss": 1.0, "lr": 0.1})
        log.write({"kind": "val", "epoch": 0, "iteration": 0, "mAP": 1.0})
    record = {"validated": {"images": str(images), "annotations": str(annotations)}}
    (directory / "config.json").write_text(json.dumps(record))
    boxes = json.loads(annotations.read_text())["annotations"]
    found = [{name: box[name] for name in ("image_id", "category_id", "bbox")} | {"score": 0.9} for box in boxes]
    (directory / "detections_val.json").write_text(json.dumps(found))
    return directory


def test_the_page_has_errors_and_images_of_the_last_validation(program, run, capsys):
    assert program("report", run) == 0
    page = (run / "report.html").read_text()
    assert "No image has an error" in page and page.count("data:image/jpeg;base64,") == 3  # the fourth has no box
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("run/detections_val.json", "the run has no detections_val.json"),
        ("shapes/annotations/instances_val2017.json", "instances_val2017.json is not there; give --annotations FILE"),
        ("val", "give --images DIR"),
        ("run/config.json", "config.json does not name the validation set; give --annotations and --images"),
    ],
)
def test_what_is_not_there_is_said_on_the_page_and_the_rest_is_shown(program, run, tmp_path, capsys, lost, said):
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert program("report", run, "--output", tmp_path / "page.html") == 0
    assert said in capsys.readouterr().out and said in (tmp_path / "page.html").read_text()


def test_masks_have_sections_of_their_own(program, run, tmp_path):
    annotations = json.loads((tmp_path / "shapes" / "annotations" / "instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in annotations["images"]}
    found = []
    for each in annotations["annotations"]:
        text = compressed(each["segmentation"], *sizes[each["image_id"]])
        if text is None:
            entry = mask.merge(mask.frPyObjects(each["segmentation"], *sizes[each["image_id"]]))
            text = entry["counts"]
        segmentation = {"size": list(sizes[each["image_id"]]), "counts": text.decode()}
        found.append({"image_id": each["image_id"], "category_id": each["category_id"], "score": 0.9})
        found[-1]["segmentation"] = segmentation
    (run / "detections_val_segm.json").write_text(json.dumps(found))
    assert program("report", run) == 0
    page = (run / "report.html").read_text()
    assert "Errors in detections_val_segm.json" in page and page.count("data:image/jpeg;base64,") == 6


def test_a_set_that_has_moved_is_named(program, run, tmp_path):
    (run / "config.json").unlink()
    annotations = tmp_path / "shapes" / "annotations" / "instances_val2017.json"
    assert program("report", run, "--annotations", annotations, "--images", tmp_path / "val") == 0
    assert (run / "report.html").read_text().count("data:image/jpeg;base64,") == 3  # the fourth has no box


def test_a_folder_without_a_run_is_refused(program, tmp_path, capsys):
    assert program("report", tmp_path) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
