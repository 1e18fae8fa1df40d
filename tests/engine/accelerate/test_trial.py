"""The largest batch is tried before the training: it changes nothing, and what does not fit never begins."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.config import ConfigError, parse_arguments
from detection.engine import RunError
from detection.engine.accelerate.device_memory import OutOfMemory, is_out_of_memory
from detection.engine.trial import largest_that_fits
from tests.engine.accelerate.pretended_memory import PretendedMemory, bytes_of, pretended
from tests.engine.distributed.test_two_ranks import free_ports

LARGE = 10**18
PADDED = (64, 96)
"""(height, width) of every batch of the tests' images."""


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_the_search_finds_the_largest_number_that_fits_in_few_tries(most):
    for limit in range(most + 2):
        tried = []

        def fits(number, limit=limit, tried=tried):
            tried.append(number)
            return number <= limit

        assert largest_that_fits(fits, most) == (min(limit, most) or None)
        assert max(tried) <= most and len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1


@pytest.mark.parametrize(
    "words",
    [
        ("--ema", "0.5", "--norm", "bn", "--accumulate", "2", "--skip-nonfinite"),
        ("--amp", "fp16", "--norm", "gn", "--set", "optim_wrapper.optimizer=dict(type='AdamW', lr=0.001)"),
    ],
    ids=["SGD", "AdamW"],
)
def test_a_trial_takes_the_largest_batch_and_leaves_every_bit_as_it_was(
    words, start, tmp_path, load, same_state, capsys, records_of
):
    assert start(tmp_path / "plain", *words) == 0
    memory = PretendedMemory(LARGE)
    with pretended(memory):
        assert start(tmp_path / "tried", *words) == 0
    said = capsys.readouterr().out
    assert re.search(r"memory: the largest batch .*, 2 x 64 x 96 pixels with up to 16 boxes each, takes", said)
    assert memory.shapes[0] == (2, 3, *PADDED) and memory.given_back == 1
    assert records_of(tmp_path / "tried") == records_of(tmp_path / "plain")
    tried, plain = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("tried", "plain"))
    for part in ("model", "ema", "optimizer", "scaler"):
        same_state(tried[part], plain[part])
    with pretended(memory):  # and in front of the rest of a run
        assert start(tmp_path / "tried", "--resume", *words, "--max-epochs", "3") == 0
    assert start(tmp_path / "plain", "--resume", *words, "--max-epochs", "3") == 0
    tried, plain = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("tried", "plain"))
    for part in ("model", "ema", "optimizer", "scaler"):
        same_state(tried[part], plain[part])


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_trained(start, tmp_path):
    memory = PretendedMemory(bytes_of((1, 3, *PADDED)))
    with (
        pretended(memory),
        pytest.raises(RunError, match=r"2 x 64 x 96 pixels .* does not fit on process 0.*\n.*--batch-size auto"),
    ):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_auto_takes_the_most_images_that_leave_a_margin_scales_the_rate_and_keeps_them_on_a_resume(
    start, tmp_path, capsys, load
):
    def config():
        return json.loads((tmp_path / "run" / "config.json").read_text())

    memory = PretendedMemory(bytes_of((4, 3, *PADDED)))  # 4 fit, but 3 leave a tenth
    with pretended(memory):
        assert start(tmp_path / "run", "--batch-size", "auto", "--max-epochs", "1") == 0
    assert config()["config"]["train"]["batch_size"] == 3
    assert config()["schedule"]["optim_wrapper"]["optimizer"]["lr"] == pytest.approx(0.02 * 3 / 16)
    out = capsys.readouterr().out
    assert "--batch-size auto: 3 images a process, with 10% of the memory left; learning rate 0.00375, scaled" in out
    with pretended(PretendedMemory(LARGE)):
        assert start(tmp_path / "run", "--batch-size", "auto", "--resume") == 0
    assert config()["config"]["train"]["batch_size"] == 3
    assert load(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 6


def test_auto_within_a_global_batch_takes_a_part_of_it(start, tmp_path):
    memory = PretendedMemory(bytes_of((4, 3, *PADDED)))
    with pretended(memory):
        assert start(tmp_path / "run", "--batch-size", "auto", "--global-batch-size", "8", "--max-epochs", "1") == 0
    train = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["train"]
    assert (train["batch_size"], train["accumulate"], train["auto_scale_lr"]) == (2, 4, False)


def test_auto_says_where_not_even_one_image_fits_and_that_it_is_for_gpus_and_trainings(start, arguments, tmp_path):
    with pretended(PretendedMemory(5)), pytest.raises(RunError, match="not even one image"):
        start(tmp_path / "run", "--batch-size", "auto")
    with pytest.raises(ConfigError, match="--batch-size auto is for GPUs"):
        start(tmp_path / "other", "--batch-size", "auto")
    with pytest.raises(ConfigError, match="--val-only a number"):
        parse_arguments(arguments(tmp_path, "--batch-size", "auto", "--val-only", "--weights", "detector.pt"))
    with pytest.raises(SystemExit):
        parse_arguments(arguments(tmp_path, "--batch-size", "0"))


def test_too_little_memory_in_mid_run_is_told_with_the_batch_and_the_remedies(start, tmp_path):
    shapes = []

    def take(shape):
        shapes.append(shape)
        if len(shapes) == 3:  # the trial, and one iteration
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    words = r"in iteration 1, process 0, batch of 2 x 64 x 96 pixels with \d+ boxes: CUDA out of memory.*\n.*--amp"
    with pretended(PretendedMemory(LARGE), take), pytest.raises(OutOfMemory, match=words):
        start(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 4 TB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_allocations_that_fail_are_known_by_their_words(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_process_with_the_least_memory_decides_and_none_waits_for_one_that_fails(
    num_ranks: int, tmp_path: Path, program: Callable[..., Any], arguments: Callable[..., list[str]]
) -> None:
    words = arguments(tmp_path, "--max-epochs", "1", "--limit-train-batches", "1", "--norm", "gn")
    place = words.index("--output-dir")
    del words[place : place + 2]
    ports = json.dumps(free_ports(4))
    with program("accelerate/trial_rank.py", tmp_path, ports, *words, ranks=num_ranks) as processes:
        said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * num_ranks, said
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    assert all(one == found[0] for one in found)
    assert found[0]["auto"] == found[0]["resumed"] == found[0]["synchronized"] == "0"
    images = {2: 3, 3: 2}[num_ranks]  # of 3.5 and 2.5, a tenth left
    train = json.loads((tmp_path / "auto" / "config.json").read_text())["config"]["train"]
    assert (train["batch_size"], train["auto_scale_lr"]) == (images, True)
    refusal = found[0]["one does not fit"]
    assert "2 x 64 x 96 pixels" in refusal and f"on process {', '.join(map(str, range(1, num_ranks)))}," in refusal
    assert not (tmp_path / "short" / "metrics.jsonl").exists()
