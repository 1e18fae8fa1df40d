"""A detector from one file: images in every form, boxes in the image's own pixels."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detection.models import (
    DetectorError,
    ImageBatch,
    TargetBatch,
    WeightsError,
    build_model,
    export_state_dict,
    load_detector,
)
from detection.models.detector import Detector, network_size, resize
from detection.models.weights.stored import stripped_file

REFERENCE = Path(__file__).parent.parent / "reference" / "pipeline"


class EchoModel(nn.Module):
    """Detects one box over the whole input and one that sticks out of it, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(3, 1, 1))
        self.given = []

    def forward(self, images):
        self.given.append(images)
        results = []
        for image in images:
            height, width = image.shape[1:]
            boxes = torch.tensor([[0.0, 0.0, width, height], [-4.0, height / 2, width + 9.0, height]])
            results.append({"boxes_xyxy": boxes, "scores": torch.tensor([0.9, 0.5]), "labels": torch.tensor([1, 0])})
        return results


def echo_detector(min_size=80, max_size=133):
    return Detector(EchoModel(), ("cat", "dog"), (3, 7), min_size, max_size)


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def content(model, **changes):
    return {
        **stripped_file(
            model.state_dict(),
            model_config=dataclasses.asdict(model.config),
            class_names=["cat", "dog", "bird"],
            category_ids=[1, 5, 9],
            preprocessing={"min_size": 64, "max_size": 96},
        ),
        **changes,
    }


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("faster_rcnn_r18_fpn", 3, fpn_channels=32, roi_hidden_channels=16, score_threshold=0.0)


@pytest.mark.parametrize("size", [(50, 80), (37, 211), (300, 200), (1, 40)])
def test_boxes_come_back_in_the_images_own_pixels_and_inside_it(size):
    detector = echo_detector()
    result = detector.predict(photo(*size))
    height, width = size
    expected = torch.tensor([[0, 0, width, height], [0, height / 2, width, height]], dtype=torch.float32)
    torch.testing.assert_close(result["boxes_xyxy"], expected)
    assert result["names"] == ["dog", "cat"] and result["labels"].tolist() == [1, 0]
    torch.testing.assert_close(result["scores"], torch.tensor([0.9, 0.5]))


def test_the_networks_input_has_mmdetections_size():
    with (REFERENCE / "resize_sizes.json").open() as file:
        reference = json.load(file)
    max_size, min_size = reference["scale"]
    sizes = [network_size(row["h"], row["w"], min_size, max_size) for row in reference["rows"]]
    assert sizes == [(row["new_h"], row["new_w"]) for row in reference["rows"]]


@pytest.mark.parametrize("case", ["up", "down"])
def test_resized_pixels_are_opencvs_to_one_grey_level(case):
    with np.load(REFERENCE / "resize_pixels.npz") as pixels:
        before, after = (torch.from_numpy(pixels[f"{case}_{which}"]).permute(2, 0, 1) for which in ("in", "out"))
    result = resize(before, min_size=after.shape[1], max_size=100)
    assert result.dtype == torch.uint8
    torch.testing.assert_close(result.int(), after.int(), rtol=0, atol=1)


def test_a_image_at_the_networks_scale_is_left_as_it_is():
    image = torch.from_numpy(photo(80, 100)).permute(2, 0, 1)
    assert resize(image, 80, 133) is image


def test_arrays_pil_images_and_paths_are_the_same_image(tmp_path):
    pixels = photo(40, 60)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    detector = echo_detector()
    detector.predict([pixels, Image.fromarray(pixels), tmp_path / "image.png", str(tmp_path / "image.png")])
    first, *others = [images[0] for images in detector.model.given]
    assert len(others) == 3 and all(torch.equal(first, other) for other in others)


def test_a_list_gives_a_list_in_batches_of_the_asked_size():
    detector = echo_detector()
    photos = [photo(40, 60 + index, index) for index in range(5)]
    results = detector.predict(photos, batch_size=2)
    assert [len(images) for images in detector.model.given] == [2, 2, 1]
    assert [result["boxes_xyxy"][0, 2].item() for result in results] == pytest.approx([60, 61, 62, 63, 64])
    assert detector.predict([]) == []
    assert isinstance(detector.predict(photos[0]), dict)


def stored_images():
    color = Image.fromarray(photo(8, 10))
    grey16 = Image.fromarray(np.full((8, 10), 0x8040, dtype=np.uint16))
    return {
        "gray": (color.convert("L"), None),
        "palette": (color.convert("P"), None),
        "cmyk": (color.convert("CMYK"), None),
        "alpha": (color.convert("RGBA"), np.asarray(color)),
        "16 bits": (grey16, np.full((8, 10, 3), 0x80, dtype=np.uint8)),
    }


@pytest.mark.parametrize("kind", stored_images())
def test_images_of_every_mode_become_rgb(kind):
    image, expected = stored_images()[kind]
    detector = echo_detector(min_size=8, max_size=100)
    detector.predict(image)
    given = detector.model.given[0][0]
    assert given.dtype == torch.uint8 and given.shape == (3, 8, 10)
    if expected is not None:
        np.testing.assert_array_equal(given.permute(1, 2, 0).numpy(), expected)


