"""What a training is accelerated by: on a GPU by itself, and by --fast."""

import dataclasses

import pytest
import torch
from torch import nn

from detection.config import ConfigError, parse_arguments
from detection.config.run_config import TrainConfig
from detection.engine.accelerate import choice
from detection.engine.accelerate.choice import acceleration_of, has_few_shapes, searches_algorithms
from detection.models import build_model
from tests.engine.tiny_model import make_known

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Whether the pretended GPU's kernels work: as kernels["work"] says."""
    make_known()
    found = {"work": True}
    monkeypatch.setattr(choice, "uses_triton", lambda device: found["work"])
    monkeypatch.setattr(choice, "describe_kernels", lambda device: "PyTorch's operators")
    return found


def chosen(*, device=GPU, world_size=1, model=None, **settings):
    model = build_model("tiny", 3, norm="bn", frozen_stages=-1) if model is None else model
    return acceleration_of(TrainConfig(**settings), device, world_size, model)


def test_one_gpu_has_graphs_by_itself_and_fast_adds_the_compiler():
    assert (chosen().graphs, chosen().graphs_asked_for, chosen().compile) == (True, False, False)
    fast = chosen(fast=True)
    assert (fast.graphs, fast.graphs_asked_for, fast.compile) == (True, True, True)
    assert "--fast" in chosen().describe() and "--fast" not in fast.describe()


def test_several_gpus_have_them_on_request():
    assert not chosen(world_size=2).graphs and "several GPUs" in chosen(world_size=2).describe()
    assert chosen(world_size=2, fast=True).graphs and chosen(world_size=2, cuda_graphs=True).graphs


@pytest.mark.parametrize("fast", [False, True])
def test_what_no_graph_can_hold_is_left_away_with_its_reason(kernels, fast):
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(build_model("tiny", 3, norm="bn", frozen_stages=-1))
    for words, found in (
        ("your own", chosen(fast=fast, model=nn.Linear(1, 1))),
        ("--sync-bn", chosen(fast=fast, model=synchronized)),
        ("--deterministic", chosen(fast=fast, deterministic=True)),
    ):
        assert not found.graphs and words in found.describe()
    kernels["work"] = False
    assert not chosen(fast=fast).graphs and not chosen(fast=fast).compile
    assert "PyTorch's operators" in chosen(fast=fast).describe()


def test_an_option_is_taken_at_its_word_and_off_is_off():
    off = chosen(cuda_graphs=False)
    assert not off.graphs and "--no-cuda-graphs" in off.describe()
    assert chosen(cuda_graphs=True, deterministic=True, world_size=4).graphs_asked_for
    assert chosen(compile=True).compile


@pytest.mark.parametrize("settings", [{}, {"fast": True}, {"deterministic": True}])
def test_a_cpu_trains_as_it_did(settings):
    found = chosen(device=CPU, **settings)
    assert not found.graphs and not found.compile
    assert not has_few_shapes(TrainConfig(**settings), CPU) and not searches_algorithms(TrainConfig(**settings), CPU)


def test_padded_sizes_are_few_on_a_gpu_however_many_there_are_unless_graphs_are_off():
    plain = TrainConfig()
    assert has_few_shapes(plain, GPU) and searches_algorithms(plain, GPU)
    off = dataclasses.replace(plain, cuda_graphs=False)
    assert not has_few_shapes(off, GPU) and not searches_algorithms(off, GPU)
    assert has_few_shapes(dataclasses.replace(off, compile=True), CPU)
    repeated = dataclasses.replace(plain, deterministic=True)
    assert has_few_shapes(repeated, GPU) and not searches_algorithms(repeated, GPU)


def test_fast_without_graphs_is_a_contradiction():
    with pytest.raises(ConfigError, match="--fast turns on CUDA graphs"):
        parse_arguments(["--fast", "--no-cuda-graphs"])
