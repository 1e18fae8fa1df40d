"""scripts/browse_dataset.py shows the tensors that training gets."""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def browse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("browse_dataset").main


@pytest.mark.slow
def test_the_images_are_those_of_the_training_batches_with_boxes_drawn(
    make_dataset: Callable[..., CocoDataset], tmp_path: Path, browse: Callable[..., int]
) -> None:
    dataset = make_dataset([(64, 48), (48, 64), (60, 60), (64, 48), (64, 40)])
    out = tmp_path / "out"
    source = ["--images", str(tmp_path), "--annotations", str(tmp_path / "annotations.json")]
    sizes = ["--min-size", "96", "--max-size", "160", "--batch-size", "2", "--epoch", "1"]
    assert browse([*source, *sizes, "--count", "5", "--output-dir", str(out)]) == 0
    loader = TrainLoader(dataset, min_size=96, max_size=160, batch_size=2, seed=0)
    batches = [raw.to("cpu") for raw in loader.batches(3, 6)]
    files = sorted(out.iterdir())
    assert len(files) == 5
    fed = [(batch, place) for batch in batches for place in range(2)]
    for file, (batch, place) in zip(files, fed, strict=False):
        assert f"id{int(batch.image_ids[place])}." in file.name
        image = np.asarray(Image.open(file))
        pixels = batch.pixels[place].permute(1, 2, 0).numpy()
        assert image.shape == pixels.shape
        unchanged = (image == pixels).all(axis=2).mean()
        assert 0.2 < unchanged < 1


def test_a_folder_that_is_not_there_is_an_error_without_a_traceback(
    tmp_path: Path, browse: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    assert browse(["--data-path", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err
    assert browse(["--images", str(tmp_path)]) == 1
    assert "--annotations" in capsys.readouterr().err