def test_exif_orientation_is_ignored(tmp_path):
    image = Image.fromarray(photo(20, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.jpg", exif=exif)
    assert echo_detector().predict(tmp_path / "rotated.jpg")["boxes_xyxy"][0].tolist() == [0, 0, 40, 20]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), "float32"),
        (np.zeros((8, 8), dtype=np.uint8), r"\[8, 8\]"),
        (np.zeros((0, 8, 3), dtype=np.uint8), r"\[0, 8, 3\]"),
        (b"bytes", "bytes"),
        ("nowhere.jpg", "nowhere.jpg"),
    ],
)
def test_what_is_no_image_is_refused_by_name(bad, message):
    with pytest.raises(DetectorError, match=message):
        echo_detector().predict(bad)


def test_a_broken_image_file_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(DetectorError, match="broken.jpg"):
        echo_detector().predict(tmp_path / "broken.jpg")


def test_a_stripped_file_is_all_that_is_needed(model, tmp_path):
    torch.save(content(model), tmp_path / "detector.pt")
    detector = load_detector(str(tmp_path / "detector.pt"))
    assert detector.class_names == ("cat", "dog", "bird") and detector.category_ids == (1, 5, 9)
    assert (detector.min_size, detector.max_size) == (64, 96)
    assert detector.model.config == model.config and not detector.model.training
    image = photo(64, 80)
    expected = model.eval()([torch.from_numpy(image).permute(2, 0, 1)])[0]
    result = detector.predict(image)
    assert len(result["scores"]) > 0
    for key in ("boxes_xyxy", "scores", "labels"):
        torch.testing.assert_close(result[key], expected[key])


def test_a_checkpoint_serves_too_with_its_moving_average(model, tmp_path):
    average = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    checkpoint = content(model, format="detection-checkpoint", ema=average, iteration=7, optimizer={"state": {}})
    torch.save(checkpoint, tmp_path / "last.pt")
    detector = load_detector(tmp_path / "last.pt")
    assert all(torch.equal(average[name], tensor) for name, tensor in detector.model.state_dict().items())


def test_weights_without_names_and_settings_are_refused_with_the_way_to_get_them(model, tmp_path):
    torch.save(export_state_dict(model, "mmdet"), tmp_path / "mmdet.pth")
    with pytest.raises(WeightsError, match="convert_weights"):
        load_detector(tmp_path / "mmdet.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": None}, "lacks 'class_names'"),
        ({"class_names": ["cat"]}, "names 1 classes .* model of 3"),
        ({"model_config": {"num_classes": 4, "backbone": "resnet18"}}, "does not hold together"),
        ({"model_config": {"num_clases": 3}}, "num_clases"),
        ({"preprocessing": {"min_size": 64}}, "max_size"),
        ({"preprocessing": [64, 96]}, "'preprocessing' is not what a detector needs"),
        ({"class_names": [torch.ones(1)]}, "'class_names' is not what a detector needs"),
        # 14 GB, for which no memory is asked.
        ({"model_config": {"num_classes": 3, "backbone": "resnet18", "roi_hidden_channels": 16384}}, "hold together"),
    ],
)
def test_an_incomplete_file_is_refused(model, changes, message, tmp_path):
    torch.save(content(model, **changes), tmp_path / "detector.pt")
    with pytest.raises(WeightsError, match=message):
        load_detector(tmp_path / "detector.pt")


def test_a_device_that_is_not_there_is_not_blamed_on_the_file(model, tmp_path):
    torch.save(content(model), tmp_path / "detector.pt")
    # Whatever the machine has, it has not so many.
    with pytest.raises(DetectorError, match="device 'cuda:99' cannot be used: "):
        load_detector(tmp_path / "detector.pt", device="cuda:99")


def test_a_detector_is_shown_in_a_line_and_batches_have_images(model, tmp_path):
    torch.save(content(model), tmp_path / "detector.pt")
    detector = load_detector(tmp_path / "detector.pt")
    shown = repr(detector)
    assert shown.startswith("Detector(resnet18, ") and "\n" not in shown and len(shown) < 200
    with pytest.raises(DetectorError, match="batch_size is 0; give at least 1"):
        detector.predict([photo(32, 32)], batch_size=0)


def test_losses_beside_detections_are_those_of_training_and_change_no_detection():
    torch.manual_seed(0)
    model = build_model("faster_rcnn_r18_fpn", num_classes=3, rpn_proposals_test=50, rpn_proposals_train=50)
    images = ImageBatch(torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 70]]))
    boxes = torch.tensor([[[5.0, 5.0, 40.0, 40.0]], [[10.0, 8.0, 30.0, 44.0]]])
    keys = torch.tensor([7, 8])
    targets = TargetBatch(boxes, torch.tensor([[0], [2]]), torch.ones(2, 1, dtype=torch.bool), keys)
    trained = model.train()(images, targets)
    found, is_finite, losses = model.eval().detect_with_losses(images, targets)
    assert list(losses) == list(trained) and bool(is_finite.all())
    for name, value in losses.items():
        assert torch.equal(value, trained[name].detach()), name
        assert not value.requires_grad
    for one, other in zip(found, model.detect(images)[0], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
