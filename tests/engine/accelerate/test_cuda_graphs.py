"""Recorded forward and backward passes, on a CPU with a stand-in for CUDA graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection.config import ConfigError
from detection.engine import build, train
from detection.engine.accelerate import cuda_graphs
from detection.engine.accelerate.choice import Acceleration
from detection.engine.accelerate.cuda_graphs import (
    CudaGraphBackend,
    StepGraphs,
    cuda_step_graphs,
    record_detection,
    require_cuda_graphs,
)
from detection.engine.distributed.comm import Processes
from detection.engine.optim.gradient_buckets import GradientBuckets
from detection.engine.trainer import Trainer
from detection.models import ImageBatch, MaskBatch, TargetBatch, build_model
from detection.models.ops.backend import DEVICE, implementation
from tests.engine.accelerate.operator_recorder import OperatorRecorder
from tests.engine.accelerate.pretended_memory import PretendedMemory, bytes_of, pretended

CPU = torch.device("cpu")


class Refuser(OperatorRecorder):
    def capture(self, step: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture
def code_of_gpus() -> Iterator[None]:
    """Has the CPU run what a GPU runs; its own code decides by what is in the batch, as only a CPU's can."""
    with implementation(**DEVICE):
        yield


def batch(seed: int, num_boxes: int, height: int = 64) -> tuple[ImageBatch, TargetBatch]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, num_boxes, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + 10 + torch.rand(2, num_boxes, 2, generator=generator) * 14), dim=2)
    pixels = torch.randint(0, 256, (2, 3, height, 96), dtype=torch.uint8, generator=generator)
    # One image that fills less than its padding: on a CPU too, masks then stay masks.
    sizes = torch.tensor([[64, 96], [30, 90]])
    labels = torch.randint(0, 3, (2, num_boxes), generator=generator)
    valid = torch.rand(2, num_boxes, generator=generator) > 0.3
    return ImageBatch(pixels, sizes), TargetBatch(boxes, labels, valid, torch.tensor([seed, seed + 100]))


def passes(model: nn.Module, graphs: StepGraphs | None, batches: list[tuple[ImageBatch, TargetBatch]]) -> list[Any]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = GradientBuckets(parameters, Processes(0, 0, 1, 1, parameters[0].device), stay=True)
    if graphs is not None and isinstance(graphs.backend, OperatorRecorder):
        graphs.backend.untouched = lambda: [p.grad for p in parameters]

    def step(images: ImageBatch, targets: TargetBatch) -> dict[str, Tensor]:
        losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        return {name: value.detach() for name, value in losses.items()}

    found = []
    for images, targets in batches:
        gradients.zero()
        losses = graphs.run(step, images, targets) if graphs is not None else step(images, targets)
        found.append((losses, torch.cat([p.grad.flatten() for p in parameters])))
    return found


