"""The keys of a configuration of MMDetection that say which data are loaded and evaluated, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.config.mmdet.keys import (
    NEAREST,
    OWN,
    Found,
    Idle,
    found_in,
    idle,
    keyed,
    local_file,
    only,
    several,
    text,
    to,
    typed,
)
from schedules.checks import Check, Keys, choice, dictionary, flag, number, optional, read_dict, read_typed, whole
from schedules.errors import Place

_BACKEND = {key: only(None, {"backend": "local"}) for key in ("backend_args", "file_client_args")}
_TRANSFORM_IO: dict[str, Keys] = {
    "LoadImageFromFile": {
        "to_float32": only(False),
        "color_type": only("color"),
        "ignore_empty": only(False),
        "imdecode_backend": idle("loading")["imdecode_backend"],
        **_BACKEND,
    },
    "LoadAnnotations": {
        "with_bbox": only(True),
        "with_label": only(True),
        # Masks are loaded where the model learns them.
        "with_mask": (flag, False),
        **{key: only(False) for key in ("with_seg", "with_keypoints")},
        "box_type": only("hbox"),
        **idle("loading"),
        **_BACKEND,
    },
    "PackDetInputs": idle("packing"),
}


def _scale(value: Any, place: Place) -> tuple[int, int]:
    """Two sides in pixels, the longer first."""
    sides = several(whole(33, 16384), 2)(value, place)
    return max(sides), min(sides)


_RESIZE: Keys = {
    "keep_ratio": only(True, required=True, hint="images keep their ratio"),
    "scale_factor": only(None),
    "clip_object_border": only(True),
    "backend": only("cv2"),
    "interpolation": only("bilinear"),
}
_MULTI_SCALE: Keys = {**_RESIZE, "resize_type": only("Resize")}
_FIXED: dict[str, Keys] = {"Resize": {**_RESIZE, "scale": _scale}}
_RESIZES: dict[str, Keys] = {
    **_FIXED,
    "RandomChoiceResize": {**_MULTI_SCALE, "scales": several(_scale)},
    "RandomResize": {
        **_MULTI_SCALE,
        "scale": lambda value, place: _scale(value, place) if _is_scale(value) else several(_scale, 2)(value, place),
        "ratio_range": (optional(several(number(at_least=0.01, at_most=100), 2)), None),
    },
}
_CROP: dict[str, Keys] = {
    "RandomCrop": {
        "crop_size": several(whole(33, 16384), 2),
        "crop_type": (choice("absolute", "absolute_range", hint=" here"), "absolute"),
        "allow_negative_crop": only(True, required=True, hint="an image stays, whatever the crop leaves of its boxes"),
        "recompute_bbox": (flag, False),
        "bbox_clip_border": only(True),
    },
    "FilterAnnotations": {
        # MIN_CROPPED_BOX_SIDE of data.transforms.geometry, which imports torch.
        "min_gt_bbox_wh": only((1e-2, 1e-2), required=True),
        "by_box": only(True),
        "by_mask": only(False),
        "min_gt_mask_area": only(1),
        "keep_empty": (flag, True),
    },
}
_FLIP: dict[str, Keys] = {
    "RandomFlip": {
        "prob": number(at_least=0, at_most=1),
        "direction": (choice("horizontal", "vertical", hint=" here"), "horizontal"),
    }
}


def _pipeline(training: bool) -> Check:
    kinds = {**_TRANSFORM_IO, **(_RESIZES | _CROP | _FLIP if training else _FIXED)}
    order = ("LoadImageFromFile", "LoadAnnotations", "Resize", *(["RandomFlip"] if training else []), "PackDetInputs")
    near = "--lsj, --photometric-distortion or --color-jitter beside --config do more" if training else ""
    hint = f" (transforms here: {', '.join(kinds)}{near and '; ' + near})"

    def read(value: Any, place: Place) -> list[Any]:
        steps = several(lambda each, at: (at, read_typed(each, at, kinds, hint=hint)))(value, place)
        found: list[Any] = [step for _, step in steps]
        if training and "RandomCrop" in (step["type"] for step in found):
            found += _large_scale_jitter(steps)
            steps = [each for each in steps if each[1]["type"] not in _CROP]
        names = ["Resize" if step["type"] in _RESIZES else step["type"] for _, step in steps]
        known = names if training else sorted(names, key=order.index)  # theirs loads the boxes after the resize
        if tuple(each for each in known if each != "RandomFlip") != tuple(e for e in order if e != "RandomFlip"):
            raise place.error(f"is {' '.join(names)}; here it is {' '.join(order)}, each once and in this order")
        flips = [step for step in found if isinstance(step, dict) and step["type"] == "RandomFlip"]
        if names[3 : 3 + len(flips)] != ["RandomFlip"] * len(flips):
            raise place.error(f"has RandomFlip in another place than here: {' '.join(order)}")
        if len({step["direction"] for step in flips}) < len(flips):
            raise place.error("has two RandomFlip of one direction; make them one")
        at, resize = next(step for step in steps if step[1]["type"] in _RESIZES)
        if not training:
            longer, shorter = resize["scale"]
            found += [Found("max_size", longer, at.at("scale")), Found("min_size", shorter, at.at("scale"))]
            return found
        scales = resize["scales"] if "scales" in resize else resize["scale"]
        if resize.get("ratio_range") is None:
            if resize["type"] == "RandomResize" and _is_scale(scales):
                raise at.at("scale").unfit("must be two scales where there is no ratio_range", scales)
            scales = (scales,) if resize["type"] == "Resize" else scales
            sampling = "range" if resize["type"] == "RandomResize" else "choice"
            found += [Found("train_scales", scales, at), Found("train_scale_sampling", sampling, at)]
        elif not any(isinstance(each, Found) and each.name == "lsj" for each in found):
            raise at.at("ratio_range").error("is done with a RandomCrop behind it alone, as large-scale jitter")
        chances = {"horizontal": 0.0, "vertical": 0.0} | {step["direction"]: step["prob"] for step in flips}
        found += [
            Found("flip_probability", chances["horizontal"], place),
            Found("vertical_flip_probability", chances["vertical"], place),
        ]
        return found

    return read


def _is_scale(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(each) is int for each in value)


_STAYS = "an image stays whatever the crop leaves of its boxes, as with False, and no other comes in its place"


def _large_scale_jitter(steps: Sequence[tuple[Place, dict[str, Any]]]) -> list[Found | Idle]:
    """The settings of RandomResize with a range of ratios, RandomCrop and FilterAnnotations behind each other."""
    names = [step["type"] for _, step in steps]
    first = names.index("RandomCrop") - 1
    at, crop = steps[first + 1]
    resize = steps[first][1]
    if names[first : first + 3] != ["RandomResize", "RandomCrop", "FilterAnnotations"] or not resize["ratio_range"]:
        message = "is done as large-scale jitter alone, between RandomResize with ratio_range and FilterAnnotations"
        raise at.error(message)
    size = crop["crop_size"][0]
    if crop["crop_size"] != (size, size) or resize["scale"] != (size, size):
        raise at.at("crop_size").error("and the scale of the RandomResize before it must be one square here")
    if (low_high := resize["ratio_range"]) != tuple(sorted(low_high)):
        raise steps[first][0].at("ratio_range").unfit("must be a smaller and a larger number", low_high)
    at_filter, rule = steps[first + 2]
    has_masks = any(step["type"] == "LoadAnnotations" and step["with_mask"] for _, step in steps)
    return [
        Found("lsj", size, at.at("crop_size")),
        Found("lsj_range", low_high, steps[first][0].at("ratio_range")),
        # Without masks it has no effect there either.
        Found("lsj_boxes_of_masks", crop["recompute_bbox"] and has_masks, at.at("recompute_bbox")),
        *([Idle(_STAYS, at_filter.at("keep_empty"))] if rule["keep_empty"] else []),
    ]


def _annotation_file(value: Any, place: Place) -> str:
    return local_file(text(value, place), place)


def _classes(value: Any, place: Place) -> tuple[str, ...]:
    if isinstance(value, str):
        raise place.unfit("must be a list of names, e.g. ('cat', 'dog')", value)
    return several(text)(value, place)


def _coco_dataset(split: str) -> dict[str, Keys]:
    training = split == "train"
    rules = {"filter_empty_gt": only(True, required=True), "min_size": only(32, required=True)}
    keys: Keys = {
        "data_root": (optional(local_file), None),
        "ann_file": _annotation_file,
        "data_prefix": keyed({"img": local_file, "sub_data_root": (lambda value, place: None, None)}),
        "metainfo": (optional(keyed({"classes": _classes, "palette": (lambda value, place: None, None)})), None),
        "pipeline": _pipeline(training),
        "filter_cfg": keyed(rules) if training else (optional(keyed(rules)), None),
        "test_mode": only(False) if training else only(True, required=True),
        "indices": only(None, hint=f"{NEAREST}--limit-train-batches"),
        "return_classes": only(False),
        **_BACKEND,
        **idle("dataset"),
    }
    voc: Keys = {
        **keys,
        "data_prefix": keyed({"sub_data_root": local_file}),
        "ann_subdir": only("Annotations"),
        "img_subdir": only("JPEGImages"),
        "filter_cfg": keyed(rules | {"bbox_min_size": (_min_box_side, None)}) if training else keys["filter_cfg"],
    }
    of_file = {**keys, "metainfo": only(None, hint="the classes are those of the file")}
    return {"CocoDataset": keys, "VOCDataset": voc, **dict.fromkeys(CLASSES_OF_FILE, of_file)}


def _min_box_side(value: Any, place: Place) -> Found | None:
    """VOCDataset's boxes end at their last pixel: those here are a pixel wider."""
    return None if value is None else Found("min_box_side", whole(1, 16383)(value, place) + 1.0, place)


