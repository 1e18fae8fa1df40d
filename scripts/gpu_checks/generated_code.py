"""The kernels that torch.compile generates for an H100, counted without one."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

_GPU, _HOST = torch.device("cuda", 0), torch.device("cpu")
_CAPABILITY = (9, 0)
# What the generator asks of a GPU; NVIDIA's H100 data sheet and the CUDA programming guide, table of capability 9.0.
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)


@dataclass(frozen=True)
class Kernel:
    """A launch: of a generated kernel, or of a library's."""

    stage: str
    is_backward: bool
    is_product: bool
    """Whether a library multiplies matrices or convolves there"""
    num_bytes: int
    """Inputs and outputs, once each"""


class GeneratedCode:
    """Compiles modules for an H100, on fake tensors on the CPU, and runs nothing of it.

    What is compiled gives empty tensors, and calls `count` with its kernels each time, and `call` with the operators of
    this project in it, which the compiler hands on, and empty tensors for their arguments. Inductor decides, fuses and
    writes as it does where there is such a GPU; only products are not padded, because it would time that.
    """

    def __init__(
        self,
        count: Callable[[Sequence[Kernel]], None],
        call: Callable[[str, Callable[..., Any], Sequence[Any]], None] = lambda *_: None,
    ) -> None:
        self.source: list[str] = []
        """Python and Triton, one text a graph"""
        self._count, self._call = count, call

    def compile(self, module: nn.Module, name: str) -> None:
        """In place. name: of the stage; of a residual network's stages their number follows."""
        module.compile(backend=partial(self._compile, name), dynamic=False)

    def compiled(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return torch.compile(function, backend=partial(self._compile, name), dynamic=False)

    def _compile(self, name: str, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        return compile_fx(graph, inputs, inner_compile=partial(self._generate, name))

    def _generate(self, name: str, graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        kernels: list[Kernel] = []
        is_backward = bool(settings.get("is_backward"))

        def generate_only(lowered: GraphLowering) -> Any:
            self.source.append(lowered.codegen()[0].value)
            kernels.extend(_kernels(name, is_backward, lowered.scheduler.nodes))
            return SimpleNamespace(call=None, __file__="", value="")

        with mock.patch.object(GraphLowering, "compile_to_module", generate_only):
            compile_fx_inner(*_on_gpu(graph, inputs), **settings)
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        places = {node: place for place, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder")}

        def run(given: Sequence[Any]) -> list[Any]:
            given = list(given)
            self._count(kernels)
            for node in graph.graph.nodes:
                if _is_ours(node):
                    self._call(
                        name, node.target, fx.node.map_arg(node.args, lambda n: _empty_like(n.meta["val"], _HOST))
                    )
            return [
                given[places[node]] if node in places else node and _empty_like(node.meta["val"], _HOST)
                for node in outputs
            ]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _kernels(name: str, is_backward: bool, nodes: Sequence[Any]) -> Iterator[Kernel]:
    for node in nodes:
        num_bytes = node.get_read_write_buffers_sizes()
        if not num_bytes:  # a view, or one of several outputs
            continue
        origins = [origin for part in node.get_nodes() for origin in part.node.get_origins()]
        last = [getattr(origin.target, "overloadpacket", None) for origin in origins]
        if node.is_extern() and any(map(_is_ours, origins)):
            continue
        is_product = node.is_extern() and any(packet in flop_registry for packet in last)
        yield Kernel(_stage(name, origins), is_backward, is_product, num_bytes)


def _is_ours(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "detection"


def _stage(name: str, origins: Sequence[fx.Node]) -> str:
    """The stage by the modules that the operators stand in: in a backward pass those of the forward pass."""
    for origin in origins:
        stack = origin.meta.get("nn_module_stack") or origin.meta.get("fwd_nn_module_stack") or {}
        for path, _ in stack.values():
            if match := re.search(r"layer(\d)", str(path)):
                return f"{name}, stage {match[1]}"
    return name


def _on_gpu(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """The same graph for tensors on a GPU, and such inputs."""
    there = copy.deepcopy(graph)

    def device(value: Any) -> Any:
        return _GPU if value == _HOST and isinstance(value, torch.device) else value

    for node, before in zip(there.graph.nodes, graph.graph.nodes, strict=True):
        node.meta = {**before.meta}
        if "val" in node.meta:
            node.meta["val"] = tree_map(_like_on_gpu, node.meta["val"])
        node.args = fx.node.map_aggregate(node.args, device)
        node.kwargs = fx.node.map_aggregate(node.kwargs, device)
    return there, [_like_on_gpu(value) for value in inputs]


def _like_on_gpu(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:  # a graph's tensors are all of one
        return _empty_like(value, _GPU)


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _layout_of_convolution(x: Tensor, weight: Tensor, *_: Any) -> torch.memory_format:
    # As cuDNN's: channels last where the input or the weight is.
    is_last = any(each.is_contiguous(memory_format=torch.channels_last) for each in (x, weight) if each.dim() == 4)
    return torch.channels_last if is_last else torch.contiguous_format


@contextlib.contextmanager
def pretended_h100() -> Iterator[None]:
    """Inside, Inductor finds the GPU that it generates code for, and keeps nothing for other processes."""
    answers: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "get_device_properties", lambda *_: _H100),
        (torch.cuda, "get_device_capability", lambda *_: _CAPABILITY),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (CudaInterface, "get_device_properties", lambda *_: _H100),
        (CudaInterface, "get_compute_capability", lambda *_: 10 * _CAPABILITY[0] + _CAPABILITY[1]),
        (CudaInterface, "is_bf16_supported", lambda *_, **__: True),
        (CudaInterface.Worker, "get_device_properties", lambda *_: _H100),
        (CudaInterface.Worker, "current_device", lambda *_: 0),
        (torch._C, "_conv_determine_backend_memory_format", _layout_of_convolution),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            is_method = isinstance(owner, type)
            stack.enter_context(mock.patch.object(owner, name, staticmethod(answer) if is_method else answer))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda *_: True))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: "h100"))
        stack.enter_context(inductor_config.patch(force_disable_caches=True, compile_threads=1, shape_padding=False))
        yield
