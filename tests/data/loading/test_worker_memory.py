"""What workers and the main process hold does not grow with the epochs."""

import itertools
import json
import multiprocessing
import os
import statistics
from pathlib import Path

import pytest
from PIL import Image

from data.coco.annotations import read_coco
from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader

NUM_IMAGES = 800
NUM_EPOCHS = 8
ALLOWED_GROWTH = 1e6
"""Bytes an epoch, of 7.4 MB that its images take"""


def private_bytes(pid: int) -> int:
    """What a process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="the system does not tell the memory of processes"
)
def test_memory_stays_flat_over_epochs(tmp_path: Path) -> None:
    Image.effect_noise((64, 48), 50).convert("RGB").save(tmp_path / "0.jpg")
    images = [{"id": i, "file_name": "0.jpg", "width": 64, "height": 48} for i in range(1, NUM_IMAGES + 1)]
    annotations = [
        {"id": i * 10 + j, "image_id": i, "category_id": 1, "bbox": [j, j, 20, 20], "area": 400, "iscrowd": 0}
        for i in range(1, NUM_IMAGES + 1)
        for j in range(8)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = CocoDataset(tmp_path, read_coco(tmp_path / "a.json"), training=True)
    loader = TrainLoader(dataset, min_size=48, max_size=64, batch_size=8, seed=0, workers=1)
    num = loader.iterations_per_epoch
    used = []
    try:
        for epoch in range(NUM_EPOCHS):
            for raw in loader.batches(epoch * num, (epoch + 1) * num):
                assert len(raw) == 8
            (worker,) = multiprocessing.active_children()
            used.append((private_bytes(os.getpid()), private_bytes(worker.pid)))
    finally:
        loader.close()
    # What is kept grows in every epoch, the last ones too. Single steps, and steps at the start, are none of it: the
    # allocator takes a new block, or pages that were shared since a fork become private when a side writes to them.
    for name, values in zip(("main process", "worker"), zip(*used, strict=True), strict=True):
        growth = [after - before for before, after in itertools.pairwise(values)]
        assert statistics.median(growth[-3:]) < ALLOWED_GROWTH, f"{name}: {values}"
