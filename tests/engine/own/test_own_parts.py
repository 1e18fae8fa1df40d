"""Detectors, backbones and augmentations of a user's own: docs/extend.md."""

import pytest
import torch

from data import DataError
from detection import load_detector
from detection.config import ConfigError
from detection.engine import RunError
from detection.models import OwnCodeError, WeightsError, build_detector
from detection.models.own.backbone import OwnBackbone
from detection.models.structures import batch_images, batch_targets

PARTS = "tests.engine.own.parts"
DETECTOR = ("--model", f"{PARTS}:retinanet", "--lr", "0.001", "--set", "param_scheduler.0.end=2")
CPU = torch.device("cpu")
IMAGES = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 80), (60, 64))]
TARGETS = [
    {"boxes_xyxy": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([2])},
    {"boxes_xyxy": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("own") / "run"
    assert start(output, *DETECTOR, "--ema", "--amp", "bf16", "--augmentation", f"{PARTS}:squares") == 0
    return output


def test_a_detector_of_ones_own_resumes_bit_for_bit(
    trained, start, start_and_kill, tmp_path, load, same_state, records_of
):
    more = (*DETECTOR, "--ema", "--amp", "bf16", "--augmentation", f"{PARTS}:squares", "--checkpoint-iterations", "1")
    start_and_kill(4, tmp_path / "run", *more)
    assert start(tmp_path / "run", *more, "--resume") == 0
    one, other = (load(folder / "checkpoints" / "last.pt") for folder in (trained, tmp_path / "run"))
    for key in ("model", "ema", "optimizer", "iteration"):
        same_state(one[key], other[key])
    assert records_of(trained) == records_of(tmp_path / "run")
    first = records_of(trained, "train")[0]
    assert {"loss_classification", "loss_bbox_regression", "grad_norm"} <= first.keys()
    assert records_of(trained, "val")[0]["mAP"] >= 0
    assert list((trained / "tensorboard").iterdir())


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_train_a_detector_of_ones_own_as_one_does(ranks, program, arguments, start, tmp_path, load):
    short = ("--model-set", "drops=False", "--max-epochs", "1", "--limit-train-batches", "2", "--seed", "3")
    assert start(tmp_path / "one", *DETECTOR, *short, "--batch-size", str(ranks)) == 0
    words = arguments(tmp_path / "several", *DETECTOR, *short, "--batch-size", "1")
    with program("tiny_model.py", *words, ranks=ranks) as processes:
        outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, outputs
    one, several = (load(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("one", "several"))
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_file_alone_starts_no_code_and_a_detector_of_ones_own_predicts(trained, start, tmp_path):
    weights = trained / "checkpoints" / "last.pt"
    with pytest.raises(WeightsError, match=f"made by {PARTS}:retinanet, which no file alone may start: give --model"):
        load_detector(weights)
    detector = load_detector(weights, own_code=[f"{PARTS}:retinanet"])
    (found,) = detector.predict([IMAGES[0].permute(1, 2, 0).numpy()])
    assert len(found["scores"]) and set(found["labels"].tolist()) <= set(range(6))
    assert (found["scores"].diff() <= 0).all()
    assert start(tmp_path / "judged", *DETECTOR, "--val-only", "--weights", weights) == 0


@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn"])
def test_torchvisions_detectors_learn_and_detect_the_classes_of_the_data(name):
    torch.manual_seed(0)
    model = build_detector(f"{PARTS}:{name}", num_classes=5).train()
    images, targets = batch_images(IMAGES, CPU), batch_targets(TARGETS, 5, CPU)
    stem = next(model.parameters())

    def gradient(targets):
        model.zero_grad()
        losses = model(images, targets)
        assert len(losses) >= 2 and all(key.startswith("loss_") for key in losses)
        sum(losses.values()).backward()
        return stem.grad.clone()

    # What is drawn follows from the sample keys.
    first, again = gradient(targets), gradient(targets)
    assert torch.equal(first, again) and first.abs().sum() > 0
    if name == "retinanet":
        assert not torch.equal(first, gradient(targets._replace(sample_keys=targets.sample_keys + 1)))
    found, is_finite = model.eval().detect(images)
    assert is_finite.tolist() == [True, True]
    assert all(each["labels"].ge(0).all() and each["labels"].lt(5).all() for each in found)
    (listed, _), size = model(IMAGES), IMAGES[0].shape
    assert torch.equal(listed["boxes_xyxy"], found[0]["boxes_xyxy"])
    assert (found[0]["boxes_xyxy"] <= torch.tensor([size[2], size[1]] * 2)).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compile",), "which takes lists of images, of any sizes: leave --compile away"),
        (("--cuda-graphs",), "leave --cuda-graphs away"),
        (("--norm", "bn"), "--norm is nothing that it is known to have"),
        (("--freeze", "stage1"), "--freeze is nothing"),
        (("--weights", "imagenet"), "let the function load such weights, or give --weights FILE"),
    ],
)
def test_what_a_detector_of_ones_own_does_not_take_is_said_before_training(words, message, arguments, tmp_path):
    from detection.config import parse_arguments

    given = [word for word in arguments(tmp_path, *DETECTOR) if word not in ("--weights", "none")]
    with pytest.raises(ConfigError, match=message):
        parse_arguments([*given, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "nowhere:detector"), "the module nowhere cannot be imported"),
        (("--model", f"{PARTS}:absent"), "has no function absent"),
        (("--model", f"{PARTS}:not_a_module"), "gives a int, not a torch.nn.Module"),
        (("--model", f"{PARTS}:retinanet", "--model-set", "depth=3"), "unexpected keyword argument"),
        (("--model", f"{PARTS}:Nothing"), "in training it must give a dictionary of scalar losses"),
        (("--backbone", f"{PARTS}:three_maps"), "there must be four, of 16 x 16, 8 x 8, 4 x 4, 2 x 2 cells"),
        (("--backbone", "timm/no_such_model"), "timm is not installed|timm gives no maps"),
        (("--augmentation", f"{PARTS}:absent"), "has no function absent"),
        (("--augmentation", f"{PARTS}:fewer_boxes"), "changes the shape or the type of valid; keep both"),
    ],
)
def test_parts_that_do_not_fit_are_one_error(words, message, start, tmp_path):
    with pytest.raises((RunError, OwnCodeError, DataError), match=message):
        start(tmp_path / "run", *words)