_WRAPPERS: dict[str, Keys] = {
    "RepeatDataset": {"times": to("repeat_times", whole(1, 1000))},
    "ClassBalancedDataset": {"oversample_thr": to("repeat_threshold", number(at_least=1e-9, at_most=1))},
}
_CONCAT: Keys = {
    # Sets here have nothing else by which they could contradict each other.
    "ignore_keys": (lambda value, place: Idle(OWN, place), None),
    "lazy_init": idle("dataset")["lazy_init"],
}


def _joined(sets: Sequence[Sequence[Found | Idle]]) -> list[Found | Idle]:
    """The settings of several data sets, whose files stand behind each other."""
    every = [each for found in sets for each in found]
    files: dict[str, Found] = {}
    for each in every:
        if isinstance(each, Found) and each.name.endswith(("_images", "_annotations")):
            before = files.get(each.name)
            files[each.name] = each if before is None else Found(each.name, before.value + each.value, before.place)
    return [*files.values(), *(each for each in every if not (isinstance(each, Found) and each.name in files))]


def _dataset(split: str) -> Check:
    kinds = _coco_dataset(split)
    hint = " (others are not supported; scripts/convert_voc.py and convert_yolo.py write COCO files)"

    def read(value: Any, place: Place) -> list[Found | Idle]:
        kind = dictionary(value, place).get("type")
        if split == "train" and isinstance(kind, str) and kind in _WRAPPERS:
            keys = {**_WRAPPERS[kind], "dataset": read, "lazy_init": idle("dataset")["lazy_init"]}
            found = list(found_in(read_typed(value, place, {kind: keys})))
            name = "repeat_threshold" if kind == "ClassBalancedDataset" else "repeat_times"
            if [each.name for each in found if isinstance(each, Found)].count(name) > 1:
                raise place.at("type").error(f"{kind} is round another one; make them one")
            return [*found, *([Found("repeat_rounds_up", True, place)] if kind == "ClassBalancedDataset" else [])]
        if kind == "ConcatDataset":
            return _joined(read_typed(value, place, {kind: {**_CONCAT, "datasets": several(one)}})["datasets"])
        return one(value, place)

    def one(value: Any, place: Place) -> list[Found | Idle]:
        found = read_typed(value, place, kinds, hint=hint)
        root, prefix = found["data_root"] or "", found["data_prefix"]
        is_voc = found["type"] == "VOCDataset"
        if is_voc != found["ann_file"].endswith(".txt"):
            kind = "a list of images, .txt" if is_voc else "a COCO file"
            raise place.at("ann_file").error(f"must be {kind}")
        folder = prefix["sub_data_root"] if is_voc else prefix["img"]
        images, annotations = (Path(root) / name for name in (folder, found["ann_file"]))
        meta = found["metainfo"]
        at_classes = place.at("metainfo").at("classes") if meta else place.at("type")
        classes = meta["classes"] if meta else _CLASSES.get(found["type"])
        return [
            *found_in(found),
            Found(f"{split}_images", (images,), place.at("data_prefix")),
            Found(f"{split}_annotations", (annotations,), place.at("ann_file")),
            Found("classes" if classes else "data set", classes or found["type"], at_classes),
        ]

    return read


