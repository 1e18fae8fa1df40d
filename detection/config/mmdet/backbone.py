"""The keys of `model.backbone` in a configuration of MMDetection, and the settings here that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from detection.config.mmdet.keys import NEAREST, Found, idle, only, same, text, to, typed
from detection.config.mmdet.layers import CONVS, GROUP_NORM
from schedules.checks import Keys, choice, flag, number, optional, whole
from schedules.errors import Place

FEATURES: dict[str, dict[str, Any]] = {
    "fpn": {"num_stages": 4, "out_indices": (0, 1, 2, 3), "strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)},
    "c4": {"num_stages": 3, "out_indices": (2,), "strides": (1, 2, 2), "dilations": (1, 1, 1)},
    "dc5": {"num_stages": 4, "out_indices": (3,), "strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)},
}
"""Which of a backbone's stages give maps, and at which strides: what the models here call it."""
_NORM: dict[str, Keys] = {
    kind: {
        "requires_grad": (flag, True),
        "eps": to("model.norm_eps", number(at_least=0, at_most=1), 1e-5),
        "momentum": only(0.1),
    }
    for kind in ("BN", "SyncBN")
}
_NORM["GN"] = {**GROUP_NORM, "eps": _NORM["BN"]["eps"]}
_STAGED: Keys = {
    "style": (choice("pytorch", "caffe"), "pytorch"),
    **{key: (lambda value, place: None, None) for key in FEATURES["fpn"]},  # see features_of
    "frozen_stages": to("frozen_stages", whole(-1, 4), -1),
    "norm_cfg": (
        typed(_NORM, hint="the other norms are not supported"),
        {"type": "BN", "requires_grad": True},
    ),
    "norm_eval": (flag, True),
    "init_cfg": (
        optional(typed({"Pretrained": {"checkpoint": text, "prefix": only(None, "backbone.")}})),
        None,
    ),
    "in_channels": only(3),
    **{key: only(False) for key in ("deep_stem", "avg_down")},
    "stage_with_dcn": only([False] * 4),
    "conv_cfg": CONVS["conv_cfg"],
    **{key: only(None) for key in ("dcn", "plugins", "pretrained")},
    # Where weights are loaded, these decide.
    "zero_init_residual": to("model.zero_last_norms", flag, True),
    **idle("backbone"),
}
"""What ResNets and RegNets have in common."""
_RESNET: Keys = {
    **_STAGED,
    "depth": choice(18, 34, 50, 101, hint=f" here ({NEAREST}50 or 101)"),
    "stem_channels": only(None, 64),
    "base_channels": only(64),
}
FOURTH_STAGE: Keys = {
    "stage": only(3),
    "stride": only(2),
    "dilation": only(1),
    **{key: _RESNET[key] for key in ("depth", "style", "norm_cfg")},
    "norm_eval": only(True),
    "init_cfg": (lambda value, place: None, None),  # the backbone's file has it too
    **{key: only(None) for key in ("dcn", "pretrained")},
    "with_cp": idle("backbone")["with_cp"],
}
"""The stage of the backbone that C4 has as a head."""
_RESNEXTS = "ResNeXt is there as 50 layers, 32x4d, and 101 layers, 32x4d, 64x4d and 32x8d"
REGNETS: dict[str, tuple[int, ...]] = {
    "regnetx_400mf": (32, 64, 160, 384),
    "regnetx_800mf": (64, 128, 288, 672),
    "regnetx_1.6gf": (72, 168, 408, 912),
    "regnetx_3.2gf": (96, 192, 432, 1008),
    "regnetx_4.0gf": (80, 240, 560, 1360),
    "regnetx_6.4gf": (168, 392, 784, 1624),
    "regnetx_8.0gf": (80, 240, 720, 1920),
    "regnetx_12gf": (224, 448, 896, 2240),
}
"""The channels of the maps that each gives."""
BACKBONES: dict[str, Keys] = {
    "ResNet": _RESNET,
    "ResNeXt": {
        **_RESNET,
        "depth": choice(50, 101, hint=f" here ({_RESNEXTS})"),
        "groups": choice(32, 64, hint=f" here ({_RESNEXTS})"),
        "base_width": (choice(4, 8, hint=f" here ({_RESNEXTS})"), 4),
    },
    "RegNet": {
        **_STAGED,
        "arch": choice(*REGNETS, hint=" here"),
        "strides": only((2, 2, 2, 2)),
        "stem_channels": only(32),
        "base_channels": only(32),
    },
}


def features_of(value: Mapping[str, Any], place: Place) -> str:
    """Which maps a backbone gives: a key of FEATURES."""
    usual = FEATURES["fpn"]
    if value.get("type") == "RegNet":  # its strides are its own
        value = {**value, "strides": usual["strides"]}
    for name, keys in FEATURES.items():
        if all(same(value.get(key, usual[key]), keys[key]) for key in keys):
            return name
    key = next(key for key in usual if not same(value.get(key, usual[key]), usual[key]))
    others = "; ".join(", ".join(f"{k}={v}" for k, v in keys.items()) for keys in FEATURES.values())
    raise place.at(key).unfit(f"must go with the others; here there are {others}", value[key])


def backbone_of(found: Mapping[str, Any], place: Place, recipe: str) -> Iterator[Found]:
    """Name of the model, norm and starting weights."""
    is_resnet = found["type"] == "ResNet"
    depth = found.get("depth", 50)
    short = found["arch"] if found["type"] == "RegNet" else f"r{depth}"
    if found["type"] == "ResNeXt":
        short = f"x{depth}_{found['groups']}x{found['base_width']}d"
        if short not in ("x50_32x4d", "x101_32x4d", "x101_64x4d", "x101_32x8d"):
            raise place.at("base_width").error(f"{_RESNEXTS}, and not {depth} layers, {short.partition('_')[2]}")
    yield Found("model", f"{recipe}_{short}_fpn", place.at("type"))
    in_1x1 = found["style"] == "caffe" and depth >= 50  # blocks of two 3x3 convolutions have no other place
    yield Found("model.stride_in_1x1", in_1x1, place.at("style"))
    norm = found["norm_cfg"]
    if norm["type"] == "GN":
        yield Found("norm", "gn", place.at("norm_cfg"))
    else:
        yield from _batch_norm(found, norm, place)
    at_weights = place.at("init_cfg").at("checkpoint")
    spec = found["init_cfg"]["checkpoint"] if found["init_cfg"] is not None else "none"
    if is_resnet and spec == f"torchvision://resnet{depth}":
        spec = "imagenet"
    spec = _PUBLISHED.get(spec, spec) if is_resnet and depth == 50 else spec
    yield Found("weights", spec, at_weights)


_PUBLISHED = {"https://download.pytorch.org/models/resnet50-11ad3fa6.pth": "IMAGENET1K_V2"}


def _batch_norm(found: Mapping[str, Any], norm: Mapping[str, Any], place: Place) -> Iterator[Found]:
    if not found["norm_eval"] and not norm["requires_grad"]:
        message = "batch norm whose statistics are trained has trained weights here; set requires_grad=True"
        raise place.at("norm_cfg").error(message)
    yield Found("norm", "frozen_bn" if found["norm_eval"] else "bn", place.at("norm_eval"))
    yield Found("sync_bn", norm["type"] == "SyncBN" and not found["norm_eval"], place.at("norm_cfg"))
    yield Found("model.train_norm_affine", norm["requires_grad"], place.at("norm_cfg"))
