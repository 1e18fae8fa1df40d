"""scripts/gpu_checks/candidates.py: its commands fit their programs, and its checks tell right from wrong.

The whole of it at toy size: python scripts/gpu_checks/candidates.py --device cpu --out DIR
"""

import sys

import pytest
import torch

from tests.scripts.gpu_checks.test_check_gpu import SCRIPTS, parser_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_commands_of_all_parts_fit_their_programs(script, tmp_path, device, monkeypatch):
    candidates, variant = script("gpu_checks.candidates"), script("benchmarks.steps").Variant
    monkeypatch.setattr(candidates.shutil, "which", lambda name: f"bin/{name}")
    parts = candidates.plan(device, tmp_path / "out", tmp_path / "work")
    assert len({part.name for part in parts}) == len({part.record for part in parts}) == len(parts)
    for part in parts:
        start = part.command.index(sys.executable) + 1
        program, *rest = part.command[start:]
        assert (SCRIPTS.parent / program).is_file()
        parsed = parser_of(script, program).parse_args(rest)
        assert parsed.json == part.record or parsed.json == str(part.record)
        assert all(variant.parse(name).name == name for name in getattr(parsed, "variants", []))
    switches = {part.name.removeprefix("without-") for part in parts if part.name.startswith("without-")}
    assert ("triton-nms" in switches) == ("sanitizer" in {part.name for part in parts}) == (device == "cuda")


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script("gpu_checks.candidates").main(["--out", str(tmp_path / "out"), "--parts", "replays"])
    assert "no part replays; there are kernels, replay" in capsys.readouterr().err


@pytest.mark.slow
def test_replays_that_are_those_of_another_batch_are_found(script, monkeypatch):
    correctness = script("gpu_checks.correctness")
    monkeypatch.setattr(correctness, "SIZES", correctness.SIZES[:1])
    right = correctness.check_replay(CPU)
    assert right["wrong"] == [] and right["recorded"] == 1

    def capture(self, step):
        kept = step()
        return lambda: {name: value.clone() for name, value in kept.items()}

    monkeypatch.setattr(correctness.Again, "capture", capture)
    (problem,) = correctness.check_replay(CPU)["wrong"]
    assert "losses or gradients differ" in problem
    assert any("batch" in problem for problem in correctness.check_detection(CPU)["wrong"])


@pytest.mark.slow
def test_the_dense_parts_are_compared_with_float64(script, monkeypatch):
    correctness = script("gpu_checks.correctness")
    right = correctness.check_kernels(CPU)
    assert right["wrong"] == [] and 0 < right["torch.float32"]["gradients"] < right["torch.bfloat16"]["gradients"]
    monkeypatch.setattr(correctness, "differences", lambda *_: {"wrong": []})
    plain = correctness.dense_parts
    monkeypatch.setattr(
        correctness,
        "dense_parts",
        lambda model, pixels, precision: plain(
            model, pixels if pixels.dtype == torch.float64 else pixels * 1.01, precision
        ),
    )
    assert any("torch.float32: gradients" in problem for problem in correctness.check_kernels(CPU)["wrong"])


def test_every_convolution_of_the_dense_parts_is_measured(script):
    card = script("gpu_checks.card")
    # 53 of the backbone, eight of the pyramid, and two of the RPN on each of five levels.
    assert card.convolutions_of("faster_rcnn_r50_fpn", 1, 64, 96).total() == 53 + 8 + 2 * 5
    figures, table = card.convolutions(CPU)
    assert all(value > 0 for value in figures["totals"].values()) and table.splitlines()[-1].startswith("all")
