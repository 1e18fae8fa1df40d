"""A base file: values that other files change."""

norm = dict(type="BN", requires_grad=True)
model = dict(
    type="Detector",
    backbone=dict(type="ResNet", depth=50, norm_cfg=norm, stages=(1, 2, 3, 4)),
    neck=dict(type="FPN", channels=[256, 512], norm_cfg=norm),
    head=dict(type="Head", num_classes=80, loss=dict(type="L1", weight=1.0), scales={8, 16, 4}),
    kept=dict(_delete_=True, a=1),
)
