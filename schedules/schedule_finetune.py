# 50 epochs for a set of some hundred images, from pretrained weights, in MMDetection's vocabulary.
# Read as data, never executed: literals, dict(...) and lists only.
# ruff: noqa: C408

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=50, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# Counted in epochs, so that the warmup is a fiftieth of the run for any number of images; then half a cosine.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=True, begin=1, end=50, convert_to_iter_based=True),
]

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001),
    clip_grad=dict(max_norm=35, norm_type=2),
)

# Validation and best.pt use averaged weights. Their decay rises to this: (1 + i) / (10 + i) in iteration i.
ema = dict(decay=0.998)

# The learning rate follows the global batch.
auto_scale_lr = dict(enable=True, base_batch_size=16)
