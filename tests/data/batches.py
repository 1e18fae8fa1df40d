"""Small loaders and what is compared of their batches, for the tests of the data path."""

from collections.abc import Callable

from data.loading.batch import Batch
from data.loading.dataset import CocoDataset
from data.loading.loader import TrainLoader

MakeDataset = Callable[..., CocoDataset]
SIZES = [(64, 48), (50, 60), (90, 40), (48, 64), (70, 70), (33, 64), (64, 33), (40, 44), (44, 40), (60, 50), (41, 40)]
"""Of both groups, (width, height)"""
TENSORS = ("pixels", "sizes", "boxes_xyxy", "labels", "valid", "image_ids", "places", "sample_keys", "scale_factors")


def train_loader(dataset: CocoDataset, **options: object) -> TrainLoader:
    return TrainLoader(dataset, **({"min_size": 64, "max_size": 112, "batch_size": 2, "seed": 3} | options))


def facts(batch: Batch) -> list:
    """All that a batch says, comparable."""
    plan = batch.plan
    arrays = [plan.scaled_sizes, plan.offsets, plan.sizes, plan.flips, plan.vertical_flips]
    arrays += [getattr(batch, name) for name in TENSORS]
    values = [batch.iteration, batch.plan.epoch, batch.native_sizes, plan.colors, plan.padded_size, batch.unreadable]
    return [*values, *(array.tolist() for array in arrays)]
