"""The training step as a GPU has it, on a GPU that is not there: no operator is given tensors of two devices, and none
makes the host wait."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DEVICE = "pretended:0"
LOSSES = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from gpu_checks.fake_device import is_supported
    finally:
        sys.path.pop(0)
    if not is_supported():
        pytest.skip("this PyTorch lets nobody pretend a device")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fake_device_step.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_batch_is_assembled_on_the_device_with_every_change_of_its_pixels(found):
    assert found["assembled on"] == [DEVICE]


@pytest.mark.parametrize("kind", ["in bf16", "in torchvision's recipe", "without sampling"])
def test_an_iteration_stays_on_the_device_and_asks_it_nothing(found, kind):
    step = found[kind]
    assert step["losses"] == sorted(LOSSES if "recipe" in kind else (*LOSSES, "loss_mask"))
    assert step["devices"] == [DEVICE]
    assert step["without gradient"] == 0
    assert step["dtypes kept"]


def test_without_triton_it_asks_once_whether_suppression_has_settled(found):
    """Which shows that such a question would be found."""
    assert found["suppression"] == "DataDependentOutputException"
