"""How a key of a configuration of MMDetection is described: `to` names the setting that it becomes, `only` the values
that are done here, `absent` what is not here, WITHOUT_EFFECT the keys that change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from schedules.checks import Check, Keys, read_dict, read_typed
from schedules.errors import Place, shown


def _all(keys: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), reason)


OWN = "this product has its own"
WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "": {
        **_all("default_scope env_cfg visualizer log_processor log_level launcher experiment_name vis_backends", OWN),
        **_all("model_wrapper_cfg find_unused_parameters", OWN),
        **_all("tta_model tta_pipeline", "scripts/predict.py has its own test-time augmentation"),
    },
    "hooks": _all("timer runtime_info param_scheduler sampler_seed visualization sync_buffers", OWN),
    "checkpoint hook": {
        "interval": "the end of every epoch is saved",
        **_all("save_best rule save_last", "the newest epochs and the best are always kept"),
    },
    "logger hook": _all("ignore_last out_suffix keep_local log_metric_by_epoch", OWN),
    "dataloader": _all("persistent_workers pin_memory prefetch_factor", OWN),
    "evaluation dataloader": {
        "batch_size": "the validation takes the training's batch size, images of like size together",
        "num_workers": "the validation takes the training's number of workers",
    },
    "dataset": _all("serialize_data lazy_init max_refetch", OWN),
    "evaluator": {"classwise": "the AP of each class is always written"},
    "VOC evaluator": _all("proposal_nums collect_device collect_dir", OWN),
    "loading": {
        "imdecode_backend": OWN,
        "poly2mask": "masks are bitmaps here, at the network's scale, as with True",
    },
    "packing": {"meta_keys": OWN},
    "data_preprocessor": {
        **_all("pad_mask mask_pad_value pad_seg seg_pad_value", OWN),
        **_all("non_blocking boxtype2tensor", OWN),
    },
    "backbone": {"with_cp": "it saves memory and changes no value"},
    "nms": {"split_thr": "it saves memory and changes no value"},
}
"""Keys that change nothing here, by section, and why. Printed once at the start of a run."""

NEAREST = "nearest: "


@dataclass(frozen=True)
class Found:
    """A setting that a key becomes: name ("model.KEY" for one of the model's), value, and where the key stands."""

    name: str
    value: Any
    place: Place | None = None


@dataclass(frozen=True)
class Idle:
    """A key without effect."""

    reason: str
    place: Place


def to(name: str, check: Check, default: Any = None) -> Any:
    """The key becomes the setting `name`. default: MMDetection's own, where it has one."""

    def read(value: Any, place: Place) -> Found:
        return Found(name, check(value, place), place)

    return read if default is None else (read, Found(name, default))


def only(*values: Any, hint: str = "", required: bool = False) -> Any:
    """The one value (or several) that is done here; MMDetection's default is the first, unless the key is required."""

    def read(value: Any, place: Place) -> None:
        if not any(same(value, each) for each in values):
            raise place.unfit(f"must be {' or '.join(map(repr, values))} here{hint and f' ({hint})'}", value)

    return read if required else (read, None)


def absent(what: str, near: str = "") -> Any:
    """A key of something that this product does not have. near: what comes nearest."""

    def read(value: Any, place: Place) -> None:
        if value is not None:
            hint = near and f" ({NEAREST}{near})"
            raise place.error(
                f"{what} not supported here{hint}; take this out, or start from a configuration without it"
            )

    return read, None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def idle(section: str) -> Keys:
    """The keys of a section that have no effect."""

    def check(reason: str) -> Check:
        return lambda value, place: Idle(reason, place)

    return {key: (check(reason), None) for key, reason in WITHOUT_EFFECT[section].items()}


def typed(kinds: Mapping[str, Keys], default: str | None = None, hint: str = "") -> Check:
    return lambda value, place: read_typed(value, place, kinds, default, hint and f" ({hint})")


def several(check: Check, length: int | None = None) -> Check:
    """A list of `length` values; None: any number above 0."""

    def read(value: Any, place: Place) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or (len(value) != length if length else not value):
            raise place.unfit(f"must be a list of {length or 'one or more'}", value)
        return tuple(check(each, place.at(i)) for i, each in enumerate(value))

    return read


def found_in(tree: Any) -> Iterator[Found | Idle]:
    if isinstance(tree, (Found, Idle)):
        yield tree
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from found_in(each)


def united(found: Iterable[Found | Idle]) -> dict[str, Found]:
    """The settings by name. Raises ScheduleError where two keys that are one setting here say different things."""
    result: dict[str, Found] = {}
    for each in found:
        if isinstance(each, Found):
            first = result.setdefault(each.name, each)
            if not same(first.value, each.value):
                # A default has no place: then the error stands at the other key.
                here, other = (each, first) if each.place else (first, each)
                where = f"{'.'.join(other.place.path)} is" if other.place else "MMDetection's default of the other is"
                message = f"is {shown(here.value)}, and {where} {shown(other.value)}; here the two are one setting"
                assert here.place is not None
                raise here.place.error(f"{message}, so give the same")
            if first.place is None:
                result[each.name] = each
    return result


def keyed(keys: Keys) -> Check:
    """A dict of these keys."""
    return lambda value, place: read_dict(value, place, keys)


def text(value: Any, place: Place) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise place.unfit("must be a name in quotes", value)
    return value


def local_file(value: Any, place: Place) -> str:
    if value == "":
        return value  # of a folder: the one that holds it
    if "://" in text(value, place):
        raise place.unfit("must be a file or folder of this machine", value)
    return value
