"""Weight files with damage, or of somebody who means harm: the reader's own error comes out, or tensors that fit."""

import io
import pickle
import pickletools
import random
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given

from detection.models import FasterRCNN, FasterRCNNConfig, WeightsError, load_detector, load_weights
from detection.models.weights.stored import stripped_file
from tests.fuzzing import DAMAGE, SEEDS, Damage, damaged, examples, with_odd_entries
from tests.models.weights.pickle_streams import HostilePickles, changed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bounded_memory")]

STATE = {
    "state_dict": {
        "backbone.conv1.weight": torch.zeros(64, 3, 7, 7),
        "roi_head.bbox_head.fc_cls.weight": torch.zeros(3, 8),
        "roi_head.bbox_head.fc_reg.bias": torch.zeros(8),
    },
    "meta": {"epoch": 1, "cfg": "style='caffe' std=[1.0, 1.0, 1.0]"},
}
ARRAYS = {"model": {"stem.conv1.weight": STATE["state_dict"]["backbone.conv1.weight"].numpy()}, "__author__": "nobody"}
FORMS = ["zip", "legacy", "pickle"]


def saved(content: Any, form: str) -> bytes:
    stream = io.BytesIO()
    if form == "pickle":
        pickle.dump(content, stream, protocol=2)
    else:
        torch.save(content, stream, _use_new_zipfile_serialization=form == "zip")
    return stream.getvalue()


INTACT = {form: saved(ARRAYS if form == "pickle" else STATE, form) for form in FORMS}


def pickle_of(content: bytes, form: str) -> tuple[bytes, bytes, bytes]:
    """What is before the pickle in a file that is not a zip, the pickle, and what is behind it."""
    if form == "pickle":
        return b"", content, b""
    stream = io.BytesIO(content)
    for _ in range(3):  # magic number, version, system
        pickle.load(stream)
    start = stream.tell()
    *_, (_, _, stop) = pickletools.genops(stream)
    end = (stop or 0) + 1
    return content[:start], content[start:end], content[end:]


def with_pickle(program: bytes, form: str) -> bytes:
    """The file of a form with another pickle in it."""
    if form == "zip":
        return archive({**members(), "archive/data.pkl": program})
    before, _, behind = pickle_of(INTACT[form], form)
    return before + program + behind


def members() -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(INTACT["zip"])) as source:
        return {member.filename: source.read(member) for member in source.infolist()}


def archive(content: dict[str, bytes], compressed: tuple[str, ...] = ()) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, data in content.items():
            target.writestr(name, data, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)
    return stream.getvalue()


@pytest.fixture(scope="module")
def model() -> FasterRCNN:
    return FasterRCNN(FasterRCNNConfig(2, backbone="resnet18", fpn_channels=8, roi_hidden_channels=8))


def judge(model: FasterRCNN, file: Path, content: bytes) -> None:
    """What train.py --weights and scripts/predict.py do with a file."""
    file.write_bytes(content)
    for read in (lambda: load_weights(model, str(file)).table(), lambda: load_detector(file)):
        try:
            read()
        except WeightsError as error:
            assert str(file) in str(error) and len(str(error)) < 2000


@examples(60)
@given(damage=DAMAGE)
@pytest.mark.parametrize("form", FORMS)
@example(damage=[("cut", share, 0, 0) for share in (0.25, 0.25, 0.1875)])  # inside a number of an old file
@example(damage=[("cut", share, 0, 0) for share in (0.25, 0.25, 0.125)])
def test_damaged_bytes(model: FasterRCNN, tmp_path: Path, form: str, damage: Damage) -> None:
    judge(model, tmp_path / "damaged.pth", damaged(INTACT[form], damage))


@examples(60)
@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_pickles_with_other_operations(model: FasterRCNN, tmp_path: Path, form: str, seed: int) -> None:
    program = members()["archive/data.pkl"] if form == "zip" else pickle_of(INTACT[form], form)[1]
    judge(model, tmp_path / "changed.pth", with_pickle(changed(program, random.Random(seed)), form))


@examples(60)
@given(seed=SEEDS)
@pytest.mark.parametrize("form", FORMS)
def test_pickles_that_are_hostile_throughout(model: FasterRCNN, tmp_path: Path, form: str, seed: int) -> None:
    judge(model, tmp_path / "hostile.pth", with_pickle(HostilePickles(random.Random(seed)).stream(), form))


@examples(60)
@given(seed=SEEDS)
def test_archives_whose_members_are_not_as_they_should_be(model: FasterRCNN, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    content = members()
    names = list(content)
    for _ in range(dice.randint(0, 2)):
        name, other = dice.choices(names, k=2)
        content[dice.choice([name, name + "/", "../" + name, other, "archive/data/99"])] = dice.choice(
            [content.get(other, b""), b"", bytes(100), b"\xff" * 37632, content.get(name, b"")[:-1]]
        )
        content.pop(dice.choice([*names, "", "", ""]), None)
    raw = bytearray(archive(content, tuple(dice.sample(names, dice.choice([0, 0, 1, 3])))))
    entries = [place for place in range(len(raw) - 46) if raw[place : place + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
    for _ in range(dice.choice([0, 1, 1, 3])):
        place = dice.choice(entries) + dice.randrange(4, 44, 2)
        value = dice.choice([0, 1, 8, 30, 2**16 - 1, 2**31, 2**32 - 1, len(raw), dice.choice(entries)])
        raw[place : place + 4] = struct.pack("<I", value)
    judge(model, tmp_path / "archive.pth", bytes(raw))


@examples(40)
@given(seed=SEEDS)
@pytest.mark.parametrize("ours", [True, False])
def test_odd_entries(model: FasterRCNN, tmp_path: Path, ours: bool, seed: int) -> None:
    content = STATE
    if ours:
        content = stripped_file(
            {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("rpn.", "roi_head."))},
            model_config=asdict(model.config),
            class_names=["a", "b"],
            category_ids=[1, 2],
            preprocessing={"min_size": 64, "max_size": 96},
        )
    judge(model, tmp_path / "odd.pth", saved(with_odd_entries(content, random.Random(seed)), "zip"))
