"""Cascade R-CNN against the figures of MMDetection: losses, gradients, steps and detections of the same weights."""

import dataclasses

import pytest
import torch

from detection.export import compare_detections
from detection.models import build_model, model_config
from detection.models.roi_head import refine_boxes
from detection.models.structures import batch_images
from tests.models.test_mmdetection_parity import NO_BOXES, Training
from tests.reference.parity import formula
from tests.reference.parity.formula import CASCADE

LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", *(f"loss_{kind}_s{stage}" for stage in range(3) for kind in ("cls", "bbox")))


def their_name(loss: str) -> str:
    kind, _, stage = loss.rpartition("_s")
    return f"s{stage}.{kind}" if kind else loss


@pytest.fixture(scope="module")
def weights():
    return formula.state_dict(CASCADE)


@pytest.fixture(scope="module")
def model(weights):
    model = build_model("cascade_rcnn_r50_fpn", rpn_samples_per_image=None, roi_samples_per_image=None)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def images():
    return formula.images(CASCADE)


@pytest.fixture(scope="module")
def targets():
    return formula.targets(CASCADE)


@pytest.fixture(scope="module")
def features(model, images):
    """P2..P6 of the images at the original weights, which several cases share."""
    with torch.no_grad():
        return model.extract_features(batch_images(images, torch.device("cpu")))


@pytest.fixture(scope="module")
def training(model, weights, features, images, targets):
    """Three steps of SGD."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9, weight_decay=1e-4)
    losses, gradients = [], {}
    for step in formula.load_json("train_f32.json", CASCADE)["steps"]:
        of_step = model(images, targets)
        losses.append({name: loss.item() for name, loss in of_step.items()})
        optimizer.zero_grad()
        sum(of_step.values()).backward()
        if not gradients:
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        optimizer.param_groups[0]["lr"] = step["lr"]
        optimizer.step()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict(weights)
    return Training(losses, gradients, parameters)


@pytest.mark.slow
def test_losses_of_three_steps_equal_mmdetections(training):
    for number, (losses, step) in enumerate(
        zip(training.losses, formula.load_json("train_f32.json", CASCADE)["steps"], strict=True)
    ):
        for name in LOSSES:
            # The stages divide by all RoIs, some 3,530. After a step, rounding may keep one more at NMS's threshold.
            rel = 5e-4 if number and name[-3:-1] == "_s" else 1e-5
            assert losses[name] == pytest.approx(step[their_name(name)], rel=rel), (number, name)


@pytest.mark.slow
def test_gradient_norms_equal_mmdetections_and_frozen_parameters_have_none(training):
    rows = formula.load_rows("params_f32.csv", CASCADE)
    assert len(rows) == len(training.gradients)
    for row in rows:
        gradient = training.gradients[formula.our_name(row["name"])]
        if row["requires_grad"] == "0":
            assert gradient is None, row["name"]
        else:
            assert gradient.double().norm().item() == pytest.approx(float(row["grad_l2"]), rel=1e-3), row["name"]


@pytest.mark.slow
def test_whole_gradients_of_small_parameters_equal_mmdetections(training):
    for name, expected in formula.load_arrays("small_grads_f32.npz", CASCADE).items():
        gradient = training.gradients[formula.our_name(name)]
        assert (gradient - expected).norm() <= 1e-3 * expected.norm(), name


@pytest.mark.slow
def test_parameters_after_three_steps_equal_mmdetections(training):
    for row in formula.load_rows("params_f32.csv", CASCADE):
        value = training.parameters[formula.our_name(row["name"])].double()
        assert value.norm().item() == pytest.approx(float(row["after3_l2"]), rel=1e-5), row["name"]
        assert value.sum().item() == pytest.approx(float(row["after3_sum"]), rel=1e-5, abs=1e-3), row["name"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "without_boxes"), [("first_image_without_gt", (0,)), ("no_gt_at_all", (0, 1))])
def test_losses_without_boxes_equal_mmdetections(
    model, weights, features, images, targets, monkeypatch, case, without_boxes
):
    expected = formula.load_json("extra_cases.json", CASCADE)["cases"][case]
    model.load_state_dict(weights)
    monkeypatch.setattr(model, "extract_features", lambda batch: features)
    some = [NO_BOXES if index in without_boxes else target for index, target in enumerate(targets)]
    with torch.no_grad():
        losses = model.train()(images, some)
    assert {name: loss.item() for name, loss in losses.items()} == {
        name: pytest.approx(expected[their_name(name)], rel=1e-5, abs=0) for name in LOSSES
    }


@pytest.mark.slow
def test_detections_equal_mmdetections(model, weights, features, images, monkeypatch):
    model.load_state_dict(weights)
    monkeypatch.setattr(model, "extract_features", lambda batch: features)
    found = model.eval()(images)
    for ours, stored in zip(found, formula.load_json("infer_f32.json", CASCADE)["images"], strict=True):
        expected = {
            "boxes_xyxy": torch.tensor(stored["bboxes"]),
            "scores": torch.tensor(stored["scores"]),
            "labels": torch.tensor(stored["labels"]),
        }
        difference = compare_detections(
            [ours], [expected], score_threshold=0.05, detections_per_image=100, score_tolerance=3e-4
        )
        assert difference.within(1e-4, 0.01) and difference.num_matched == len(expected["scores"]), difference


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_stage_refines_boxes_as_mmdetections_does(number):
    arrays, facts = formula.load_arrays("refine.npz", CASCADE), formula.load_json("refine.json", CASCADE)
    stage = model_config("cascade_rcnn_r50_fpn").stages[number]
    assert list(stage.roi_delta_stds) == facts["stds"][number]
    for image, size in enumerate(facts["img_shapes"]):
        mine = arrays["rois"][:, 0] == image
        refined = refine_boxes(
            stage,
            arrays["rois"][mine, 1:][None].float(),
            arrays["scores"][mine].float(),
            arrays["deltas"][mine][:, None].float(),
            torch.tensor([size]),
            arrays["labels"][mine][None],
        )[0]
        # Ground-truth boxes, the first of the positives, are not passed on.
        given = arrays[f"pos_is_gt{image}"].bool()
        kept = torch.cat((~given, torch.ones(len(refined) - len(given), dtype=torch.bool)))
        torch.testing.assert_close(refined[kept], arrays[f"refined_s{number}_{image}"].float(), rtol=0, atol=1e-3)


def test_a_stage_with_a_box_for_each_class_moves_a_roi_by_that_of_its_class():
    arrays = formula.load_arrays("refine.npz", CASCADE)
    config = dataclasses.replace(model_config("cascade_rcnn_r50_fpn", 5).stages[0], regressor_is_class_agnostic=False)
    labels = arrays["per_class_labels"]
    rois = arrays["rois"][: len(labels), 1:][None].float()
    size = torch.tensor([formula.load_json("refine.json", CASCADE)["img_shapes"][0]])
    deltas = arrays["per_class_deltas"].float().view(len(labels), 5, 4)
    expected = arrays["per_class_boxes"].float()
    for logits, given in (
        (torch.zeros(len(labels), 6), labels[None]),
        (torch.nn.functional.one_hot(labels, 6).float(), None),
        (torch.nn.functional.one_hot(labels, 6).float(), torch.full_like(labels, 5)[None]),  # background
    ):
        torch.testing.assert_close(
            refine_boxes(config, rois, logits, deltas, size, given)[0], expected, rtol=0, atol=1e-3
        )
