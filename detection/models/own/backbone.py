"""A backbone of a user's own, or of timm: any module that gives four maps."""

from __future__ import annotations

import importlib
import importlib.util
import re

import torch
from torch import Tensor, nn

from detection.models.own.code import OwnCodeError, called, is_own

STRIDES = (4, 8, 16, 32)
_TIMM = re.compile(r"timm/[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_own_backbone(name: str) -> bool:
    """Whether a name is package.module:function or timm/NAME."""
    return is_own(name) or _TIMM.fullmatch(name) is not None


class OwnBackbone(nn.Module):
    """C2..C5 of a module whose forward takes images float [B, 3, H, W] and gives four maps, of strides 4, 8, 16 and 32,
    as a list, a tuple or a dictionary in this order.

    name: package.module:function, called without arguments, or timm/NAME, made by timm with features_only. norm:
    "frozen_bn" keeps the statistics of its batch norms, anything else trains them. frozen_stages: 4 keeps all of its
    weights, -1 trains all.
    """

    compiled_by_stage = False
    stride_in_1x1 = False

    def __init__(self, name: str, *, norm: str, frozen_stages: int) -> None:
        super().__init__()
        if frozen_stages not in (-1, 4):
            raise OwnCodeError(f"{name}: its stages are not known: freeze none of it, or the whole backbone")
        self.name = name
        self.frozen_stages = frozen_stages
        self._keeps_statistics = norm == "frozen_bn" or frozen_stages == 4
        self.body = _made(name)
        self.out_channels = self._probe()
        if frozen_stages == 4:
            self.body.requires_grad_(False)

    def train(self, mode: bool = True) -> OwnBackbone:
        """As of any module, but for batch norms that keep their statistics."""
        super().train(mode)
        if self._keeps_statistics:
            for module in self.body.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalized images, float [B, 3, H, W], to C2..C5."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen_stages < 4):
            maps = self.body(x)
        c2, c3, c4, c5 = maps.values() if isinstance(maps, dict) else maps
        return c2, c3, c4, c5

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, int, int]:
        """The channels of the maps, of which four of the right sizes must come."""
        side, was_training = 64, self.body.training
        self.body.eval()
        try:
            # The device of the parameters: "meta" where a model is made without memory.
            device = next((p.device for p in self.body.parameters()), torch.device("cpu"))
            maps = self.body(torch.zeros(1, 3, side, side, device=device))
            maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
            sizes = [tuple(each.shape[2:]) for each in maps]
        except Exception as error:
            raise OwnCodeError(f"{self.name}: an image of {side} x {side} pixels makes it fail: {error!r}") from error
        finally:
            self.body.train(was_training)
        expected = [(side // stride,) * 2 for stride in STRIDES]
        if sizes != expected:
            given = ", ".join(" x ".join(map(str, size)) for size in sizes)
            message = f"of an image of {side} x {side} pixels it gives maps of {given}; there must be four, of"
            raise OwnCodeError(f"{self.name}: {message} {', '.join(f'{a} x {b}' for a, b in expected)} cells")
        c2, c3, c4, c5 = (each.shape[1] for each in maps)
        return c2, c3, c4, c5


def pretrained_state(name: str) -> dict[str, Tensor]:
    """The weights that timm publishes for timm/NAME, by the names of the module that it makes. Raises OwnCodeError."""
    return _of_timm(name, pretrained=True).state_dict()


def _made(name: str) -> nn.Module:
    body = called(name) if is_own(name) else _of_timm(name)
    if not isinstance(body, nn.Module):
        raise OwnCodeError(f"{name} gives a {type(body).__name__}, not a torch.nn.Module")
    return body


def _of_timm(name: str, *, pretrained: bool = False) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise OwnCodeError(f"{name}: timm is not installed; pip install timm")
    timm = importlib.import_module("timm")
    model = name.removeprefix("timm/")
    try:
        strides = timm.create_model(model, features_only=True).feature_info.reduction()
        places = [strides.index(stride) for stride in STRIDES]
        return timm.create_model(model, features_only=True, out_indices=places, pretrained=pretrained)
    except Exception as error:  # whatever timm raises for a name that it does not know, or without a network
        raise OwnCodeError(f"{name}: timm gives no maps of strides 4, 8, 16 and 32 of it: {error!r}") from error
