"""What a run says at its end: where everything is, and commands that can be pasted."""

from pathlib import Path

import pytest

from tests.documentation.documented_commands import check_options, commands_of

pytestmark = pytest.mark.slow


def test_the_end_of_a_run_names_its_files_and_commands_that_exist(start, shapes_set, tmp_path, capsys):
    output = tmp_path / "a run"  # a space: what is pasted must survive it
    assert start(output, "--limit-val-batches", "9") == 0
    printed = capsys.readouterr().out
    table = printed.split("validation after epoch 2")[1].split("epoch    mAP")[1].splitlines()
    assert [line.split()[0] for line in table[1:3]] == ["1", "2"]  # epochs count from 1
    closing = printed.split("\n\ncheckpoints ")[-1].splitlines()
    said = {line[:13].strip(): line[13:] for line in closing[1:]}
    assert list(said) == ["detections", "take away", "figures", "curves", "report", "why so", "try it"]
    assert Path(said["detections"].removesuffix(" (of the last validation)")).is_file()
    assert all(Path(file).is_file() for file in said["figures"].split(", "))
    assert said["curves"] == f"tensorboard --logdir '{output}'"

    page = tmp_path / "page.md"
    page.write_text(f"    {said['why so']}\n    {said['try it']}\n")
    analysis, prediction = commands_of(page)
    for command in (analysis, prediction):
        check_options(command)
        named = [Path(word) for word in command.arguments if not word.startswith("--")]
        assert named and all(path.exists() for path in named), command
    assert str(shapes_set / "val2017") in analysis.arguments
    assert str(output / "best_weights.safetensors") in prediction.arguments


def test_a_validation_of_a_part_of_the_set_is_not_offered_for_analysis(start, tmp_path, capsys):
    """Each image that was not run would count as one where nothing was found."""
    assert start(tmp_path / "run", "--max-epochs", "1") == 0
    assert "detections   " in (said := capsys.readouterr().out) and "why so" not in said
