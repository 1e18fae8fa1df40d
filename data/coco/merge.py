"""Several annotation files as one: their classes joined by name, their images behind each other."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from shlex import quote
from typing import Any

import numpy as np

from data.coco.annotations import AnnotationError, CocoAnnotations
from data.coco.findings import examples
from data.coco.segmentations import Segmentations


def joint_classes(
    sets: Sequence[CocoAnnotations], class_map: Mapping[str, str] | None = None, meant: Sequence[str] = ()
) -> tuple[str, ...]:
    """The classes of all files, each name once, in the order in which they first come.

    class_map: other names that classes of any file get. meant: names that are different classes however alike.

    Raises AnnotationError where `class_map` joins classes of LVIS's, where names differ only in case, blanks or other
    signs and neither `class_map` nor `meant` says what is meant, and where no file has a class that is mapped.
    """
    class_map = class_map or {}
    before = dict.fromkeys(name for each in sets for name in each.class_names)
    for name in class_map:
        if name not in before:
            near = difflib.get_close_matches(name, before, n=1)
            raise AnnotationError(
                f"--class-map {name}={class_map[name]}: no set has a class {name!r}"
                + (f" (did you mean {near[0]!r}?)" if near else f"; there are {examples(map(repr, before))}")
            )
    names = tuple(dict.fromkeys(class_map.get(name, name) for name in before))
    for file in sets:
        mapped = {class_map.get(name, name) for name in file.class_names}
        if file.federated is not None and len(mapped) < len(file.class_names):
            raise AnnotationError(
                f"{file.source}: says of each image which classes it was searched for (LVIS), so they cannot be "
                "joined: leave --class-map away"
            )
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(filter(str.isalnum, name.casefold())) or name, []).append(name)
    for group in alike.values():
        if len(group) > 1 and not set(group) <= {*class_map.values(), *meant}:
            places = [f"{name!r} ({_first_with(name, sets, class_map)})" for name in group]
            others = " ".join(quote(f"{name}={group[0]}") for name in group[1:])
            each = " ".join(quote(f"{name}={name}") for name in group)
            raise AnnotationError(
                f"the data sets spell what may be one class in {len(group)} ways: {', '.join(places)}. Say which it "
                f"is: --class-map {others} makes them one class, --class-map {each} keeps them apart"
            )
    return names


def require_one_kind(sets: Sequence[CocoAnnotations]) -> None:
    """Raises AnnotationError for one of several files that is LVIS's."""
    if len(sets) > 1 and (federated := [each.source for each in sets if each.federated is not None]):
        raise AnnotationError(
            f"{federated[0]}: its images were searched for some classes each (LVIS), by which several sets cannot be "
            "judged together: give it alone"
        )


def _first_with(name: str, sets: Sequence[CocoAnnotations], class_map: Mapping[str, str]) -> str:
    return next(each.source for each in sets if name in {class_map.get(own, own) for own in each.class_names})


def into_classes(
    annotations: CocoAnnotations, names: Sequence[str], class_map: Mapping[str, str] | None = None
) -> CocoAnnotations:
    """The same with the labels of a joint class list. Annotations of other classes are left out, every image stays.

    A class keeps the file's category id (the first one's where several become one); one that the file does not know
    gets another.
    """
    mapped = [(class_map or {}).get(name, name) for name in annotations.class_names]
    place = {name: label for label, name in enumerate(names)}
    new_label = np.array([place.get(name, -1) for name in mapped], dtype=np.int64)
    own = dict(zip(reversed(mapped), reversed(annotations.category_ids), strict=True))
    unused = iter(range(max(annotations.category_ids) + 1, max(annotations.category_ids) + 1 + len(names)))
    kept = annotations.of_labels(new_label)
    return replace(
        kept,
        class_names=tuple(names),
        category_ids=tuple(own[name] if name in own else next(unused) for name in names),
        unknown_classes=tuple(name for name in names if name not in own),
    )


def concatenate(sets: Sequence[CocoAnnotations]) -> CocoAnnotations:
    """The images of all files, which have one class list, behind each other, and their annotations.

    Image and annotation ids after those of the first file begin where those before end. Category ids are the first's.
    """
    first = sets[0]
    assert all(each.class_names == first.class_names for each in sets), "one class list"
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(each, name) for each in sets])
        for name in ("widths", "heights", "file_name_bytes", "boxes_xywh", "areas", "labels", "crowd", "ignore")
    }
    outlines = [each.segmentations for each in sets if each.segmentations is not None]
    return replace(
        first,
        source=", ".join(each.source for each in sets),
        **joined,
        image_ids=_renumbered([each.image_ids for each in sets]),
        annotation_ids=_renumbered([each.annotation_ids for each in sets]),
        file_name_offsets=_joined_offsets([each.file_name_offsets for each in sets]),
        offsets=_joined_offsets([each.offsets for each in sets]),
        segmentations=Segmentations.concatenate(outlines) if len(outlines) == len(sets) else None,
        findings=tuple(finding for each in sets for finding in each.findings),
        unknown_classes=(),
    )


def _renumbered(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of several files, those of each but the first shifted beyond those before it."""
    shifted, end = [], None
    for part in parts:
        moved = part if end is None or not len(part) else part - part.min() + end
        shifted.append(moved)
        end = max([end or 0, *([int(moved.max()) + 1] if len(moved) else [])])
    return np.concatenate(shifted)


def _joined_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    ends = np.cumsum([0, *(part[-1] for part in parts)])
    return np.concatenate([parts[0][:1], *(part[1:] + start for part, start in zip(parts, ends[:-1], strict=True))])
