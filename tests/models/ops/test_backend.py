"""The Triton kernels: computed in Triton's interpreter, compiled for GPUs that are not there, and chosen or refused."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.models.ops import nms, selfcheck
from detection.models.ops.backend import CPU as CPU_NAMES
from detection.models.ops.backend import DEVICE, TRITON, implementation, implementation_of, verdicts
from detection.models.ops.matcher import MaxIoUAssigner
from detection.models.ops.roi_align import RoIAlign, roi_levels
from detection.models.ops.selfcheck import SWITCH, describe_kernels, uses_triton

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_kernels.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_kernels_pass_the_check_that_decides_on_their_use_and_broken_ones_do_not(interpreted):
    assert interpreted["kernels_that_differ"] == []
    assert interpreted["broken_kernels_are_found"] == [
        *("suppression", "assignment", "RoIAlign", "ends of convolutions", "crops of masks")
    ]


@pytest.mark.slow
def test_suppression_is_torchvisions_to_the_last_box(interpreted):
    assert len(interpreted["suppression"]) > 10
    assert [case for case, is_equal in interpreted["suppression"].items() if not is_equal] == []


@pytest.mark.slow
def test_rois_and_their_gradients_are_pooled_as_by_the_sparse_matrix(interpreted):
    found = interpreted["pooled"]
    assert found.pop("levels") == [0, 1, 2, 3]
    assert len(found) == 3 * 2 + 2 * 2  # each also in whole numbers, and two in a shared gradient as well
    for values, gradients in found.values():
        assert values < 1e-5 and gradients < 1e-4


@pytest.mark.slow
def test_bias_residual_and_relu_in_one_pass_are_those_in_several(interpreted):
    assert len(interpreted["ends"]) == 15
    assert {case: worst for case, worst in interpreted["ends"].items() if worst > 1e-4} == {}


@pytest.mark.slow
def test_a_training_step_has_the_losses_and_gradients_it_has_without_kernels(interpreted):
    step = interpreted["training_step"]
    assert step["pooled"] == 1
    assert step["ours"] == pytest.approx(step["plain"], rel=1e-6)
    assert step["gradient"] < 1e-5


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> str:
    """The kernel's PTX for an H100, which Triton assembles too; without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    return made.asm["ptx"]


def assert_rounds_each_operation(ptx: str) -> None:
    assert re.search(r"\bdiv\.rn(\.ftz)?\.f32", ptx) and not re.search(r"\bfma\.rn\.f32|\bdiv\.(full|approx)", ptx)


@pytest.mark.slow
def test_suppression_compiles_for_a_gpu_and_rounds_as_the_plain_code_does():
    from detection.models.ops.triton.nms import overlap_bits, walk_down

    numbers = {"num_boxes": "i32", "num_words": "i32"}
    types = {"boxes": "*fp32", "bits": "*i32", "row_words": "i32", "threshold": "fp32", **numbers}
    text = compiled(overlap_bits, types, {"ROWS": 128, "WORDS": 4}, enable_fp_fusion=False)
    assert_rounds_each_operation(text)
    compiled(walk_down, {"bits": "*i32", "valid": "*u8", "keep": "*u8", **numbers}, {"ROW_WORDS": 64}, num_warps=1)


@pytest.mark.parametrize("has_valid", [True, False])
def test_assignment_compiles_for_a_gpu_and_rounds_as_the_plain_code_does(has_valid):
    from detection.models.ops.triton.matcher import best_of_candidates, last_gt_with_its_best

    types = dict.fromkeys(("num_gt", "num_candidates", "image_stride"), "i32")
    types |= {"gt_boxes": "*fp32", "gt_valid": "*u8", "candidates": "*fp32", "best_of_gt": "*i32"}
    types |= {"best_iou": "*fp32", "best_index": "*i64", "found": "*i64", "low_quality_iou": "fp32"}
    constants: dict[str, Any] = {"HAS_VALID": has_valid, "BLOCK": 512}
    if has_valid:
        types["candidate_valid"] = "*u8"
    else:
        constants["candidate_valid"] = None
    for kernel, more in ((best_of_candidates, {"LOW_QUALITY": True}), (last_gt_with_its_best, {})):
        text = compiled(kernel, types, {**constants, **more}, enable_fp_fusion=False)
        assert_rounds_each_operation(text)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize(("ratio", "aligned", "dtype"), [(0, True, "bf16"), (2, False, "fp32")])
