import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torchvision

from detection.engine.optim.amp import multiplies_bfloat16
from detection.models import ImageBatch, MaskBatch, TargetBatch, build_model
from detection.models import rpn as rpn_module
from detection.models.backbones.resnet import NORMS
from detection.models.ops.backend import DEVICE, implementation
from detection.models.ops.box_losses import BOX_LOSSES
from detection.models.ops.feature_table import cell_table, windows_3x3
from detection.models.ops.selfcheck import describe_kernels, uses_triton
from detection.models.roi_head import sample_rois
from detection.models.rpn import rpn_losses
from detection.models.structures import batch_images, batch_targets

LOSSES = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 96, 128


SMALL = {
    "fpn_channels": 32,
    "roi_hidden_channels": 64,
    "mask_channels": 8,
    "rpn_proposals_train": 200,
    "rpn_proposals_test": 50,
    "roi_samples_per_image": 64,
}


def make_model(name="faster_rcnn_r18_fpn", **overrides):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, **{**SMALL, **overrides}).train()
    # As large as trained ones, so that proposals and detections differ from anchors.
    torch.nn.init.normal_(model.rpn.deltas.weight, std=0.1)
    torch.nn.init.normal_(model.rpn.objectness.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model("mask_rcnn_r18_fpn")


def photos(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def target(boxes, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1 : (y1 + y2 + 1) // 2, x1:x2] = True
    labels = torch.arange(len(boxes)) % 5 if labels is None else labels
    return {"boxes_xyxy": boxes, "labels": labels, "masks": masks}


def names_of_losses(config):
    kinds = ["cls", "bbox", *(["mask"] if config.has_masks else [])]
    stages = [""] if config.cascade_ious is None else [f"_s{stage}" for stage in range(3)]
    return {"loss_rpn_cls", "loss_rpn_bbox", *(f"loss_{kind}{stage}" for kind in kinds for stage in stages)}


def step(model, images, targets):
    """Losses of a step, after checks that hold for every step: finite, and every trained parameter takes part."""
    model.zero_grad(set_to_none=True)
    losses = model(images, targets)
    assert losses.keys() == names_of_losses(model.config)
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 and loss.dim() == 0 for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return {name: loss.item() for name, loss in losses.items()}


BOX = [20.0, 16, 90, 70]


def two_images():
    truth = batch_targets([target([BOX, [0, 0, 30, 40]]), target([[5, 5, 60, 60]])], 5, CPU)
    return batch_images(photos((HEIGHT, WIDTH), (64, 120)), CPU), truth


EDGE_CASES = {
    "one image without boxes": [target([BOX]), target([])],
    "no boxes at all": [target([]), target([])],
    "500 boxes": [
        target([[x, y, x + 9, y + 7] for x in range(0, 100, 4) for y in range(0, 80, 4)][:500]),
        target([BOX]),
    ],
    "boxes at the border": [
        target([[0, 0, WIDTH, HEIGHT], [WIDTH - 4, HEIGHT - 9, WIDTH, HEIGHT]]),
        target([[0, 0, 5, 5]]),
    ],
    "equal boxes": [target([BOX, BOX, BOX]), target([BOX])],
    "boxes of one pixel": [
        target([[7, 9, 8, 10], [0, 0, 1, 1], [WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT]]),
        target([BOX]),
    ],
    "lines": [target([[3, 40, 125, 41], [60, 1, 61, 95]]), target([[0, 0, WIDTH, 0.5]])],
}


@pytest.mark.parametrize(
    "settings",
    [{"roi_sampler": "ohem"}, *({"roi_box_loss": kind, "roi_box_loss_weight": 10.0} for kind in BOX_LOSSES)],
    ids=str,
)
def test_every_sampler_and_box_loss_trains_all_parameters_under_autocast(settings):
    model = make_model(**settings, score_threshold=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        step(model, photos((64, 96)), [target([BOX])])


def test_hard_examples_are_those_with_the_largest_classification_loss():
    model = make_model(roi_sampler="ohem", roi_samples_per_image=16)
    truth = batch_targets([target([BOX])], 5, CPU)
    features = model.extract_features(batch_images(photos((HEIGHT, WIDTH)), CPU))
    torch.nn.init.normal_(model.roi_head.classifier.weight, std=0.5)
    boxes = torch.rand(1, 60, 4) * 40
    boxes[..., 2:] += boxes[..., :2] + 8

    def losses(candidates, labels):
        logits, _ = model.roi_head(model.pool(features, candidates))
        return -logits.log_softmax(dim=1).gather(1, labels.view(-1, 1)).view_as(labels)

    rois = sample_rois(model.config, boxes, torch.ones(1, 60, dtype=torch.bool), truth, class_losses=losses)
    assert rois.chosen.all() and int(rois.positive.sum()) <= 4
    chosen = losses(rois.boxes_xyxy, rois.labels)[~rois.positive]
    background = losses(boxes, torch.full((1, 60), 5))[0]
    assert torch.equal(chosen.sort().values, background.sort().values[-len(chosen) :])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"features": "c4", "roi_output_size": 14}, {"features": "dc5"}], ids=str)
def test_a_single_map_trains_all_parameters_and_detects(settings):
    anchors = {"anchor_strides": (16,), "anchor_sizes": (32, 64, 128), "roi_samples_per_image": 16}
    model = make_model("faster_rcnn_r50_fpn", **settings, **anchors, score_threshold=0.0)
    step(model, photos((64, 96), (60, 64)), [target([BOX]), target([])])
    assert all(len(found["scores"]) for found in model.eval()(photos((64, 96), (60, 64))))


def test_a_network_for_bgr_is_given_the_channels_in_that_order():
    rgb = make_model(pixel_mean=(10, 20, 30), pixel_std=(1, 2, 3)).double()
    bgr = make_model(pixel_mean=(30, 20, 10), pixel_std=(3, 2, 1), pixel_order="bgr").double()
    bgr.load_state_dict(rgb.state_dict() | {"backbone.conv1.weight": rgb.backbone.conv1.weight.flip(1)})
    batch = batch_images(photos((64, 96), (60, 64)), CPU)
    for one, other in zip(rgb.extract_features(batch), bgr.extract_features(batch), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limits"),
    # torchvision's first weights lead to larger features and answers.
    [("faster_rcnn_r18_fpn", (0.05, 0.3)), ("fasterrcnn_resnet18_fpn", (0.2, 0.9))],
)
def test_a_fresh_models_losses_are_those_of_guessing(name, limits):
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, norm="gn", frozen_stages=-1).train()
    losses = step(model, photos((HEIGHT, WIDTH), (HEIGHT, WIDTH)), [target([BOX]), target([BOX])])
    assert losses["loss_rpn_cls"] == pytest.approx(math.log(2), abs=limits[0])
    assert losses["loss_cls"] == pytest.approx(math.log(6), abs=limits[1])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"{name}_fpn", marks=() if "18" in name else pytest.mark.slow)
        for name in ("faster_rcnn_r18", "cascade_mask_rcnn_r18", "faster_rcnn_r50", "faster_rcnn_x101_32x4d")
    ],
)
def test_every_model_trains_with_every_norm_in_both_precisions(name, norm, precision):
    if precision == "bf16" and "18" not in name and not multiplies_bfloat16(CPU):
        pytest.skip("takes long where the processor emulates bfloat16")
    model = make_model(name, norm=norm).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        step(model, photos((HEIGHT, WIDTH)), [target([BOX])])


