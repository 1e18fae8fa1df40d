r"""Converts detector weights between this project, MMDetection and torchvision.

    python scripts/convert_weights.py runs/mine/checkpoints/best.pt --to ours --output detector.pt
    python scripts/convert_weights.py detector.pt --to mmdet --output mmdet.pth
    python scripts/convert_weights.py fasterrcnn_coco.pth --to ours --categories instances_val2017.json \
        --output detector.pt

Reads our checkpoints (their EMA weights where they have them) and stripped files, torchvision's and
MMDetection's files, and Detectron2's R50-FPN .pkl. "ours" writes a stripped file for scripts/predict.py and
load_detector: weights, the model's settings, class names and preprocessing. "mmdet" and "torchvision" write
what those projects load.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from checkout import program_parser
from detection.config.cli import model_setting
from detection.export.files import whole_file
from detection.models import MODELS, build_model, load_weights
from detection.models.weights.files import WeightsError
from detection.models.weights.layouts import LAYOUTS, box_heads, classifier_names, regressor_names, to_layout
from detection.models.weights.stored import StoredWeights, read_detector_file, read_weights, stripped_file


def main(argv: list[str] | None = None) -> int:
    parser = program_parser(__doc__)
    parser.add_argument("input", metavar="FILE", type=Path, help="the weights to convert")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="whose naming to write")
    parser.add_argument("--output", required=True, metavar="FILE", type=Path, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    group = parser.add_argument_group("for --to ours, where the input is not ours and does not tell")
    group.add_argument(
        "--model",
        metavar="NAME",
        choices=sorted(MODELS),
        help="as train.py takes it; default: the R50-FPN of the project the file is from",
    )
    text = "a field of the model, as train.py takes it, such as norm=gn or fpn_norm=gn; may be given again"
    group.add_argument("--model-set", metavar="KEY=VALUE", action="append", default=[], help=text)
    group.add_argument("--categories", metavar="FILE", type=Path, help="COCO annotations: names and ids of the classes")
    group.add_argument("--min-size", metavar="N", type=int, default=800, help="shorter side of the input (default 800)")
    group.add_argument(
        "--max-size", metavar="N", type=int, default=1333, help="limit of the longer side (default 1333)"
    )
    arguments = parser.parse_args(argv)

    try:
        if arguments.output.exists() and not arguments.overwrite:
            raise WeightsError(f"{arguments.output} exists; give another --output, or --overwrite")
        stored = read_weights(arguments.input)
        if stored.is_ours:
            stored = read_detector_file(arguments.input)  # which checks what else it holds
        if arguments.to == "ours":
            content = _stripped(stored, arguments)
            count = len(content["model"])
        else:
            state = _foreign(stored, arguments.to)
            count = len(state)
            content = {"meta": _meta(stored), "state_dict": state} if arguments.to == "mmdet" else state
        with whole_file(arguments.output) as partial:
            torch.save(content, partial)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in stored.notes:
        print(f"note: {note}")
    print(f"{arguments.output}: {count} tensors")
    return 0


def _foreign(stored: StoredWeights, layout: str) -> dict[str, torch.Tensor]:
    extra = [name for name in stored.state if name not in stored.origin]
    if extra:
        print(f"note: {len(extra)} tensors without a counterpart are left out, {extra[0]} among them")
    state = {name: tensor for name, tensor in stored.state.items() if name in stored.origin}
    for head in box_heads(state)[:1]:
        has_background = len(state[regressor_names(head)[0]]) == 4 * len(state[classifier_names(head)[0]])
        if has_background and layout == "mmdet":
            print("note: the background's box outputs, which nothing uses, are left out: MMDetection has none")
        if not has_background and layout == "torchvision":
            print("note: torchvision wants box outputs for the background, which nothing uses: zeros")
    if stored.norm_eps is not None and stored.norm_eps != 1e-5:
        print(f"note: these weights need batch norms with an epsilon of {stored.norm_eps:g}, which no file can say")
    # Rows that were cut or moved are views; a copy keeps what they were cut from out of the file.
    return {name: tensor.contiguous().clone() for name, tensor in to_layout(state, layout).items()}


def _stripped(stored: StoredWeights, arguments: argparse.Namespace) -> dict[str, Any]:
    payload = stored.payload
    if stored.is_ours:
        return stripped_file(
            stored.state,
            model_config=payload["model_config"],
            class_names=payload["class_names"],
            category_ids=payload["category_ids"],
            preprocessing=payload["preprocessing"],
        )
    heads = box_heads(stored.state)
    if not heads:
        raise WeightsError(f"{arguments.input} has no detection head; a detector cannot be made of it")
    num_classes = len(stored.state[classifier_names(heads[0])[0]]) - 1
    names, ids = _categories(stored, arguments.categories, num_classes)
    name = arguments.model or _default_model(stored, len(heads) > 1)
    overrides: dict[str, Any] = {"stride_in_1x1": True} if stored.stride_in_1x1 else {}
    overrides |= dict(map(model_setting, arguments.model_set))
    model = build_model(name, num_classes, **overrides)
    report = load_weights(model, arguments.input)
    if report.missing or report.reshaped:
        raise WeightsError(
            f"{arguments.input} is not the whole of a {name}; choose another --model, or say with --model-set what is "
            f"different, such as norm=gn\n{report.table()}"
        )
    return stripped_file(
        model.state_dict(),
        model_config=dataclasses.asdict(model.config),
        class_names=names,
        category_ids=ids,
        preprocessing={"min_size": arguments.min_size, "max_size": arguments.max_size},
    )


def _default_model(stored: StoredWeights, is_cascade: bool) -> str:
    """The R50-FPN of the project the file is from, with masks where it has them."""
    has_masks = any(name.startswith("mask_head.") for name in stored.origin)
    if stored.layout == "torchvision":
        return "maskrcnn_resnet50_fpn" if has_masks else "fasterrcnn_resnet50_fpn"
    if has_masks:
        return "cascade_mask_rcnn_r50_fpn" if is_cascade else "mask_rcnn_r50_fpn"
    return "cascade_rcnn_r50_fpn" if is_cascade else "faster_rcnn_r50_fpn"


def _meta(stored: StoredWeights) -> dict[str, Any]:
    names = _names_in(stored)
    return {} if names is None else {"CLASSES": tuple(names), "dataset_meta": {"classes": tuple(names)}}


def _names_in(stored: StoredWeights) -> list[str] | None:
    """Class names that the file itself holds."""
    if stored.is_ours:
        return list(stored.payload["class_names"])
    meta = stored.payload.get("meta")
    if not isinstance(meta, dict):
        return None
    dataset = meta.get("dataset_meta")
    names = (dataset.get("classes") or dataset.get("CLASSES")) if isinstance(dataset, dict) else meta.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None


def _categories(stored: StoredWeights, file: Path | None, num_classes: int) -> tuple[list[str], list[int]]:
    if file is not None:
        try:
            categories = json.loads(file.read_text())["categories"]
            pairs = sorted((int(category["id"]), str(category["name"])) for category in categories)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"no categories could be read from {file}: {error}") from error
        if len(pairs) != num_classes and stored.layout == "torchvision" and pairs[-1][0] == num_classes:
            # torchvision's labels are the category ids themselves, unused ones included.
            known = dict(pairs)
            pairs = [(number, known.get(number, f"unused {number}")) for number in range(1, num_classes + 1)]
        names, ids = [name for _, name in pairs], [number for number, _ in pairs]
    else:
        found = _names_in(stored)
        if found is None:
            raise WeightsError("the file does not name its classes; give --categories with COCO annotations")
        names, ids = found, list(range(1, len(found) + 1))
        print(f"note: the file does not tell category ids; they are 1 to {len(found)}. --categories gives them")
    if len(names) != num_classes:
        raise WeightsError(f"there are {len(names)} class names for a head of {num_classes} classes")
    return names, ids


if __name__ == "__main__":
    raise SystemExit(main())
