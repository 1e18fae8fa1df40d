# Cascade R-CNN, its training set three times an epoch, at scales between two.
_base_ = "faster.py"
smooth = dict(type="SmoothL1Loss", beta=1.0)
kept = ["neck", "backbone", "data_preprocessor"]
matches = [
    dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=iou, neg_iou_thr=iou, match_low_quality=False),
        sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25),
    )
    for iou in [0.5, 0.6, 0.7]
]
all_stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
heads = [
    dict(
        type="Shared2FCBBoxHead",
        num_classes=80,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=stage),
        reg_class_agnostic=True,
        loss_bbox=smooth,
    )
    for stage in all_stds
]
model = dict(
    type="CascadeRCNN",
    rpn_head=dict(loss_bbox=dict(_delete_=True, type="SmoothL1Loss", beta=1.0 / 9.0)),
    roi_head=dict(type="CascadeRoIHead", num_stages=3, stage_loss_weights=[1, 0.5, 0.25], bbox_head=heads),
    train_cfg=dict(rpn=dict(allowed_border=0), rpn_proposal=dict(max_per_img=2000), rcnn=matches),
)
steps = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=[(1333, 640), (1333, 800)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="RepeatDataset",
        times=3,
        dataset=dict(
            type="CocoDataset",
            data_root=_base_.root,
            ann_file="annotations/instances_train2017.json",
            data_prefix=dict(img="train2017/"),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=steps,
        ),
    )
)
