"""README and docs/: every command fits its program, every option exists, every link and image is there."""

import os
import re
from functools import cache
from pathlib import Path

import pytest

from tests.documentation import run_commands, stand_ins
from tests.documentation.documented_commands import (
    ROOT,
    Command,
    ShellCommand,
    accepted,
    commands_of,
    parser_of,
    shell_commands_of,
    with_subparsers,
)

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS = [command for page in PAGES for command in commands_of(page)]
# Options of other programs that the pages mention.
FOREIGN_OPTIONS = {
    "--timeout",
    *("--nproc_per_node", "--nproc-per-node", "--nnodes", "--node_rank", "--node-rank", "--master_addr"),
    *("--master-addr", "--master_port", "--master-port", "--rdzv_backend", "--rdzv-backend", "--rdzv_endpoint"),
    *("--rdzv-endpoint", "--rdzv_id", "--rdzv-id", "--max_restarts", "--max-restarts", "--standalone"),
    *("--log-dir", "--redirects", "--signals-to-handle", "--logdir", "--signal", "--requeue"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--shm-size"),
    *("--ipc", "--cfg-options", "--num-gpus", "--eval-only", "--epochs", "--lr-steps"),
    *("--trainable-backbone-layers",),
}
# Options that a shell script of ours compares its arguments with.
SHELL_OPTIONS = {
    option
    for script in (ROOT / "scripts").glob("*.sh")
    for option in re.findall(
        r"""(?:= "?|^\s*|\| )(--[a-z][\w-]*)(?=" \]|\)| \])""", script.read_text(), flags=re.MULTILINE
    )
}


@cache
def known_options() -> frozenset[str]:
    """Options of train.py and of every program in scripts/ that a page starts."""
    options = set(FOREIGN_OPTIONS | SHELL_OPTIONS)
    for program, arguments in {(c.program, c.arguments[:1]) for c in COMMANDS if c.program.endswith(".py")}:
        for parser in with_subparsers(parser_of(program, arguments)):
            options.update(parser._option_string_actions)
    return frozenset(options)


def test_the_pages_hold_commands_at_all():
    assert {command.page.name for command in COMMANDS} >= {"README.md", "getting_started.md", "schedules.md"}
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_starts_a_program_that_exists_and_takes_its_options(command):
    assert (ROOT / command.program).is_file(), f"{command}: there is no {command.program}"
    if command.program.endswith(".py"):
        accepted(command)
        return
    text = (ROOT / command.program).read_text()
    for option in (word for word in command.arguments if word.startswith("--") and word != "--"):
        assert option in text or option in known_options(), f"{command}: {command.program} knows no {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_page_mentions_exists(page):
    text = page.read_text()
    for command in shell_commands_of(page):
        text = text.replace(command.text, "") if command.is_refused else text
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", text))
    assert mentioned <= known_options(), sorted(mentioned - known_options())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_image_of_a_page_is_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_index_and_from_the_readme():
    index = (ROOT / "docs" / "README.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name != "README.md":
            assert f"({page.name})" in index, page.name
            assert f"(docs/{page.name})" in readme, page.name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python3 train.py --shedule 1x", "--shedule"),
        ("torchrun --nproc_per_node=2 train.py --amp fp8", "fp8"),
        ("python3 scripts/plot_schedule.py --iterations-per-epoch many", "many"),
        ("python3 scripts/compare_runs.py", "DIR"),
    ],
)
def test_a_wrong_command_would_be_found(tmp_path, line, message):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n    {line}   # a remark\n")
    (command,) = commands_of(page)
    with pytest.raises(ValueError, match=message):
        accepted(command)


def test_commands_are_read_as_a_shell_reads_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n```bash\nOMP_NUM_THREADS=1 python3 train.py --set a=1 \\\n  --seed 3 | tee log\nls\n```\n"
    )
    assert commands_of(page) == [Command(Path(page), "train.py", ("--set", "a=1", "--seed", "3"))]


def test_every_command_of_every_page_has_a_way_to_be_run():
    """What runs them is a step of .ci/run: tests/documentation/run_commands.py."""
    steps = [step for page in run_commands.plan(PAGES) for step in page]
    assert len(steps) > 80
    assert sum(step.way.kind == "run" for step in steps) > 60
    for step in steps:
        if step.way.kind == "elsewhere":
            assert stand_ins.is_done_elsewhere(step.way), step.command
        if step.way.kind == "extras":
            assert not stand_ins.missing_extras(step.command), step.command
    assert "tests/documentation/run_commands.py" in (ROOT / ".ci" / "run").read_text()


