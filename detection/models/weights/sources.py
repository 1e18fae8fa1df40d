"""Weights by name or address: which of torchvision's published files a name means, and getting a file into torch's
cache."""

from __future__ import annotations

import difflib
import hashlib
import http.client
import re
import socket
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
import torchvision

from detection.models.weights.files import WeightsError

NETWORK_TIMEOUT_SECONDS = 30.0
_FILE_SUFFIXES = (".pth", ".pt", ".pkl", ".ckpt", ".bin", ".safetensors")

# Which of torchvision's weight enumerations fit a backbone.
_PUBLISHED = {
    "resnet18": ["ResNet18_Weights"],
    "resnet34": ["ResNet34_Weights"],
    "resnet50": ["ResNet50_Weights", "FasterRCNN_ResNet50_FPN_Weights", "MaskRCNN_ResNet50_FPN_Weights"],
    "resnet101": ["ResNet101_Weights"],
    "resnext50_32x4d": ["ResNeXt50_32X4D_Weights"],
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
    one. Or any file by its address, which is its name too.
    """

    name: str
    url: str
    norm_eps: float | None

    @property
    def is_torchvisions(self) -> bool:
        return self.name != self.url

    @property
    def cached_file(self) -> Path:
        """Another address of the same file name is another file, unless the name carries the content's hash."""
        name = Path(urlparse(self.url).path).name
        if not _hash_prefix(self.url):
            name = f"{hashlib.sha256(self.url.encode()).hexdigest()[:8]}-{name}"
        return Path(torch.hub.get_dir()) / "checkpoints" / name


def find_published(spec: str, backbone: str, *, masks: bool = False) -> PublishedWeights | None:
    """What `spec` ("imagenet", "IMAGENET1K_V2", "COCO_V1", "ResNet50_Weights.IMAGENET1K_V2", ..., or the address of a
    file) means for a model with this backbone (one of `backbones.ARCHITECTURES`), with masks or without, or None where
    it can only be a file.

    Raises WeightsError for a name that does not exist or does not fit the backbone.
    """
    if spec.partition("://")[0] in ("http", "https", "file"):
        if Path(urlparse(spec).path).suffix not in _FILE_SUFFIXES:
            raise WeightsError(
                f"{spec} is not the address of a weight file: it ends in none of {', '.join(_FILE_SUFFIXES)}"
            )
        return PublishedWeights(spec, spec, None)
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
    """First digits of the file's SHA-256, as torchvision's and OpenMMLab's addresses carry them; "" without."""
    digits = Path(urlparse(url).path).stem.rpartition("-")[2]
    return digits if re.fullmatch("[0-9a-f]{8,64}", digits) else ""


def fetch(published: PublishedWeights) -> Path:
    """The file in torch's cache, fetched there (and its hash checked) if it was not in it.

    Raises WeightsUnavailable where it cannot be fetched.
    """
    file = published.cached_file
    if file.is_file():
        if not published.is_torchvisions:
            _check_cached(published, file)
        return file
    # torch.hub opens its connection without a time limit, and a firewall that drops packets would hold the run for
    # minutes; the socket module's default is the only handle on it.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        prefix = _hash_prefix(published.url) or None
        torch.hub.download_url_to_file(published.url, str(file), prefix, progress=False)
        if not published.is_torchvisions:
            _hash_file(file).write_text(_digest(file))
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


def _check_cached(published: PublishedWeights, file: Path) -> None:
    """Raises WeightsUnavailable where a file in the cache is not what was fetched from its address."""
    expected = _hash_prefix(published.url)
    if not expected and _hash_file(file).is_file():
        expected = _hash_file(file).read_text().strip()
    if not _digest(file).startswith(expected):
        message = f"{file} is not what {published.url} gave: its SHA-256 is another. Delete it, to fetch it again"
        raise WeightsUnavailable(message)


def _hash_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