def test_roi_align_compiles_for_a_gpu(backward, ratio, aligned, dtype):
    from detection.models.ops.triton.roi_align import pool

    types = {f"{name}_{level}": "i32" for name in ("start", "height", "width") for level in range(4)}
    types |= {f"scale_{level}": "fp32" for level in range(4)}
    types |= {"boxes": "*fp32", "levels": "*i64", "pooled": f"*{dtype}", "num_rois": "i32", "num_channels": "i32"}
    constants = {"SIZE": 7, "RATIO": ratio, "ALIGNED": aligned, "BINS": 64, "CHANNELS": 32, "BACKWARD": backward}
    plain = {**types, "table": "*fp32" if backward else f"*{dtype}"}
    text = compiled(pool, plain, {**constants, "unit": None, "IN_UNITS": False})
    assert bool(re.search(r"atom\S*add\S*f32", text)) == backward
    if backward:
        text = compiled(pool, {**types, "table": "*i64", "unit": "*fp32"}, {**constants, "IN_UNITS": True})
        assert re.search(r"atom\S*add\S*u64", text) and not re.search(r"atom\S*add\S*f32", text)


def test_ends_of_convolutions_compile_for_a_gpu():
    from detection.models.ops.triton.epilogue import finish, finish_backward

    numbers = {"num_rows": "i32", "num_channels": "i32", "rows_of_program": "i32"}
    types = {"out": "*bf16", "bias": "*fp32", "residual": "*bf16", **numbers}
    tile = {"ROWS": 32, "CHANNELS": 128}
    compiled(finish, types, {"HAS_BIAS": True, "HAS_RESIDUAL": True, "RELU": True, **tile})
    types = {"gradient": "*bf16", "out": "*bf16", "of_input": "*bf16", "sums": "*fp32", **numbers}
    compiled(finish_backward, types, {"RELU": True, "SUM": True, **tile})


@pytest.fixture
def a_gpu(monkeypatch):
    """As much of torch.cuda as the choice of kernels asks for, and no verdict from before."""
    modes = ["error"]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.delenv(SWITCH, raising=False)
    verdicts.clear()
    yield modes
    verdicts.clear()


def test_the_check_has_gradients_wherever_the_question_comes_from(a_gpu, monkeypatch):
    def differ(device: torch.device) -> list[str]:
        assert not torch.are_deterministic_algorithms_enabled()
        x = torch.ones(1, requires_grad=True)
        return [] if torch.autograd.grad(x * 2, x)[0] == 2 else ["gradient"]

    monkeypatch.setattr(selfcheck, "kernels_that_differ", differ)
    inside = torch.library.custom_op("detection_test::ask", mutates_args=())(_ask)
    torch.use_deterministic_algorithms(True)
    try:
        for ask in (torch.no_grad()(_ask), torch.inference_mode()(_ask), inside):
            verdicts.clear()
            ask(torch.zeros(1))
            assert "checked on this GPU" in describe_kernels(torch.device("cuda", 0)), ask
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def _ask(x: torch.Tensor) -> torch.Tensor:
    assert uses_triton(torch.device("cuda"))
    return x.clone()


def without_compiler(device: torch.device) -> list[str]:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")


