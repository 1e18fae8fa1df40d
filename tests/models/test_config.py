import dataclasses
import json
import re

import pytest

from detection.models import MODELS, ModelError, build_model, model_from_config
from detection.models.config import TORCHVISION_RECIPE, FasterRCNNConfig, config_from_dict, model_config


def test_an_unknown_model_or_setting_is_refused_with_the_nearest_name():
    with pytest.raises(ModelError, match=r"did you mean 'faster_rcnn_r50_fpn'\? Models: "):
        build_model("faster_rcnn_r5_fpn")
    with pytest.raises(ModelError, match="did you mean 'score_threshold'"):
        build_model("faster_rcnn_r18_fpn", score_treshold=0.1)


@pytest.mark.parametrize("name", ["faster_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn"])
def test_a_configuration_survives_json_and_rebuilds_the_model(name):
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
        ({"anchor_sizes": 32}, "anchor_sizes is 32, expected a list of numbers"),
        ({"anchor_sizes": [32, "64"]}, "expected a list of numbers"),
        ({"anchor_sizes": [32, 64]}, "has 2 sizes and anchor_strides 5 strides"),
        ({"detection_min_size": "none"}, "expected a number or None"),
        ({"nms_iou": float("nan")}, "expected finite numbers"),
        ({"fpn_channels": -1}, "expected finite numbers of at least 0"),
        ({"num_classes": 0}, "num_classes is 0; a detector needs one foreground class"),
        ({"roi_samples_per_image": 0}, "roi_samples_per_image is 0; give a positive number, or None"),
        ({"rpn_proposals_test": 0}, "rpn_proposals_test is 0; give at least 1"),
        ({"score_threshold": 2.0}, "score_threshold is 2.0; give a number from 0 to 1"),
    ],
)
def test_a_setting_that_cannot_work_is_one_error_that_says_what_was_expected(settings, said):
    with pytest.raises(ModelError, match=re.escape(said)):
        model_config("faster_rcnn_r50_fpn", **settings)


def test_whole_numbers_are_numbers_and_every_default_passes():
    assert model_config("faster_rcnn_r50_fpn", nms_iou=1, frozen_stages=-1).frozen_stages == -1
    for name in MODELS:
        assert config_from_dict(dataclasses.asdict(model_config(name))) == model_config(name)
