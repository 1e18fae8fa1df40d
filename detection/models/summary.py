"""What a detector costs, part by part: parameters, operations, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detection.models.faster_rcnn import FasterRCNN

PARTS = ("backbone", "fpn", "rpn", "roi_head", "mask_head")
REST = "rest"
NUM_BOXES = 8  # ground truth of the training step; COCO has 7.3 boxes an image


@dataclass(frozen=True)
class PartSummary:
    """The cost of one part of the model (the rest: RoIAlign, losses and, in training, the RPN at its sampled anchors).

    parameters, trained: numbers of parameters, of all and of those with a gradient. state_bytes: parameters and
    buffers. flops: floating-point operations of convolutions and matrix products for one image in evaluation, a
    multiplication and an addition counted as two. saved_bytes: tensors kept for the backward pass of each image in
    training, float32, as the CPU runs it (kernels of other devices may keep a little more or less). folded_bytes: kept
    once a batch, above all weights with a frozen norm folded in.
    """

    name: str
    parameters: int
    trained: int
    state_bytes: int
    flops: int
    saved_bytes: int
    folded_bytes: int


def summarize_model(model: FasterRCNN, height: int, width: int) -> list[PartSummary]:
    """One entry for each of PARTS that the model has and one for the rest, measured with random images of this size.
    The mask head learns from as many RoIs as it can.

    height, width: pixels at the network's scale. Neither the model nor torch's random state changes.
    """
    model = copy.deepcopy(model)
    model.fixed_shapes = True
    names = [name for name in PARTS if name != "mask_head" or model.config.has_masks]
    with torch.random.fork_rng(devices=[]):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        flops = _count_flops(model, names, image)
        one, two = _measure_saved(model, names, [image]), _measure_saved(model, names, [image] * 2)
    summaries = []
    for name in (*names, REST):
        part = nn.Module() if name == REST else model.get_submodule(name)  # nothing else has parameters
        parameters = list(part.parameters())
        summaries.append(
            PartSummary(
                name,
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                sum(t.numel() * t.element_size() for t in (*parameters, *part.buffers())),
                flops[name],
                two[name] - one[name],
                2 * one[name] - two[name],
            )
        )
    return summaries


def _modules(model: FasterRCNN, name: str) -> list[str]:
    """The modules that run for a part: itself, or each of a list."""
    part = model.get_submodule(name)
    return [f"{name}.{number}" for number in range(len(part))] if isinstance(part, nn.ModuleList) else [name]


def _count_flops(model: FasterRCNN, names: Sequence[str], image: Tensor) -> dict[str, int]:
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model([image])
    counts = counter.get_flop_counts()
    root = type(model).__name__
    flops = {name: sum(sum(counts[f"{root}.{module}"].values()) for module in _modules(model, name)) for name in names}
    return {**flops, REST: counter.get_total_flops() - sum(flops.values())}


def _measure_saved(model: FasterRCNN, names: Sequence[str], images: list[Tensor]) -> dict[str, int]:
    model.train()
    height, width = images[0].shape[1:]
    corners = torch.rand(NUM_BOXES, 2, 2).sort(dim=1).values
    boxes_xyxy = corners.flatten(1) * torch.tensor([width, height] * 2)
    masks = torch.ones(NUM_BOXES, height, width, dtype=torch.bool)
    target = {"boxes_xyxy": boxes_xyxy, "labels": torch.zeros(NUM_BOXES, dtype=torch.int64), "masks": masks}

    current = REST
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = dict.fromkeys((*names, REST), 0)

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any = None) -> None:
            nonlocal current
            current = name

        return hook

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:  # views and repeated uses share memory
            known.add(storage.data_ptr())
            saved[current] += storage.nbytes()
        return tensor

    hooks = []
    for name in names:
        for part in map(model.get_submodule, _modules(model, name)):
            hooks += [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(enter(REST))]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(images, [target] * len(images))
    assert losses, "the graph, and with it what was saved, must live until here"
    for hook in hooks:
        hook.remove()
    return saved