def _class_aware(value: Any, place: Place) -> tuple[str, ...]:
    if value != 1:
        raise place.unfit("must be 1 here", value)
    return ()


_ASPECT_RATIO: Keys = {"type": only("AspectRatioBatchSampler", required=True), "drop_last": only(False)}


def loader(split: str) -> Check:
    training = split == "train"
    own: Keys
    if training:
        own = {
            "batch_size": to("batch_size", whole(1, 4096)),
            "num_workers": to("workers", whole(0, 256)),
            "batch_sampler": (optional(keyed(_ASPECT_RATIO)), None),
        }
    else:
        own = {**idle("evaluation dataloader"), "batch_sampler": only(None)}
    shuffle = {"shuffle": only(training, required=True), "round_up": only(True, False), "seed": only(None)}
    samplers: dict[str, Keys] = {"DefaultSampler": shuffle}
    if training:
        # Passes over the set follow each other, as in every iteration-based run here.
        samplers["InfiniteSampler"] = {"shuffle": only(True), "seed": only(None)}
        share = (to("class_shares", lambda value, place: _class_aware(value, place)), Found("class_shares", ()))
        samplers["ClassAwareSampler"] = {"num_sample_class": share, "seed": only(None)}
    keys: Keys = {
        **own,
        "sampler": typed(samplers, hint="the other samplers are not supported"),
        "dataset": _dataset(split),
        "drop_last": only(False),
        "collate_fn": only(None, {"type": "pseudo_collate"}),
        **idle("dataloader"),
    }
    return lambda value, place: read_dict(value, place, keys)


