"""A trained detector as a file for other programs: torch.export, ONNX, or weights with all that belongs to them.

ONNX needs the optional extra "export" (onnx, onnxscript, onnxruntime); nothing of it is imported before it is used.
"""

from detection.export.comparison import Difference, compare_detections
from detection.export.files import (
    ONNX_OPSET,
    InputShape,
    open_onnx,
    open_program,
    save_onnx,
    save_program,
    save_weights,
)
from detection.export.graph import OUTPUT_NAMES, DetectorGraph, ExportError, graph_model

__all__ = [
    "ONNX_OPSET",
    "OUTPUT_NAMES",
    "DetectorGraph",
    "Difference",
    "ExportError",
    "InputShape",
    "compare_detections",
    "graph_model",
    "open_onnx",
    "open_program",
    "save_onnx",
    "save_program",
    "save_weights",
]
