"""--config: each key of a configuration of MMDetection is a setting, without effect, or an error."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detection.config import ConfigError, parse_arguments, read_mmdet_config
from detection.config.mmdet_page import PAGE, page
from detection.config.mmdet_run import read_run
from detection.models import build_model, export_state_dict, model_config
from tests.config.test_mmdet_config import wheel_configs
from tests.fuzzing import examples

CONFIGS = Path(__file__).parents[1] / "reference" / "mmdet_run"
FASTER, CASCADE, MASK = CONFIGS / "faster.py", CONFIGS / "cascade.py", CONFIGS / "mask.py"


def parsed(*words, path=FASTER):
    return parse_arguments(["--config", str(path), *words])


def with_options(*options, path=FASTER):
    return parsed("--cfg-options", *options, path=path)


@pytest.mark.parametrize(
    ("path", "name"),
    [(FASTER, "faster_rcnn_r50_fpn"), (CASCADE, "cascade_rcnn_r50_fpn"), (MASK, "mask_rcnn_r50_fpn")],
)
def test_the_shipped_values_are_those_of_the_model_of_that_name(path, name):
    config = parsed(path=path)
    assert config.model.model == name
    assert model_config(name, **dict(config.model.settings)) == model_config(name)
    assert (config.model.weights, config.model.norm, config.model.frozen_stages) == ("imagenet", "frozen_bn", 1)


def test_a_cascade_with_masks_has_a_mask_head_for_each_stage(tmp_path):
    whole = MASK.read_text().replace("faster.py", str(CASCADE)).replace('    type="MaskRCNN",\n', "")
    lines = [line for line in whole.splitlines() if "train_cfg" not in line]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    config = parsed(path=tmp_path / "mine.py")
    assert config.model.model == "cascade_mask_rcnn_r50_fpn"
    assert parameters_of(config) == PARAMETERS["cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"]


@pytest.mark.parametrize(
    ("key", "kind"),
    [("model.train_cfg.rcnn.0.sampler", "OHEMSampler"), ("model.roi_head.bbox_head.0", "Shared4Conv1FCBBoxHead")],
)
def test_a_kind_of_one_stage_alone_is_refused(key, kind):
    with pytest.raises(ConfigError, match="here the two are one setting"):
        with_options(f"{key}.type={kind}", path=CASCADE)
    assert with_options(*(f"{key.replace('0', str(n))}.type={kind}" for n in range(3)), path=CASCADE)


@pytest.mark.parametrize("count", [2, 3])
def test_a_list_of_parts_has_one_of_each_stage(tmp_path, count):
    text = "_base_ = %r\npart = _base_.model['roi_head']['bbox_roi_extractor']\n"
    text += "model = dict(roi_head=dict(bbox_roi_extractor=[part] * %d))\n"
    (tmp_path / "mine.py").write_text(text % (str(CASCADE), count))
    if count == 3:
        assert parsed(path=tmp_path / "mine.py").model == parsed(path=CASCADE).model
        return
    with pytest.raises(ConfigError, match="bbox_roi_extractor: is of 2 stages, and roi_head.num_stages is 3"):
        parsed(path=tmp_path / "mine.py")


def test_data_schedule_and_runtime_arrive_in_their_settings():
    config = with_options("resume=True", "default_hooks.checkpoint.max_keep_ckpts=-1", "work_dir=mine", path=CASCADE)
    data, train, output = config.data, config.train, config.output
    assert data.train_images == (Path("data/coco/train2017"),)
    assert data.val_annotations == (Path("data/coco/annotations/instances_val2017.json"),)
    assert (data.min_size, data.max_size, data.workers, len(data.classes)) == (800, 1333, 2, 80)
    assert (train.batch_size, train.seed, train.schedule) == (2, 7, str(CASCADE))
    assert (output.resume, output.output_dir, output.log_interval) == ("auto", Path("mine"), 50)
    assert output.keep_checkpoints > 100_000
    assert config.augmentation.train_scales == ((1333, 640), (1333, 800))
    assert (config.augmentation.train_scale_sampling, config.augmentation.repeat_times) == ("range", 3)


SET = """dict(type='CocoDataset', ann_file='%s.json', data_prefix=dict(img='%s/'), pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True), dict(type='RandomFlip', prob=%s),
    dict(type='PackDetInputs')],
    filter_cfg=dict(filter_empty_gt=True, min_size=32))"""
SEVERAL = """
_base_ = %r
train_dataloader = dict(sampler=%s, dataset=dict(_delete_=True, type='RepeatDataset', times=3, dataset=%s))
"""


def several(path, prob="0.5", wrapper="dict(type='ClassBalancedDataset', oversample_thr=0.01, dataset=%s)"):
    sets = f"[{SET % ('a', 'x', '0.5')}, {SET % ('b', 'y', prob)}]"
    joined = f"dict(type='ConcatDataset', ignore_keys=['dataset_type'], datasets={sets})"
    sampler = "dict(_delete_=True, type='InfiniteSampler', shuffle=True)"
    if "ClassBalanced" not in wrapper:
        sampler = "dict(_delete_=True, type='ClassAwareSampler', num_sample_class=1)"
    path.write_text(SEVERAL % (str(FASTER), sampler, wrapper % joined))
    return parsed(path=path)


def test_several_data_sets_and_what_repeats_them_become_settings(tmp_path):
    config = several(tmp_path / "c.py")
    assert config.data.train_images == (Path("x"), Path("y"))
    assert config.data.train_annotations == (Path("a.json"), Path("b.json"))
    repeats = config.augmentation
    assert (repeats.repeat_times, repeats.repeat_threshold, repeats.repeat_rounds_up) == (3, 0.01, True)
    assert several(tmp_path / "c.py", wrapper="%s").augmentation.class_shares == ()
    with pytest.raises(ConfigError, match=r"datasets\.1\.pipeline: is 0\.4, and .*datasets\.0\.pipeline is 0\.5"):
        several(tmp_path / "c.py", prob="0.4")
    with pytest.raises(ConfigError, match=r"datasets\.0\.type"):
        several(tmp_path / "c.py", wrapper="dict(type='ConcatDataset', datasets=[%s])")


@pytest.mark.parametrize(
    "wrapper",
    [
        "dict(type='RepeatDataset', times=3, dataset=%s)",
        "dict(type='ClassBalancedDataset', oversample_thr=0.01, dataset=%s)",
    ],
)
def test_a_wrapper_round_another_of_its_kind_is_refused(tmp_path, wrapper):
    with pytest.raises(ConfigError, match="is round another one; make them one"):
        several(tmp_path / "c.py", wrapper=wrapper.replace("%s", wrapper))


CHANGES = [
    ("model.backbone.norm_eval=False", lambda c: c.model.norm == "bn"),
    ("model.backbone.norm_cfg.requires_grad=False", lambda c: ("train_norm_affine", False) in c.model.settings),
    ("model.rpn_head.loss_bbox.type=SmoothL1Loss", lambda c: ("rpn_loss_beta", 1.0) in c.model.settings),
    ("model.train_cfg.rpn.allowed_border=0", lambda c: ("anchors_within_image", True) in c.model.settings),
    (
        "model.rpn_head.anchor_generator.scales=[4]",
        lambda c: ("anchor_sizes", (16, 32, 64, 128, 256)) in c.model.settings,
    ),
    ("model.backbone.style=caffe", lambda c: ("stride_in_1x1", True) in c.model.settings),
    ("model.data_preprocessor.bgr_to_rgb=False", lambda c: ("pixel_order", "bgr") in c.model.settings),
    (
        "model.roi_head.bbox_head.loss_bbox.loss_weight=2",
        lambda c: ("roi_box_loss_weight", 2) in c.model.settings,
    ),
    ("model.train_cfg.rcnn.sampler.type=OHEMSampler", lambda c: ("roi_sampler", "ohem") in c.model.settings),
    ("model.test_cfg.rcnn.nms.type=soft_nms", lambda c: ("soft_nms", "linear") in c.model.settings),
    ("model.backbone.zero_init_residual=False", lambda c: ("zero_last_norms", False) in c.model.settings),
    ("model.backbone.init_cfg=None", lambda c: c.model.weights == "none"),
    ("load_from=https://host/weights.pth", lambda c: c.model.weights == "https://host/weights.pth"),
    ("load_from=theirs.pth", lambda c: c.model.weights == "theirs.pth"),
    ("randomness.deterministic=True", lambda c: c.train.deterministic),
    ("train_dataloader.dataset.pipeline.2.scale=(600,400)", lambda c: c.augmentation.train_scales == ((600, 400),)),
    ("train_dataloader.dataset.pipeline.3.direction=vertical", lambda c: c.augmentation.flip_probability == 0),
    ("train_dataloader.dataset.data_root=/else", lambda c: c.data.train_images == (Path("/else/train2017"),)),
    ("train_dataloader.dataset.data_prefix.img=", lambda c: c.data.train_images == (Path("data/coco"),)),
    ("default_hooks.checkpoint.by_epoch=False", lambda c: c.output.checkpoint_iterations == 1),
    ("default_hooks.checkpoint=None", lambda c: c.output.keep_checkpoints == 3),
]


@pytest.mark.parametrize(("option", "holds"), CHANGES, ids=[option for option, _ in CHANGES])
def test_a_key_takes_effect(option, holds):
    assert holds(with_options(option))
    assert not holds(parsed())


REFUSED = [
    ("model.backbone.style=tf", "must be 'pytorch' or 'caffe'"),
    ("model.backbone.num_stages=3", "must go with the others; here there are num_stages=4, out_indices=(0, 1, 2, 3)"),
    ("model.backbone.strides=(1,2,2,1)", "must go with the others"),
    ("model.backbone.depth=152", "must be 18 or 34 or 50 or 101"),
    ("model.backbone.depth=../..", "must be 18 or 34 or 50 or 101"),
    ("model.backbone.type=HRNet", "the other backbones are not supported"),
    ("model.backbone.norm_cfg.type=IBN", "the other norms are not supported"),
    ("model.neck.norm_cfg.type=BN", "must be 'GN'"),
    ("model.neck.conv_cfg.type=DCN", "must be 'ConvWS'"),
    ("model.roi_head.shared_head.type=ResLayer", "a stage shared by heads is not supported here"),
    ("model.roi_head.mask_head.type=FCNMaskHead", "masks need both mask_roi_extractor and mask_head"),
    ("model.roi_head.mask_head.type=HTCMaskHead", "the other mask heads are not supported"),
    ("model.type=RetinaNet", "one-stage detectors and others are not supported"),
    ("model.rpn_head.type=FCOSHead", "FCOS and others as RPN are not supported"),
    ("model.roi_head.bbox_head.loss_bbox.type=GIoULoss", "GIoULoss compares boxes; give reg_decoded_bbox=True"),
    ("model.roi_head.bbox_head.loss_bbox.type=EIoULoss", "must be 'L1Loss' or 'SmoothL1Loss'"),
    ("model.rpn_head.loss_bbox.type=GIoULoss", "losses of overlap are those of roi_head.bbox_head alone"),
    ("model.rpn_head.loss_bbox.loss_weight=2", "must be 1.0 here"),
    ("model.train_cfg.rpn.sampler.type=OHEMSampler", "must be 'RandomSampler'"),
    ("model.test_cfg.rpn.nms.type=soft_nms", "must be 'nms'"),
    ("model.data_preprocessor.rgb_to_bgr=True", "images are read as BGR there already"),
    ("model.data_preprocessor.batch_augments=[1]", "must be dict(...)"),
    ("model.train_cfg.rpn_proposal.nms.iou_threshold=0.6", "here the two are one setting"),
    ("model.backbone.frozen_stage=1", "unknown key; did you mean frozen_stages?"),
    ("model.mask_head=1", "model.mask_head: unknown key"),
    ("train_dataloader.dataset.pipeline.3.type=Mosaic", "must be 'LoadImageFromFile' or"),
    ("train_dataloader.dataset.filter_cfg.min_size=0", "must be 32 here"),
    ("train_dataloader.batch_sampler.type=Other", "must be 'AspectRatioBatchSampler' here"),
    ("train_dataloader.dataset.pipeline.2.keep_ratio=False", "images keep their ratio"),
    ("train_cfg.type=IterBasedTrainLoop", "train_cfg: has no max_iters; add it"),
    ("val_evaluator.metric=proposal", "masks are evaluated where the model has them"),
    ("val_evaluator.ann_file=other.json", "here the two are one setting"),
    ("model.roi_head.bbox_head.num_classes=3", "is 3, and the data sets have 80 classes"),
    ("load_from=open-mmlab://weights", "download it, and give --weights FILE"),
    ("optim_wraper.type=OptimWrapper", "did you mean optim_wrapper?"),
    ("root=/data", "is only a name in the file"),
    ("custom_imports.imports=mine", "code of one's own is not supported here"),
    ("compile=True", "nearest: --compile"),
    ("custom_hooks=[1]", "must be dict(...)"),
    ("train_dataloader.dataset.ann_file=", "must be a name in quotes"),
    ("train_dataloader.dataset.type=[]", "must be 'CocoDataset' or"),
    ("model.roi_head.bbox_head.loss_bbox.type=[]", "must be 'L1Loss' or 'SmoothL1Loss'"),
    ("model.neck.in_channels.9=1", "is no place in a list of 4"),
    ("model.backbone.depth.x=1", "neither a dict nor a list"),
    ("model.neck.in_channels=[1", "a bracket without the other one"),
    ("model", "write it as KEY=VALUE"),
]


@pytest.mark.parametrize(("option", "message"), REFUSED, ids=[option for option, _ in REFUSED])
def test_what_is_not_here_is_refused_with_key_and_source(option, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        with_options(option)
    text = str(caught.value)
    assert text.startswith("--cfg-options") or "the two are one setting" in text or "IterBased" in option, text


JITTER = """
_base_ = %r
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=%s),
    dict(type='RandomResize', scale=(640, 640), ratio_range=(0.2, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=(640, %d), allow_negative_crop=True,
         recompute_bbox=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]))