def evaluator(split: str) -> Check:
    keys: Keys = {
        "ann_file": (
            lambda value, place: value and Found(f"{split}_annotations", (Path(local_file(value, place)),), place),
            None,
        ),
        "metric": only("bbox", ["bbox"], ["bbox", "segm"], hint="masks are evaluated where the model has them"),
        "format_only": only(False),
        "outfile_prefix": only(None),
        "sort_categories": (flag, False),  # here they always are
        "proposal_nums": only([100, 300, 1000]),
        **{key: only(None) for key in ("iou_thrs", "metric_items", "prefix")},
        **_BACKEND,
        **idle("evaluator"),
    }
    voc: Keys = {
        "metric": only("mAP", ["mAP"]),
        "eval_mode": to("voc_metric", choice("11points", "area"), "11points"),
        "iou_thrs": only(0.5, [0.5]),
        **{key: only(None) for key in ("scale_ranges", "prefix")},
        **idle("VOC evaluator"),
    }
    # A file of LVIS is judged by LVIS's rules.
    kinds = {"CocoMetric": keys, "LVISMetric": keys, "VOCMetric": voc}
    kind: Check = typed(kinds, hint="the other metrics are not supported")
    return lambda value, place: several(kind, 1)(value, place) if isinstance(value, list) else kind(value, place)


_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_CLASSES = tuple(_NAMES.split(","))
"""What MMDetection's CocoDataset takes without metainfo."""
_VOC_NAMES = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,sheep,"
    "sofa,train,tvmonitor"
)
VOC_CLASSES = tuple(_VOC_NAMES.split(","))
"""What VOCDataset takes."""
_CLASSES = {"CocoDataset": COCO_CLASSES, "VOCDataset": VOC_CLASSES}
CLASSES_OF_FILE = {
    "LVISDataset": 1230,
    "LVISV05Dataset": 1230,
    "LVISV1Dataset": 1203,
    "Objects365V1Dataset": 365,
    "Objects365V2Dataset": 365,
}
"""Data sets whose classes are those of the file, by ascending id, and how many there are."""
