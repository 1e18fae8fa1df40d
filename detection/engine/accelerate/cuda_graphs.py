"""CUDA graphs of a training's passes and of detections: recorded once for each size of batch, then started as a whole.

A step launches some two thousand kernels, which takes the host longer than a fast GPU takes for a few images. Replaying
a recording is one launch. It does again exactly what was recorded, at the same addresses: so the batch is copied to
where the recording reads it, and gradients stay where it wrote them. Nothing in a step may depend on what the host
knows of the batch but its shape, and nothing may ask the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor, nn

from detection.config import ConfigError
from detection.engine.distributed.sync_batch_norm import has_synchronized_batch_norm
from detection.models import FasterRCNN, ImageBatch, MaskBatch, TargetBatch, describe_kernels, uses_triton

Losses = dict[str, Tensor]
Step = Callable[..., Losses]
"""Of an ImageBatch and a TargetBatch, or None for a detection without losses."""

_FEWEST_BOX_ROWS = 32
# Each size has a recording of its own: of MB only few.
_FEWEST_MASK_BITS, _GROWTH_OF_MASKS = 1 << 22, 4
# Sizes of a batch that are recorded; the buckets of padded sizes and numbers of boxes make some twenty.
_MOST_RECORDINGS = 32


class GraphBackend(Protocol):
    """Records what a function does on the device."""

    def warm_up(self, step: Callable[[], Losses]) -> Losses:
        """What `step` gives, done as recording wants it done once before."""

    def capture(self, step: Callable[[], Losses]) -> Callable[[], Losses]:
        """A function that does what `step` does, with what is in the tensors that it reads by then, and gives new
        tensors. Recording itself does nothing. RuntimeError: it cannot be recorded."""


class StepGraphs:
    """Runs forward and backward passes, from the third batch of a size on by replaying a recording.

    Where recording fails, `warn` is called, and batches of that size run eagerly from then on.
    """

    def __init__(self, backend: GraphBackend, warn: Callable[[str], None]) -> None:
        self.backend = backend
        self._warn = warn
        self._seen: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._graphs: dict[Hashable, _Graph] = {}

    @property
    def num_captures(self) -> int:
        return len(self._graphs)

    def run(self, step: Step, images: ImageBatch, targets: TargetBatch | None) -> Losses:
        """What `step` gives for a batch; its gradients are added to those of the parameters."""
        rows = 0 if targets is None else _round_up_to_power_of_two(targets.valid.shape[1])
        num_bits = 0 if targets is None else _mask_room(targets)
        kind = images.pixels.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        size = (tuple(images.pixels.shape), images.pixels.dtype, precision, rows, num_bits)
        graph = self._graphs.get(size)
        if graph is not None:
            graph.load(images, targets)
            return graph.replay()
        if size in self._failed or size not in self._seen or len(self._graphs) == _MOST_RECORDINGS:
            # The first of a size makes what is kept for it: anchors, chosen algorithms, compiled code.
            self._seen.add(size)
            return step(images, targets)
        graph = _Graph(images, targets, rows, num_bits)
        graph.load(images, targets)
        losses = self.backend.warm_up(lambda: step(graph.images, graph.targets))
        try:
            graph.replay = self.backend.capture(lambda: step(graph.images, graph.targets))
        except RuntimeError as error:
            # What is raised at the end of a recording says no more than that something went wrong before.
            cause = error.__context__ or error
            self._failed.add(size)
            problem = (str(cause).splitlines() or [""])[0]
            shape = "x".join(map(str, images.pixels.shape))
            self._warn(f"batches of {shape} pixels cannot be recorded as a CUDA graph, they run without: {problem}")
        else:
            self._graphs[size] = graph
        return losses


class _Graph:
    """A recording, and the batch that it reads: with `rows` rows of boxes an image and room for num_bits of masks."""

    replay: Callable[[], Losses]

    # Tensors of inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    def __init__(self, images: ImageBatch, targets: TargetBatch | None, rows: int, num_bits: int) -> None:
        self.images = ImageBatch(*(torch.empty_like(each) for each in images))
        self.targets: TargetBatch | None = None
        if targets is None:
            return
        boxes, labels, valid, keys = targets[:4]
        number = len(keys)
        masks = None
        if targets.masks is not None:
            bits, offsets, rectangles = targets.masks
            masks = MaskBatch(
                bits.new_zeros(num_bits), offsets.new_zeros(number, rows), rectangles.new_zeros(number, rows, 4)
            )
        self.targets = TargetBatch(
            boxes.new_zeros(number, rows, 4),
            labels.new_zeros(number, rows),
            valid.new_zeros(number, rows),
            torch.empty_like(keys),
            masks,
        )

    @torch.no_grad()
    def load(self, images: ImageBatch, targets: TargetBatch | None) -> None:
        for mine, given in zip(self.images, images, strict=True):
            mine.copy_(given)
        if self.targets is None or targets is None:
            return
        rows = targets.valid.shape[1]
        # Rows that this batch does not have hold no box; what else is in them nobody looks at.
        self.targets.valid[:, rows:].zero_()
        pairs = list(zip(self.targets[:3], targets[:3], strict=True))
        if self.targets.masks is not None and targets.masks is not None:
            self.targets.masks.bits[: len(targets.masks.bits)].copy_(targets.masks.bits)
            pairs += zip(self.targets.masks[1:], targets.masks[1:], strict=True)
        for mine, given in pairs:
            mine[:, :rows].copy_(given)
        self.targets.sample_keys.copy_(targets.sample_keys)


class CudaGraphBackend:
    """Records CUDA graphs, which share their memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def warm_up(self, step: Callable[[], Losses]) -> Losses:
        # On the stream of the recording: libraries keep what they work with for each.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            losses = step()
        current.wait_stream(self._stream)
        for value in losses.values():
            value.record_stream(current)
        return losses

    def capture(self, step: Callable[[], Losses]) -> Callable[[], Losses]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads (checkpoints, the loader's pinned memory) may use the GPU meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                recorded = step()
        except RuntimeError:
            # torch leaves these as they are in a recording: its stream, and an allocator and a generator that wait for
            # its end.
            torch.cuda.set_stream(current)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
            generator = torch.cuda.default_generators[current.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise

        def replay() -> Losses:
            graph.replay()
            # The next replay writes over what this one gave.
            return {name: value.clone() for name, value in recorded.items()}

        return replay


def require_cuda_graphs(device: torch.device) -> None:
    """Raises ConfigError where no training's passes can be recorded: on a CPU, and where they ask the device."""
    if device.type != "cuda":
        raise ConfigError("--cuda-graphs is for GPUs: leave it away on a CPU")
    if not uses_triton(device):
        raise ConfigError(
            "--cuda-graphs needs the Triton kernels, because PyTorch's own suppression waits for the host; here are "
            f"{describe_kernels(device)}"
        )


def cuda_step_graphs(model: nn.Module, warn: Callable[[str], None]) -> StepGraphs:
    """Graphs for a training on a device that has passed require_cuda_graphs.

    Raises:
        ConfigError: this training's passes cannot be recorded, because they talk to other processes.
    """
    if has_synchronized_batch_norm(model):
        raise ConfigError(
            "--cuda-graphs does not go with --sync-bn, whose forward pass talks to the other processes: leave one of "
            "them away, or use --norm gn or pretrained weights"
        )
    return StepGraphs(CudaGraphBackend(), warn)


def record_detection(model: nn.Module, backend: GraphBackend, warn: Callable[[str], None]) -> None:
    """From here on `model` detects, in evaluations and predictions, by replaying what has fixed shapes.

    Args:
        backend: that of a training, whose memory it shares; its passes and detections never run at the same time.
    """
    if isinstance(model, FasterRCNN):
        model.recorder = StepGraphs(backend, warn).run


def _mask_room(targets: TargetBatch) -> int:
    """The smallest of few sizes that a batch's masks fit into; 0 without masks."""
    if targets.masks is None:
        return 0
    room = _FEWEST_MASK_BITS
    while room < len(targets.masks.bits):
        room *= _GROWTH_OF_MASKS
    return room


def _round_up_to_power_of_two(rows: int) -> int:
    return max(_FEWEST_BOX_ROWS, 1 << (rows - 1).bit_length())
