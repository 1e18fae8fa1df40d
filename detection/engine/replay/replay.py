"""A captured step run again, watched module by module: where its first value that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from detection.engine.optim.amp import Precision, gradient_norm
from detection.engine.replay.captured_step import MASKS_OF_BATCH, OF_BATCH, CapturedStepError
from detection.models import ImageBatch, MaskBatch, TargetBatch, model_from_config

MODEL = "the model itself"
"""What is computed in no module of its own: normalization of pixels, RoIAlign, losses."""

_HANDS_ON = {"ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "ReshapeAlias", "Clone", "Mul"}
"""Operations that weights go through before they are used."""


@dataclass(frozen=True)
class Finding:
    """The first value of a step that is not finite."""

    phase: str
    """batch, weights, forward or backward"""
    module: str
    """Dotted name; MODEL for what is outside of all modules. Of a batch, the name of the tensor."""
    what: str
    """In words."""

    def __str__(self) -> str:
        place = {"batch": "in the batch", "weights": "before the step"}.get(self.phase, f"in the {self.phase} pass")
        return f"{self.module}: {self.what}, {place}"


class FirstNonFinite(TorchFunctionMode):
    """Watches one forward and backward pass of a model, inside its context, and keeps the first value not finite.

    Forward, every operation is asked for what it takes and gives, as far as gradients flow through it, and every module
    for its inputs and outputs. Masks and overlaps, which may be infinite, have no gradient. Backward, every node of the
    graph is asked for the gradients that it takes and gives.

    A node belongs to the module whose parameter it reads: convolutions with a norm folded in, for one, call no module
    of their own. Others belong to the module in whose forward they were made.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.finding: Finding | None = None
        named = model.named_parameters()
        self._modules: dict[Any, str] = {parameter: name.rpartition(".")[0] for name, parameter in named}
        self._nodes: dict[Node, str] = {}
        self._inside = [MODEL]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name or MODEL))
            module.register_forward_hook(partial(self._leave, name or MODEL))

    def note(self, phase: str, module: str, what: str) -> None:
        if self.finding is None:
            self.finding = Finding(phase, module, what)

    def watch_backward(self, loss: Tensor) -> None:
        """Every node of the graph of `loss` (a scalar) is in the watch from here on."""
        self._claim(loss.grad_fn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.finding is not None or func.__name__ == "__get__":  # an attribute
            return func(*args, **(kwargs or {}))
        given = list(_tensors_of((args, kwargs)))
        # What an operation of our own has made is seen here first.
        self._look_at(given)
        result = func(*args, **(kwargs or {}))
        self._look_at(_tensors_of(result), given)
        return result

    def _look_at(self, tensors: Iterable[Tensor], given: Sequence[Tensor] = ()) -> None:
        for tensor in tensors:
            if tensor.grad_fn is not None and (bad := _infinite_in([tensor])):
                self._claim(tensor.grad_fn)
                more = f", given up to {_largest(given):.3g}" if given else ""
                what = f"its output has {bad} ({_operation(tensor.grad_fn)}{more})"
                self.note("forward", self._nodes[tensor.grad_fn], what)

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        tensors = list(_tensors_of(inputs))
        for tensor in tensors:
            self._claim(tensor.grad_fn)
        if bad := _infinite_in(tensors):
            self.note("forward", self._inside[-1], f"what it gives to {name} has {bad}")
        self._inside.append(name)

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors_of(output):
            self._claim(tensor.grad_fn)
        self._inside.pop()
        if bad := _infinite_in(_tensors_of(output)):
            self.note("forward", name, f"its output has {bad} (given up to {_largest(_tensors_of(inputs)):.3g})")

    def _claim(self, last: Node | None) -> None:
        """The nodes from `last` down that are nobody's yet are of where the forward pass is."""
        waiting = [last]
        while waiting:
            node = waiting.pop()
            if node is None or node in self._nodes:
                continue
            below = [each for each, _ in node.next_functions]
            around = self._inside[-1]
            read = next((name for each in (node, *below) if (name := self._read_by(each))), "")
            is_inside = around == MODEL or read.startswith(f"{around}.")
            self._nodes[node] = read if read and is_inside else around
            node.register_hook(partial(self._after, node))
            waiting += below

    def _read_by(self, node: Node | None) -> str:
        """The module of the parameter that a node hands on, cast, turned or scaled at most; "" for others."""
        while node is not None and _operation(node) in _HANDS_ON:
            node = next((each for each, _ in node.next_functions if each is not None), None)
        return self._modules.get(getattr(node, "variable", None), "")

    def _after(self, node: Node, gives: tuple[Tensor | None, ...], takes: tuple[Tensor | None, ...]) -> None:
        given = [each for each in takes if each is not None]
        if bad := _infinite_in(given):
            self.note("backward", self._nodes[node], f"the sum of its output's gradients has {bad}")
        elif bad := _infinite_in(each for each in gives if each is not None):
            what = f"its gradient has {bad} ({_operation(node)}, given up to {_largest(given):.3g})"
            self.note("backward", self._nodes[node], what)


def replay(content: Mapping[str, Any], batch: Mapping[str, Any], device: torch.device, amp: str) -> Finding | None:
    """Run the step of a captured batch, or of some images of it, forward and backward.

    Args:
        content: see captured_step.
        amp: off, bf16 or fp16.

    Raises:
        CapturedStepError: the weights are not of the model described.
    """
    try:
        model = model_from_config(content["model_config"])
        model.load_state_dict(content["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CapturedStepError(f"the step's weights are not of its own model ({error})") from error
    model.to(device).train()
    if content["config"]["train"]["channels_last"]:
        model.to(memory_format=torch.channels_last)
    precision = Precision(amp, device, content["loss_scale"] if amp == "fp16" else 1.0)
    images = ImageBatch(*(batch[name].to(device) for name in OF_BATCH[:2]))
    masks = None
    if "mask_bits" in batch:
        masks = MaskBatch(*(batch[name].to(device) for name in ("mask_bits", *MASKS_OF_BATCH)))
    boxes, labels, valid, keys = (batch[name].to(device) for name in OF_BATCH[2:])
    targets = TargetBatch(boxes, labels, valid, keys, masks)
    num_micro_steps = 1 + max(each["micro_step"] for each in content["batches"])
    watch = FirstNonFinite(model)
    for name, tensor in (("pixels", images.pixels), ("boxes_xyxy", targets.boxes_xyxy)):
        if bad := _infinite_in([tensor]):
            watch.note("batch", name, f"it has {bad}")
    for name, value in model.state_dict().items():
        if bad := _infinite_in(_tensors_of(value)):
            watch.note("weights", name, f"it has {bad}")
    if watch.finding is not None:
        return watch.finding
    with watch:
        with precision.autocast():
            losses = model(images, targets)
        loss = torch.stack(list(losses.values())).sum() / num_micro_steps
        watch.watch_backward(loss)
        precision.backward(loss)
    if watch.finding is None and not gradient_norm(model.parameters(), clip_to=None).isfinite():
        sizes = {name: _largest([each.grad]) for name, each in model.named_parameters() if each.grad is not None}
        name = max(sizes, key=lambda name: sizes[name])
        what = f"the norm of all gradients is not finite, of which its own are the largest (up to {sizes[name]:.3g})"
        watch.note("backward", name.rpartition(".")[0], what)
    return watch.finding


def images_alone(
    content: Mapping[str, Any], batch: Mapping[str, Any], device: torch.device, amp: str
) -> list[tuple[int, str]]:
    """Id and file name of each image of a batch whose step is not finite without the others."""
    named = list(zip(batch["image_ids"], batch["file_names"], strict=True))
    if len(named) == 1:
        return named
    of_image = [name for name in (*OF_BATCH, *MASKS_OF_BATCH) if name in batch]
    alone = [{**batch, **{name: batch[name][i : i + 1] for name in of_image}} for i in range(len(named))]
    return [name for name, one in zip(named, alone, strict=True) if replay(content, one, device, amp) is not None]


def remedy(content: Mapping[str, Any], in_run: Finding | None, in_float32: Finding | None) -> str:
    """What to do, after what was found in the run's precision and in float32."""
    found = in_run or in_float32
    if found is None:
        return (
            f"It does not come again here. The run was on {content['device']}: try --device {content['device']}, on "
            "the same kind of machine. If it stays away there too, resume the run; its memory may be faulty."
        )
    if found.phase == "weights":
        return "The run had these weights before the step: check what it began with, --weights or --resume."
    if found.phase == "batch":
        return "Check the annotations of the images: scripts/check_dataset.py."
    if in_float32 is None:
        better = "--amp bf16 or --amp off" if content["amp"] == "fp16" else "--amp off"
        return f"The numbers are too large for {content['amp']} alone: resume with {better}."
    return (
        "The numbers are too large for float32 too: resume from an earlier checkpoint with a lower --lr, with "
        "--clip-grad 35, or with a longer warmup. If it is one image alone, look at it: scripts/browse_dataset.py."
    )


def _operation(node: Node) -> str:
    """What a node of the graph is the backward pass of."""
    return node.name().partition("Backward")[0].lstrip("_")


def _largest(tensors: Iterable[Tensor]) -> float:
    """Of the finite numbers in them, without their sign."""
    finite = [each.detach()[each.isfinite()].abs() for each in tensors]
    return max((float(each.max()) for each in finite if each.numel()), default=0.0)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_of(each)
    elif isinstance(value, dict):
        yield from _tensors_of(list(value.values()))


def _infinite_in(tensors: Iterable[Tensor]) -> str:
    """What of nan and inf is in any of them; "" where all are finite."""
    bad = [each for each in tensors if not each.isfinite().all()]
    kinds = {"nan": any(each.isnan().any() for each in bad), "inf": any(each.isinf().any() for each in bad)}
    return " and ".join(name for name, there in kinds.items() if there)
