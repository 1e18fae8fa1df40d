"""Lists the faults of a data set, with file, id and remedy.

    python3 scripts/check_dataset.py --data-path my_set

Exit status: 0 when nothing was found that breaks or biases training, 1 when something was, 2 for a wrong command.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from checkout import exit_status
from data.coco.annotations import AnnotationError, CocoAnnotations, find_fatal, read_coco
from data.coco.checks import check_pair, check_split
from data.coco.findings import MAX_PLACES, SEVERITIES, Finding, by_severity
from data.coco.image_checks import DecodedImage, check_images, check_leaks, inspect_images
from data.coco.layout import standard_layout
from data.convert.conversion import counted
from data.errors import DataError
from data_path import add_data_path, chosen, described, found_set

SPLITS = ("train", "val")


@dataclass
class Split:
    """A split under test, and what was found of it."""

    name: str
    images: Path
    file: Path
    findings: list[Finding] = field(default_factory=list)
    annotations: CocoAnnotations | None = None
    facts: list[DecodedImage] | None = None


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: check(_parse(argv)), DataError, status=1)


def check(arguments: argparse.Namespace) -> int:
    """Prints every finding; the exit status."""
    splits = splits_of(arguments)
    for split in splits:
        _check(split, arguments)
    between: list[Finding] = []
    for train, val in itertools.combinations(splits, 2):
        if train.annotations is not None and val.annotations is not None:
            between += check_pair(train.annotations, val.annotations, train.images, val.images)
            if train.facts is not None and val.facts is not None:
                between += check_leaks(train.annotations, val.annotations, train.facts, val.facts)

    findings = {split.name: split.findings for split in splits} | {"between": between}
    for name, found in findings.items():
        for finding in by_severity(found):
            _print(name, finding, arguments.places)
    print(summary(splits, findings))
    if arguments.json is not None:
        content = {name: [finding.to_dict() for finding in found] for name, found in findings.items()}
        arguments.json.write_text(json.dumps(content, indent=1))
    return int(any(finding.severity == "error" for found in findings.values() for finding in found))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_path(parser)
    for split in SPLITS:
        parser.add_argument(f"--{split}-images", type=Path, metavar="DIR", help=f"images of the {split} split")
        parser.add_argument(f"--{split}-annotations", type=Path, metavar="FILE", help="its COCO annotation file")
    parser.add_argument("--fast", action="store_true", help="do not open the images (seconds, also for all of COCO)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one a core)")
    parser.add_argument("--places", type=int, default=10, metavar="N", help="places shown per finding (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"write the findings, up to {MAX_PLACES} places each")
    arguments = parser.parse_args(argv)
    files = {name: [getattr(arguments, f"{name}_{kind}") for kind in ("images", "annotations")] for name in SPLITS}
    if any((images is None) != (file is None) for images, file in files.values()):
        parser.error("images and annotations of a split go together: --train-images with --train-annotations")
    arguments.splits = [Split(name, images, file) for name, (images, file) in files.items() if file is not None]
    if "data_path" in arguments and arguments.splits:
        parser.error("give either --data-path or the files of the splits")
    return arguments


def splits_of(arguments: argparse.Namespace) -> list[Split]:
    """Those that options name, or those of the folder. Raises DataError where it cannot be read."""
    if arguments.splits:
        return arguments.splits
    layout = standard_layout(getattr(arguments, "data_path", Path("datasets/coco")))
    is_coco = layout.train_annotations.is_file()
    found = None if is_coco else found_set(arguments)
    if found is None:  # what of COCO's own layout is missing is a finding like others
        parts = ((name, getattr(layout, f"{name}_images"), getattr(layout, f"{name}_annotations")) for name in SPLITS)
        return [Split(*part) for part in parts]
    print(described(found))
    return [Split(name, files.images, files.annotations) for name, files in found.splits.items()]


def _check(split: Split, arguments: argparse.Namespace) -> None:
    try:
        read = read_coco(split.file, masks=True)
    except AnnotationError:
        split.findings = find_fatal(split.file)
        return
    split.annotations = chosen(read, arguments)
    split.findings = check_split(split.annotations, split.images, training=split.name == "train")
    if arguments.fast or not split.images.is_dir():
        return
    with tqdm(total=len(split.annotations), desc=f"{split.name} images", unit="img", disable=None) as bar:
        split.facts = inspect_images(split.annotations, split.images, workers=arguments.workers, progress=bar.update)
    split.findings += check_images(split.annotations, split.images, split.facts)


def _print(name: str, finding: Finding, num_places: int) -> None:
    stop = "" if finding.text.endswith("?") else "."
    print(f"{finding.severity.upper()} [{name}: {finding.code}] {finding.text}{stop}")
    for place in finding.places[:num_places]:
        print(f"    {place}")
    rest = finding.count - min(num_places, len(finding.places))
    if finding.places and rest > 0:
        print(f"    and {rest:,} more")


def summary(splits: Sequence[Split], findings: dict[str, list[Finding]]) -> str:
    """The table at the end: what each split holds, and how often each fault occurs."""
    lines = [""]
    for split in splits:
        if split.annotations is None:
            lines.append(f"{split.name:<8}{split.file}: unusable as it is; boxes and images were not checked")
            continue
        annotations = split.annotations
        classes = counted(len(annotations.class_names), "class", "classes")
        looked = "images decoded" if split.facts is not None else "images not opened"
        lines.append(
            f"{split.name:<8}{len(annotations):,} images, {annotations.num_boxes:,} annotations "
            f"({int(annotations.crowd.sum()):,} crowd), {classes}; {looked}"
        )
    found = {(finding.severity, finding.code) for group in findings.values() for finding in group}
    if not found:
        return "\n".join([*lines, "", "No faults found."])
    width = max(len(code) for _, code in found) + 2
    lines += ["", f"{'severity':<10}{'fault':<{width}}" + "".join(f"{name:>10}" for name in findings)]
    for severity, code in sorted(found, key=lambda key: (SEVERITIES.index(key[0]), key[1])):
        counts = [
            sum(f.count for f in group if (f.severity, f.code) == (severity, code)) for group in findings.values()
        ]
        lines.append(f"{severity:<10}{code:<{width}}" + "".join(f"{count or '-':>10}" for count in counts))
    num_errors = sum(severity == "error" for severity, _ in found)
    verdict = "Nothing stands in the way of training."
    if num_errors:
        kinds = "one kind" if num_errors == 1 else f"{num_errors} kinds"
        verdict = f"Errors of {kinds} would break or bias training."
    if any(split.annotations is None for split in splits):
        verdict += " Mend the annotation file and look again: it could not be checked further."
    return "\n".join([*lines, "", verdict])


if __name__ == "__main__":
    sys.exit(main())
