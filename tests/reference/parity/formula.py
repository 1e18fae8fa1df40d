"""Weights and images of the parity fixtures, rebuilt from their formula."""

import csv
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor

FOLDER = Path(__file__).parent
CASCADE = FOLDER.parent / "parity_cascade"
MASK = FOLDER.parent / "parity_mask"
BACKGROUND_BIAS = 9.2  # added to the background logit, so that few RoIs count as objects

# He-like variances: gain / fan_in. The first rule whose text occurs in the name holds.
GAINS = (
    ("neck.lateral_convs.3.", 5.0),
    ("neck.", 1.0),
    ("rpn_cls.", 0.5),
    ("rpn_reg.", 0.15),
    ("shared_fcs.0.", 8.0),
    *((f"bbox_head.{stage}.fc_cls.", 4.5) for stage in range(3)),  # a cascade averages the logits of three heads
    ("fc_cls.", 1.5),
    ("fc_reg.", 0.2),
    ("conv_logits.", 1.0),
    ("", 2.0),
)

# MMDetection's prefixes and ours; the backbone's names agree.
PREFIXES = {
    **{f"neck.lateral_convs.{level}.conv": f"fpn.lateral.{level}" for level in range(4)},
    **{f"neck.fpn_convs.{level}.conv": f"fpn.output.{level}" for level in range(4)},
    "rpn_head.rpn_conv": "rpn.conv",
    "rpn_head.rpn_cls": "rpn.objectness",
    "rpn_head.rpn_reg": "rpn.deltas",
    "roi_head.bbox_head.shared_fcs.0": "roi_head.fc1",
    "roi_head.bbox_head.shared_fcs.1": "roi_head.fc2",
    "roi_head.bbox_head.fc_cls": "roi_head.classifier",
    "roi_head.bbox_head.fc_reg": "roi_head.regressor",
    **{f"roi_head.mask_head.convs.{number}.conv": f"mask_head.convs.{number}" for number in range(4)},
    "roi_head.mask_head.upsample": "mask_head.upsample",
    "roi_head.mask_head.conv_logits": "mask_head.logits",
    **{f"roi_head.bbox_head.{stage}.shared_fcs.0": f"roi_head.{stage}.fc1" for stage in range(3)},
    **{f"roi_head.bbox_head.{stage}.shared_fcs.1": f"roi_head.{stage}.fc2" for stage in range(3)},
    **{f"roi_head.bbox_head.{stage}.fc_cls": f"roi_head.{stage}.classifier" for stage in range(3)},
    **{f"roi_head.bbox_head.{stage}.fc_reg": f"roi_head.{stage}.regressor" for stage in range(3)},
}


def our_name(mmdetection_name: str) -> str:
    prefix, leaf = mmdetection_name.rsplit(".", 1)
    return f"{PREFIXES.get(prefix, prefix)}.{leaf}"


def load_json(name: str, folder: Path = FOLDER) -> dict:
    return json.loads((folder / name).read_text())


def load_arrays(name: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    with np.load(folder / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def load_rows(name: str, folder: Path = FOLDER) -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def weight_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of one state-dict entry from its MMDetection name."""
    seed = zlib.crc32(name.encode()) % 2**32
    normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    module, leaf = name.rsplit(".", 2)[-2:]
    is_norm = name.startswith("backbone.") and (module.startswith("bn") or ".downsample.1." in name)
    if leaf == "running_var":
        value = np.exp(0.2 * normal)
    elif is_norm and leaf == "weight":
        gain = 0.3 if module == "bn3" else 0.8
        value = gain + 0.1 * gain * normal
    elif is_norm:  # running_mean and bias
        value = 0.1 * normal
    elif leaf == "bias":
        value = 0.02 * normal
    else:
        if "shared_fcs.0." in name:  # no response to a constant RoI feature
            windows = normal.reshape(shape[0], -1, 49)
            normal = (windows - windows.mean(axis=2, keepdims=True)).reshape(shape)
        gain = next(gain for text, gain in GAINS if text in name)
        # An output of the transposed convolution, whose strides do not overlap, sees one tap of each input channel.
        fan_in = shape[0] if "upsample." in name else math.prod(shape[1:])
        value = math.sqrt(gain / fan_in) * normal
    if name.endswith("fc_cls.bias"):
        value[-1] += BACKGROUND_BIAS
    return value.astype(np.float32)


def state_dict(folder: Path = FOLDER) -> dict[str, Tensor]:
    """The whole model's weights under our names."""
    entries = {}
    for row in load_rows("state_dict.csv", folder):
        if not row["name"].endswith("num_batches_tracked"):
            shape = tuple(int(size) for size in row["shape"].split("x"))
            entries[our_name(row["name"])] = torch.from_numpy(weight_array(row["name"], shape))
    return entries


def image(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [height, width, 3]: three octaves of block noise and pixel noise, in integer arithmetic."""
    generator = np.random.Generator(np.random.PCG64(seed))
    total = np.zeros((height, width, 3), np.int64)
    for block, weight in ((48, 4), (16, 2), (5, 1)):
        coarse = generator.integers(0, 256, (-(-height // block), -(-width // block), 3))
        total += weight * coarse.repeat(block, axis=0).repeat(block, axis=1)[:height, :width]
    noisy = total // 7 + generator.integers(-12, 13, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def images(folder: Path = FOLDER) -> list[Tensor]:
    """The two images, uint8 [3, H, W]."""
    return [
        torch.from_numpy(image(entry["h"], entry["w"], entry["img_seed"])).permute(2, 0, 1).contiguous()
        for entry in load_json("inputs.json", folder)["images"]
    ]


def targets(folder: Path = FOLDER) -> list[dict[str, Tensor]]:
    """Their boxes and labels, and masks where there are any."""
    return [
        {
            "boxes_xyxy": torch.tensor(entry["gt_bboxes"]),
            "labels": torch.tensor(entry["gt_labels"]),
            **({"masks": bitmaps(entry["gt_masks_rle"])} if "gt_masks_rle" in entry else {}),
        }
        for entry in load_json("inputs.json", folder)["images"]
    ]


def bitmaps(rles: list[dict]) -> Tensor:
    """COCO's RLE of masks: uint8 [N, H, W]."""
    return torch.from_numpy(mask_utils.decode(rles)).permute(2, 0, 1).contiguous()
