"""Weights by name: which of torchvision's published files a name means, and getting it into torch's cache."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import socket
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision

from detection.models.weights.files import WeightsError

NETWORK_TIMEOUT_SECONDS = 30.0
_FILE_SUFFIXES = (".pth", ".pt", ".pkl", ".ckpt", ".bin")

# Which of torchvision's weight enumerations fit a backbone.
_PUBLISHED = {
    "resnet18": ["ResNet18_Weights"],
    "resnet34": ["ResNet34_Weights"],
    "resnet50": ["ResNet50_Weights", "FasterRCNN_ResNet50_FPN_Weights", "MaskRCNN_ResNet50_FPN_Weights"],
    "resnet101": ["ResNet101_Weights"],
    "resnext101_32x8d": ["ResNeXt101_32X8D_Weights"],
    "resnext101_64x4d": ["ResNeXt101_64X4D_Weights"],
}

# torchvision sets its norms' epsilon to 0 when it loads these, and only these.
_ZERO_EPS_WEIGHTS = ("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "MaskRCNN_ResNet50_FPN_Weights.COCO_V1")


class WeightsUnavailable(WeightsError):
    """Published weights that are neither in the cache nor to be had over the network."""


@dataclass(frozen=True)
class PublishedWeights:
    """One of torchvision's files: its full name, address, and the batch norm epsilon if it needs a particular
    one.
    """

    name: str
    url: str
    norm_eps: float | None

    @property
    def cached_file(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(self.url).path).name


def find_published(spec: str, backbone: str, *, masks: bool = False) -> PublishedWeights | None:
    """What `spec` ("imagenet", "IMAGENET1K_V2", "COCO_V1", "ResNet50_Weights.IMAGENET1K_V2", ...) means for a
    model with this backbone (one of `backbones.ARCHITECTURES`), with masks or without, or None where it can only be a
    file.

    Raises WeightsError for a name that does not exist or does not fit the backbone.
    """
    path = Path(spec)
    if path.is_file() or path.suffix in _FILE_SUFFIXES or len(path.parts) > 1:
        return None
    enumerations = [torchvision.models.get_weight(f"{name}.DEFAULT") for name in _PUBLISHED.get(backbone, [])]
    known = [str(each) for default in enumerations for each in type(default)]
    short = "IMAGENET1K_V1" if spec == "imagenet" else spec
    # A name without an enumeration is one of the own kind first.
    for name in sorted(known, key=lambda name: name.startswith("MaskRCNN") != masks):
        if short in (name, name.partition(".")[2]):
            url = torchvision.models.get_weight(name).url
            return PublishedWeights(name, url, 0.0 if name in _ZERO_EPS_WEIGHTS else None)
    if spec == "imagenet" or short.startswith(("IMAGENET1K_", "COCO_")) or "_Weights." in short:
        there_are = f"there are {', '.join(known)}. Choose one of them, a file, or" if known else "give a file, or"
        raise WeightsError(
            f"torchvision publishes no weights {spec!r} for the backbone {backbone}; {there_are} --weights none"
        )
    near = difflib.get_close_matches(spec, ["imagenet", "none", *known, *(n.partition(".")[2] for n in known)], n=1)
    raise WeightsError(
        f"--weights {spec!r} is neither a file nor the name of published weights"
        + (f"; did you mean {near[0]!r}?" if near else f"; names are imagenet, {', '.join(known)}")
    )


def is_zero_eps_file(path: Path) -> bool:
    """Whether this is, under whatever name, one of torchvision's files whose norms have an epsilon of 0."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest.startswith(tuple(_hash_prefix(torchvision.models.get_weight(name).url) for name in _ZERO_EPS_WEIGHTS))


def _hash_prefix(url: str) -> str:
    """First digits of the file's SHA-256, as torchvision's addresses carry them."""
    return Path(urlparse(url).path).stem.rpartition("-")[2]


def fetch(published: PublishedWeights) -> Path:
    """The file in torch's cache, fetched there (and its hash checked) if it was not in it.

    Raises WeightsUnavailable where it cannot be fetched.
    """
    file = published.cached_file
    if file.is_file():
        return file
    # torch.hub opens its connection without a time limit, and a firewall that drops packets would hold the run for
    # minutes; the socket module's default is the only handle on it.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(published.url, str(file), _hash_prefix(published.url), progress=False)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise WeightsUnavailable(
            f"the weights {published.name} are not at hand and could not be fetched ({reason}).\n"
            f"  address: {published.url}\n"
            f"  put the file into: {file.parent}\n"
            "  or start without them: --weights none"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return file
