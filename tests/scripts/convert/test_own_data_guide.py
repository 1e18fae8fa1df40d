"""docs/own_data.md: every command of it, to the letter, on a set made for it."""

import importlib
import re
import runpy
import shlex
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from data.coco.annotations import read_coco
from data.convert.conversion import LabeledBox, LabeledImage
from data.convert.voc import VOC_TEXTS
from data.convert.voc_xml import voc_xml
from data.convert.yolo import YOLO_TEXTS
from data.convert.yolo_config import yaml_text
from data.tools.shape_scenes import CLASS_NAMES
from data.tools.shapes import make_shapes
from tests.data.layouts import exports
from tests.engine.tiny_model import make_known

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "own_data.md").read_text()
# What makes a training of minutes one of seconds; the options of the guide stay.
SHORT = {
    "train.py": "--model tiny --device cpu --workers 0 --min-size 64 --max-size 96 --max-epochs 1 "
    "--limit-train-batches 2 --limit-val-batches 1",
    "predict.py": "--device cpu --limit 2",
}


def commands() -> list[list[str]]:
    blocks = re.sub(r"\\\n\s+", "", "\n".join(line for line in GUIDE.splitlines() if line.startswith("    ")))
    return [shlex.split(line, comments=True) for line in blocks.splitlines()]


def label_files(root: Path) -> None:
    """my_voc and my_yolo in `root`, of a few shapes."""
    made = make_shapes(root / "shapes", num_train=12, num_val=1, size=(96, 80))
    annotations = read_coco(made / "annotations" / "instances_train2017.json")
    for folder in ("my_voc/JPEGImages", "my_voc/Annotations", "my_yolo/images", "my_yolo/labels"):
        (root / folder).mkdir(parents=True)
    for index in range(len(annotations)):
        name = annotations.file_name(index)
        width, height = int(annotations.widths[index]), int(annotations.heights[index])
        for folder in ("my_voc/JPEGImages", "my_yolo/images"):
            (root / folder / name).write_bytes((made / "train2017" / name).read_bytes())
        rows = annotations.rows(index)
        boxes, lines = [], []
        for (x, y, w, h), label in zip(annotations.boxes_xywh[rows], annotations.labels[rows], strict=True):
            corners = tuple(Decimal(str(round(float(value), 1))) for value in (x, y, x + w, y + h))
            boxes.append(LabeledBox(CLASS_NAMES[label], corners))
            fractions = np.array([x + w / 2, y + h / 2, w, h]) / [width, height, width, height]
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in fractions)]))
        image = LabeledImage("", root / name, width, height, boxes)
        (root / "my_voc" / "Annotations" / name).with_suffix(".xml").write_bytes(voc_xml(image, name))
        (root / "my_yolo" / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))
    for name, export in {
        "my_roboflow": exports.roboflow_coco,
        "my_imagefolder": exports.imagefolder,
        "my_coco": exports.one_coco_file,
    }.items():
        export(root / name)
    (root / "my_yolo" / "data.yaml").write_text(yaml_text(list(CLASS_NAMES), {"train": "images"}))


@pytest.mark.slow
def test_every_command_of_the_guide_does_what_it_says(tmp_path, monkeypatch, capsys):
    label_files(tmp_path)
    make_known()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    said = {}
    for number, (python, program, *words) in enumerate(commands()):
        assert python == "python3" and (ROOT / program).is_file()
        name = Path(program).name
        words += SHORT.get(name, "").split()
        if name == "train.py":
            # ImageNet's weights are not at hand everywhere; the second training starts from the first.
            words += [] if "--weights" in words else ["--weights", "none"]
            monkeypatch.setattr("sys.argv", [name, *words])
            with pytest.raises(SystemExit) as left:
                runpy.run_path(str(ROOT / program), run_name="__main__")
            status = left.value.code
        else:
            status = importlib.import_module(name.removesuffix(".py")).main(words)
        streams = capsys.readouterr()
        assert status == 0, (program, words, streams.out[-2000:], streams.err[-2000:])
        said[number, name] = streams.out
    assert [name for _, name in said][:14] == [
        *("check_dataset.py", "train.py", "predict.py", *["train.py"] * 5, "convert_voc.py", "convert_yolo.py"),
        *("check_dataset.py", "browse_dataset.py", "train.py", "predict.py"),
    ]
    assert "2 images" not in said[2, "predict.py"] and "YOLO in my_yolo: val, 1 image" in said[2, "predict.py"]
    titles = [said[number, "train.py"].splitlines()[0] for number in range(3, 7)]
    kinds = ("Roboflow's COCO export", "Pascal VOC", "Hugging Face's imagefolder", "COCO JSON")
    assert all(title.startswith(f"found: {kind} in my_") for title, kind in zip(titles, kinds, strict=True))
    lines = said[1, "train.py"].splitlines()
    assert lines[0].startswith("found: YOLO in my_yolo: train 11 images, ") and lines[0].endswith("; 6 classes")
    assert lines[1] == "       by seed 0 and file name, 0.1 of the images to validate on"
    assert (tmp_path / "datasets" / "mine" / "gallery.html").is_file()
    assert len(list((tmp_path / "predictions").iterdir())) == 2
    tuned = next(text for (number, name), text in reversed(said.items()) if name == "train.py")
    assert "frozen: stem, stage 1, stage 2" in tuned
    # Both sources hold the same boxes, but for the six digits of YOLO's fractions.
    for split in ("train", "val"):
        voc, yolo = (
            read_coco(tmp_path / "datasets" / name / "annotations" / f"instances_{split}.json")
            for name in ("mine", "from_yolo")
        )
        assert voc.file_name_bytes.tobytes() == yolo.file_name_bytes.tobytes()
        assert np.abs(voc.boxes_xywh - yolo.boxes_xywh).max() <= 0.11


def test_the_guide_names_every_finding_and_no_other():
    (table,) = re.findall(r"## Findings\n(.*?)\n## ", GUIDE, re.S)
    named = {
        severity: set(re.findall(r"`([a-z][a-z-]+)`", line.split("|", 2)[2]))
        for line in table.splitlines()
        for severity in ("error", "warning", "info")
        if line.startswith(f"| {severity}")
    }
    severities = {code: rule.split(": ")[0] for code, rule in (VOC_TEXTS | YOLO_TEXTS).items()}
    for severity, codes in named.items():
        assert codes <= {code for code, kind in severities.items() if kind == severity}
    assert {code for code, kind in severities.items() if kind == "error"} == named["error"]
    rest = {code for code, kind in severities.items() if kind == "info"} - named["info"]
    assert not rest
