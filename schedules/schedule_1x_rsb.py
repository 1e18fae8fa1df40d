# 12 epochs with AdamW for a backbone from "ResNet strikes back" (Wightman et al. 2021), in MMDetection's vocabulary:
# the schedule of its faster-rcnn_r50-rsb-pre_fpn_1x_coco.
# Read as data, never executed: literals, dict(...) and lists only.
# ruff: noqa: C408

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# As in 1x: a linear warmup over 500 iterations, then a tenth of the learning rate after 8 and after 11 epochs.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.0002, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True),
)

# base_batch_size = 8 GPUs x 2 images: the global batch that lr above belongs to.
auto_scale_lr = dict(enable=False, base_batch_size=16)