def test_no_stand_in_is_left_over_from_a_command_that_is_gone():
    commands = [command for page in PAGES for command in shell_commands_of(page)]
    texts = {command.text for command in commands}
    assert set(stand_ins.IN_PLACE) <= texts
    assert set(stand_ins.ADDED) <= {stand_ins.program_key(command) for command in commands}
    for pattern, _, _ in stand_ins.SUBSTITUTIONS:
        assert any(re.search(pattern, text) for text in texts), pattern


@pytest.mark.parametrize("line", ["python3 scripts/make_shapes.py", "docker run image", "python -m http.server"])
def test_a_new_program_has_no_way_to_be_run_until_one_is_given(tmp_path, line):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n    {line}\n")
    with pytest.raises(stand_ins.NoWay, match=rf"page.md:3: {line}\n  no way to run it here is given"):
        run_commands.plan([page])


def test_a_line_among_commands_that_is_none_is_no_command_passed_over(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n    python3 train.py\n    detect everything\n")
    with pytest.raises(ValueError, match=r"page.md:4: detect everything.*STARTERS"):
        shell_commands_of(page)


def test_shell_commands_are_found_in_blocks_and_in_sentences_and_not_in_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Start `python3 train.py --help`, or `torchrun train.py ...`.\n\n"
        "    # a remark\n"
        "    A=1 python3 train.py --set 'a=\"#\"' \\\n        --seed 3   # refused: why\n\n"
        "| `python3 train.py --seed 4` |\n\n"
        "    output --seed 5\n\n"
        "```python\npython = 1\n```\n\n"
        "In a sentence that goes on `python3\ntrain.py --seed 6`\n"
    )
    assert shell_commands_of(page) == [
        ShellCommand(page, 1, "python3 train.py --help"),
        ShellCommand(page, 4, "A=1 python3 train.py --set 'a=\"#\"' --seed 3", "refused: why"),
        ShellCommand(page, 15, "python3 train.py --seed 6"),
    ]


class Folders:
    """In place of what a run lays out: a new folder for a page, and nothing in it."""

    coco_port = 0

    def __init__(self, folder):
        self.folder, self.environment = folder, dict(os.environ)

    def of_page(self, name, *, with_coco):
        (self.folder / name).mkdir()
        return self.folder / name


@pytest.mark.parametrize(
    ("text", "remark", "failure"),
    [
        ("exit 0", "", ""),
        ("echo a word; exit 3", "", "exit status 3\n  | a word"),
        ("echo did you mean it >&2; exit 2", "refused: did you mean it", ""),
        ("echo did you mean it", "refused: did you mean it", "exit status 0, and the page says that it is refused"),
        ("exit 2", "refused: did you mean it", "it does not say 'did you mean it'"),
        ("sleep 60", "", "not done after 0.2 seconds"),
    ],
)
def test_a_command_that_does_not_do_what_its_page_says_fails(tmp_path, monkeypatch, text, remark, failure):
    monkeypatch.setattr(run_commands, "TIME_LIMIT", 0.2 if text == "sleep 60" else 60)
    command = ShellCommand(tmp_path / "page.md", 1, text, remark)
    step = run_commands.Step(command, stand_ins.Way("run", text))
    (outcome,) = run_commands.Runner(Folders(tmp_path)).run_page([step])
    assert failure in outcome.failure and bool(failure) == bool(outcome.failure)
    # What a failure left can be looked at.
    assert (tmp_path / "page.md").exists() == bool(failure)


def test_commands_that_do_the_same_are_run_once_and_a_resume_with_what_it_resumes(tmp_path):
    first, second, third = (tmp_path / f"{name}.md" for name in ("first", "second", "third"))
    first.write_text("    python scripts/benchmark.py eval --repeats 3\n    python3 train.py --seed 1\n")
    second.write_text("    python3 scripts/benchmark.py eval\n    python train.py --seed 1\n")
    third.write_text("    python3 train.py --seed 1\n    python3 train.py --seed 1 --resume\n")
    steps = run_commands.plan([first, second, third])
    same = [[step.same_as and step.same_as.place for step in page] for page in steps]
    assert same == [[None, None], ["first.md:1", "first.md:2"], [None, None]]
    told = [step.way.text.split("--output-dir ")[1] for step in steps[2]]
    assert told[0] == told[1]