def without_triton(device: torch.device) -> list[str]:
    nms.by_triton(torch.zeros(1, 1, 4), torch.zeros(1, 1), [1], 0.5)
    return []


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda device: ["RoIAlign"], "RoIAlign: other results"),
        (without_compiler, "RuntimeError: Failed to find C compiler."),
        (without_triton, "import of triton"),
    ],
)
def test_kernels_that_do_not_work_are_not_used_and_the_reason_is_told(a_gpu, monkeypatch, check, reason):
    monkeypatch.delitem(sys.modules, "detection.models.ops.triton.nms", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(selfcheck, "kernels_that_differ", check)
    assert not uses_triton(torch.device("cuda"))
    assert reason in describe_kernels(torch.device("cuda"))
    assert a_gpu[-1] == "error"


def test_the_environment_turns_the_kernels_off_unasked(a_gpu, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.setattr(selfcheck, "kernels_that_differ", lambda device: pytest.fail("nobody wants to know"))
    assert not uses_triton(torch.device("cuda"))
    assert SWITCH in describe_kernels(torch.device("cuda"))


@pytest.mark.parametrize("differ", [[], ["RoIAlign"]])
def test_a_gpu_runs_kernels_from_the_moment_they_have_passed(a_gpu, monkeypatch, differ):
    asked = []
    monkeypatch.setattr(selfcheck, "kernels_that_differ", lambda device: asked.append(a_gpu[-1]) or differ)
    gpu = torch.device("cuda", 0)
    assert {operator: implementation_of(operator, gpu) for operator in DEVICE} == DEVICE
    assert uses_triton(gpu) == uses_triton(gpu) == (not differ)
    # Asked once, and meanwhile the GPU may be waited for.
    assert asked == ["default"] and a_gpu[-1] == "error"
    assert not uses_triton(CPU) and describe_kernels(CPU) == ""
    expected = DEVICE if differ else TRITON
    assert {operator: implementation_of(operator, gpu) for operator in DEVICE} == expected
    assert {operator: implementation_of(operator, CPU) for operator in DEVICE} == CPU_NAMES


def test_a_caller_chooses_for_a_block_and_a_wrong_name_is_refused():
    with implementation(nms="rounds", roi_align="operator"):
        with implementation(nms="triton"):
            assert [implementation_of(each, CPU) for each in ("nms", "roi_align")] == ["triton", "operator"]
        assert implementation_of("nms", CPU) == "rounds"
    assert implementation_of("nms", CPU) == CPU_NAMES["nms"]
    for wrong in ({"nms": "fast"}, {"mns": "rounds"}):
        with pytest.raises(ValueError, match="there are"), implementation(**wrong):
            pass


@pytest.mark.cuda
def test_on_a_gpu_the_kernels_agree_at_the_size_of_a_training():
    device = torch.device("cuda")
    assert uses_triton(device), describe_kernels(device)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(16, 8819, 2, generator=generator) * 1000
    boxes = torch.cat((corners, corners + torch.rand(16, 8819, 2, generator=generator) * 300), dim=2).to(device)
    ranking = torch.randn(16, 8819, generator=generator).to(device)
    per_level = [2000, 2000, 2000, 2000, 819]
    expected = nms.in_rounds(boxes, ranking, per_level, 0.7)
    assert torch.equal(nms.by_triton(boxes, ranking, per_level, 0.7), expected)

    anchors = torch.rand(1, 268_569, 2, generator=generator) * 1200
    anchors = torch.cat((anchors, anchors + torch.rand(1, 268_569, 2, generator=generator) * 300), dim=2).to(device)
    gt_valid = torch.rand(16, 40, generator=generator).to(device) > 0.5
    usable = torch.rand(16, 268_569, generator=generator).to(device) > 0.1
    assigner = MaxIoUAssigner(0.7, 0.3, 0.3)
    arguments = (boxes[:, :40].contiguous(), gt_valid, anchors, usable)
    for ours, plain in zip(assigner.best_by_triton(*arguments), assigner.best_in_blocks(*arguments), strict=True):
        assert torch.equal(ours, plain)

    maps = [torch.randn(16, 256, 800 // s, 1344 // s, device=device) for s in (4, 8, 16, 32)]
    maps = [each.to(memory_format=torch.channels_last) for each in maps]
    maps = [each.requires_grad_() for each in maps]
    rois = boxes[:, :512].contiguous()
    levels = roi_levels(rois, finest_scale=28, eps_inside_log=True)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    pool = RoIAlign(7, 0, True, (4, 8, 16, 32))
    results = []
    for by in (pool.by_triton, pool.by_operator):
        values = by(maps, rois, levels)
        results.append((values.detach(), *torch.autograd.grad((values * values.detach().sin()).sum(), maps)))
    torch.use_deterministic_algorithms(True)
    try:
        twice = [torch.autograd.grad(pool.by_triton(maps, rois, levels).square().sum(), maps) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    for one, other in zip(*twice, strict=True):
        assert torch.equal(one, other)