def with_masks(seed: int, num_boxes: int) -> tuple[ImageBatch, TargetBatch]:
    """A random bitmap inside of each box, and more of them where there are more boxes."""
    images, targets = batch(seed, num_boxes)
    side, number = 8, 2 * num_boxes
    bits = torch.randint(0, 2, (number * side**2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    offsets = (side**2 * torch.arange(number)).view(2, num_boxes)
    rectangles = torch.cat((targets.boxes_xyxy[..., :2].long() + 1, torch.full((2, num_boxes, 2), side)), dim=2)
    return images, targets._replace(masks=MaskBatch(bits, offsets, rectangles))


def tiny(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build_model("tiny", 3, norm="gn", frozen_stages=-1, **settings).train()
    model.fixed_shapes = True
    nn.init.normal_(model.rpn.deltas.weight, std=0.1)
    return model


def test_replayed_passes_give_each_batch_its_own_losses_and_gradients(code_of_gpus, same_state):
    # Other images, boxes, keys and numbers of boxes each time, in two sizes by turns.
    batches = [batch(seed, 1 + 5 * (seed % 3), 64 if seed % 2 else 96) for seed in range(10)]
    backend = OperatorRecorder()
    problems: list[str] = []
    graphs = StepGraphs(backend, problems.append)
    with_graphs, without = passes(tiny(), graphs, batches), passes(tiny(), None, batches)
    # Of each size one pass as it is written and one with the recording.
    assert (graphs.num_captures, backend.replays) == (2, 6)
    same_state(with_graphs, without)
    assert len({float(losses["loss_cls"]) for losses, _ in with_graphs}) == 10
    assert problems == []


def test_replayed_passes_learn_each_batchs_own_masks(code_of_gpus, same_state):
    batches = [with_masks(seed, 1 + 5 * (seed % 3)) for seed in range(6)]
    backend, settings = OperatorRecorder(), {"has_masks": True, "mask_channels": 4}
    graphs = StepGraphs(backend, pytest.fail)
    same_state(passes(tiny(**settings), graphs, batches), found := passes(tiny(**settings), None, batches))
    assert (graphs.num_captures, backend.replays) == (1, 4)
    assert len({float(losses["loss_mask"]) for losses, _ in found}) == 6


def test_more_boxes_than_before_are_a_size_of_their_own(code_of_gpus, same_state):
    batches = [batch(seed, 40 if seed % 2 else 3) for seed in range(6)]
    backend = OperatorRecorder()
    graphs = StepGraphs(backend, pytest.fail)
    same_state(passes(tiny(), graphs, batches), passes(tiny(), None, batches))
    assert (graphs.num_captures, backend.replays) == (2, 2)


def test_passes_that_cannot_be_recorded_are_done_once_each_as_they_are_written(code_of_gpus, same_state):
    problems: list[str] = []
    graphs = StepGraphs(Refuser(), problems.append)
    batches = [batch(seed, 3) for seed in range(4)]
    same_state(passes(tiny(), graphs, batches), passes(tiny(), None, batches))
    (problem,) = problems
    assert problem.endswith("operation not permitted when stream is capturing")
    assert graphs.num_captures == 0


@pytest.mark.parametrize(
    ("settings", "amp"), [({}, True), ({"has_masks": True, "mask_channels": 4}, False)], ids=["bfloat16", "masks"]
)
def test_replayed_detections_and_losses_are_those_of_the_network_as_it_is_written(
    code_of_gpus, same_state, settings, amp
):
    if settings:
        batches = [with_masks(seed, 1 + 5 * (seed % 3)) for seed in range(5)]
    else:
        batches = [batch(seed, 3, 64 if seed % 2 else 96) for seed in range(6)]
    plain, recorded = tiny(**settings).eval(), tiny(**settings).eval()
    backend = OperatorRecorder()
    record_detection(recorded, backend, pytest.fail)
    for number, (images, targets) in enumerate(batches):
        if number == 4:  # as a training does between two validations
            for model in (plain, recorded):
                model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})
        with torch.autocast("cpu", enabled=amp):
            same_state(recorded.detect_with_losses(images, targets), plain.detect_with_losses(images, targets))
        with torch.inference_mode():  # as Detector.predict
            for pixels in (images.pixels, images.pixels + 0.5):
                given = ImageBatch(pixels, images.sizes)
                same_state(recorded.detect(given), plain.detect(given))
    assert backend.replays == 3 * (len(batches) - (2 if settings else 4))


def on_gpu(*batches: tuple[ImageBatch, TargetBatch]) -> list[tuple[ImageBatch, TargetBatch]]:
    return [
        (ImageBatch(*(each.cuda() for each in images)), targets.to(torch.device("cuda"))) for images, targets in batches
    ]


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_replayed_passes_give_what_passes_give_as_they_are_written(compiled):
    batches = on_gpu(*(batch(seed, 1 + 5 * (seed % 3), 64 if seed % 2 else 96) for seed in range(10)))
    problems: list[str] = []
    graphs = StepGraphs(CudaGraphBackend(), problems.append)
    recorded, plain = tiny().cuda(), tiny().cuda()
    if compiled:
        recorded.compile_dense_parts(dynamic=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, expected = passes(recorded, graphs, batches), passes(plain, None, batches)
    assert not problems and graphs.num_captures == 2
    for (losses, gradients), (plain_losses, plain_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(losses, plain_losses, rtol=1e-3, atol=1e-4)
        assert (gradients - plain_gradients).norm() < 0.01 * plain_gradients.norm()


@pytest.mark.cuda
def test_on_a_gpu_a_pass_that_cannot_be_recorded_leaves_a_training_that_goes_on():
    batches = on_gpu(*(batch(seed, 3) for seed in range(6)))
    problems: list[str] = []
    model, graphs = tiny().cuda(), StepGraphs(CudaGraphBackend(), problems.append)
    model.register_forward_hook(lambda module, given, losses: losses["loss_cls"].item() and None)
    found = passes(model, graphs, batches)
    assert any("captur" in problem for problem in problems)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    expected = passes(tiny().cuda(), None, batches)
    assert all((g - e).norm() < 0.02 * e.norm() for (_, g), (_, e) in zip(found, expected, strict=True))
    # What another stream has used is free again when it has done so.
    own = torch.cuda.Stream()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        used = torch.zeros(2**20, device="cuda")
        used.record_stream(own)
        del used
    torch.cuda.synchronize()
    torch.zeros(1, device="cuda")
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, code_of_gpus: None) -> list[StepGraphs]:
    """--cuda-graphs with the stand-in; the graphs of each training."""
    made: list[StepGraphs] = []

    def graphs(model: nn.Module, warn: Any) -> StepGraphs:
        recorder = OperatorRecorder()
        recorder.untouched = lambda: [p.grad for p in model.parameters() if p.requires_grad]
        made.append(StepGraphs(recorder, warn))
        return made[-1]

    monkeypatch.setattr(build, "require_cuda_graphs", lambda device: None)
    monkeypatch.setattr(train, "cuda_step_graphs", graphs)
    return made


@pytest.mark.parametrize("more", [[], ["--accumulate", "2", "--skip-nonfinite", "--clip-grad", "3", "--ema"]])
def test_a_training_with_graphs_ends_with_the_bits_of_one_without(
    on_cpu, monkeypatch, start, tmp_path, records_of, load, same_state, more
):
    words = ["--cuda-graphs", "--norm", "gn", "--limit-train-batches", "4", "--max-epochs", "3", *more]
    words += ["--limit-val-batches", "9"]
    assert start(tmp_path / "with", *words) == 0
    # Of 12 passes and 9 batches of validations, the first two of each are no replays.
    assert on_cpu[0].num_captures >= 1 and on_cpu[0].backend.replays >= 10 + 7
    # The same loop and the same padding, with passes as they are written.
    monkeypatch.setattr(StepGraphs, "run", lambda self, step, images, targets: step(images, targets))
    assert start(tmp_path / "without", *words) == 0
    assert on_cpu[1].num_captures == 0
    assert records_of(tmp_path / "with") == records_of(tmp_path / "without")
    states = [load(tmp_path / name / "checkpoints" / "last.pt") for name in ("with", "without")]
    for key in ("model", "ema", "optimizer"):
        same_state(states[0][key], states[1][key])


def test_a_training_with_graphs_resumes_to_the_same_bits(on_cpu, start, tmp_path, load, same_state):
    words = ["--cuda-graphs", "--norm", "gn", "--limit-train-batches", "4"]
    assert start(tmp_path / "whole", *words, "--max-epochs", "2") == 0
    assert start(tmp_path / "halves", *words, "--max-epochs", "1") == 0
    assert start(tmp_path / "halves", *words, "--max-epochs", "2", "--resume") == 0
    states = [load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "halves")]
    same_state(states[0]["model"], states[1]["model"])


def test_a_size_that_cannot_be_recorded_leaves_the_others_their_recordings(code_of_gpus, same_state):
    class RefusesOne(OperatorRecorder):
        def capture(self, step: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
            if not problems:
                raise RuntimeError("out of memory")
            return super().capture(step)

    problems: list[str] = []
    backend = RefusesOne()
    graphs = StepGraphs(backend, problems.append)
    batches = [batch(seed, 3, 64 if seed % 2 else 96) for seed in range(8)]
    same_state(passes(tiny(), graphs, batches), passes(tiny(), None, batches))
    assert problems == [
        "batches of 2x3x96x96 pixels cannot be recorded as a CUDA graph, they run without: out of memory"
    ]
    assert (graphs.num_captures, backend.replays) == (1, 2)


def test_a_gradient_that_graphs_no_longer_reach_is_an_error_at_the_next_log(on_cpu, monkeypatch, start, tmp_path):
    plain = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> None:
        plain(self, batches)
        parameter = next(p for p in self.state.model.parameters() if p.requires_grad)
        parameter.grad = parameter.grad.clone()

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(RuntimeError, match="gradient was replaced, but CUDA graphs write to the one before"):
        start(tmp_path / "run", "--cuda-graphs", "--norm", "gn", "--log-interval", "1")


def test_graphs_that_cannot_be_recorded_are_told_and_the_training_goes_on(on_cpu, monkeypatch, start, tmp_path, capsys):
    monkeypatch.setattr(train, "cuda_step_graphs", lambda model, warn: StepGraphs(Refuser(), warn))
    assert start(tmp_path / "run", "--cuda-graphs", "--norm", "gn") == 0
    said = capsys.readouterr()
    assert "cannot be recorded as a CUDA graph, they run without: operation not permitted" in said.out + said.err


@pytest.mark.parametrize(("num_images", "has_graphs"), [(2, False), (4, True)])
def test_graphs_that_nobody_asked_for_leave_a_tenth_of_the_memory_or_are_left_away(
    on_cpu, monkeypatch, start, tmp_path, capsys, num_images, has_graphs
):
    monkeypatch.setattr(train, "acceleration_of", lambda *_: Acceleration(graphs=True))
    words = ["--norm", "gn", "--max-epochs", "1", "--limit-train-batches", "4"]
    with pretended(PretendedMemory(bytes_of((num_images, 3, 64, 96)))):
        assert start(tmp_path / "run", *words) == 0
    # Those of the training, and of the trial of its largest batch.
    assert [graphs.num_captures for graphs in on_cpu] == ([1, 1, 1] if has_graphs else [0, 1])
    assert ("no CUDA graphs: with them less than 10% of the memory" in capsys.readouterr().out) is not has_graphs


@pytest.mark.parametrize(
    ("device", "triton", "synchronized", "message"),
    [
        ("cpu", True, False, "leave it away on a CPU"),
        ("cuda", False, False, "needs the Triton kernels"),
        ("cuda", True, True, "does not go with --sync-bn"),
    ],
)
def test_passes_that_no_graph_can_hold_are_refused_before_the_training(
    monkeypatch, device, triton, synchronized, message
):
    monkeypatch.setattr(cuda_graphs, "uses_triton", lambda where: triton)
    monkeypatch.setattr(cuda_graphs, "describe_kernels", lambda where: "PyTorch's operators")
    model = build_model("tiny", 3, norm="bn", frozen_stages=-1)
    if synchronized:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(ConfigError, match=message):
        require_cuda_graphs(torch.device(device))
        cuda_step_graphs(model, pytest.fail)
