_base_ = "../several.py"
model = dict(backbone=dict(stages=[4, 3]), neck=None)
train_cfg = dict(max_epochs=24)
