"""What the console shows of validations."""

import io

from detection.engine.metrics.logger import MetricLogger
from detection.reporting import Console

METRICS = {"mAP_50": 0.6, "mAP_75": 0.4, "AR_100": 0.55, "num_images": 4, "seconds": 1.0, "per_class": {}}


def test_a_validation_is_compared_with_the_best_by_the_chosen_metric():
    said = io.StringIO()
    logger = MetricLogger(Console(stream=said), None, None, describe=lambda log: None, best_metric="loss")
    for epoch, (value, loss) in enumerate([(0.5, 2.0), (0.4, 1.0), (0.3, float("nan")), (0.45, 1.5)]):
        logger.validation(epoch, epoch, {"mAP": value, "loss": loss, **METRICS}, "weights")
    (*_, last) = [line.split() for line in said.getvalue().splitlines() if line.split()[:1] == ["mAP"]]
    assert last[1:4] == ["0.450", "+0.150", "+0.050"]