@pytest.mark.slow
@pytest.mark.skipif(not multiplies_bfloat16(CPU), reason="takes minutes where the processor emulates bfloat16")
def test_the_command_line_fine_tunes_a_frozen_network_in_bf16(tmp_path):
    data, run, weights = tmp_path / "shapes", tmp_path / "run", tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    options = (
        f"--schedule 1x --dataset shapes --data-path {data} --model faster_rcnn_r18_fpn "
        f"--weights {weights} --norm frozen_bn --amp bf16 --min-size 96 --max-size 128 --batch-size 1 --max-epochs 1 "
        f"--limit-train-batches 1 --limit-val-batches 1 --device cpu --workers 1 --output-dir {run}"
    )
    subprocess.run([sys.executable, "train.py", *options.split()], cwd=ROOT, check=True)
    assert (run / "checkpoints" / "last.pt").is_file()


@pytest.mark.parametrize("case", EDGE_CASES)
def test_every_kind_of_target_gives_finite_losses_and_gradients_for_all(model, case):
    losses = step(model, photos((HEIGHT, WIDTH), (HEIGHT, WIDTH)), EDGE_CASES[case])
    if case == "no boxes at all":
        assert losses["loss_rpn_bbox"] == losses["loss_bbox"] == losses["loss_mask"] == 0
    else:
        assert losses["loss_mask"] > 0
        assert losses["loss_bbox"] > 0 or losses["loss_rpn_bbox"] > 0
    assert losses["loss_rpn_cls"] > 0
    assert losses["loss_cls"] > 0


