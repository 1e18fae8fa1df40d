"""scripts/reproduce_coco.sh: the commands it lists, checks and runs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from detection.config import parse_arguments
from schedules import load_schedule, with_overrides

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "reproduce_coco.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*arguments, script=SCRIPT, **environment):
    # The script starts python3, which is the one of these tests only where their environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "COCO": "", "PATH": path, **environment}
    return subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment)


def listed(*arguments, **environment):
    """name -> words of its command."""
    done = run("--list", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


def test_every_recipe_is_a_valid_command_with_the_batch_it_claims(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = listed()
    assert {"1x", "2x", "20e", "1x_1gpu", "2x_1gpu_scaled", "1x_adamw"} <= set(commands)
    directories = set()
    for name, words in commands.items():
        start = words.index("train.py")
        processes = int(words[1].removeprefix("--nproc_per_node=")) if words[0] == "torchrun" else 1
        config = parse_arguments(words[start + 1 :])
        overrides = dict(text.split("=", 1) for text in config.train.overrides)
        schedule, _ = with_overrides(load_schedule(config.train.schedule), overrides)
        global_batch = processes * config.train.batch_size * (config.train.accumulate or 1)
        assert schedule.name in name or schedule.name == "schedule_1x_adamw" or name.startswith("mask_lsj"), name
        # Where the batch is not the schedule's, the learning rate follows it.
        assert (global_batch == schedule.base_batch_size) != config.train.auto_scale_lr, name
        directories.add(config.output_dir)
    assert len(directories) == len(commands)


def test_the_data_may_lie_elsewhere_and_options_can_be_added():
    words = listed("20e", "--", "--amp", "bf16", COCO="/data/coco")["20e"]
    assert words[words.index("--data-path") + 1] == "/data/coco"
    assert words[-2:] == ["--amp", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["4x"], {}, "there is no recipe '4x'; there are 1x "),
        ([], {}, "name one or more of 1x "),
        (["1x"], {"COCO": "my data"}, "without spaces"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_remedy(arguments, environment, message):
    done = run(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
def test_a_dry_run_checks_the_command_on_a_generated_set():
    done = run("--dry-run", "1x_adamw_1gpu", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "AdamW, lr 0.0001" in done.stdout
    assert "batch     16 = " in done.stdout
    assert "dry run: everything above was checked" in done.stdout


def test_what_is_run_is_what_is_listed(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / "scripts")
    for name in ("torchrun", "python3"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        program.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = run("2x", "1x_1gpu", "--", "--seed", "3", script=script, PATH=path)
    assert done.returncode == 0, done.stderr
    commands = listed("2x", "1x_1gpu", "--", "--seed", "3")
    assert [line.split() for line in done.stdout.splitlines()] == list(commands.values())
