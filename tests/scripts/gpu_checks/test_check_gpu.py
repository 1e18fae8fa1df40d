"""scripts/check_gpu.py: its commands fit their programs, and one part that fails or hangs stops no other.

The whole of it at toy size: python scripts/check_gpu.py --device cpu --short --out DIR
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


def parser_of(script, program: str) -> argparse.ArgumentParser:
    if program == "scripts/benchmark.py":
        parser = argparse.ArgumentParser(exit_on_error=False)
        script("benchmarks.train").add_arguments(parser.add_subparsers().add_parser("train"))
        return parser
    return script(program.removeprefix("scripts/").removesuffix(".py").replace("/", "."))._parser()


@pytest.mark.parametrize("words", [[], ["--device", "cpu", "--short"], ["--data-path", "coco"]], ids=" ".join)
def test_the_commands_of_all_parts_fit_their_programs(script, tmp_path, words):
    check = script("check_gpu")
    arguments = check._parser().parse_args(["--out", str(tmp_path / "out"), *words])
    parts = script("gpu_checks.parts").plan(arguments, tmp_path / "out", tmp_path / "work")
    assert tuple(part.name for part in parts) == script("gpu_checks.parts").PARTS
    assert len({part.record for part in parts}) == len(parts)
    for part in parts:
        python, program, *rest = part.command
        assert python == sys.executable
        if program == "-m":
            files = [word for word in rest if word.startswith("tests/")]
            assert len(files) >= 4 and all((SCRIPTS.parent / file).is_file() for file in files)
        else:
            assert (SCRIPTS.parent / program).is_file()
            parsed = parser_of(script, program).parse_args(rest)
            assert getattr(parsed, "data_path", None) in (None, Path.cwd() / "coco")
    of_gpu = "--compile" in parts[3].command
    assert of_gpu == (arguments.device == "cuda")
    assert sum(part.limit for part in parts) < 20 * 60


def test_the_list_of_parts_runs_nothing_and_makes_no_folder(script, tmp_path, capsys):
    assert script("check_gpu").main(["--out", str(tmp_path / "out"), "--list"]) == 0
    assert "scripts/fault_test.py --kills 4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused(script, tmp_path, capsys):
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit, match="2"):
        script("check_gpu").main(["--out", str(tmp_path)])
    assert "not empty" in capsys.readouterr().err


@pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs Linux: left-over processes are found in /proc"
)
def test_a_part_that_fails_or_hangs_is_told_and_stops_no_other(script, tmp_path, capsys):
    check, part = script("check_gpu"), script("gpu_checks.parts").Part
    arguments = check._parser().parse_args(["--out", str(tmp_path / "out"), "--device", "cpu"])
    figures, torn, child = tmp_path / "figures.json", tmp_path / "torn.json", tmp_path / "child"

    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    # The child has a session of its own, as a training that a part has started.
    hangs = (
        "import pathlib, subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True); "
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid)); "
        f"pathlib.Path({str(torn)!r}).write_text('{{'); time.sleep(99)"
    )
    parts = [
        part("fails", "", python("print('why it failed'); raise SystemExit(3)"), 60),
        part("hangs", "", python(hangs), 3, torn),
        part("works", "", python(f"open({str(figures)!r}, 'w').write('{{\"speed\": 5}}')"), 60, figures),
    ]
    (tmp_path / "work").mkdir()
    assert check.run_parts(parts, arguments, tmp_path / "out", tmp_path / "work") == 1
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {part["name"]: part for part in record["parts"]}
    states = {"fails": "failed", "hangs": "timed out", "works": "ok"}
    assert {name: part["state"] for name, part in found.items()} == states
    assert found["fails"]["status"] == 3 and found["works"]["figures"] == {"speed": 5}
    assert torn.exists() and found["hangs"]["figures"] is None
    assert "why it failed" in (tmp_path / "out" / "report.md").read_text()
    assert "timed out" in capsys.readouterr().out
    until = time.monotonic() + 5
    while is_running(int(child.read_text())):
        assert time.monotonic() < until, "what the part had started still runs"
        time.sleep(0.02)

    arguments.minutes = 0.0
    assert check.run_parts(parts[2:], arguments, tmp_path / "later", tmp_path / "work") == 1
    assert json.loads((tmp_path / "later" / "results.json").read_text())["parts"][0]["state"] == "not run"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
