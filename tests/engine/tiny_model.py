"""Networks so small that tests can train them; run as a program, this is train.py with them."""

import train
from detection.models import MODELS
from detection.models.backbones.architectures import ARCHITECTURES, residual
from detection.models.config import CASCADE_RECIPE
from detection.process_exit import leave

BACKBONE = "resnet10"
TINY = {
    "backbone": BACKBONE,
    "fpn_channels": 32,
    "roi_hidden_channels": 32,
    # An image without a positive anchor does not count one all the same: so it fills the sampler as others do, and
    # the mean over processes is the mean over images.
    "rpn_counts_at_least_one": False,
    "rpn_nms_pre_train": 100,
    "rpn_nms_pre_test": 50,
    "rpn_proposals_train": 60,
    "rpn_proposals_test": 30,
    "roi_samples_per_image": 32,
    "score_threshold": 0.0,
    "detections_per_image": 10,
}


class Killed(BaseException):
    """Stands for a kill: nothing in the program may catch it."""


def make_known() -> None:
    """Models "tiny", "tiny_other", "tiny_cascade" and "tiny_mask" exist from now on."""
    ARCHITECTURES[BACKBONE] = residual((1, 1, 1, 1), bottleneck=False, channels=32)
    MODELS["tiny"] = TINY
    MODELS["tiny_other"] = {**TINY, "fpn_channels": 64}
    MODELS["tiny_cascade"] = {**CASCADE_RECIPE, **TINY}
    MODELS["tiny_mask"] = {**TINY, "has_masks": True, "mask_channels": 16}


if __name__ == "__main__":
    make_known()
    leave(train.main())
