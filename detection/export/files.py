"""Exported detectors as files: written whole or not at all, and opened again to be run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from detection.export.graph import (
    MASK_OUTPUT_NAME,
    OUTPUT_NAMES,
    DetectorGraph,
    ExportError,
    Suppression,
    graph_model,
    suppress_groups,
)
from detection.models import Detector
from detection.models.weights.stored import stripped_file

ONNX_OPSET = 20
"""The newest whose RoiAlign onnxruntime 1.32 computes; it knows none of opset 22."""
METADATA_FILE = "detector.json"
"""Name of the extra file in a .pt2; an .onnx has the same entries as metadata properties."""
_IMAGE_SIDES = (1, 2**15)  # of a dynamic height or width
_BATCH_SIZES = (1, 2**10)

Runner: TypeAlias = Callable[[np.ndarray], list[dict[str, Tensor]]]
"""uint8 RGB [B, H, W, 3] -> for each image {"boxes_xyxy", "scores", "labels"}, as the model in PyTorch gives them, and
"mask_probabilities" of a model with masks."""


@dataclass(frozen=True)
class InputShape:
    """Shape [batch_size, height, width, 3] of the images; None leaves a length open until the file is used."""

    batch_size: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ExportError("height and width are both fixed or both open")

    def example(self) -> Tensor:
        """Images of an allowed shape, all zeros. Open lengths are neither 0 nor 1, which exporters take as fixed."""
        return torch.zeros((self.batch_size or 2, self.height or 100, self.width or 150, 3), dtype=torch.uint8)

    def dimensions(self) -> dict[int, Any]:
        """The open lengths for torch.export."""
        named = (
            (0, "batch", self.batch_size, _BATCH_SIZES),
            (1, "height", self.height, _IMAGE_SIDES),
            (2, "width", self.width, _IMAGE_SIDES),
        )
        return {
            place: torch.export.Dim(name, min=low, max=high)
            for place, name, length, (low, high) in named
            if length is None
        }


def save_program(detector: Detector, shape: InputShape, path: str | Path) -> None:
    """A torch.export program (.pt2) with class names and the rest in METADATA_FILE.

    `torch.export.load` opens it where torchvision has been imported, on the kind of device that the detector is on;
    nothing of this project is needed.
    """
    program = _exported(detector, shape, suppress_groups)
    with whole_file(path) as partial:
        torch.export.save(program, partial, extra_files={METADATA_FILE: json.dumps(_metadata(detector, shape))})


def save_onnx(detector: Detector, shape: InputShape, path: str | Path, opset: int = ONNX_OPSET) -> None:
    """An ONNX model in one file; class names and the rest are metadata properties, JSON each.

    Raises ExportError where the extra "export" is not installed, or the weights exceed ONNX's 2 GiB for one file.
    """
    onnx = _extra("onnx")
    _extra("onnxscript")
    onnx_suppression = importlib.import_module("detection.export.onnx_suppression")
    program = _exported(detector, shape, onnx_suppression.suppress)
    with _quiet(), torch.no_grad():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=onnx_suppression.TRANSLATIONS,
            input_names=["images"],
            output_names=[*OUTPUT_NAMES, *([MASK_OUTPUT_NAME] if detector.model.config.has_masks else [])],
            opset_version=opset,
            verbose=False,
        )
    assert converted is not None
    model = converted.model_proto
    _name_open_lengths(model.graph, shape)
    for key, value in _metadata(detector, shape).items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=key, value=json.dumps(value)))
    with whole_file(path) as partial:
        try:
            onnx.save(model, partial)
        except ValueError as error:
            raise ExportError(f"{path} cannot be written as one file: {error}") from error


def save_weights(detector: Detector, path: str | Path) -> None:
    """A stripped weights file: all that `load_detector` needs and nothing of a training run."""
    content = stripped_file(
        detector.model.state_dict(),
        model_config=dataclasses.asdict(detector.model.config),
        class_names=detector.class_names,
        category_ids=detector.category_ids,
        preprocessing={"min_size": detector.min_size, "max_size": detector.max_size},
    )
    with whole_file(path) as partial:
        torch.save(content, partial)


def open_program(path: str | Path, device: str = "cpu") -> Runner:
    """The program in a .pt2 file, which was exported for `device`."""
    with _quiet():
        module = torch.export.load(path).module()

    def run(images: np.ndarray) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            return _per_image(*(tensor.cpu() for tensor in module(torch.from_numpy(images).to(device))))

    return run


def open_onnx(path: str | Path) -> Runner:
    """The model in an .onnx file, in onnxruntime on the CPU.

    Raises ExportError where the extra "export" is not installed, or onnxruntime cannot run the file.
    """
    runtime = _extra("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no base class but this
        raise ExportError(f"onnxruntime {runtime.__version__} cannot run {path}: {error}") from error

    def run(images: np.ndarray) -> list[dict[str, Tensor]]:
        return _per_image(*map(torch.from_numpy, session.run(None, {"images": images})))

    return run


def _exported(detector: Detector, shape: InputShape, suppress: Suppression) -> torch.export.ExportedProgram:
    graph = DetectorGraph(detector, suppress).eval()
    device = detector.model.pixel_mean.device
    # Without gradients the freezing of stages leaves no trace in the graph.
    with _quiet(), torch.no_grad():
        return torch.export.export(
            graph, (shape.example().to(device),), dynamic_shapes=(shape.dimensions(),), strict=False
        )


def _name_open_lengths(graph: Any, shape: InputShape) -> None:
    """Gives the open lengths of an ONNX graph the names batch, height and width."""
    (images,) = graph.input
    lengths = images.type.tensor_type.shape.dim
    name_of = {lengths[place].dim_param: dimension.__name__ for place, dimension in shape.dimensions().items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for length in value.type.tensor_type.shape.dim:
            if length.dim_param in name_of:  # to write another, be it "", would erase a known length
                length.dim_param = name_of[length.dim_param]


def _metadata(detector: Detector, shape: InputShape) -> dict[str, Any]:
    config = graph_model(detector).config
    return {
        "class_names": list(detector.class_names),
        "category_ids": list(detector.category_ids),
        "preprocessing": {"min_size": detector.min_size, "max_size": detector.max_size},
        "input": {"name": "images", "dtype": "uint8", "layout": "BHWC RGB", **dataclasses.asdict(shape)},
        "score_threshold": config.score_threshold,
        "nms_iou": config.nms_iou,
        "detections_per_image": config.detections_per_image,
    }


def _per_image(
    boxes: Tensor, scores: Tensor, labels: Tensor, counts: Tensor, masks: Tensor | None = None
) -> list[dict[str, Tensor]]:
    outputs = {"boxes_xyxy": boxes, "scores": scores, "labels": labels}
    if masks is not None:
        outputs[MASK_OUTPUT_NAME] = masks
    return [
        {name: values[row, :count] for name, values in outputs.items()} for row, count in enumerate(counts.tolist())
    ]


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the package {name}, which is not installed: pip install onnx onnxscript onnxruntime, "
            "or the extra: pip install '.[export]'"
        ) from error


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """A place to write to, moved to `target` where nothing went wrong, else removed."""
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    # torch.export wants the suffix, so the mark stands in front.
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say to people who develop exporters; errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
