"""Hugging Face's Parquet files of a detection set, unpacked to an imagefolder: images, metadata.jsonl, classes.txt.

A row has "image" (struct of bytes and path) and "objects" as in metadata.jsonl; see data.convert.imagefolder. The names
of the classes are in the schema, where the `datasets` library writes them. Splits are named by the files
(train-00000-of-00002.parquet) or their folders (train/0000.parquet).
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data.convert.conversion import ConversionError, Progress
from data.convert.imagefolder import CATEGORY_KEYS, METADATA
from data.convert.splits import SPLIT_OF_FOLDER
from data.images.files import IMAGE_SUFFIXES, walk

ROWS_AT_ONCE = 64
"""An image may have megabytes."""
SUFFIX_OF_FORMAT = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def unpack_parquet(source: Path, target: Path, progress: Progress = lambda _: None) -> dict[str, int]:
    """Writes the images and objects of all Parquet files below `source` to a new folder; images of each split.

    The folder is written whole or not at all. An image has the name that its row gives, or a number.

    Raises ConversionError where pyarrow is missing, `target` has something in it, no file is there, or a row is no
    image with objects; OSError where the disk is full.
    """
    files = walk(source, {".parquet"})
    if not files:
        raise ConversionError(f"{source}: no Parquet files there")
    if target.exists() and any(target.iterdir()):
        raise ConversionError(f"{target}: is not empty. Give a new folder, or delete what is there")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)  # mkdtemp's folder is for its owner alone
        counts = _unpack(files, source, staging, progress)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return counts


def _unpack(files: Sequence[Path], source: Path, target: Path, progress: Progress) -> dict[str, int]:
    counts: Counter[str] = Counter()
    class_names: list[str] | None = None
    with ExitStack() as opened:
        records: dict[str, Any] = {}
        for file in files:
            split = _split(file, source)
            if split not in records:
                (target / split).mkdir()
                records[split] = opened.enter_context((target / split / METADATA).open("x", encoding="utf-8"))
            names, rows = _read(file)
            if class_names not in (None, names):
                raise ConversionError(f"{file}: names other classes than the files before it. Unpack them apart")
            class_names = names
            for number, row in enumerate(rows):
                name, objects = _unpack_row(row, target / split, counts[split], f"{file}, row {number}")
                records[split].write(json.dumps({"file_name": name, "objects": objects}) + "\n")
                counts[split] += 1
                progress(1)
    if class_names:
        (target / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    return dict(counts)


def _split(file: Path, source: Path) -> str:
    """Of the file's name up to the first sign, or of the first folder of such a name; "all" without one."""
    words = [file.stem.split("-")[0].split("_")[0], *file.relative_to(source).parts[:-1]]
    return next((SPLIT_OF_FOLDER[word.lower()] for word in words if word.lower() in SPLIT_OF_FOLDER), "all")


def _read(file: Path) -> tuple[list[str] | None, Iterator[Mapping[str, Any]]]:
    """The names of the classes, None where the schema has none, and the rows."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConversionError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        opened = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ConversionError(f"{file}: cannot be read: {error}. Download it again") from error
    if missing := {"image", "objects"} - set(opened.schema_arrow.names):
        held = ", ".join(opened.schema_arrow.names)
        raise ConversionError(
            f"{file}: has no column {' and no column '.join(sorted(missing))}, but {held}. Rename the columns with the "
            "images and their objects"
        )
    try:
        features = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names = _class_label(features.get("info", {}).get("features", {}).get("objects", {}))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConversionError(f"{file}: what it says of its columns cannot be read: {error!r}") from error
    return names, _rows(file, opened)


def _rows(file: Path, opened: Any) -> Iterator[Mapping[str, Any]]:
    try:
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=["image", "objects"]):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file}: cannot be read to its end: {error}. Download it again") from error


def _class_label(feature: Any) -> list[str] | None:
    """The names of the first class label of a feature and those in it; of a struct's parts, that of the category."""
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return [str(name) for name in feature["names"]]
    within = [feature[key] for key in ("feature", *CATEGORY_KEYS) if key in feature]
    return next((names for part in within if (names := _class_label(part)) is not None), None)


def _unpack_row(row: Mapping[str, Any], folder: Path, number: int, place: str) -> tuple[str, Any]:
    """Writes the image; its name, and its objects."""
    image, objects = row["image"], row["objects"]
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is None or not isinstance(objects, dict | list):
        raise ConversionError(f"{place}: is no image with its bytes and objects. Mend or leave out the row")
    name = PurePosixPath(str(image.get("path") or "").replace("\\", "/")).name
    is_name = Path(name).suffix.lower() in IMAGE_SUFFIXES and name[0] != "." and "\0" not in name and len(name) < 100
    if not is_name or (folder / name).exists():
        try:
            with Image.open(io.BytesIO(content)) as read:
                suffix = SUFFIX_OF_FORMAT[str(read.format)]
        except (OSError, KeyError) as error:
            raise ConversionError(f"{place}: is no image: {error}. Mend or leave out the row") from error
        name = f"{number:08d}{suffix}"
        while (folder / name).exists():  # another image is called by this number
            name = f"_{name}"
    with (folder / name).open("xb") as file:
        file.write(content)
    if isinstance(objects, dict):
        return name, _of_boxes(objects)
    if not all(isinstance(one, dict) for one in objects):
        raise ConversionError(f"{place}: its objects have no bbox. Mend or leave out the row")
    return name, [_of_boxes(one) for one in objects]


def _of_boxes(objects: Mapping[str, Any]) -> dict[str, Any]:
    return {key: objects[key] for key in ("bbox", *CATEGORY_KEYS) if key in objects}
