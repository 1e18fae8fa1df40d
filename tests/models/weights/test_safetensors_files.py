"""safetensors files: read as their format's page says, and refused where header and file disagree."""

import dataclasses
import json
import struct

import pytest
import torch
from torchvision.models import resnet18

from detection.models import WeightsError, build_model, load_detector, load_weights, model_from_config
from detection.models.weights.files import read_weight_file
from detection.models.weights.safetensors_files import read_metadata, read_safetensors, write_safetensors
from detection.models.weights.stored import stripped_file, write_detector

TENSORS = {
    "half": torch.arange(3, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3).t(),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


def by_hand(header, data=b"", *, length=None):
    """A file as the format's page describes it; header: JSON's values, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_what_is_written_comes_back_and_is_laid_out_as_the_format_says(tmp_path):
    path = tmp_path / "w.safetensors"
    with path.open("wb") as stream:
        write_safetensors(stream, TENSORS, {"format": "pt", "who": "é"})
    tensors, metadata = read_safetensors(path)
    assert metadata == read_metadata(path) == {"format": "pt", "who": "é"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, end = header["wide"]["data_offsets"]
    assert header["wide"]["dtype"] == "F64" and header["wide"]["shape"] == [3, 2] and first % 8 == length % 8 == 0
    assert struct.unpack("<6d", content[8 + length :][first:end]) == (0, 3, 1, 4, 2, 5)


def test_a_file_made_by_hand_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(by_hand({"b": entry(offsets=(8, 16)), "a": entry("I32")}, struct.pack("<2i2f", 1, 2, 3, 4)))
    found = read_weight_file(path)
    assert found["a"].tolist() == [1, 2] and found["b"].tolist() == [3.0, 4.0]


EIGHT = bytes(8)
REFUSED = {
    "header beyond the file": by_hand({}, length=2**40),
    "header beyond any": by_hand(b"{" + b" " * 2**23, length=2**23),
    "no JSON": by_hand(b'{"a": '),
    "deep": by_hand(b'{"a":' + b"[" * 200_000),
    "no entry": by_hand({"a": [1]}),
    "more in the entry": by_hand({"a": entry(more=1)}, EIGHT),
    "unknown type": by_hand({"a": entry("C64", (1,))}, EIGHT),
    "other shape": by_hand({"a": entry(shape=(3,))}, EIGHT),
    "huge shape": by_hand({"a": entry(shape=(2**40, 2**40))}, EIGHT),
    "negative": by_hand({"a": entry(shape=(-2,), offsets=(8, 0))}, EIGHT),
    "true for a number": by_hand({"a": entry(shape=(True, 2))}, EIGHT),
    "tensor beyond the file": by_hand({"a": entry(shape=(2**30,), offsets=(0, 2**32))}, EIGHT),
    "cut short": by_hand({"a": entry()}, EIGHT[:7]),
    "bytes left over": by_hand({"a": entry()}, EIGHT * 2),
    "gap": by_hand({"a": entry(), "b": entry(offsets=(16, 24))}, EIGHT * 3),
    "overlap": by_hand({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT * 2),
    "a name twice": by_hand(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
    "truth of 2": by_hand({"a": entry("BOOL", (8,))}, b"\x02" * 8),
    "metadata of numbers": by_hand({"__metadata__": {"a": 1}}),
    "detector of a list": by_hand({"__metadata__": {"detector": "[1]"}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_hold_together_is_refused(name, tmp_path, bounded_memory):
    path = tmp_path / "w.safetensors"
    path.write_bytes(REFUSED[name])
    with pytest.raises(WeightsError, match=str(path)):
        read_weight_file(path)


def test_a_detector_comes_back_with_its_classes_and_gives_its_weights(tmp_path):
    model = build_model("faster_rcnn_r18_fpn", 2, fpn_channels=32, roi_hidden_channels=16, anchor_ratios=(0.5, 1.0))
    content = stripped_file(
        model.state_dict(),
        model_config=dataclasses.asdict(model.config),
        class_names=["a", "ü"],
        category_ids=[3, 9],
        preprocessing={"min_size": 64, "max_size": 96},
    )
    path = tmp_path / "mine.safetensors"
    with path.open("wb") as stream:
        write_detector(stream, {**content, "notes": "blue"})
    detector = load_detector(path)
    assert (detector.class_names, detector.category_ids) == (("a", "ü"), (3, 9))
    assert detector.model.config == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in detector.model.state_dict().items())
    assert json.loads(read_metadata(path)["detector"])["notes"] == "blue"
    report = load_weights(model_from_config(dataclasses.asdict(model.config)), path)
    assert not report.missing and not report.reshaped


def of_transformers(name):
    """What transformers' ResNetForImageClassification calls a tensor of torchvision's ResNet."""
    module, _, kind = name.rpartition(".")
    if module == "fc":
        return f"classifier.1.{kind}"
    parts = {"conv1": "convolution", "bn1": "normalization"}
    if module in parts:
        return f"resnet.embedder.embedder.{parts[module]}.{kind}"
    layer, block, *rest = module.split(".")
    place = f"resnet.encoder.stages.{int(layer[-1]) - 1}.layers.{block}"
    if rest[0] == "downsample":
        return f"{place}.shortcut.{'convolution' if rest[1] == '0' else 'normalization'}.{kind}"
    word = "convolution" if rest[0].startswith("conv") else "normalization"
    return f"{place}.layer.{int(rest[0][-1]) - 1}.{word}.{kind}"


@pytest.mark.parametrize("rename", [str, of_transformers, lambda name: of_transformers(name).removeprefix("resnet.")])
def test_a_backbone_under_torchvisions_or_transformers_names_fills_ours(rename, tmp_path):
    torch.manual_seed(1)
    theirs = resnet18().state_dict()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        write_safetensors(stream, {rename(name): tensor for name, tensor in theirs.items()}, {"format": "pt"})
    model = build_model("faster_rcnn_r18_fpn", 2, fpn_channels=32, roi_hidden_channels=16, norm="bn")
    report = load_weights(model, path)
    ours = model.backbone.state_dict()
    assert len(report.unexpected) == 2  # the classifier
    assert not [name for name in report.missing if name.startswith("backbone.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith("num_batches_tracked"))
