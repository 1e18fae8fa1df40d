"""scripts/average_checkpoints.py: the mean of what the files hold, of one model only."""

import pytest
import torch

from detection.models import load_detector


@pytest.fixture
def average(program):
    return lambda *arguments: program("average_checkpoints", *arguments)


@pytest.fixture
def small_file(detector_content):
    def content(seed):
        small = {"fpn_channels": 8, "roi_hidden_channels": 16, "norm": "bn"}
        found = detector_content("faster_rcnn_r18_fpn", seed, ["a", "b"], [1, 5], **small)
        for name, value in found["model"].items():
            if name.endswith("running_mean"):
                value.normal_()
            elif name.endswith("num_batches_tracked"):
                value.fill_(100 + seed)
        return found

    return content


def test_the_output_is_the_mean_and_a_detector(average, small_file, tmp_path, capsys):
    contents = [small_file(seed) for seed in range(3)]
    files = [tmp_path / f"{seed}.pt" for seed in range(3)]
    for content, file in zip(contents, files, strict=True):
        torch.save(content, file)
    assert average(*files, "--output", tmp_path / "new" / "average.pt") == 0, capsys.readouterr().err
    result = torch.load(tmp_path / "new" / "average.pt", weights_only=True)
    for name, tensor in result["model"].items():
        stack = torch.stack([content["model"][name] for content in contents])
        if tensor.is_floating_point():
            assert torch.equal(tensor, stack.double().mean(dim=0).float()), name
        else:
            assert torch.equal(tensor, stack[-1]), name
    assert load_detector(tmp_path / "new" / "average.pt").class_names == ("a", "b")
    assert result | {"model": None} == contents[0] | {"model": None}


def test_of_a_checkpoint_the_moving_average_counts_and_a_mixture_is_told(average, small_file, tmp_path, capsys):
    plain, other = small_file(0), small_file(1)
    torch.save(plain, tmp_path / "plain.pt")
    torch.save({**plain, "format": "detection-checkpoint", "ema": other["model"]}, tmp_path / "ema.pt")
    assert average(tmp_path / "ema.pt", tmp_path / "plain.pt", "--output", tmp_path / "average.pt") == 0
    result = torch.load(tmp_path / "average.pt", weights_only=True)["model"]
    weight = "roi_head.fc2.weight"
    torch.testing.assert_close(result[weight], (plain["model"][weight] + other["model"][weight]) / 2)
    assert "1 of 2 files have a moving average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ["a", "c"]}, "do not have the same class_names"),
        (
            {"preprocessing": {"min_size": 80, "max_size": 96}},
            "other.pt do not have the same preprocessing (min_size: 64 and 80)",
        ),
        ({"format": "something else"}, "no checkpoint or detector of this project"),
        ({"model": "another shape"}, "do not have the same tensors: rpn.conv.bias differs"),
        ({"model": "nan"}, "holds NaN or infinity"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(average, small_file, tmp_path, capsys, changes, message):
    torch.save(small_file(0), tmp_path / "one.pt")
    other = small_file(1)
    bias = other["model"]["rpn.conv.bias"]
    if "model" in changes:
        wrong = {"nan": bias / 0, "another shape": bias[1:].clone()}[changes["model"]]
        changes = {"model": {**other["model"], "rpn.conv.bias": wrong}}
    torch.save({**other, **changes}, tmp_path / "other.pt")
    assert average(tmp_path / "one.pt", tmp_path / "other.pt", "--output", tmp_path / "average.pt") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error and "other.pt" in error
    assert not (tmp_path / "average.pt").exists()


def test_an_existing_output_stays_unless_overwriting_is_asked_for(average, small_file, tmp_path, capsys):
    for seed in range(2):
        torch.save(small_file(seed), tmp_path / f"{seed}.pt")
    output = tmp_path / "0.pt"
    before = output.read_bytes()
    assert average(tmp_path / "0.pt", tmp_path / "1.pt", "--output", output) == 2
    assert "--overwrite" in capsys.readouterr().err and output.read_bytes() == before
    assert average(tmp_path / "0.pt", tmp_path / "1.pt", "--output", output, "--overwrite") == 0
    assert output.read_bytes() != before
    assert average(tmp_path / "1.pt", "--output", tmp_path / "x.pt") == 2
    assert "two files or more" in capsys.readouterr().err
