"""Waiting for data: measured, logged, and told with what might help."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import CocoDataset, LoadTimes
from detection.engine.inputs import data_stall
from detection.engine.inputs.data_stall import DataAdvice, DataStallWatch

ADVICE = DataAdvice(num_workers=2, num_cores=8, stored_megapixels=0.3, seen_megapixels=0.9, has_simplejpeg=True)
BUSY = LoadTimes(num_images=10, seconds=0.1, cpu_seconds=0.09)


def records(number: int, share: float, seconds: float = 1.0) -> list[dict]:
    return [{"idle_share": share, "images_per_second": 4 / seconds}] * number


def test_a_tenth_is_tolerated_and_more_is_told_after_the_warm_up() -> None:
    watch = DataStallWatch(4, lambda: "Advice.")
    assert watch.note(records(data_stall.WARMUP_ITERATIONS, 1.0)) is None
    assert watch.note(records(data_stall.WINDOW_ITERATIONS, 0.1)) is None
    assert watch.note(records(data_stall.WINDOW_ITERATIONS - 1, 0.25)) is None
    told = watch.note(records(1, 0.25))
    assert told == "the training has waited for data for 25% of the last 50 s. Advice."


def test_a_window_is_long_enough_to_mean_something() -> None:
    watch = DataStallWatch(4, lambda: "")
    watch.note(records(data_stall.WARMUP_ITERATIONS, 0.0))
    assert watch.note(records(data_stall.WINDOW_ITERATIONS, 0.5, seconds=0.01)) is None
    assert watch.note(records(3000, 0.5, seconds=0.01)) is not None


def test_it_is_said_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = DataStallWatch(4, lambda: "")
    now = [1000.0]
    monkeypatch.setattr(data_stall.time, "monotonic", lambda: now[0])
    watch.note(records(data_stall.WARMUP_ITERATIONS, 0.0))
    said = []
    for _ in range(5):
        said.append(watch.note(records(data_stall.WINDOW_ITERATIONS, 0.9)) is not None)
        now[0] += 20 * 60
    assert said == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("advice", "times", "words", "not_words"),
    [
        (ADVICE, BUSY, ["10.0 ms", "9.0 ms", "--workers 8"], ["disk", "simplejpeg", "smaller copies"]),
        (ADVICE, LoadTimes(10, 1.0, 0.1), ["faster disk", "--workers 4"], ["simplejpeg"]),
        (ADVICE.__class__(8, 8, 0.3, 0.9, False), BUSY, ["pip install simplejpeg"], ["--workers"]),
        (ADVICE.__class__(8, 8, 12.0, 1.1, True), BUSY, ["12.0 megapixels", "shown 1.1"], ["--workers"]),
        (ADVICE.__class__(8, 8, 0.3, 0.9, True), BUSY, ["more CPU cores a GPU"], ["--workers"]),
        (ADVICE.__class__(0, 8, 0.3, 0.9, True), BUSY, ["the training's own process", "--workers 8"], []),
    ],
)
def test_the_advice_fits_the_cause(advice: DataAdvice, times: LoadTimes, words: list, not_words: list) -> None:
    text = advice.text(times)
    assert all(word in text for word in words), text
    assert not any(word in text for word in not_words), text


def test_a_training_on_slow_data_says_so(
    tmp_path: Path,
    start: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = CocoDataset.image

    def slow(self: CocoDataset, *rest: object) -> object:
        time.sleep(0.2)
        return image(self, *rest)

    monkeypatch.setattr(CocoDataset, "image", slow)
    monkeypatch.setattr(data_stall, "TOLERATED_SHARE", 0.01)
    monkeypatch.setattr(data_stall, "WARMUP_ITERATIONS", 2)
    monkeypatch.setattr(data_stall, "WINDOW_ITERATIONS", 3)
    monkeypatch.setattr(data_stall, "WINDOW_SECONDS", 0.1)
    assert start(tmp_path / "run", "--workers", 0, "--limit-train-batches", 5, "--max-epochs", 1) == 0
    output = capsys.readouterr()
    told = [line for line in (output.out + output.err).splitlines() if "waited for data" in line]
    assert len(told) == 1
    assert "it mostly waits: put the images on a faster disk" in told[0]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shares = [record["idle_share"] for record in map(json.loads, lines) if record["kind"] == "train"]
    assert len(shares) == 5
    assert all(0 <= share <= 1 for share in shares) and max(shares) > 0.01
