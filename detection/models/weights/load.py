"""Weights into our models: any readable file or published name, with a report of what fitted; detectors from files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detection.models.backbones.resnet import FrozenBatchNorm, ResNet
from detection.models.detector import Detector, DetectorError
from detection.models.faster_rcnn import AnyDetector, FasterRCNN, model_from_config
from detection.models.own.backbone import pretrained_state
from detection.models.own.code import OwnCodeError
from detection.models.own.detector import OwnDetector
from detection.models.weights.files import WeightsError, weight_file
from detection.models.weights.layouts import (
    COCO_CATEGORY_IDS,
    PixelInput,
    box_heads,
    classifier_names,
    clean_names,
    mask_logits_names,
    regressor_names,
    take_categories,
    to_layout,
)
from detection.models.weights.sources import fetch, find_published
from detection.models.weights.stored import StoredWeights, read_detector_file, read_own, read_weights

_NAMES_IN_FULL = 4
_LAYOUT_WORDS = {
    "ours": "our layout",
    "mmdet": "MMDetection's layout",
    "torchvision": "torchvision's detector layout",
    "detectron2": "Detectron2's layout",
    "transformers": "transformers' ResNet",
    "backbone": "a backbone alone",
}


@dataclass(frozen=True)
class WeightReport:
    """What `load_weights` did, by names of the model's state dict (`unexpected`: the file's own names).

    matched: filled from the file. missing: not in the file. unexpected: in the file, not in the model.
    reshaped: (name, shape in the file, shape in the model); these kept the model's initialization, as the
    missing ones did. source: what was read. notes: what was converted, re-initialized or cannot be the same.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    source: str
    notes: tuple[str, ...]

    def table(self) -> str:
        """A few lines for a person: counts, names where they are few, modules where they are many."""
        reshaped = [f"{name} {list(theirs)} -> {list(ours)}" for name, theirs, ours in self.reshaped]
        total = len(self.matched) + len(self.missing) + len(self.reshaped)
        lines = [
            f"weights from {self.source}",
            f"  matched    {len(self.matched):4d} of {total} tensors of the model",
            f"  missing    {len(self.missing):4d}  {_names(self.missing)}",
            f"  unexpected {len(self.unexpected):4d}  {_names(self.unexpected)}",
            f"  reshaped   {len(reshaped):4d}  {', '.join(reshaped[:_NAMES_IN_FULL])}",
        ]
        if len(reshaped) > _NAMES_IN_FULL:
            lines[-1] += f" and {len(reshaped) - _NAMES_IN_FULL} more"
        if self.missing or self.reshaped:
            lines.append("  missing and reshaped tensors keep the model's own initialization")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)


