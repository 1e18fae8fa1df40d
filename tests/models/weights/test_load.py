"""load_weights: what of a file or a name ends in the model, and what the report says about the rest."""

import email.message
import hashlib
import io
import pickle
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from torchvision.models import resnet18

from detection.models import (
    WeightsError,
    WeightsUnavailable,
    build_model,
    export_state_dict,
    load_weights,
    prefetch_weights,
)
from detection.models.weights.layouts import (
    CAFFE_INPUT,
    COCO_CATEGORY_IDS,
    IMAGENET_INPUT,
    classifier_names,
    regressor_names,
    stem_for,
)

SMALL = {"fpn_channels": 32, "roi_hidden_channels": 16}
HEAD = {f"roi_head.{layer}.{kind}" for layer in ("classifier", "regressor") for kind in ("weight", "bias")}


def small(name="faster_rcnn_r18_fpn", num_classes=3, seed=0, **overrides):
    torch.manual_seed(seed)
    return build_model(name, num_classes, **{**SMALL, **overrides})


def trained(name="faster_rcnn_r18_fpn", num_classes=3, seed=1, **overrides):
    """A model none of whose tensors is as fresh ones are."""
    model = small(name, num_classes, seed, **overrides)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def same_weights(first, second):
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.fixture
def load(tmp_path):
    """Saves `content` as model.pth and loads that into `model`."""

    def load(model, content, **settings):
        torch.save(content, tmp_path / "model.pth")
        return load_weights(model, tmp_path / "model.pth", **settings)

    return load


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache folder of downloads, empty; and a network that is not there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)

    def unreachable(*arguments, **keywords):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    return folder


@pytest.mark.parametrize(
    ("model_name", "layout"),
    [("faster_rcnn_r18_fpn", "mmdet"), ("fasterrcnn_resnet18_fpn", "torchvision"), ("faster_rcnn_r18_fpn", "ours")],
)
def test_a_whole_model_is_loaded_from_each_layout(model_name, layout, load):
    source, model = trained(model_name), small(model_name)
    state = export_state_dict(source, layout)
    report = load(model, {"meta": {"epoch": 12}, "state_dict": state} if layout == "mmdet" else state)
    assert same_weights(source, model)
    assert set(report.matched) == set(model.state_dict())
    assert not report.missing and not report.unexpected and not report.reshaped and not report.notes
    assert "model.pth" in report.source


def test_prefixes_of_ddp_and_compile_do_not_matter(load):
    source, model = trained(), small()
    state = {f"module._orig_mod.{name}": tensor for name, tensor in source.state_dict().items()}
    assert not load(model, {"model": state, "optimizer": {}}).missing
    assert same_weights(source, model)


@pytest.mark.slow
def test_of_a_checkpoint_the_moving_average_is_taken(load):
    raw, average, model = trained(seed=1), trained(seed=2), small()
    checkpoint = {
        "format": "detection-checkpoint",
        "version": 1,
        "model": raw.state_dict(),
        "ema": average.state_dict(),
    }
    report = load(model, {**checkpoint, "model_config": {}})
    assert same_weights(average, model)
    assert any("EMA" in note for note in report.notes)

    report = load(model, {**checkpoint, "ema": None, "model_config": {}})
    assert same_weights(raw, model) and not report.notes


