"""What the options of train.py are tried with: values that do not exclude each other, an option or a few to a group."""

TRIED: dict[str, tuple[str, ...]] = {
    "model": ("--model tiny", "--model tiny_other", "--model tiny_like_torchvision"),
    "model settings": (
        "",
        "--model-set rpn_samples_per_image=None --model-set roi_samples_per_image=None",
        "--model-set anchor_ratios=[1.0] --model-set anchor_sizes=[8,16,32,64,128]",
        "--model-set fpn_norm='gn' --model-set roi_output_size=1 --model-set standardize_weights=True",
        "--model-set head_norm='gn' --model-set roi_num_convs=1 --model-set roi_num_hidden=1",
        "--model-set score_threshold=0.99 --model-set norm_eps=0.001 --model-set detections_per_image=1",
        "--model-set roi_sampler='ohem' --model-set roi_box_loss='ciou' --model-set soft_nms='linear'",
        "--model-set regressor_has_background=True --model-set roi_loss_beta=1 --model-set detection_min_size=3",
        "--model-set pixel_order='bgr' --model-set roi_box_loss='giou' --model-set soft_nms='gaussian'",
    ),
    "norm": ("", "--norm bn --sync-bn", "--norm gn"),
    "freeze": ("", "--freeze stem", "--frozen-stages 2", "--freeze backbone"),
    "schedule": ("", "--schedule 20e", "--schedule schedules/schedule_1x_adamw.py"),
    "optimizer": (
        "",
        "--set optim_wrapper.optimizer.foreach=True",
        "--set optim_wrapper.optimizer.fused=True",
        "--set optim_wrapper.paramwise_cfg=dict(norm_decay_mult=0,bias_lr_mult=2,custom_keys={'fpn':dict(lr_mult=0)})",
    ),
    "learning rate": ("", "--auto-scale-lr", "--lr 1e-5 --set param_scheduler.0.end=2"),
    "epochs": ("--max-epochs 1", "--max-epochs 2 --val-interval 2"),
    "batch": ("--batch-size 1", "--batch-size 3 --accumulate 2", "--batch-size 2 --global-batch-size 4"),
    "iterations": ("--limit-train-batches 1", "--limit-train-batches 2"),
    "validation": ("--limit-val-batches 1", "--eval-backend pycocotools"),
    "clip": ("", "--clip-grad 0.1"),
    "nonfinite": ("", "--skip-nonfinite"),
    "precision": ("", "--amp bf16", "--amp fp16"),
    "average": ("", "--ema", "--ema 0.5"),
    "layout": ("", "--no-channels-last"),
    "seed": ("", "--seed 9223372036854775807"),
    "deterministic": ("", "--deterministic"),
    "size": ("--min-size 64 --max-size 96", "--min-size 33 --max-size 64", "--min-size 33 --max-size 33"),
    "scales": (
        "",
        "--train-min-sizes 33 33",
        "--train-min-sizes 33 33 --train-scale-sampling range",
        "--train-scales 96x64 40x33",
        "--lsj 64",
        "--lsj 33 --lsj-range 0.5 3 --lsj-min-visibility 0.5",
    ),
    "flips": ("", "--flip-probability 1 --vertical-flip-probability 0.5"),
    "colors": ("", "--photometric-distortion", "--color-jitter 0.4 10 0 0.5"),
    "repeats": ("", "--repeat-threshold 0.9"),
    "classes": ("", "--classes circle cross"),
    "workers": ("--workers 0", "--workers 1"),
    "bad images": ("", "--max-bad-images 0"),
    "checkpoints": ("", "--checkpoint-iterations 1 --keep-checkpoints 1", "--checkpoint-minutes 0.0001"),
    "log": ("", "--log-interval 1000"),
}
"""By group, words of the command line that are tried for it."""

OF_A_RUN = ("model", "batch", "iterations", "repeats", "classes")
"""Groups that a resumed run must repeat: others are refused."""