model = dict(data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size=(%d, %d))]))
"""


def test_resize_crop_and_padding_to_one_size_are_large_scale_jitter(tmp_path):
    def jitter(crop, padded, *words, base=FASTER):
        (tmp_path / "mine.py").write_text(JITTER % (str(base), base is not FASTER, crop, padded, padded))
        config = parsed(*words, path=tmp_path / "mine.py")
        assert any("no other comes in its place: train_dataloader" in line for line in config.config_notes)
        return config.augmentation

    found = jitter(640, 640)
    assert (found.lsj, found.lsj_range, found.train_scales) == (640, (0.2, 1.5), None)
    assert not found.lsj_boxes_of_masks  # which theirs makes of masks alone
    assert jitter(640, 640, base=FASTER.with_name("mask.py")).lsj_boxes_of_masks
    assert jitter(640, 640, "--train-min-sizes", "400").lsj is None
    with pytest.raises(ConfigError, match=r"mine\.py, line 10: .*batch_augments.*with the size of its crop"):
        jitter(640, 512)
    with pytest.raises(ConfigError, match=r"mine\.py, line 6: .*crop_size: .* must be one square here"):
        jitter(800, 640)


PIPELINE = """
_base_ = %r
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), %s]))
"""
RESIZE, PACK = "dict(type='Resize', scale=(600, 400), keep_ratio=True)", "dict(type='PackDetInputs')"
ACROSS, DOWN = (f"dict(type='RandomFlip', prob=0.5, direction='{each}')" for each in ("horizontal", "vertical"))


def with_transforms(path, *transforms):
    path.write_text(PIPELINE % (str(FASTER), ", ".join(transforms)))
    return parsed(path=path).augmentation


def test_flips_are_one_of_each_direction_behind_the_resize(tmp_path):
    found = with_transforms(tmp_path / "c.py", RESIZE, ACROSS, DOWN, PACK)
    assert (found.flip_probability, found.vertical_flip_probability) == (0.5, 0.5)
    with pytest.raises(ConfigError, match="two RandomFlip of one direction"):
        with_transforms(tmp_path / "c.py", RESIZE, ACROSS, ACROSS, PACK)
    with pytest.raises(ConfigError, match="RandomFlip in another place"):
        with_transforms(tmp_path / "c.py", RESIZE, ACROSS, PACK, DOWN)


def test_a_random_resize_of_one_scale_needs_ratios(tmp_path):
    resize = "dict(type='RandomResize', scale=%s, keep_ratio=True)"
    found = with_transforms(tmp_path / "c.py", resize % "[(600, 400), (600, 500)]", ACROSS, PACK)
    assert (found.train_scales, found.train_scale_sampling) == (((600, 400), (600, 500)), "range")
    with pytest.raises(ConfigError, match=r"pipeline\.2\.scale: must be two scales where there is no ratio_range"):
        with_transforms(tmp_path / "c.py", resize % "(600, 400)", ACROSS, PACK)


@pytest.mark.parametrize(("kind", "num_classes"), [("LVISV1Dataset", 1203), ("Objects365V2Dataset", 365)])
def test_a_data_set_of_known_size_has_the_classes_of_its_file(kind, num_classes):
    def parse(count):
        splits = [f"{split}_dataloader.dataset.type={kind}" for split in ("train", "val")]
        return with_options(*splits, "val_evaluator.type=LVISMetric", f"model.roi_head.bbox_head.num_classes={count}")

    assert parse(num_classes).data.classes is None
    with pytest.raises(ConfigError, match=f"the data sets have {num_classes} classes"):
        parse(80)


def test_an_error_names_file_line_and_key_of_the_base_file(tmp_path):
    (tmp_path / "base.py").write_text(
        FASTER.read_text().replace('type="ResNet",', 'type="ResNet",\n        style="tf",')
    )
    (tmp_path / "mine.py").write_text("_base_ = 'base.py'\n")
    with pytest.raises(ConfigError, match=r"base\.py, line \d+: model\.backbone\.style: must be 'pytorch' or 'caffe'"):
        parsed(path=tmp_path / "mine.py")


def test_options_count_over_the_file_and_each_is_printed_with_its_line():
    config = parsed("--batch-size", "4", "--seed", "7", "--model-set", "score_threshold=0.01", "--min-size", "600")
    assert (config.train.batch_size, config.data.min_size) == (4, 600)
    assert dict(config.model.settings)["score_threshold"] == 0.01
    line = FASTER.read_text().splitlines().index("train_dataloader = dict(") + 2
    replaced = [line for line in config.config_notes if "in place of" in line]
    assert len(replaced) == 3, replaced  # the seed is the file's
    assert re.search(
        rf"--batch-size 4 in place of .*faster\.py, line {line}: train_dataloader\.batch_size: 2", replaced[0]
    )


def test_keys_without_effect_are_named_once_grouped_by_reason():
    notes = [line for line in parsed().config_notes if line.startswith("without effect")]
    assert "default_hooks.timer, default_scope, log_level" in notes[0]
    assert len(notes) == len({line.partition(":")[0] for line in notes}) <= 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "faster_rcnn_r18_fpn"], "--model and --config both choose the model"),
        (["--schedule", "2x", "--cfg-options", "train_cfg.max_epochs=3"], "has no effect beside --schedule"),
    ],
)
def test_options_that_contradict_the_file_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parsed(*words)


def test_resume_in_the_file_takes_the_checkpoint_that_it_loads_from():
    assert with_options("resume=True", "load_from=theirs.pth").output.resume == "theirs.pth"


def test_weights_that_are_not_fetched_matter_neither_with_others_nor_on_a_resume():
    other = ["--cfg-options", "model.backbone.init_cfg.checkpoint=open-mmlab://resnext101_32x4d"]
    assert parsed("--weights", "mine.pth", *other).model.weights == "mine.pth"
    assert parsed("--resume", *other).output.resume == "auto"
    with pytest.raises(ConfigError, match="download it"):
        parsed(*other)


@pytest.mark.skipif(not wheel_configs().is_dir(), reason="MMDET_CONFIGS names no folder: mmdet/.mim/configs of a wheel")
def test_the_head_of_c4_has_the_norm_of_the_backbone():
    path = wheel_configs() / "faster_rcnn" / "faster-rcnn_r50-caffe_c4-1x_coco.py"
    assert parsed("--weights", "any.pth", path=path).model.norm == "frozen_bn"
    for option, key in (
        ("model.roi_head.shared_head.norm_cfg.requires_grad=True", "shared_head.norm_cfg"),
        ("model.backbone.norm_cfg.type=SyncBN", "shared_head.norm_cfg"),
        ("model.backbone.norm_eval=False", "backbone.norm_eval"),
    ):
        with pytest.raises(ConfigError, match=f"{key}: must be .*one norm here"):
            parsed("--weights", "any.pth", "--cfg-options", option, path=path)


def test_a_name_that_a_file_gives_to_a_value_of_its_own_is_no_key(tmp_path):
    (tmp_path / "mine.py").write_text(FASTER.read_text() + "\nnorm_cfg = conv_cfg = dict(type='GN')\nimage_size = 3\n")
    assert parsed(path=tmp_path / "mine.py").model == parsed().model


def test_cfg_options_need_a_configuration():
    with pytest.raises(ConfigError, match="no effect without --config"):
        parse_arguments(["--cfg-options", "a=1"])


def test_data_of_the_command_line_replace_those_of_the_file():
    config = parsed("--data-path", "mine", "--train-min-sizes", "400", "500", path=CASCADE)
    assert config.data.train_images is None
    assert config.augmentation.train_scales is None


def leaves(value, path=()):
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, str(key)))
    yield ".".join(path)


LEAVES = sorted(set(leaves(read_mmdet_config(CASCADE))) - {""})
ODD = (
    "None,True,-1,0,1e999,nan,(),[],'',[[[]]],(1),9999999999999999999999,x,1.5,1_0,(1,2),[(1,2),(3,4)],[1 2],../..,a=b"
)
odd_values = st.one_of(st.sampled_from(ODD.split(",")), st.text(max_size=8))


@examples(150)
@given(
    st.lists(st.tuples(st.sampled_from(LEAVES), st.sampled_from(["", ".x", ".0"]), odd_values), min_size=1, max_size=3)
)
def test_odd_values_are_settings_or_errors_of_ours(changes):
    try:
        read_run(CASCADE, [f"{key}{end}={value}" for key, end, value in changes], "train").under({}, {})
    except ConfigError as error:
        assert len(str(error)) < 2000


@pytest.mark.slow
@pytest.mark.skipif(not wheel_configs().is_dir(), reason="MMDET_CONFIGS names no folder: mmdet/.mim/configs of a wheel")
def test_the_page_of_shipped_configurations_says_which_run():
    assert PAGE.read_text() == page(wheel_configs()), "python3 -m detection.config.mmdet_page FOLDER"


def parameters_of(config):
    """Names, shapes and what is trained, as a hash: those of the reference table."""
    chosen = {"norm": config.model.norm, "frozen_stages": config.model.frozen_stages, **dict(config.model.settings)}
    model = build_model(config.model.model, len(config.data.classes), **chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1 if parameter.requires_grad else 0)
    buffers = ("running_mean", "running_var")
    entries = [
        (name, list(tensor.shape), None if name.endswith(buffers) else bool(tensor.flatten()[0]))
        for name, tensor in export_state_dict(model, "mmdet").items()
        if not name.endswith("num_batches_tracked")
    ]
    return hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest()[:16]


PARAMETERS = json.loads((CONFIGS / "parameters.json").read_text())


@pytest.mark.parametrize(
    ("path", "same_as"),
    [
        (FASTER, "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
        (CASCADE, "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"),
        (MASK, "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"),
    ],
)
def test_names_shapes_and_what_is_trained_are_mmdetections(path, same_as):
    assert parameters_of(parsed(path=path)) == PARAMETERS[same_as]
    assert parameters_of(with_options("model.backbone.frozen_stages=2", path=path)) != PARAMETERS[same_as]


GN_WS = """
_base_ = %r
conv_cfg = dict(type="ConvWS")
norm_cfg = dict(type="GN", num_groups=32, requires_grad=True)
both = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
model = dict(
    backbone=dict(**both), neck=dict(**both),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, **both), mask_head=dict(**both)))