def test_weights_of_other_precision_and_memory_format_keep_the_models(load):
    source, model = trained(), small().to(memory_format=torch.channels_last)
    load(model, {name: tensor.half() for name, tensor in source.state_dict().items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight.half().float())


@pytest.mark.parametrize(
    ("file_classes", "file_recipe"),
    # The last one has a regressor of the same shape: 4 * (3 + 1) rows of torchvision's are 4 * 4 of MMDetection's.
    [(5, "faster_rcnn_r18_fpn"), (3, "fasterrcnn_resnet18_fpn")],
)
def test_a_head_for_another_number_of_classes_keeps_its_initialization_and_the_report_says_so(
    file_classes, file_recipe, load
):
    source, model = trained(file_recipe, file_classes), small(num_classes=4)
    before = snapshot(model)
    layout = "torchvision" if file_recipe.startswith("fasterrcnn") else "mmdet"
    report = load(model, export_state_dict(source, layout))
    assert {name for name, *_ in report.reshaped} == HEAD
    assert changed(before, model) == set(before) - HEAD
    assert ("roi_head.classifier.bias", (file_classes + 1,), (5,)) in report.reshaped
    assert any(f"{file_classes} classes" in note and "re-initialized" in note for note in report.notes)
    assert "re-initialized" in report.table()


@pytest.mark.parametrize(
    ("source_name", "model_name"),
    [("fasterrcnn_resnet18_fpn", "faster_rcnn_r18_fpn"), ("faster_rcnn_r18_fpn", "fasterrcnn_resnet18_fpn")],
)
def test_the_recipes_exchange_weights_although_one_regresses_the_background(source_name, model_name, load):
    source, model = trained(source_name), small(model_name)
    before = snapshot(model)
    report = load(model, source.state_dict())
    assert not report.missing and not report.reshaped
    regressor = model.roi_head.regressor.weight
    assert torch.equal(regressor[:12], source.roi_head.regressor.weight[:12])
    assert torch.equal(regressor[12:], before["roi_head.regressor.weight"][12:])


def test_a_backbone_file_fills_the_backbone_only(load):
    model = small()
    before = snapshot(model)
    report = load(model, resnet18().state_dict())
    assert set(report.matched) == {name for name in before if name.startswith("backbone.")}
    assert set(report.missing) == {name for name in before if not name.startswith("backbone.")}
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in report.missing)


def test_tensors_of_another_shape_are_reported_and_left_alone(load):
    source, model = trained(fpn_channels=16), small()
    before = snapshot(model)
    report = load(model, source.state_dict())
    reshaped = {name: shapes for name, *shapes in report.reshaped}
    assert reshaped["fpn.lateral.0.weight"] == [(16, 64, 1, 1), (32, 64, 1, 1)]
    assert changed(before, model) == set(report.matched) == set(before) - set(reshaped)


def test_counters_of_batch_norm_are_never_called_missing_or_unexpected(load):
    for norm, other in (("bn", "frozen_bn"), ("frozen_bn", "bn")):
        report = load(small(norm=other), trained(norm=norm).state_dict())
        assert not report.unexpected and not report.missing


def test_batch_norms_of_a_file_do_not_get_into_group_norms(load):
    model = small(norm="gn")
    before = snapshot(model)
    report = load(model, trained().state_dict())
    norms = {name for name in before if ".bn" in name or "downsample.1" in name}
    assert changed(before, model) == set(before) - norms
    assert norms <= set(report.unexpected)
    assert any("group norm" in note for note in report.notes)


def test_a_backbone_alone_with_group_norms_is_loaded_by_mmdetections_names(load):
    source, model = trained(norm="gn", standardize_weights=True), small(norm="gn", standardize_weights=True)
    theirs = export_state_dict(source, "mmdet")
    state = {name.removeprefix("backbone."): theirs[name] for name in theirs if name.startswith("backbone.")}
    assert "layer1.0.gn1.weight" in state
    before = snapshot(model)
    report = load(model, state)
    own = {name for name in before if name.startswith("backbone.")}
    assert changed(before, model) == set(report.matched) == own and not report.unexpected
    assert all(torch.equal(source.state_dict()[name], model.state_dict()[name]) for name in own)


def test_a_file_of_which_nothing_fits_is_an_error_and_changes_nothing(load):
    model = small()
    before = snapshot(model)
    with pytest.raises(WeightsError, match="nothing in .*model.pth.* fits.*neck.other.weight.*backbone.conv1.weight"):
        load(model, {"neck.other.weight": torch.zeros(3)})
    assert not changed(before, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"encoder.weight": torch.zeros(2)}, "no known layout .*encoder.weight"),
        ({"epoch": 3}, "no weights in .*epoch"),
        ({}, "no weights in .*nothing"),
        ([torch.zeros(2)], "holds a list"),
        ({"format": "detector-weights"}, "no weights under 'model'"),
        ({"model": {"blobs": {}, "x": torch.zeros(1)}}, "Caffe2"),
    ],
)
def test_files_without_usable_weights_are_refused(content, message, load):
    with pytest.raises(WeightsError, match=message):
        load(small(), content)


