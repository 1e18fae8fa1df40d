"""scripts/replay.py: what it says of a captured step, and its exit status."""

import pytest
import torch

from tests.engine.replay.small_step import captured_step


@pytest.mark.slow
def test_the_status_tells_where_a_step_is_finite(program, tmp_path, capsys):
    content = captured_step("fp16")
    torch.save(content, tmp_path / "step.pt")
    assert program("replay", tmp_path / "step.pt", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "iteration 5 is not finite" in said and said.count("every output and every gradient is finite") == 2

    content["model"]["fpn.output.0.weight"] *= 1e6
    torch.save(content, tmp_path / "step.pt")
    assert program("replay", tmp_path / "step.pt", "--device", "cpu") == 1
    said = capsys.readouterr().out
    assert "fp16 (the run's precision), on cpu:\n  fpn.output.0: its output has " in said
    assert "7 (seven.jpg), 9 (nine.jpg)" in said and "--amp bf16" in said

    content["batches"][0]["boxes_xyxy"][1, 0, 0] = torch.inf
    torch.save(content, tmp_path / "step.pt")
    assert program("replay", tmp_path / "step.pt", "--device", "cpu") == 3
    said = capsys.readouterr().out
    assert "boxes_xyxy: it has inf, in the batch" in said and "do it alone: 9 (nine.jpg)\n" in said


def test_another_file_is_an_error_of_one_line(program, tmp_path, capsys):
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    assert program("replay", tmp_path / "broken.pt", "--device", "cpu") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'broken.pt'}: ") and said.count("\n") == 1