"""
REGNET = """
_base_ = %r
model = dict(
    backbone=dict(_delete_=True, type="RegNet", arch="regnetx_3.2gf", out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True), norm_eval=True, style="pytorch"),
    neck=dict(in_channels=[96, 192, 432, 1008]))
"""


@pytest.mark.parametrize(
    ("text", "path", "same_as"),
    [
        (GN_WS, MASK, "gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py"),
        (REGNET, FASTER, "regnet/faster-rcnn_regnetx-3.2GF_fpn_1x_coco.py"),
    ],
)
def test_group_norm_standardized_weights_and_regnets_are_mmdetections(tmp_path, text, path, same_as):
    (tmp_path / "mine.py").write_text(text % str(path))
    config = parsed(path=tmp_path / "mine.py")
    assert parameters_of(config) == PARAMETERS[same_as]
    assert dict(config.model.settings)["standardize_weights"] == (text is GN_WS)
    if text is REGNET:
        with pytest.raises(ConfigError, match=r"neck\.in_channels: must be \[96, 192, 432, 1008\]"):
            parsed("--cfg-options", "model.neck.in_channels.0=256", path=tmp_path / "mine.py")
    else:
        with pytest.raises(ConfigError, match="here the two are one setting"):
            parsed("--cfg-options", "model.neck.conv_cfg=None", path=tmp_path / "mine.py")


@pytest.mark.slow
@pytest.mark.skipif(not wheel_configs().is_dir(), reason="MMDET_CONFIGS names no folder: mmdet/.mim/configs of a wheel")
@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configurations_make_mmdetections_parameters(name):
    assert parameters_of(parsed("--weights", "any.pth", path=wheel_configs() / name)) == PARAMETERS[name]