def load_weights(
    model: AnyDetector,
    spec: str | Path,
    *,
    category_ids: Sequence[int] | None = None,
    map_location: str | torch.device = "cpu",
) -> WeightReport:
    """Fills `model` with the weights `spec` and reports what fitted.

    spec: a file of ours, torchvision's, MMDetection's, Detectron2's or of transformers' ResNet, or the name of
    published weights: "imagenet" (IMAGENET1K_V1 of the model's backbone, or timm's), "IMAGENET1K_V2", "COCO_V1",
    "ResNet50_Weights.IMAGENET1K_V2", ..., or a file's address. A head for another number of classes keeps the
    model's own initialization, as do tensors of another shape. category_ids: those of the model's classes;
    torchvision's head for COCO has a row for each of 90 ids, and gives COCO's 80 categories theirs (None: 80 classes
    are taken for COCO's). map_location: where the file's tensors are put on their way into the model. Raises
    WeightsError where nothing fits or the file cannot be read, WeightsUnavailable where published weights are
    neither cached nor reachable.
    """
    name = model.config.backbone
    masks = model.config.has_masks
    published = None if _is_of_timm(str(spec), name) else find_published(str(spec), name, masks=masks)
    if isinstance(model, OwnDetector):
        stored = read_own(Path(spec) if published is None else fetch(published))
        source = f"{spec} ({model.config.factory})"
    elif _is_of_timm(str(spec), name):
        state = {f"backbone.body.{key}": tensor for key, tensor in pretrained_state(name).items()}
        stored = StoredWeights(state, {}, "backbone", None, None, (), {})
        source = f"{name} (timm's pretrained weights)"
    else:
        pixels = PixelInput(model.config.pixel_order, tuple(model.config.pixel_std))
        path = weight_file(Path(spec)) if published is None else fetch(published)
        stored = read_weights(path, pixels, is_published=published is not None and published.is_torchvisions)
        source = f"{path if published is None else published.name} ({_LAYOUT_WORDS[stored.layout]})"
    notes = list(stored.notes)

    own = clean_names(model.state_dict())
    if isinstance(model, FasterRCNN) and model.config.features == "c4":
        # A backbone's file has as its fourth stage what is the head's here.
        renamed = {name: name.replace("backbone.layer4.", "roi_head.stage.") for name in stored.state}
        stored = dataclasses.replace(
            stored,
            state={renamed[name]: tensor for name, tensor in stored.state.items()},
            origin={renamed.get(name, name): theirs for name, theirs in stored.origin.items()},
        )
    state = {name: tensor.to(map_location) for name, tensor in stored.state.items()}
    refused = _foreign_norms(state, own)
    if refused:
        notes.append("the file's batch norms have no use for the model's group norms; those keep their initialization")
    is_coco = category_ids is None or tuple(category_ids) == COCO_CATEGORY_IDS
    heads = _fit_head(state, own, notes, is_coco_by_id=is_coco and stored.layout == "torchvision")

    matched, reshaped, unexpected = [], [], []
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in own or name in refused:
                if not name.endswith("num_batches_tracked"):
                    unexpected.append(stored.origin.get(name, name))
            elif name in heads or tensor.shape != own[name].shape:
                reshaped.append((name, tuple(tensor.shape), tuple(own[name].shape)))
            else:
                own[name].copy_(tensor)
                matched.append(name)
    if not matched:
        raise WeightsError(
            f"nothing in {source} fits the model: the file has {_some(stored.state)}, the model has {_some(own)}"
        )
    settled = {*matched, *(name for name, _, _ in reshaped)}
    missing = [name for name in own if name not in settled and not name.endswith("num_batches_tracked")]
    if isinstance(model, FasterRCNN) and isinstance(model.backbone, ResNet):
        notes += _suit_backbone(model, stored, published.norm_eps if published else stored.norm_eps)
    return WeightReport(tuple(matched), tuple(missing), tuple(unexpected), tuple(reshaped), source, tuple(notes))


def load_detector(
    path: str | Path, device: str | torch.device = "cpu", own_code: Collection[str | None] = ()
) -> Detector:
    """The detector in a stripped weights file or a checkpoint of ours (of which it takes the EMA weights, if
    any).

    own_code: package.module:function of a detector or backbone of one's own, which is not run because a file names it.
    Raises WeightsError where the file is no such file or is incomplete, and DetectorError where there is no such
    device.
    """
    path = weight_file(Path(path))
    stored = read_detector_file(path)
    payload = stored.payload
    try:
        names = tuple(str(name) for name in payload["class_names"])
        category_ids = tuple(int(number) for number in payload["category_ids"])
        sizes = tuple(int(payload["preprocessing"][side]) for side in ("min_size", "max_size"))
        model = model_from_config(payload["model_config"], weights=stored.state, own_code=own_code)
        detector = Detector(model.eval(), names, category_ids, *sizes)
    except OwnCodeError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # whatever settings of another kind make a model raise
        raise WeightsError(f"{path} does not hold together: {error}") from error
    if not len(detector.class_names) == len(detector.category_ids) == model.config.num_classes:
        raise WeightsError(
            f"{path} names {len(detector.class_names)} classes and {len(detector.category_ids)} category ids for a "
            f"model of {model.config.num_classes}"
        )
    try:
        model.to(device)
    except (AssertionError, RuntimeError) as error:  # builds without CUDA assert it
        raise DetectorError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return detector


def prefetch_weights(spec: str | Path, backbone: str, *, masks: bool = False) -> Path | None:
    """Fetches published weights into torch's cache, so that processes that load them later find them there.

    Does nothing, and returns None, where `spec` is a file or "none". backbone: the model's. masks: whether it has
    them. Raises as `load_weights` does for a name.
    """
    if str(spec) == "none":
        return None
    if _is_of_timm(str(spec), backbone):
        pretrained_state(backbone)
        return None
    published = find_published(str(spec), backbone, masks=masks)
    return None if published is None else fetch(published)


def _is_of_timm(spec: str, backbone: str) -> bool:
    return spec == "imagenet" and backbone.startswith("timm/")


def export_state_dict(model: AnyDetector, layout: str = "ours") -> dict[str, Tensor]:
    """The model's weights under the names, and in the order of class rows, of another project.

    layout: "mmdet", "torchvision" or "ours"; see `layouts.to_layout`. Tensors are detached and share
    the model's memory where they need no change.
    """
    return to_layout(clean_names(model.state_dict()), layout)