@pytest.mark.parametrize("sizes", [((32, 320), (300, 20)), ((1, 200), (200, 1))])
def test_images_of_extreme_aspect_train(model, sizes):
    targets = [target([[0, 0, 15, 1]]), target([[0, 2, 1, 60]])]
    step(model, photos(*sizes), targets)
    detections = model.eval()(photos(*sizes))
    model.train()
    assert len(detections) == 2


@pytest.mark.parametrize("samples", [None, 16])
def test_a_step_in_which_no_proposal_survives_learns_from_the_boxes_alone(samples):
    model = make_model(proposal_min_size=1e5, rpn_samples_per_image=samples, roi_samples_per_image=samples)
    images = photos((HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert step(model, images, [target([BOX]), target([])])["loss_cls"] > 0
    losses = step(model, images, [target([]), target([])])
    assert losses["loss_cls"] == losses["loss_bbox"] == 0
    detections = model.eval()(images)
    assert [len(each["scores"]) for each in detections] == [0, 0]


@pytest.mark.parametrize("name", ["faster_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn"])
def test_the_rpn_learns_the_same_at_its_sampled_anchors_as_from_whole_maps(name):
    """Losses and gradients through `RPNHead.at_anchors` equal those through the dense pass at the same anchors."""
    model = make_model(name, rpn_samples_per_image=64)
    batch, truth = two_images()
    features = [each.detach().requires_grad_() for each in model.extract_features(batch)]
    anchors = model._anchors(batch, features)
    learned = rpn_module.anchor_targets(model.config, anchors, batch.sizes, truth)
    cells = learned.sample.candidate // model.rpn.anchors_per_cell
    patches = cell_table(features)[windows_3x3(cells, anchors.layout).view(-1)]
    sampled = model.rpn.at_anchors(patches, learned.sample.candidate)
    dense = [learned.sample.take(each) for each in model.rpn(features)]
    wanted = [*model.rpn.parameters(), *features]
    gradients = []
    for outputs in (sampled, dense):
        losses = rpn_losses(model.config, *outputs, learned)
        gradients.append(torch.autograd.grad(losses[0] + 3 * losses[1], wanted, retain_graph=True))
    torch.testing.assert_close(sampled, tuple(dense), rtol=1e-4, atol=1e-5)
    for of_sampled, of_dense in zip(*gradients, strict=True):
        torch.testing.assert_close(of_sampled, of_dense, rtol=1e-3, atol=1e-5)
    assert sum(of_dense.any() for of_dense in gradients[1]) >= len(wanted) - 1  # the coarsest map may have no sample


def test_padded_boxes_behind_the_real_ones_change_nothing(model):
    batch, truth = two_images()
    padding = 7
    padded = TargetBatch(
        torch.cat((truth.boxes_xyxy, torch.full((2, padding, 4), 1e6)), dim=1),
        torch.cat((truth.labels, torch.full((2, padding), 4)), dim=1),
        torch.cat((truth.valid, torch.zeros(2, padding, dtype=torch.bool)), dim=1),
        truth.sample_keys,
        MaskBatch(
            torch.cat((truth.masks.bits, torch.ones(9, dtype=torch.uint8))),
            torch.cat((truth.masks.offsets, torch.full((2, padding), 5)), dim=1),
            torch.cat((truth.masks.rectangles, torch.zeros(2, padding, 4, dtype=torch.int64)), dim=1),
        ),
    )
    with torch.no_grad():
        assert model(batch, truth) == model(batch, padded)


def test_what_lies_in_the_images_padding_changes_nothing(model):
    batch, truth = two_images()
    noisy = batch.pixels.clone()
    noisy[1, :, 64:] = 200
    noisy[1, :, :, 120:] = 100
    with torch.no_grad():
        assert model(batch, truth) == model(ImageBatch(noisy, batch.sizes), truth)


def test_samples_depend_on_the_images_keys_and_not_on_their_places():
    model = make_model(rpn_samples_per_image=32, roi_samples_per_image=32)
    batch = batch_images(photos((HEIGHT, WIDTH), (HEIGHT, WIDTH), (HEIGHT, WIDTH)), CPU)
    truth = batch_targets([target([BOX]), target([[5, 5, 60, 60], [1, 1, 9, 9]]), target([])], 5, CPU)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        losses = model(batch, truth)
        swapped = model(ImageBatch(*(each[order] for each in batch)), TargetBatch(*(each[order] for each in truth[:4])))
        others = model(batch, truth._replace(sample_keys=truth.sample_keys + 1))
    for name in LOSSES:
        torch.testing.assert_close(swapped[name], losses[name], rtol=1e-4, atol=1e-6)
    for name in ("loss_rpn_cls", "loss_cls"):
        assert others[name].item() != pytest.approx(losses[name].item(), rel=1e-5), name


def test_under_autocast_every_parameter_learns_much_the_same(model):
    batch, truth = two_images()
    gradients = []
    for enabled in (False, True):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model(batch, truth)
        sum(losses.values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, single in gradients[0].items():
        half = gradients[1][name]
        assert half is not None, name
        assert half.dtype == torch.float32
        similarity = torch.nn.functional.cosine_similarity(single.flatten(), half.flatten(), dim=0)
        assert similarity > 0.8, (name, similarity)


@pytest.mark.slow
def test_the_code_for_other_devices_gives_the_same_losses(model):
    batch, truth = two_images()
    with torch.no_grad():
        on_cpu = model(batch, truth)
        with implementation(**DEVICE):
            elsewhere = model(batch, truth)
    for name in LOSSES:
        torch.testing.assert_close(elsewhere[name], on_cpu[name], rtol=1e-5, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["mask_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn", "cascade_mask_rcnn_r18_fpn"])
@pytest.mark.parametrize("with_triton", [True, False])
def test_a_step_on_the_gpu_waits_for_nothing_and_without_triton_once_for_its_suppression(name, with_triton):
    device = torch.device("cuda")
    assert uses_triton(device), describe_kernels(device)
    model = make_model(name).cuda()
    batch = batch_images(photos((HEIGHT, WIDTH), (64, 120)), device)
    truth = batch_targets([target([BOX]), target([])], 5, device)
    with implementation(**({} if with_triton else DEVICE)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sum(model(batch, truth).values()).backward()
        caught.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            losses = model(batch, truth)
            torch.stack(list(losses.values())).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) == (0 if with_triton else 1), waits


@pytest.mark.cuda
def test_losses_on_the_gpu_equal_those_on_the_cpu(model):
    batch, truth = two_images()
    on_gpu = make_model("mask_rcnn_r18_fpn").cuda()
    on_gpu.load_state_dict(model.state_dict())
    # A GPU's convolutions of float32 round their inputs to TF32 otherwise.
    precise = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with precise, torch.no_grad():
        expected = model(batch, truth)
        found = on_gpu(ImageBatch(*(each.cuda() for each in batch)), truth.to(torch.device("cuda")))
    for name in LOSSES:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-3), name


@pytest.mark.slow
def test_each_padded_size_is_compiled_once_without_graph_break_and_gives_the_same_losses_gradients_and_names():
    model = make_model("mask_rcnn_r18_fpn")
    names = list(model.state_dict())
    batches = []
    for size in ((HEIGHT, WIDTH), (64, 160), (HEIGHT, WIDTH)):
        batches.append((batch_images(photos(size, size), CPU), batch_targets([target([BOX]), target([])], 5, CPU)))

    def train():
        found = []
        for batch, truth in batches:
            model.zero_grad(set_to_none=True)
            losses = model(batch, truth)
            sum(losses.values()).backward()
            found.append((losses, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
        return found

    expected = train()
    torch._dynamo.utils.counters.clear()
    model.compile_dense_parts(dynamic=False, backend="aot_eager", fullgraph=True)
    model.glue.compile(lambda function, _: torch.compile(function, dynamic=False, backend="aot_eager", fullgraph=True))
    with implementation(**{**DEVICE, "glue": "compiled"}):
        found = train()
    for (losses, gradients), (other_losses, other_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(losses, other_losses, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradients, other_gradients, rtol=1e-3, atol=1e-5)
    # Two sizes of backbone, pyramid, RPN head and proposals; one of the rest, which is box head, mask head, windows,
    # the RPN at its anchors, and two losses.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * 4 + 6
    assert list(model.state_dict()) == names
    with torch.autocast("cpu", torch.bfloat16):
        sum(model(*batches[0]).values()).backward()


@pytest.mark.slow
def test_a_deep_copy_of_a_compiled_model_is_independent():
    model = make_model()
    model.compile_dense_parts(backend="eager")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    images, targets = photos((HEIGHT, WIDTH)), [target([BOX])]
    with torch.no_grad():
        assert twin(images, targets)["loss_rpn_cls"].item() == pytest.approx(0.6931, abs=1e-3)
        assert model(images, targets)["loss_rpn_cls"].item() != pytest.approx(0.6931, abs=1e-3)
