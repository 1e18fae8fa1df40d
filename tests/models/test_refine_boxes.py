"""The boxes that the stages of a cascade pass on, against MMDetection's."""

import dataclasses

import pytest
import torch

from detection.models import model_config
from detection.models.roi_head import refine_boxes
from tests.reference.parity import formula
from tests.reference.parity.formula import CASCADE


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
