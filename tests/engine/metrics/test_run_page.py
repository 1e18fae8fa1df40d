"""The page of a run."""

import json
import re
from contextlib import closing

import numpy as np
import pytest

from detection.engine.metrics.run_page import run_page, start_command
from detection.evaluation.html_page import Curve, line_chart
from detection.reporting import MetricsLog, read_runs


@pytest.fixture
def directory(tmp_path):
    """A run of 1,000 iterations in two starts, with three validations; "a <run>" by name."""
    directory = tmp_path / "a <run>"
    with closing(MetricsLog(directory / "metrics.jsonl")) as log:
        for i in range(1000):
            loss = float("nan") if i == 3 else 1.0 + (i == 500)
            figures = {"lr": 0.02, "loss": loss, "loss_cls": 0.5, "images_per_second": 40.0, "idle_share": 0.25}
            log.write({"kind": "train", "epoch": i // 400, "iteration": i, **figures})
        for epoch, value in enumerate((0.1, 0.3, 0.2)):
            figures = {"mAP": value, "mAP_s": -1.0, "seconds": 60.0, "images_per_second": 5.0, "num_images": 300}
            log.write({"kind": "val", "epoch": epoch, "iteration": 400 * epoch, "per_class": {"<b>": value}, **figures})
    starts = [
        {"time": "then", "iteration": 0, "world_size": 2, "command": ["python", "train.py", "--lr", "0.1"]},
        {"time": "later", "iteration": 600, "world_size": 1, "command": ["python", "train.py", "--resume"]},
    ]
    config = {"train": {"batch_size": 8, "amp": None}, "model": {"model": "tiny"}}
    schedule = {"optim_wrapper": {"accumulative_counts": 1}}
    record = {"config": config, "schedule": schedule, "starts": starts, "device": "CPU", "versions": {"torch": "2.8"}}
    (directory / "config.json").write_text(json.dumps(record))
    return directory


def rows(page, heading):
    """Texts of the cells of the first table below a heading."""
    section = page[page.index(f"<h2>{heading}") :]
    body = section[section.index("<tbody>") : section.index("</tbody>")]
    return [re.findall(r"<td>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", body)]


def test_a_page_has_figures_curves_speed_configuration_and_the_command(directory):
    page = run_page(*read_runs([directory]), analysis="<h2>ERRORS</h2>", missing=["images: <none>"])
    assert "<title>a &lt;run&gt;</title>" in page and "Not shown: images: &lt;none&gt;" in page
    assert rows(page, "Validations")[1][:4] == ["2 (best)", "401", "0.300", "–"]
    # The last start's single process makes a batch of 8 images: 1,000 iterations of them at 40 images a second.
    speed = dict(rows(page, "Speed"))
    assert speed["training, all iterations"] == "3:20" and speed["waiting for data"] == "25.0% of the training time"
    assert speed["validation, all"] == "3:00"
    assert dict(rows(page, "Configuration"))["train.batch_size"] == "8" and "train.amp" not in page
    assert "torchrun --nproc_per_node=2 train.py --lr 0.1 --output-dir &#x27;a &lt;run&gt;_again&#x27;" in page
    assert [row[1:3] for row in rows(page, "How to repeat it")] == [["0", "2"], ["600", "1"]]
    assert page.count('class="chart"') == 6 and "<h2>ERRORS</h2>" in page
    for outside in ("http://", "https://", "src=", "<b>"):
        assert outside not in page


@pytest.mark.parametrize(("metric", "epoch"), [("mAP_50", "1"), ("AP/<b>", "2"), ("loss", "3")])
def test_the_best_validation_is_the_one_whose_weights_the_run_kept(directory, metric, epoch):
    record = json.loads((directory / "config.json").read_text())
    record["config"]["train"]["best_metric"] = metric
    (directory / "config.json").write_text(json.dumps(record))
    (run,) = read_runs([directory])
    for validation, mAP_50, loss in zip(run.val, (0.9, 0.8, 0.9), (3.0, 2.0, 1.0), strict=True):  # noqa: N806
        validation |= {"mAP_50": mAP_50, "loss": loss}
    page = run_page(run)
    assert [row[0] for row in rows(page, "Validations") if "best" in row[0]] == [f"{epoch} (best)"]


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    page = run_page(*read_runs([tmp_path]))
    assert "No iteration was logged" in page and "Not shown: config.json is not there" in page


def test_a_single_process_repeats_its_own_command():
    assert start_command({"world_size": 1, "command": ["python", "a b.py", "--x"]}) == "python 'a b.py' --x"


def points(chart):
    (text,) = re.findall('<polyline points="([^"]*)"', chart)
    return np.array([[float(number) for number in pair.split(",")] for pair in text.split()])


def test_a_long_curve_is_drawn_as_means_over_equal_parts_with_its_range():
    y = np.tile([1.0, 3.0], 30_000)
    chart = line_chart("t", {"y": Curve(np.arange(60_000), y)}, x_name="x")
    drawn = points(chart)
    assert len(drawn) == 300 and np.ptp(drawn[:, 1]) == 0  # 2 everywhere
    assert chart.count("<polygon") == 1 and len(chart) < 30_000


@pytest.mark.parametrize(("x", "y"), [([5.0], [0.3]), ([0.0, 1.0], [2.0, 2.0]), ([0.0, 1.0], [0.0, 0.0])])
def test_a_point_or_a_level_curve_lies_inside_its_chart(x, y):
    drawn = points(line_chart("t", {"y": Curve(np.array(x), np.array(y))}, x_name="x"))
    assert np.isfinite(drawn).all() and (drawn >= [52, 10]).all() and (drawn <= [338, 210]).all()


def test_a_chart_without_a_point_is_left_out():
    assert line_chart("t", {"y": Curve(np.zeros(0), np.zeros(0))}, x_name="x") == ""