@pytest.mark.slow
def test_detectron2s_file_is_loaded_and_its_stem_turned(tmp_path):
    model = small("faster_rcnn_r50_fpn", stride_in_1x1=True)
    stem = np.random.default_rng(0).standard_normal((64, 3, 7, 7)).astype(np.float32)
    norm = np.full(64, 0.25, np.float32)
    arrays = {
        "backbone.bottom_up.stem.conv1.weight": stem,
        "backbone.bottom_up.stem.conv1.norm.running_mean": norm,
        "roi_heads.box_predictor.cls_score.bias": np.arange(4, dtype=np.float32),
        "proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4), np.float32),
    }
    path = tmp_path / "model_final_b275ba.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2))
    report = load_weights(model, path)
    assert torch.equal(model.backbone.conv1.weight, stem_for(torch.from_numpy(stem), CAFFE_INPUT, IMAGENET_INPUT))
    assert torch.equal(model.backbone.bn1.running_mean, torch.from_numpy(norm))
    assert model.roi_head.classifier.bias.tolist() == [0, 1, 2, 3]
    assert report.unexpected == ("proposal_generator.anchor_generator.cell_anchors.0",)
    assert any("BGR" in note for note in report.notes) and not any("stride" in note for note in report.notes)

    report = load_weights(small("faster_rcnn_r50_fpn"), path)
    assert any("stride_in_1x1=True" in note for note in report.notes)

    caffe = {
        "stride_in_1x1": True,
        "pixel_order": "bgr",
        "pixel_mean": (103.53, 116.28, 123.675),
        "pixel_std": (1, 1, 1),
    }
    model = small("faster_rcnn_r50_fpn", **caffe)
    report = load_weights(model, path)
    assert torch.equal(model.backbone.conv1.weight, torch.from_numpy(stem)) and not report.notes
    torch.save({"conv1.weight": torch.from_numpy(stem), "layer1.0.bn1.bias": torch.ones(64)}, tmp_path / "bare.pth")
    report = load_weights(model, tmp_path / "bare.pth")
    assert torch.equal(model.backbone.conv1.weight, torch.from_numpy(stem)) and not report.notes

    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision"}))
    model = small("faster_rcnn_r50_fpn")
    report = load_weights(model, path)
    assert torch.equal(model.backbone.conv1.weight, torch.from_numpy(stem)) and not report.notes


@pytest.mark.slow
def test_mmdetections_caffe_style_is_known_by_the_configuration_in_the_file(load):
    source = trained("faster_rcnn_r50_fpn")
    pytorch = "backbone=dict(type='ResNet', style='pytorch'), data_preprocessor=dict(std=[58.395, 57.12, 57.375])"
    caffe = "backbone=dict(type='ResNet', style='caffe'), data_preprocessor=dict(bgr_to_rgb=False, std=[1.0, 1.0, 1.0])"
    for key, text in (("cfg", caffe), ("config", caffe), ("cfg", pytorch)):
        model = small("faster_rcnn_r50_fpn")
        report = load(model, {"meta": {key: text}, "state_dict": export_state_dict(source, "mmdet")})
        stem = source.backbone.conv1.weight.detach()
        assert torch.equal(
            model.backbone.conv1.weight, stem_for(stem, CAFFE_INPUT, IMAGENET_INPUT) if text == caffe else stem
        )
        assert any("stride_in_1x1=True" in note for note in report.notes) == (text == caffe)


