"""Trainings with --compile: the same numbers, and everything else as without.

The first of them compiles (most of a minute on two cores); the others find its work in the cache, as runs do.
"""

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from detection.engine.accelerate import compile
from detection.models import FasterRCNN, ImageBatch, TargetBatch, build_model
from detection.models.ops.backend import implementation

COMPILERS = [os.environ.get("CXX", "g++"), "g++", "clang++"]
pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="torch.compile wants a C++ compiler")

LOSSES = ("loss", "loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "grad_norm")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for what the compiler makes, empty at first."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        # One small kernel after the other: a pool of processes would take longer to start.
        context.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def recipe(finished: Path) -> list[str]:
    """Folded frozen normalization, as trainings on COCO have it, and an average of the weights; one padded size,
    because each is compiled."""
    sizes = ["--min-size", "64", "--max-size", "64"]
    return ["--weights", str(finished / "checkpoints" / "last.pt"), "--norm", "frozen_bn", "--ema", "0.5", *sizes]


@pytest.fixture(scope="module")
def train(start, recipe, cache):
    """train(output, *more): like a run of its own, which knows of earlier ones what their cache holds."""

    def run(output: Path, *more: str) -> Path:
        torch._dynamo.reset()
        assert start(output, *recipe, *more) == 0
        return output

    yield run
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def eager(train, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("eager") / "run")


@pytest.fixture(scope="module")
def compiled(train, tmp_path_factory, cache) -> Path:
    output = train(tmp_path_factory.mktemp("compiled") / "run", "--compile", "--limit-val-batches", "9")
    assert list(cache.rglob("*.so")), "nothing was compiled"
    return output


@pytest.fixture(scope="module")
def killed(start_and_kill, recipe, cache, tmp_path_factory) -> Path:
    """The compiled training, ended in the middle of its second epoch; every iteration was saved."""
    torch._dynamo.reset()
    output = tmp_path_factory.mktemp("killed") / "run"
    start_and_kill(5, output, *recipe, "--compile", "--limit-val-batches", "9", "--checkpoint-iterations", "1")
    return output


@pytest.fixture
def assert_same_losses(records_of):
    """assert_same_losses(a, b): fails unless two runs have the same losses and gradients to rounding, step by step."""

    def compare(one: Path, other: Path) -> None:
        ours, theirs = records_of(one, "train"), records_of(other, "train")
        assert [record["iteration"] for record in ours] == [record["iteration"] for record in theirs]
        for mine, yours in zip(ours, theirs, strict=True):
            assert mine["lr"] == yours["lr"]
            for name in LOSSES:
                assert mine[name] == pytest.approx(yours[name], rel=1e-5), (mine["iteration"], name)

    return compare


def test_losses_are_the_same_to_rounding_at_every_step(compiled, eager, assert_same_losses, records_of):
    assert len(records_of(compiled, "train")) == 6
    assert_same_losses(compiled, eager)


def test_a_run_killed_in_mid_epoch_resumes_to_the_same_bits(
    compiled, killed, train, tmp_path, load, same_state, records_of
):
    output = shutil.copytree(killed, tmp_path / "run")
    train(output, "--compile", "--limit-val-batches", "9", "--resume")
    states = [load(folder / "checkpoints" / "last.pt") for folder in (compiled, output)]
    for state in states:
        del state["config"]  # has the output directory in it
    same_state(*states)
    assert records_of(compiled) == records_of(output)


def test_a_compiled_runs_checkpoint_is_gone_on_with_uncompiled(
    killed, eager, train, tmp_path, load, assert_same_losses
):
    output = shutil.copytree(killed, tmp_path / "run")
    state, other = (load(folder / "checkpoints" / "last.pt") for folder in (output, eager))
    assert state["iteration"] == 5
    for part in ("model", "ema"):
        assert list(state[part]) == list(other[part])
    assert list(state["optimizer"]["state"]) == list(other["optimizer"]["state"])
    assert_same_losses(train(output, "--resume"), eager)


def test_an_uncompiled_runs_checkpoint_is_gone_on_with_compiled(eager, train, tmp_path, assert_same_losses):
    output = shutil.copytree(eager, tmp_path / "run")
    train(output, "--resume", output / "checkpoints" / "epoch_0001.pt", "--compile")
    assert_same_losses(output, eager)


def test_accumulated_micro_steps_have_the_same_losses(train, tmp_path, assert_same_losses):
    words = ["--accumulate", "2", "--max-epochs", "1", "--limit-train-batches", "2"]
    assert_same_losses(train(tmp_path / "compiled", "--compile", *words), train(tmp_path / "eager", *words))


def test_the_validation_inside_gives_what_the_same_weights_give_alone(compiled, train, tmp_path, records_of):
    """Uncompiled, and with the average of the weights: a copy of a model whose parts were compiled later."""
    file = compiled / "checkpoints" / "last.pt"
    alone = train(tmp_path / "alone", "--weights", file, "--val-only", "--limit-val-batches", "9")
    metrics, trained = json.loads((alone / "metrics_val.json").read_text()), records_of(compiled, "val")[-1]
    for name in ("mAP", "mAP_50", "AR_100", "per_class", "num_images"):
        assert metrics[name] == trained[name]
    assert metrics["num_images"] == 6
    first, second = ((folder / "detections_val.json").read_text() for folder in (alone, compiled))
    assert first == second and len(json.loads(first)) > 6


def test_two_processes_follow_the_losses_of_one_with_the_same_global_batch(
    program, arguments, recipe, train, tmp_path, assert_same_losses
):
    words = ["--max-epochs", "1", *recipe]
    with program(
        "accelerate/compiled_rank.py", *arguments(tmp_path / "two", *words, "--compile"), ranks=2
    ) as processes:
        for process in processes:
            out, err = process.communicate(timeout=200)
            assert process.returncode == 0, out[-3000:] + err[-6000:]
            # Four stages of the backbone, pyramid, RPN and RoI head.
            assert json.loads(out.splitlines()[-1])["traced"] >= 7
    assert_same_losses(tmp_path / "two", train(tmp_path / "one", "--max-epochs", "1", "--accumulate", "2"))


def test_a_compiler_that_fails_between_the_dense_parts_is_told_once_and_not_used_there(monkeypatch):
    torch.manual_seed(0)
    model = build_model("faster_rcnn_r18_fpn", 3, fpn_channels=16, roi_hidden_channels=16, rpn_samples_per_image=16)
    images = ImageBatch(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96]]))
    boxes = torch.tensor([[[8.0, 8, 40, 44]]])
    targets = TargetBatch(boxes, torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([5]))
    expected = model(images, targets)

    def fail(*_):
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(compile.torch, "compile", partial(torch.compile, backend=fail))
    monkeypatch.setattr(FasterRCNN, "compile_dense_parts", lambda *_, **__: None)
    told: list[str] = []
    compile.compile_for_training(model, by_stage=False, warn=told.append)
    with implementation(glue="compiled"):
        for _ in range(2):
            torch.testing.assert_close(model(images, targets), expected, rtol=1e-6, atol=1e-7)
    (line,) = told
    assert "the compiler failed in backbone_features; only the dense parts run compiled" in line
    assert "no such instruction" in line
