"""Names, class rows and input conventions of other projects, there and back."""

import csv
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection import maskrcnn_resnet50_fpn

from detection.models import build_model, export_state_dict
from detection.models.weights.layouts import CAFFE_INPUT, IMAGENET_INPUT, recognize, stem_for, to_layout, to_ours

REFERENCES = Path(__file__).parents[2] / "reference"
SMALL = {"fpn_channels": 32, "roi_hidden_channels": 16, "mask_channels": 8}


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.fill_(7)
    return model


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("faster_rcnn_r50_fpn", "parity"),
        ("cascade_rcnn_r50_fpn", "parity_cascade"),
        ("mask_rcnn_r50_fpn", "parity_mask"),
    ],
)
def test_mmdetections_names_and_shapes_are_written(model, folder):
    with torch.device("meta"):
        exported = export_state_dict(build_model(model, 80), "mmdet")
    with (REFERENCES / folder / "state_dict.csv").open() as file:
        expected = {row["name"]: row["shape"] for row in csv.DictReader(file)}
    assert {name: "x".join(map(str, t.shape)) or "scalar" for name, t in exported.items()} == expected


@pytest.mark.slow
def test_torchvisions_names_shapes_and_order_are_written_and_load_strictly():
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    model = randomized(build_model("maskrcnn_resnet50_fpn", 4))
    exported = export_state_dict(model, "torchvision")
    assert {name: t.shape for name, t in exported.items()} == {name: t.shape for name, t in theirs.state_dict().items()}
    assert list(exported) == list(theirs.state_dict())
    theirs.load_state_dict(exported)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("faster_rcnn_r18_fpn", "mmdet"),
        ("faster_rcnn_r50_fpn", "mmdet"),
        ("faster_rcnn_x101_32x4d_fpn", "mmdet"),
        ("cascade_rcnn_r18_fpn", "mmdet"),
        ("fasterrcnn_resnet18_fpn", "torchvision"),
        ("maskrcnn_resnet50_fpn", "torchvision"),
        ("cascade_mask_rcnn_r18_fpn", "mmdet"),
        ("mask_rcnn_r18_fpn", "ours"),
        ("mask_rcnn_regnetx_400mf_fpn", "mmdet"),
    ],
)
def test_the_way_there_and_back_changes_no_bit(name, layout, norm):
    settings: dict = {}
    if norm == "gn":
        if "regnetx" in name:
            pytest.skip("its channels are no multiples of 32")
        settings = {"fpn_norm": "gn"}
        if layout != "torchvision":
            settings |= {"head_norm": "gn", "roi_num_convs": 4, "roi_num_hidden": 1, "mask_channels": 32}
    ours = randomized(build_model(name, 3, norm=norm, **{**SMALL, **settings})).state_dict()
    exported = to_layout(ours, layout)
    back, origin = to_ours(exported, recognize(exported))
    assert recognize(exported) == layout
    assert origin.keys() == back.keys() and set(origin.values()) == exported.keys()
    without_counters = {key: tensor for key, tensor in back.items() if key in ours}
    assert equal(without_counters, ours)
    assert all(key.endswith("num_batches_tracked") for key in back.keys() - ours.keys())
    if layout == "mmdet" and norm == "gn":
        assert "backbone.layer1.0.gn1.weight" in exported and "neck.fpn_convs.0.gn.weight" in exported


def test_counters_of_trained_batch_norms_are_kept_and_those_of_frozen_ones_made_up():
    model = randomized(build_model("faster_rcnn_r18_fpn", 2, norm="bn", frozen_stages=1, **SMALL))
    exported = export_state_dict(model, "mmdet")
    assert exported["backbone.bn1.num_batches_tracked"] == 0
    assert exported["backbone.layer2.0.bn1.num_batches_tracked"] == 7


def test_box_outputs_of_the_background_are_added_for_torchvision_and_dropped_for_mmdetection():
    ours = randomized(build_model("faster_rcnn_r18_fpn", 3, **SMALL)).state_dict()
    exported = to_layout(ours, "torchvision")["roi_heads.box_predictor.bbox_pred.weight"]
    assert exported.shape == (16, 16) and not exported[:4].any()
    assert torch.equal(exported[4:], ours["roi_head.regressor.weight"])

    ours = randomized(build_model("fasterrcnn_resnet18_fpn", 3, **SMALL)).state_dict()
    exported = to_layout(ours, "mmdet")["roi_head.bbox_head.fc_reg.weight"]
    assert torch.equal(exported, ours["roi_head.regressor.weight"][:12])


