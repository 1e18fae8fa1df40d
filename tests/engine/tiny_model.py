"""Networks so small that tests can train them; run as a program, this is train.py with them."""

import sys

TINY = {
    "tiny": {
        "backbone": "resnet18",
        "fpn_channels": 32,
        "roi_hidden_channels": 32,
        "rpn_nms_pre_train": 100,
        "rpn_nms_pre_test": 50,
        "rpn_proposals_train": 60,
        "rpn_proposals_test": 30,
        "roi_samples_per_image": 32,
        "score_threshold": 0.0,
        "detections_per_image": 10,
    },
}
TINY["tiny_other"] = {**TINY["tiny"], "fpn_channels": 64}

if __name__ == "__main__":
    import train
    from detection.models import MODELS

    MODELS.update(TINY)
    sys.exit(train.main())
