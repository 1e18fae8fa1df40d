"""train.py --config: a configuration of MMDetection as a whole run."""

import re
from pathlib import Path

import pytest

from detection.config import parse_arguments
from detection.engine import RunError, run

CONFIGS = Path(__file__).parents[2] / "reference" / "mmdet_run"
SMALL = {
    "model.backbone": {"depth": 18, "init_cfg": None, "norm_eval": False, "frozen_stages": -1},
    "model.neck": {"in_channels": "64,128,256,512"},
    "model.train_cfg.rpn_proposal": {"nms_pre": 100, "max_per_img": 60},
    "model.test_cfg.rpn": {"nms_pre": 50, "max_per_img": 30},
    "train_cfg": {"max_epochs": 2},
    "train_dataloader": {"num_workers": 0},
}
HEADS = {"faster": ["bbox_head"], "cascade": [f"bbox_head.{stage}" for stage in range(3)]}


BY_ITERATION = """
_base_ = %r
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=8, val_interval=4)
param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=2)]
"""


def words(name, folder, *more, path=None):
    train = "train_dataloader.dataset" + (".dataset" if name == "cascade" else "")
    keys = [f"{part}.{key}={value}" for part, values in SMALL.items() for key, value in values.items()]
    keys = [key for key in keys if path is None or "max_epochs" not in key]
    classes = CLASSES[name]
    for part in (train, "val_dataloader.dataset"):
        keys += [f"{part}.data_root={folder}", f"{part}.metainfo.classes={classes}"]
    keys.append(f"val_evaluator.ann_file={folder}/annotations/instances_val2017.json")
    keys += [f"model.roi_head.{head}.num_classes={len(classes.split(','))}" for head in HEADS[name]]
    keys += [f"model.roi_head.{head}.fc_out_channels=32" for head in HEADS[name]]
    keys += ["val_dataloader.dataset.pipeline.1.scale=(96,64)", f"{train}.pipeline.2.scale={SCALES[name]}"]
    return ["--config", str(path or CONFIGS / f"{name}.py"), "--device", "cpu", "--cfg-options", *keys, *map(str, more)]


CLASSES = {"faster": "circle,ring,star", "cascade": "circle,ring,triangle,square,star,cross"}
SCALES = {"faster": "(96,64)", "cascade": "[(96,48),(96,64)]"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_a_configuration_trains_and_resumes_bit_for_bit(name, shapes_set, tmp_path, load, same_state, capsys):
    """Faster R-CNN counts iterations, of some of the classes; Cascade R-CNN epochs, of all."""
    path, shorter = None, ("--max-epochs", 1)
    if name == "faster":
        path, shorter = tmp_path / "by_iteration.py", ("--set", "train_cfg.max_iters=4")
        path.write_text(BY_ITERATION % str(CONFIGS / "faster.py"))

    def start(output, *more):
        given = words(name, shapes_set, "--limit-train-batches", 2, "--output-dir", output, *more, path=path)
        return run(parse_arguments(given))

    assert start(tmp_path / "dry", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert f"{name}_rcnn_r18_fpn" in plan
    assert "4 iterations, 2 an epoch" in plan
    if name == "faster":
        assert "classes   circle, ring, star\n" in plan
    assert not (tmp_path / "dry").exists()
    if name == "cascade":
        images = int(re.search(r"train: (\d+) images", plan)[1])
        assert f"the train set comes 3 times an epoch: {3 * images} images" in plan
        assert "scale between 96x48 and 96x64" in plan
    assert start(tmp_path / "whole") == 0
    assert start(tmp_path / "part", *shorter) == 0
    assert start(tmp_path / "part", "--resume") == 0
    one, other = (load(tmp_path / folder / "checkpoints" / "last.pt") for folder in ("whole", "part"))
    for key in ("model", "optimizer", "iteration", "epoch"):
        if key in one:
            same_state(one[key], other[key])


def test_a_class_of_the_configuration_that_the_annotations_lack_is_refused(shapes_set, tmp_path):
    keys = ["model.roi_head.bbox_head.num_classes=2"]
    keys += [f"{split}_dataloader.dataset.metainfo.classes=ring,cat" for split in ("train", "val")]
    config = parse_arguments([*words("faster", shapes_set, "--output-dir", tmp_path / "run"), "--cfg-options", *keys])
    with pytest.raises(RunError, match=r"has no category 'cat'; it has 'circle', .*metainfo"):
        run(config)
