"""docs/extend.md: its blocks are files of a user, and its commands run with them."""

import contextlib
import io
import sys

import pytest

from detection.config import parse_arguments
from detection.engine import run
from tests.documentation.documented_commands import ROOT, blocks_of, commands_of
from tests.documentation.stand_ins import SHORT_TRAINING, SMALL_MODEL

PAGE = ROOT / "docs" / "extend.md"


@pytest.mark.slow
def test_every_block_and_command_of_the_page_runs(tmp_path, monkeypatch):
    from data.tools.shapes import make_shapes

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    shapes = make_shapes(tmp_path / "set", num_train=4, num_val=2, size=(96, 64))
    blocks = [lines for _, kind, lines in blocks_of(PAGE) if kind == "python"]
    assert len(blocks) == 3 and all(lines[0] == "# my_parts.py" for lines in blocks)
    (tmp_path / "my_parts.py").write_text("\n".join("\n".join(lines) for lines in blocks))
    (tmp_path / "photo.jpg").write_bytes(next(shapes.rglob("*.png")).read_bytes())
    commands = commands_of(PAGE)
    assert len(commands) == 5
    for command in commands:
        if command.program == "scripts/predict.py":
            import predict

            assert predict.main([*command.arguments, "--device", "cpu"]) == 0
            continue
        small = SHORT_TRAINING.replace("train-batches 2", "train-batches 1") + " --max-epochs 1 --batch-size 1"
        # 4 images in place of the set's 600.
        assert command.arguments[2:4] == ("--dataset", "shapes")
        words = [*command.arguments[:2], "--data-path", str(shapes), *command.arguments[4:], *small.split()]
        if "my_parts:fcos" not in words and "torchvision" not in command.text:
            own_output = ["--weights", "none", "--output-dir", f"runs/{command.line}"]
            words += own_output + (SMALL_MODEL.split()[2:] if "--model" in words else SMALL_MODEL.split())
        with contextlib.redirect_stdout(io.StringIO()):
            assert run(parse_arguments(words)) == 0, command
    assert len(list((tmp_path / "runs").iterdir())) == 4
