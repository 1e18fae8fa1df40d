"""README and docs/: every command fits its program, every option exists, every link and image is there."""

import argparse
import ast
import os
import re
import sys
from functools import cache

import pytest

import detection
from tests.documentation import run_commands, stand_ins
from tests.documentation.documented_commands import PAGES, ROOT, Command, check_options, commands_of, parser_of
from tests.test_walls import ALLOWED

COMMANDS = [command for page in PAGES for command in commands_of(page)]
# Those that start something of this repository, without those that a page shows as mistakes.
OURS = [command for command in COMMANDS if command.program and not command.is_refused]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Options of other programs that the pages mention.
FOREIGN_OPTIONS = {
    *("--timeout", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--max-restarts"),
    *("--standalone", "--log-dir", "--redirects", "--signals-to-handle", "--logdir", "--signal", "--requeue", "--ipc"),
    *("--shm-size", "--config-file", "--num-gpus", "--eval-only", "--epochs", "--lr-steps"),
    *("--trainable-backbone-layers", "--gpus-per-task", "--rdzv_conf"),
}
# Options that a shell script of ours compares its arguments with.
SHELL_OPTIONS = {
    option
    for script in (ROOT / "scripts").glob("*.sh")
    for option in re.findall(r"""(?:= "?|^\s*|\| )(--[a-z][\w-]*)(?=" \]|\)| \])""", script.read_text(), flags=re.M)
}
# Names of files and folders of this repository in a text, and those of them that are somebody else's, or a run's.
FILE_NAME = re.compile(
    r"(?<![\w/.+-])(?:(?:data|detection|docs|schedules|scripts|tests|\.ci)/[\w./-]*\w|[\w./+-]+\.(?:py|sh|sbatch|md)\b)"
)
FOREIGN_FILE = re.compile(r"(tools|_base_|configs)/|report\.md|my_parts\.py")


@cache
def known_options() -> frozenset[str]:
    """Options of train.py and of every program in scripts/ that a page starts."""
    options = set(FOREIGN_OPTIONS | SHELL_OPTIONS)
    for program, arguments in {(c.program, c.arguments[:1]) for c in OURS if c.program.endswith(".py")}:
        parsers = [parser_of(program, arguments)]
        for action in parsers[0]._actions:
            parsers += action.choices.values() if isinstance(action, argparse._SubParsersAction) else []
        options.update(option for parser in parsers for option in parser._option_string_actions)
    return frozenset(options)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_starts_a_program_that_exists_and_takes_its_options(command):
    assert (ROOT / command.program).is_file(), f"{command}: there is no {command.program}"
    if command.program.endswith(".py"):
        check_options(command)
        return
    text = (ROOT / command.program).read_text()
    for option in (word for word in command.arguments if word.startswith("--") and word != "--"):
        assert option in text or option in known_options(), f"{command}: {command.program} knows no {option}"


@each_page
def test_every_option_that_a_page_mentions_exists(page):
    text = page.read_text()
    for command in commands_of(page):
        text = text.replace(command.text, "") if command.is_refused else text
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", text))
    is_changelog = page.name == "CHANGELOG.md"  # which names what is gone
    assert is_changelog or mentioned <= known_options(), sorted(mentioned - known_options())


@each_page
def test_every_link_image_and_file_that_a_page_names_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
    folders = [ROOT / name for name in ("data", "detection", "docs", "schedules", "scripts", "tests")]
    files = [*ROOT.glob("*"), *ROOT.glob(".ci/*"), *(file for folder in folders for file in folder.rglob("*"))]
    there = "".join(f"{file}\n" for file in files)
    for name in set(FILE_NAME.findall(text)) if page.name != "CHANGELOG.md" else ():  # which names what is gone
        assert f"/{name}\n" in there or FOREIGN_FILE.match(name) or (page.parent / name).exists(), name


def test_every_page_is_reached_from_the_index_and_from_the_readme():
    index = (ROOT / "docs" / "README.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.name != "README.md":
            assert f"({page.name})" in index, page.name
            assert f"(docs/{page.name})" in readme, page.name


def test_the_walls_on_the_architecture_page_are_those_that_a_test_checks():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(
        r"^\| (`.*`) \| (`.*`|nothing) \|$", page[page.index("## The walls") : page.index("## Five walks")], re.M
    )
    stated = [[re.findall(r"`([\w.]+?)(?:\.py)?`", cell) for cell in row] for row in rows]
    assert {name: set(known) for names, known in stated for name in names} == ALLOWED


def test_the_changelog_has_the_version():
    assert f"## [{detection.__version__}] - 20" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_that_a_file_imports_is_named_in_setup_cfg():
    other_names = {"PIL": "pillow", "google": "protobuf", "cv2": "opencv-python-headless"}
    settings = (ROOT / "setup.cfg").read_text()
    named = set(re.findall(r"^    ([\w-]+)", settings[settings.index("install_requires") :], flags=re.M))
    files = [file for name in ("data", "detection", "schedules", "scripts") for file in (ROOT / name).rglob("*.py")]
    # Triton comes with PyTorch, where there is one. Programs import what lies beside them.
    known = {"data", "detection", "schedules", "triton", *sys.stdlib_module_names}
    known |= {name for file in files if ROOT / "scripts" in file.parents for name in (file.stem, file.parent.name)}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in imported} - known:
                assert other_names.get(name, name.replace("_", "-")) in named, f"{file}: {name}"


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
        check_options(command)


def test_every_command_of_every_page_has_a_way_to_be_run():
    """What runs them is a step of .ci/run: tests/documentation/run_commands.py."""
    steps = [step for page in run_commands.plan(PAGES).values() for step in page]
    assert {step.command.page.name for step in steps} >= {"README.md", "getting_started.md", "schedules.md"}
    assert len(steps) > 80
    assert sum(bool(step.text) for step in steps) > 60
    for file, text in stand_ins.DONE_BY.values():
        assert text in (ROOT / file).read_text(), file
    assert "tests/documentation/run_commands.py" in (ROOT / ".ci" / "run").read_text()


def test_no_stand_in_is_left_over_from_a_command_that_is_gone():
    texts = {command.text for command in COMMANDS}
    assert set(stand_ins.DONE_BY) <= texts | {str(page.relative_to(ROOT)) for page in PAGES}
    assert stand_ins.ADDED.keys() | stand_ins.UNCHANGED <= {stand_ins.program_key(command) for command in COMMANDS}
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
        commands_of(page)


def test_commands_are_found_in_blocks_and_in_sentences_and_not_in_tables_and_read_as_a_shell_reads_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Start `python3 train.py --help`, or `torchrun train.py ...`.\n\n"
        "    # a remark\n"
        "    A=1 python3 train.py --set 'a=\"#\"' \\\n        --seed 3 | tee log   # refused: why\n\n"
        "| `python3 train.py --seed 4` |\n\n"
        "    output --seed 5\n\n"
        "```python\npython = 1\n```\n\n```bash\nls\n```\n\n"
        "In a sentence that goes on `python3\ntrain.py --seed 6`\n"
    )
    commands = commands_of(page)
    assert commands == [
        Command(page, 1, "python3 train.py --help"),
        Command(page, 4, "A=1 python3 train.py --set 'a=\"#\"' --seed 3 | tee log", "refused: why"),
        Command(page, 16, "ls"),
        Command(page, 19, "python3 train.py --seed 6"),
    ]
    assert [command.program for command in commands] == ["train.py", "train.py", "", "train.py"]
    assert commands[1].arguments == ("--set", 'a="#"', "--seed", "3") and commands[1].is_refused


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
    command = Command(tmp_path / "page.md", 1, text, remark)
    found = run_commands.run(run_commands.Step(command, text), tmp_path, dict(os.environ))
    assert failure in found and bool(failure) == bool(found)


def test_commands_that_do_the_same_are_run_once_and_a_resume_with_what_it_resumes(tmp_path):
    first, second, third = (tmp_path / f"{name}.md" for name in ("first", "second", "third"))
    first.write_text("    python scripts/benchmark.py eval --seed 3 --repeats 2\n    python3 train.py --seed 1\n")
    second.write_text("    python3 scripts/benchmark.py eval --repeats 2 --seed 3\n    python train.py --seed 1\n")
    third.write_text("    python3 train.py --seed 1\n    python3 train.py --seed 1 --resume\n")
    steps = run_commands.plan([first, second, third])
    same = [[step.same_as and step.same_as.place for step in page] for page in steps.values()]
    assert same == [[None, None], ["first.md:1", "first.md:2"], [None, None]]
    told = [step.text.split("--output-dir ")[1] for step in steps[third]]
    assert told[0] == told[1]
