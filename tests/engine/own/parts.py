"""Parts that are not this product's, as a user would write them: a detector, a backbone, an augmentation."""

from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign


class Maps(nn.Module):
    """Four maps. What is dropped is drawn from torch's generator; without, no image has a part in another's figures."""

    def __init__(self, *, channels=8, drops=True):
        super().__init__()
        self.out_channels = channels
        norm = nn.BatchNorm2d(channels) if drops else nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), norm, nn.ReLU())
        self.stages = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(4))
        self.drop = nn.Dropout2d(0.2 if drops else 0.0)

    def forward(self, x):
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x).relu()
            found.append(self.drop(x))
        return OrderedDict((str(number), each) for number, each in enumerate(found))


def maps():
    return Maps()


def three_maps():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1))


def _anchors(*ratios):
    return AnchorGenerator(((16,), (32,), (64,), (96,)), (ratios,) * 4)


def retinanet(num_classes, min_size=64, max_size=96, drops=True):
    sizes = {"min_size": min_size, "max_size": max_size}
    return RetinaNet(
        Maps(drops=drops), num_classes, anchor_generator=_anchors(0.5, 1.0, 2.0), score_thresh=0.0, **sizes
    )


def fcos(num_classes):
    return FCOS(
        Maps(channels=32), num_classes, min_size=64, max_size=96, anchor_generator=_anchors(1.0), score_thresh=0.0
    )


def faster_rcnn(num_classes):
    pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
    sizes = {"min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20}
    return FasterRCNN(
        Maps(), num_classes, rpn_anchor_generator=_anchors(1.0), box_roi_pool=pool, box_score_thresh=0.0, **sizes
    )


def not_a_module(num_classes):
    return num_classes


class Nothing(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images, targets=None):
        return [self.weight] if targets else images


def squares(batch, uniform):
    """A gray square in each image, where chance wants it."""
    for image, (height, width), (y, x) in zip(batch.pixels, batch.resized_sizes, uniform(2).tolist(), strict=True):
        top, left = int(y * height), int(x * width)
        image[:, top : min(top + 16, height), left : min(left + 16, width)] = 114
    return batch


def fewer_boxes(batch, uniform):
    batch.valid = batch.valid[:, :-1]
    return batch
