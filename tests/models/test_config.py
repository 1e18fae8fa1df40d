import dataclasses
import json
import re

import pytest
import torch

from detection.models import MODELS, ModelError, build_model, model_from_config
from detection.models.config import TORCHVISION_RECIPE, FasterRCNNConfig, config_from_dict, model_config


def test_an_unknown_model_or_setting_is_refused_with_the_nearest_name():
    with pytest.raises(ModelError, match=r"did you mean 'faster_rcnn_r50_fpn'\? Models: "):
        build_model("faster_rcnn_r5_fpn")
    with pytest.raises(ModelError, match="did you mean 'score_threshold'"):
        build_model("faster_rcnn_r18_fpn", score_treshold=0.1)


@pytest.mark.parametrize("name", ["faster_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn"])
def test_a_configuration_survives_json_and_rebuilds_the_model(name):
    with torch.device("meta"):
        model = build_model(name, num_classes=3, rpn_samples_per_image=None, score_threshold=0.2)
        settings = json.loads(json.dumps(dataclasses.asdict(model.config)))
        rebuilt = model_from_config(settings)
    assert rebuilt.config == model.config
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_a_configuration_without_its_number_of_classes_is_refused():
    with pytest.raises(ModelError, match="num_classes"):
        model_from_config({"backbone": "resnet18"})


def test_every_entry_of_the_torchvision_recipe_differs_from_the_default():
    default = FasterRCNNConfig(num_classes=1)
    assert [key for key, value in TORCHVISION_RECIPE.items() if getattr(default, key) == value] == []


def test_fresh_heads_start_near_silence_and_the_hidden_layers_keep_variance():
    model = build_model("faster_rcnn_r18_fpn", num_classes=80)
    expected = {
        "rpn.conv.weight": 0.01,
        "rpn.objectness.weight": 0.01,
        "roi_head.classifier.weight": 0.01,
        "roi_head.regressor.weight": 0.001,
        "roi_head.fc2.weight": (2 / (1024 + 1024)) ** 0.5,
    }
    for name, std in expected.items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.05), name
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score_threshold": "high"}, "score_threshold is 'high', expected a number"),
        ({"roi_output_size": 7.5}, "roi_output_size is 7.5, expected a whole number"),
        ({"roi_output_size": True}, "expected a whole number"),
        ({"round_anchors": 1}, "round_anchors is 1, expected True or False"),
        ({"anchor_sizes": 32}, "anchor_sizes is 32, expected a list of numbers from 1 to 100000"),
        ({"anchor_sizes": [32, "64"]}, "expected a list of numbers"),
        ({"anchor_sizes": [32, 64]}, "anchor_sizes is (32, 64), expected a list of 5 with features 'fpn'"),
        ({"anchor_strides": [4, 8]}, "anchor_strides is (4, 8), expected a list of 5 with features 'fpn'"),
        ({"features": "c4"}, "expected a list of 1 with features 'c4'"),
        ({"features": "c4", "anchor_strides": [16], "backbone": "resnet18"}, "with a ResNet of 50 layers or more"),
        ({"anchor_ratios": [0, 1]}, "expected a list of numbers from 0.001 to 1000"),
        ({"anchor_ratios": {}}, "anchor_ratios is {}, expected a list of numbers"),
        ({"anchor_ratios": []}, "expected a list of numbers"),
        ({"anchor_ratios": [1.0] * 1000}, "expected a list of numbers"),
        ({"pixel_mean": [1, 2]}, "pixel_mean is (1, 2), expected a list of 3 numbers from -1000 to 1000"),
        ({"pixel_std": [0, 1, 1]}, "expected a list of 3 numbers from 0.001 to 1000"),
        ({"roi_delta_stds": [0.1, 0.1]}, "expected a list of 4 numbers"),
        ({"detection_min_size": "none"}, "expected a number from 0 to 100000 or None"),
        ({"nms_iou": float("nan")}, "nms_iou is nan, expected a number from 0 to 1"),
        ({"fpn_channels": -1}, "expected a whole number from 1 to 4096"),
        ({"fpn_channels": 10**9}, "expected a whole number from 1 to 4096"),
        (
            {"fpn_channels": 48, "fpn_norm": "gn"},
            "cannot divide into 32 groups: give a multiple of 32",
        ),
        ({"fpn_norm": "bn"}, "fpn_norm is 'bn', expected 'gn' or None"),
        ({"norm": "layer"}, "norm is 'layer', expected 'frozen_bn' or 'bn' or 'gn'"),
        ({"norm": "bn", "norm_eps": 0}, "norm_eps is 0, with which batch norm cannot be trained: give e.g. 1e-5"),
        ({"frozen_stages": 5}, "frozen_stages is 5, expected a whole number from -1 to 4"),
        ({"backbone": "resnet18", "stride_in_1x1": True}, "its blocks have 3x3 convolutions only"),
        ({"backbone": "resnet52"}, "backbone is 'resnet52', expected 'resnet18' or"),
        ({"rpn_negative_iou": 0.8}, "rpn_negative_iou 0.8 is above rpn_positive_iou 0.7"),
        ({"roi_hidden_channels": 16384, "roi_output_size": 64}, "17,179,869,184 weights in one layer: give smaller"),
        ({"num_classes": 0}, "num_classes is 0, expected a whole number from 1 to 100000"),
        ({"roi_samples_per_image": 0}, "expected a whole number from 1 to 1000000 or None"),
        ({"rpn_proposals_test": 0}, "rpn_proposals_test is 0, expected a whole number from 1 to 100000"),
        ({"score_threshold": 2.0}, "score_threshold is 2.0, expected a number from 0 to 1"),
    ],
)
def test_a_setting_that_cannot_work_is_one_error_that_says_what_was_expected(settings, said):
    with pytest.raises(ModelError, match=re.escape(said)):
        model_config("faster_rcnn_r50_fpn", **settings)


def test_whole_numbers_are_numbers_and_every_default_passes():
    assert model_config("faster_rcnn_r50_fpn", nms_iou=1, frozen_stages=-1).frozen_stages == -1
    for name in MODELS:
        assert config_from_dict(dataclasses.asdict(model_config(name))) == model_config(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cascade_ious": (0.5, 0.6)}, "2 stages, cascade_loss_weights 3 and cascade_delta_stds 12 numbers"),
        ({"cascade_ious": (0.5, 0.6, 1.7)}, "cascade_ious is .* from 0 to 1"),
        ({"regressor_has_background": True}, "do not go together"),
    ],
)
def test_settings_of_a_cascade_that_do_not_fit_each_other_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        build_model("cascade_rcnn_r18_fpn", 3, **settings)
