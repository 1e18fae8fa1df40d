"""Hugging Face's Parquet files, unpacked."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import read_coco
from data.convert.conversion import ConversionError
from data.convert.parquet import unpack_parquet
from data.layouts.found_set import find_set
from data.layouts.recognition import LayoutError
from tests.data.layouts.exports import BOXES, NAMES, image

BOX_LISTS = {
    "bbox": pa.list_(pa.list_(pa.float32(), 4)),
    "category": pa.list_(pa.int64()),
    "iscrowd": pa.list_(pa.int8()),
}
ONE_BOX = {"bbox": pa.list_(pa.float32(), 4), "category": pa.int64()}
OBJECTS = {
    "struct of lists": pa.struct(BOX_LISTS),
    "list of structs": pa.list_(pa.struct(ONE_BOX)),
}


def features(objects, names=NAMES):
    """What the datasets library notes in the schema."""
    label = {"names": list(names), "_type": "ClassLabel"}
    box = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "List"}
    if objects == "struct of lists":
        columns = {"bbox": {"feature": box, "_type": "List"}, "category": {"feature": label, "_type": "List"}}
    else:
        columns = {"feature": {"bbox": box, "category": label}, "_type": "List"}
    return {b"huggingface": json.dumps({"info": {"features": {"objects": columns}}}).encode()}


def write_file(path, contents, objects="struct of lists", names=NAMES, image_names=None):
    """A file of images that each hold a coin and a key."""
    pairs = [{"bbox": list(box), "category": number} for number, box in enumerate(BOXES)]
    one = pairs if objects == "list of structs" else {key: [pair[key] for pair in pairs] for key in ONE_BOX}
    rows = [
        {"image": {"bytes": content, "path": image_names and image_names[number]}, "objects": one, "width": 32}
        for number, content in enumerate(contents)
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": kind, "objects": OBJECTS[objects], "width": pa.int32()}, features(objects, names))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


@pytest.fixture
def pictures(tmp_path):
    return [image(tmp_path / "source" / f"{number}.png", number).read_bytes() for number in range(7)]


@pytest.mark.parametrize("objects", OBJECTS)
def test_parquet_files_become_a_folder_that_is_trained_on(objects, pictures, tmp_path):
    # Names may be missing, come twice, or lead out of the folder.
    names = ["00000002.png", "00000002.png", "a\0.png", "../../b.png"]
    write_file(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", pictures[:4], objects, image_names=names)
    write_file(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", pictures[4:5], objects)
    write_file(tmp_path / "set" / "default" / "validation" / "0000.parquet", pictures[5:], objects)
    assert unpack_parquet(tmp_path / "set", tmp_path / "new" / "folder") == {"train": 5, "val": 2}
    folder = tmp_path / "new" / "folder"
    written = ["00000002.png", "00000001.png", "_00000002.png", "b.png", "00000004.png"]
    assert [(folder / "train" / name).read_bytes() for name in written] == pictures[:5]
    found = find_set(folder, tmp_path / "cache")
    train, val = (read_coco(found.splits[name].annotations) for name in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (5, 2, NAMES)
    assert train.boxes_xywh[train.rows(0)].tolist() == [list(box) for box in BOXES]
    with pytest.raises(ConversionError, match="is not empty"):
        unpack_parquet(tmp_path / "set", folder)


def test_a_folder_of_parquet_files_is_told_how_to_be_read(pictures, tmp_path):
    write_file(tmp_path / "set" / "train.parquet", pictures)
    with pytest.raises(LayoutError, match=f"pack_dataset.py unpack {tmp_path / 'set'} FOLDER"):
        find_set(tmp_path / "set", tmp_path / "cache")


def _damaged(path):
    path.write_bytes(path.read_bytes()[:-9])


def _cut_inside(path):
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes(200) + content[240:])  # a page; the end, with the schema, is whole


def _without_objects(path):
    pq.write_table(pa.table({"image": [1], "text": ["x"]}), path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: path.unlink(), "set: no Parquet files there"),
        (_damaged, "train.parquet: cannot be read"),
        (_cut_inside, "train.parquet: cannot be read to its end"),
        (_without_objects, "train.parquet: has no column objects, but image, text"),
        (lambda path: write_file(path, [None]), "train.parquet, row 0: is no image with its bytes"),
        (lambda path: write_file(path, [b"no image"]), "train.parquet, row 0: is no image"),
        (lambda path: write_file(path.with_name("val.parquet"), [], names="xyz"), "val.parquet: names other classes"),
    ],
)
def test_what_cannot_be_unpacked_is_named_and_leaves_nothing(change, said, pictures, tmp_path):
    write_file(tmp_path / "set" / "train.parquet", pictures)
    change(tmp_path / "set" / "train.parquet")
    with pytest.raises(ConversionError, match=said):
        unpack_parquet(tmp_path / "set", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]