def _names(names: Sequence[str]) -> str:
    if len(names) <= _NAMES_IN_FULL:
        return ", ".join(names)
    modules = Counter(".".join(name.split(".")[:-1][:2]) or name for name in names)
    if len(modules) > 2 * _NAMES_IN_FULL:
        modules = Counter(name.split(".")[0] for name in names)
    groups = [f"{module}.* ({count})" if count > 1 else f"{module}.*" for module, count in modules.items()]
    more = len(groups) - 2 * _NAMES_IN_FULL
    return ", ".join(groups[: 2 * _NAMES_IN_FULL]) + (f" and {more} more modules" if more > 0 else "")


def _foreign_norms(state: dict[str, Tensor], own: dict[str, Tensor]) -> set[str]:
    """Weights and biases of the file's batch norms whose place in the model is taken by a group norm."""
    modules = [name.removesuffix("running_mean") for name in state if name.endswith(".running_mean")]
    modules = [module for module in modules if module + "weight" in own and module + "running_mean" not in own]
    return {module + kind for module in modules for kind in ("weight", "bias")}


def _fit_head(
    state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str], *, is_coco_by_id: bool
) -> tuple[str, ...]:
    """Gives the file's class-dependent layers the model's rows; their names where the numbers of classes differ."""
    differing: list[str] = []
    for head in box_heads(own):
        differing += _fit_box_head(head, state, own, notes, is_coco_by_id=is_coco_by_id)
    return tuple(differing)


def _fit_box_head(
    head: str, state: dict[str, Tensor], own: dict[str, Tensor], notes: list[str], *, is_coco_by_id: bool
) -> tuple[str, ...]:
    weight = classifier_names(head)[0]
    if weight not in state:
        return ()
    num_rows = len(own[weight])
    if is_coco_by_id and (len(state[weight]), num_rows) == (COCO_CATEGORY_IDS[-1] + 1, len(COCO_CATEGORY_IDS) + 1):
        take_categories(state, head, COCO_CATEGORY_IDS)
        notes.append("of the 90 ids that the file's head has rows for, COCO's 80 categories take theirs")
    if len(state[weight]) != num_rows:
        note = (
            f"the file's head is for {len(state[weight]) - 1} classes, the model's for {num_rows - 1}: "
            f"classifier{', masks' if mask_logits_names(head)[0] in own else ''} and regressor are re-initialized"
        )
        notes += [note] if note not in notes else []
        # One box for all classes is the same box for others.
        agnostic = len(own[regressor_names(head)[0]]) == 4
        return (*classifier_names(head), *(() if agnostic else regressor_names(head)))
    for name in regressor_names(head):
        theirs, ours = state.get(name), own[name]
        # The four box outputs of the background are last, and nothing uses them.
        if theirs is None or theirs.shape[1:] != ours.shape[1:]:
            continue
        if abs(len(theirs) - len(ours)) == 4 and min(len(theirs), len(ours)) > 4:
            state[name] = torch.cat((theirs[: len(ours)], ours[len(theirs) :].to(theirs)))
    return ()


def _suit_backbone(model: FasterRCNN, stored: StoredWeights, norm_eps: float | None) -> list[str]:
    """Gives the model's batch norms the epsilon that the weights were made for; says where strides differ."""
    notes = []
    backbone = model.backbone
    norms = [norm for norm in backbone.modules() if isinstance(norm, (FrozenBatchNorm, nn.BatchNorm2d))]
    if norm_eps == 0 and model.config.norm == "bn":
        kept = f"{model.config.norm_eps:g}"
        notes.append(f"these weights need an epsilon of 0, with which batch norm cannot be trained: it stays {kept}")
    elif norm_eps is not None and any(norm.eps != norm_eps for norm in norms):
        for norm in norms:
            norm.eps = norm_eps
        model.config = dataclasses.replace(model.config, norm_eps=norm_eps)
        notes.append(f"the batch norms' epsilon is now {norm_eps:g}, as these weights need it")
    if stored.stride_in_1x1 is not None and stored.stride_in_1x1 != backbone.stride_in_1x1:
        where, other = ("first 1x1", "3x3") if stored.stride_in_1x1 else ("3x3", "first 1x1")
        notes.append(
            f"these weights expect the stages' strides in the {where} convolution and the model has them in the "
            f"{other}: until it is trained it detects worse than their source; a model built with "
            f"stride_in_1x1={stored.stride_in_1x1} would not"
        )
    return notes


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) + ", ..."