@pytest.mark.slow
def test_torchvisions_published_detectors_set_the_norms_epsilon_to_zero(cache, tmp_path, monkeypatch):
    source = trained("fasterrcnn_resnet50_fpn")
    state = export_state_dict(source, "torchvision")
    torch.save(state, cache / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    model = small("fasterrcnn_resnet50_fpn")
    for name in ("COCO_V1", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1"):
        model = small("fasterrcnn_resnet50_fpn")
        report = load_weights(model, name)
        assert same_weights(source, model)
        assert model.config.norm_eps == model.backbone.bn1.eps == model.backbone.layer4[2].bn3.eps == 0.0
        assert any("epsilon" in note for note in report.notes)

    # The same file under another name is known by its contents.
    torch.save(state, tmp_path / "renamed.pth")
    model = small("fasterrcnn_resnet50_fpn")
    load_weights(model, tmp_path / "renamed.pth")
    assert model.config.norm_eps == 1e-5
    digest = hashlib.sha256((tmp_path / "renamed.pth").read_bytes()).hexdigest()
    weights = torchvision.models.get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1")
    monkeypatch.setattr(type(weights), "url", property(lambda self: f"https://host/fasterrcnn-{digest[:8]}.pth"))
    load_weights(model, tmp_path / "renamed.pth")
    assert model.config.norm_eps == model.backbone.bn1.eps == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("ids", [None, COCO_CATEGORY_IDS])
def test_torchvisions_head_for_90_ids_gives_cocos_80_categories_their_rows(ids, load):
    source = trained("fasterrcnn_resnet50_fpn", num_classes=90)
    model = small("fasterrcnn_resnet50_fpn", num_classes=80)
    report = load(model, export_state_dict(source, "torchvision"), category_ids=ids)
    assert not report.missing and not report.reshaped and any("90 ids" in note for note in report.notes)
    head, theirs = model.roi_head, source.roi_head
    for label, number in ((0, 1), (10, 11), (11, 13), (79, 90)):  # person, fire hydrant, stop sign, toothbrush
        assert torch.equal(head.classifier.weight[label], theirs.classifier.weight[number - 1])
        assert torch.equal(head.regressor.bias[4 * label :][:4], theirs.regressor.bias[4 * (number - 1) :][:4])
    assert torch.equal(head.classifier.bias[80], theirs.classifier.bias[90])


@pytest.mark.slow
def test_eighty_other_classes_get_a_new_head(load):
    source = trained("fasterrcnn_resnet50_fpn", num_classes=90)
    model = small("fasterrcnn_resnet50_fpn", num_classes=80)
    report = load(model, export_state_dict(source, "torchvision"), category_ids=range(1, 81))
    assert {name for name, _, _ in report.reshaped} == {*classifier_names("roi_head."), *regressor_names("roi_head.")}


def test_a_checkpoint_brings_the_epsilon_its_model_had(load):
    source, model = trained(norm_eps=0.0), small()
    content = {"format": "detector-weights", "model": source.state_dict(), "model_config": {"norm_eps": 0.0}}
    load(model, content)
    assert model.config.norm_eps == model.backbone.bn1.eps == 0.0


def test_batch_norm_that_is_trained_keeps_an_epsilon_above_zero(load):
    source, model = trained(norm_eps=0.0), small(norm="bn")
    report = load(
        model, {"format": "detector-weights", "model": source.state_dict(), "model_config": {"norm_eps": 0.0}}
    )
    assert model.config.norm_eps == model.backbone.layer4[1].bn2.eps == 1e-5
    assert any("an epsilon of 0, with which batch norm cannot be trained" in note for note in report.notes)


@pytest.mark.parametrize("spec", ["imagenet", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_published_backbones_come_from_torchs_cache(spec, cache):
    backbone = resnet18()
    torch.save(backbone.state_dict(), cache / "resnet18-f37072fd.pth")
    model = small()
    report = load_weights(model, spec)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, backbone.layer4[1].conv2.weight)
    assert "ResNet18_Weights.IMAGENET1K_V1" in report.source
    assert prefetch_weights(spec, "resnet18") == cache / "resnet18-f37072fd.pth"


@pytest.mark.slow
def test_a_backbones_fourth_stage_is_the_heads_in_c4(load):
    backbone = torchvision.models.resnet50()
    model = small("faster_rcnn_r50_fpn", features="c4", anchor_strides=(16,), roi_output_size=14)
    report = load(model, backbone.state_dict())
    assert torch.equal(model.roi_head.stage[2].conv3.weight, backbone.layer4[2].conv3.weight)
    assert set(report.unexpected) == {"fc.weight", "fc.bias"}


def test_what_is_neither_cached_nor_reachable_is_told_with_address_folder_and_way_out(cache):
    for load in (
        lambda: load_weights(small(), "imagenet"),
        lambda: prefetch_weights("imagenet", "resnet18"),
    ):
        with pytest.raises(WeightsUnavailable) as error:
            load()
        message = str(error.value)
        assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
        assert str(cache) in message
        assert "--weights none" in message
        assert "Network is unreachable" in message
    assert not list(cache.iterdir())


def test_a_download_has_a_time_limit_and_a_checked_hash(cache, monkeypatch):
    limits = []

    class Response(io.BytesIO):
        def info(self):
            return email.message.Message()

    def answer(*arguments, **keywords):
        limits.append(socket.getdefaulttimeout())
        return Response(b"not the weights")

    monkeypatch.setattr("torch.hub.urlopen", answer)
    with pytest.raises(WeightsUnavailable, match="hash"):
        prefetch_weights("imagenet", "resnet18")
    assert limits == [30.0] and socket.getdefaulttimeout() is None
    assert not list(cache.iterdir())


def test_a_file_comes_from_its_address_once_and_a_changed_one_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.urlopen", urllib.request.urlopen)
    backbone = resnet18()
    torch.save(backbone.state_dict(), tmp_path / "mine.pth")
    address = (tmp_path / "mine.pth").as_uri()
    model = small()
    report = load_weights(model, address)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, backbone.layer4[1].conv2.weight)
    assert report.source.startswith(address)
    (tmp_path / "mine.pth").unlink()
    load_weights(model, address)
    (cached,) = cache.glob("*.pth")
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsUnavailable, match="SHA-256 is another. Delete it"):
        load_weights(model, address)


def test_the_hash_in_an_addresss_name_is_that_of_the_file(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.urlopen", urllib.request.urlopen)
    torch.save(resnet18().state_dict(), tmp_path / "plain.pth")
    digest = hashlib.sha256((tmp_path / "plain.pth").read_bytes()).hexdigest()
    good, bad = tmp_path / f"r18-{digest[:8]}.pth", tmp_path / "r18-00000000.pth"
    for path in (good, bad):
        path.write_bytes((tmp_path / "plain.pth").read_bytes())
    assert prefetch_weights(good.as_uri(), "resnet18") == cache / good.name
    with pytest.raises(WeightsUnavailable, match="hash"):
        prefetch_weights(bad.as_uri(), "resnet18")
    assert not (cache / bad.name).exists()
    with pytest.raises(WeightsError, match="is not the address of a weight file"):
        prefetch_weights("https://host/page.html", "resnet18")


def test_files_and_none_need_no_prefetching(cache, tmp_path):
    assert prefetch_weights("none", "resnet18") is None
    assert prefetch_weights(tmp_path / "model.pth", "resnet18") is None


@pytest.mark.parametrize(
    ("model_name", "spec", "message"),
    [
        ("faster_rcnn_x101_32x4d_fpn", "imagenet", "no weights .* resnext101_32x4d; give a file, or --weights none"),
        ("faster_rcnn_r18_fpn", "IMAGENET1K_V2", "ResNet18_Weights.IMAGENET1K_V1"),
        ("faster_rcnn_r18_fpn", "ResNet50_Weights.IMAGENET1K_V1", "backbone resnet18"),
        ("faster_rcnn_r18_fpn", "COCO_V1", "backbone resnet18"),
        (
            "faster_rcnn_r50_fpn",
            "FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1",
            "FasterRCNN_ResNet50_FPN_Weights.COCO_V1",
        ),
        ("faster_rcnn_r18_fpn", "imagenett", "did you mean 'imagenet'"),
        ("faster_rcnn_r18_fpn", "runs/last.pt", "no weight file runs/last.pt"),
    ],
)
def test_names_that_mean_nothing_for_the_model_are_refused_with_what_there_is(model_name, spec, message, cache):
    with torch.device("meta"):
        model = build_model(model_name, 3)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, spec)


def test_the_table_names_a_few_tensors_and_sums_up_many(load):
    table = load(small(), resnet18().state_dict()).table()
    assert "100 of 130" in table
    assert "fpn.* (16), rpn.* (6), roi_head.* (8)" in table
    assert "fc.weight, fc.bias" in table
    assert max(map(len, table.splitlines())) < 200
