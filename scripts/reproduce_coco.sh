#!/usr/bin/env bash
# The trainings behind the COCO figures of docs/coco_results.md, each with its exact command.
#
#   bash scripts/reproduce_coco.sh --list             every recipe and its command
#   bash scripts/reproduce_coco.sh 1x                 train one or more of them; started again, they go on
#   bash scripts/reproduce_coco.sh --dry-run [NAME]   check the commands on a small generated set, train nothing
#   bash scripts/reproduce_coco.sh 1x -- --amp bf16   what follows -- is added to each command
#
# Needs COCO 2017 under datasets/coco (scripts/download_coco.py fetches it), or under $COCO.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

# NAME: 8 GPUs x 2 images (mask_lsj: x 8). NAME_1gpu: the same global batch of 16 on one GPU, in 8 micro-steps. NAME_1gpu_scaled: a
# global batch of 2, eight times the iterations, the learning rate scaled to an eighth.
recipes=()
declare -A options
for schedule in 1x 2x 20e; do
    recipes+=("$schedule" "${schedule}_1gpu" "${schedule}_1gpu_scaled")
    options[$schedule]="--schedule $schedule"
done
for schedule in 1x 20e; do
    recipes+=("cascade_$schedule" "cascade_${schedule}_1gpu" "cascade_${schedule}_1gpu_scaled")
    options[cascade_$schedule]="--schedule $schedule --model cascade_rcnn_r50_fpn"
done
for schedule in 1x 2x; do
    recipes+=("mask_$schedule" "mask_${schedule}_1gpu")
    options[mask_$schedule]="--schedule $schedule --model mask_rcnn_r50_fpn"
done
# MMDetection's 100 epochs with large-scale jitter, for a global batch of 64.
recipes+=(mask_lsj mask_lsj_1gpu)
options[mask_lsj]="--schedule 1x --model mask_rcnn_r50_fpn --lsj 1024 --lsj-boxes-of-masks --batch-size 8 --lr 0.1"
options[mask_lsj]+=" --set optim_wrapper.optimizer.weight_decay=0.00004 --set param_scheduler.0.start_factor=0.067"
options[mask_lsj]+=" --max-epochs 100 --set param_scheduler.1.end=100 --set param_scheduler.1.milestones=[88,96] --set auto_scale_lr.base_batch_size=64"
# Newer ImageNet weights and AdamW. AdamW's rate does not scale with the batch: no scaled form.
recipes+=(1x_adamw 1x_adamw_1gpu)
options[1x_adamw]="--schedule schedules/schedule_1x_adamw.py --weights IMAGENET1K_V2"
recipes+=(1x_rsb 1x_rsb_1gpu)
rsb=https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb256-rsb-a1-600e_in1k_20211228-20e21305.pth
decay=optim_wrapper.optimizer.weight_decay=0.05
options[1x_rsb]="--schedule schedules/schedule_1x_adamw.py --lr 0.0002 --set $decay --weights $rsb"

command_of() {
    local start="torchrun --nproc_per_node=8 train.py" more=""
    case "$1" in
        *_1gpu) start="python3 train.py" more=" --accumulate 8" ;;
        *_1gpu_scaled) start="python3 train.py" more=" --auto-scale-lr" ;;
    esac
    echo "$start ${options[${1%%_1gpu*}]}$more --data-path ${COCO:-datasets/coco} --output-dir runs/coco_$1 --resume auto"
}

if [[ "${COCO:-}" =~ [[:space:]] ]]; then
    echo "reproduce_coco.sh: COCO=\"$COCO\": a path without spaces is needed; make a link to it" >&2
    exit 2
fi

action=train
chosen=()
extra=()
while [ $# -gt 0 ]; do
    case "$1" in
        --list) action=list ;;
        --dry-run) action=dry_run ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        --) shift; extra=("$@"); break ;;
        *)
            if [[ ! " ${recipes[*]} " == *" $1 "* ]]; then
                echo "reproduce_coco.sh: there is no recipe '$1'; there are ${recipes[*]}" >&2
                exit 2
            fi
            chosen+=("$1")
            ;;
    esac
    shift
done

case "$action" in
    list)
        for name in "${chosen[@]:-${recipes[@]}}"; do
            printf '%-23s%s\n' "$name" "$(command_of "$name")${extra[*]:+ ${extra[*]}}"
        done
        ;;
    dry_run)
        # One process, no downloaded weights, and a generated set in place of COCO; all else as it will be.
        set_of_shapes=$(mktemp -d)
        trap 'rm -rf "$set_of_shapes"' EXIT
        python3 scripts/make_shapes.py --data-path "$set_of_shapes/coco" --num-train 32 --num-val 4
        for name in "${chosen[@]:-${recipes[@]}}"; do
            read -ra words <<< "$(COCO="$set_of_shapes/coco" command_of "$name")"
            if [ "${words[0]}" = torchrun ]; then words=(python3 "${words[@]:2}"); fi
            echo "== $name: ${words[*]}"
            "${words[@]}" --weights none --output-dir "$set_of_shapes/run" "${extra[@]}" --dry-run
        done
        ;;
    train)
        if [ ${#chosen[@]} -eq 0 ]; then
            echo "reproduce_coco.sh: name one or more of ${recipes[*]}; --list shows their commands" >&2
            exit 2
        fi
        for name in "${chosen[@]}"; do
            read -ra words <<< "$(command_of "$name")"
            (set -x; "${words[@]}" "${extra[@]}")
        done
        ;;
esac
