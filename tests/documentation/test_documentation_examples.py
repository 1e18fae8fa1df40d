"""The Python blocks of the guides run as they stand, one after the other, on generated data."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detection
from detection.export.graph import OUTPUT_NAMES
from detection.models import build_model
from detection.models.weights.stored import stripped_file
from tests.documentation.documented_commands import ROOT, blocks_of

CLASS_NAMES = ["square", "disc", "star"]


def run(page):
    """What the page's blocks leave behind by name; an error names the page and the block's line in it."""
    namespace = {"__name__": "__main__"}
    blocks = [block for block in blocks_of(ROOT / "docs" / page) if block[1] == "python"]
    assert blocks, f"{page} has no Python block"
    for first_line, _, lines in blocks:
        exec(compile("\n" * (first_line - 1) + "\n".join(lines), str(ROOT / "docs" / page), "exec"), namespace)
    return namespace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages speak of: a photo, a detector, annotations and results."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    # Fewer proposals than by default; the layers are those of the model that the page builds.
    model = build_model("faster_rcnn_r18_fpn", num_classes=3, rpn_nms_pre_test=100, rpn_proposals_test=50)
    content = stripped_file(
        model.state_dict(),
        model_config=dataclasses.asdict(model.config),
        class_names=CLASS_NAMES,
        category_ids=[1, 2, 3],
        preprocessing={"min_size": 64, "max_size": 96},
    )
    torch.save(content, "detector.pt")
    box = {"image_id": 1, "category_id": 2, "bbox": [5, 5, 30, 30]}
    truth = {
        "images": [{"id": 1, "file_name": "photo.jpg", "width": 80, "height": 60}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)],
        "annotations": [{"id": 1, "area": 900, "iscrowd": 0, **box}],
    }
    Path("instances_val.json").write_text(json.dumps(truth))
    Path("results.json").write_text(json.dumps([{"score": 0.9, **box}]))
    return tmp_path


@pytest.mark.slow
def test_the_page_on_python_runs(folder):
    names = run("python_api.md")
    assert [iteration for iteration, _ in names["tracker"].curve] == [0]
    assert names["metrics"]["mAP"] == pytest.approx(1.0)
    assert len(names["found"]["scores"]) > 0 and len(names["fused"]["scores"]) > 0
    assert names["report"].matched and not names["report"].missing
    assert set(names["losses"]) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}
    with Image.open(folder / "drawn.png") as drawn:
        assert drawn.size == (640, 480)


class OneBox(torch.nn.Module):
    """In place of a detector, whose export takes long: the whole image, once."""

    def forward(self, images):
        sides = torch.tensor([0.0, 0.0, 1.0, 1.0]) * (images[0, 0, 0, 0] * 0 + 60)
        count = torch.ones(1, dtype=torch.int64)
        return sides.expand(1, 1, 4).clone(), torch.full((1, 1), 0.5), torch.ones(1, 1, dtype=torch.int64), count


@pytest.mark.slow
def test_the_page_on_export_runs(folder):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='ONNX is the optional extra "export"')
    metadata = {"class_names": CLASS_NAMES}
    program = torch.export.export(OneBox(), (torch.zeros(1, 60, 80, 3, dtype=torch.uint8),))
    torch.export.save(program, "detector.pt2", extra_files={"detector.json": json.dumps(metadata)})
    import onnx

    model = torch.onnx.export(
        program, input_names=["images"], output_names=list(OUTPUT_NAMES), verbose=False
    ).model_proto
    model.metadata_props.append(onnx.StringStringEntryProto(key="class_names", value=json.dumps(CLASS_NAMES)))
    onnx.save(model, "detector.onnx")
    names = run("predict_and_export.md")
    assert names["names"] == CLASS_NAMES and names["boxes"].tolist() == [[[0, 0, 60, 60]]]


def test_stable_names_are_at_the_top():
    page = (ROOT / "docs" / "python_api.md").read_text()
    section = page[page.index("## Stable names") :]
    stated = re.findall(r"`(\w+)`", section[: section.index("`schedules`")])
    assert sorted(stated[1:]) == sorted(detection.__all__) and stated[0] == "detection"
    for name in detection.__all__:
        assert getattr(detection, name).__name__ == name
    with pytest.raises(AttributeError, match="load_detectr"):
        detection.load_detectr  # noqa: B018


@pytest.mark.slow
def test_the_notebook_goes_from_images_to_detections(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for written, here in {
        "num_train=200, num_val=40": "num_train=8, num_val=4",
        "max_epochs=30": "max_epochs=1",
    }.items():
        assert code.count(written) == 1
        code = code.replace(written, here)
    names = {"__name__": "__main__"}
    exec(compile(code, "tour.ipynb", "exec"), names)
    assert "4 images, " in capsys.readouterr().out
    assert names["pair"].getcolors(2) is None and len(names["left"].lines) == len(names["right"].lines) == 2
    assert all(not cell.get("outputs") for cell in cells)