def test_torchvisions_older_names_are_read():
    model = randomized(build_model("mask_rcnn_r18_fpn", 3, regressor_has_background=True, **SMALL))
    exported = export_state_dict(model, "torchvision")
    for i in range(4):
        for kind in ("weight", "bias"):
            exported[f"roi_heads.mask_head.mask_fcn{i + 1}.{kind}"] = exported.pop(f"roi_heads.mask_head.{i}.0.{kind}")
    older = {
        re.sub(r"(inner_blocks\.\d|layer_blocks\.\d|rpn\.head\.conv)(\.0)+\.(weight|bias)$", r"\1.\3", name): tensor
        for name, tensor in exported.items()
        if not name.endswith("num_batches_tracked")
    }
    assert "rpn.head.conv.weight" in older and "backbone.fpn.inner_blocks.3.bias" in older
    assert equal(to_ours(older, "torchvision")[0], model.state_dict())


def detectron2_name(name):
    """Detectron2's name of one of our parameters, put together from the module definitions of its R50-FPN."""
    for ours, theirs in (
        (r"\bbn(\d)\.", r"conv\1.norm."),
        (r"\.downsample\.0", ".shortcut"),
        (r"\.downsample\.1", ".shortcut.norm"),
        (r"^backbone\.conv1", "backbone.bottom_up.stem.conv1"),
        (r"^backbone\.layer(\d)", lambda match: f"backbone.bottom_up.res{int(match[1]) + 1}"),
        (r"^fpn\.(lateral|output)\.(\d)", lambda match: f"backbone.fpn_{match[1]}{int(match[2]) + 2}"),
        (r"^rpn\.", "proposal_generator.rpn_head."),
        (r"\.objectness\.", ".objectness_logits."),
        (r"\.deltas\.", ".anchor_deltas."),
        (r"^roi_head\.fc", "roi_heads.box_head.fc"),
        (r"^roi_head\.classifier", "roi_heads.box_predictor.cls_score"),
        (r"^roi_head\.regressor", "roi_heads.box_predictor.bbox_pred"),
        (r"^mask_head\.convs\.(\d)", lambda match: f"roi_heads.mask_head.mask_fcn{int(match[1]) + 1}"),
        (r"^mask_head\.upsample", "roi_heads.mask_head.deconv"),
        (r"^mask_head\.logits", "roi_heads.mask_head.predictor"),
    ):
        name = re.sub(ours, theirs, name)
    return name


def test_every_name_of_detectron2s_r50_fpn_is_read():
    ours = randomized(build_model("mask_rcnn_r50_fpn", 3, **SMALL)).state_dict()
    theirs = {detectron2_name(name): tensor for name, tensor in ours.items()}
    assert "backbone.bottom_up.res4.5.conv3.norm.running_var" in theirs
    assert "backbone.bottom_up.stem.conv1.norm.bias" in theirs
    assert recognize(theirs) == "detectron2"
    back, origin = to_ours(theirs, "detectron2")
    assert equal(back, ours) and origin == {name: detectron2_name(name) for name in ours}

    backbone = {k.removeprefix("backbone.bottom_up."): v for k, v in theirs.items() if ".bottom_up." in k}
    assert recognize(backbone) == "detectron2"
    assert equal(to_ours(backbone, "detectron2")[0], {k: v for k, v in ours.items() if k.startswith("backbone.")})


def test_the_stem_for_bgr_input_gives_the_same_features_from_our_input_up_to_the_border():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, 7, 7, generator=generator, dtype=torch.float64)
    rgb = torch.randint(0, 256, (1, 3, 20, 30), generator=generator).double()
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64)[:, None, None]
    std = torch.tensor(IMAGENET_INPUT.std, dtype=torch.float64)[:, None, None]
    detectron2_input = (rgb - mean).flip(1)
    turned = stem_for(weight, CAFFE_INPUT, IMAGENET_INPUT)
    ours = F.conv2d((rgb - mean) / std, turned, stride=2, padding=3)
    torch.testing.assert_close(ours, F.conv2d(detectron2_input, weight, stride=2, padding=3), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(stem_for(turned, IMAGENET_INPUT, CAFFE_INPUT), weight, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "backbone"),
        (["backbone.layer1.0.conv1.weight", "head.fc.weight"], "mmdet"),
        (["backbone.conv1.weight", "fpn.lateral.0.weight"], "ours"),
        (["encoder.blocks.0.weight"], None),
    ],
)
def test_layouts_are_recognized_by_their_names(names, layout):
    assert recognize(names) == layout


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="ours, mmdet, torchvision"):
        to_layout({}, "keras")


def test_names_without_a_counterpart_keep_theirs():
    some = torch.zeros(3)
    name = "roi_heads.keypoint_head.0.weight"
    ours, origin = to_ours({name: some, "rpn.head.cls_logits.bias": some}, "torchvision")
    assert set(ours) == {name, "rpn.objectness.bias"}
    assert origin == {"rpn.objectness.bias": "rpn.head.cls_logits.bias"}
