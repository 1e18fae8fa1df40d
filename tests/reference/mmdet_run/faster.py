# Faster R-CNN as MMDetection ships it, in our own words: the values are its, the text is not.
fpn, rpn_nms, stds = 256, dict(type="nms", iou_threshold=0.7), [0.1, 0.1, 0.2, 0.2]
no_shift = [0.0] * 4
rpn_match = dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3)
rcnn_match = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, match_low_quality=False)
l1 = dict(type="L1Loss")
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="ResNet",
        depth=50,
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
    ),
    neck=dict(type="FPN", in_channels=[fpn, 2 * fpn, 4 * fpn, 8 * fpn], out_channels=fpn, num_outs=5),
    rpn_head=dict(
        type="RPNHead",
        in_channels=fpn,
        feat_channels=fpn,
        anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        loss_bbox=l1,
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=7),
            out_channels=fpn,
            featmap_strides=[4, 8, 16, 32],
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead",
            in_channels=fpn,
            num_classes=80,
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=no_shift, target_stds=stds),
            loss_bbox=l1,
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=rpn_match,
            sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
        ),
        rpn_proposal=dict(nms_pre=2000, max_per_img=1000, nms=rpn_nms, min_bbox_size=0),
        rcnn=dict(assigner=rcnn_match, sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=rpn_nms, min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
)

root, scale = "data/coco/", (1333, 800)
load, boxes = dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)
resize, pack = dict(type="Resize", scale=scale, keep_ratio=True), dict(type="PackDetInputs")
flip = dict(type="RandomFlip", prob=0.5)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type="CocoDataset",
        data_root=root,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=[load, boxes, resize, flip, pack],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=root,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=[load, resize, boxes, pack],
    ),
)
val_evaluator = dict(type="CocoMetric", ann_file=root + "annotations/instances_val2017.json", metric="bbox")
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=0.0001))
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
)
randomness = dict(seed=7)
default_scope, log_level, load_from, resume = "mmdet", "INFO", None, False