def test_a_backbone_of_ones_own_trains_under_the_pyramid_with_frozen_statistics(start, tmp_path, load):
    words = ("--backbone", f"{PARTS}:maps", "--norm", "frozen_bn", "--max-epochs", "1", "--lr", "0.001")
    assert start(tmp_path / "run", *words, "--limit-train-batches", "1") == 0
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert state["model_config"]["backbone"] == f"{PARTS}:maps"
    assert state["model"]["backbone.body.stem.1.running_mean"].eq(0).all()
    with pytest.raises(WeightsError, match="give --backbone"):
        load_detector(tmp_path / "run" / "checkpoints" / "last.pt")


def test_a_backbone_of_ones_own_is_frozen_as_a_whole_or_not_at_all():
    frozen = OwnBackbone(f"{PARTS}:maps", norm="bn", frozen_stages=4).train()
    assert frozen.out_channels == (8, 8, 8, 8)
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.body.stem[1].training
    assert OwnBackbone(f"{PARTS}:maps", norm="bn", frozen_stages=-1).train().body.stem[1].training
    with pytest.raises(OwnCodeError, match="freeze none of it, or the whole backbone"):
        OwnBackbone(f"{PARTS}:maps", norm="bn", frozen_stages=1)


def test_timms_backbones_give_four_maps():
    pytest.importorskip("timm")
    backbone = OwnBackbone("timm/mobilenetv3_small_050", norm="frozen_bn", frozen_stages=-1)
    assert [each.shape[-1] for each in backbone(torch.zeros(1, 3, 64, 64))] == [16, 8, 4, 2]
