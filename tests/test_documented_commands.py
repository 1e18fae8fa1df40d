"""README and docs/: every command fits its program, every option exists, every link and picture is there."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.documented_commands import ROOT, Command, accepted, commands_of, parser_of, with_subparsers

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
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", page.read_text()))
    assert mentioned <= known_options(), sorted(mentioned - known_options())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_is_there(page):
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
