_base_ = ["base/detector.py"]
model = dict(
    backbone=dict(_delete_=True, type="Swin", inner=dict(_delete_=True, x=1)),
    neck=dict(_delete_=False, channels=[1]),
    head=dict(loss=dict(_delete_=True, type="GIoU")),
    kept=dict(c=3),
)
norm = dict(_delete_=True)
_deprecation_ = dict(expected="several.py")
