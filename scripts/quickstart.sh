#!/usr/bin/env bash
# A fresh machine: makes the environment and the shapes set, trains the 1x schedule on it with two processes (or on
# every GPU), validates each epoch, and shows what came out. About 10 minutes on two CPU cores.
#
#   bash scripts/quickstart.sh            the whole run; started again it goes on where it stopped
#   bash scripts/quickstart.sh --short    two short epochs, to see that everything works
set -euo pipefail
source "$(dirname "$0")/environment.sh" plots,fast

output=runs/quickstart
extra=()
if [ "${1:-}" = "--short" ]; then
    output=runs/quickstart_short
    extra=(--max-epochs 2 --limit-train-batches 12 --limit-val-batches 4)
    rm -rf "$output"
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/quickstart.sh [--short]" >&2
    exit 2
fi

gpus=$(python -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus > 0 ? gpus : 2))
# Where a device has instructions for bfloat16 it is faster than float32, elsewhere much slower.
amp=$(python -c "
import torch
from detection.engine.optim.amp import multiplies_bfloat16
print('bf16' if multiplies_bfloat16(torch.device('cuda' if $gpus else 'cpu')) else 'off')")

# A detector of the size that small images of simple things need; everything else is as on COCO.
set -x
torchrun --nproc_per_node="$processes" train.py --schedule 1x \
    --dataset shapes --model faster_rcnn_r18_fpn --weights none \
    --model-set fpn_channels=128 --model-set roi_hidden_channels=256 --model-set roi_samples_per_image=256 \
    --model-set rpn_nms_pre_train=1000 --model-set rpn_proposals_test=300 \
    --min-size 192 --max-size 256 --batch-size 4 --set param_scheduler.0.end=200 --clip-grad 35 --amp "$amp" \
    --output-dir "$output" --resume auto "${extra[@]}"
python scripts/predict.py --weights "$output/checkpoints/best.pt" --output-dir "$output/predictions" \
    --overwrite --min-score 0.5 --limit 8 datasets/shapes/val2017
set +x
echo
echo "images of detections: $output/predictions"
echo "curves:                 .venv/bin/tensorboard --logdir $output/tensorboard"
